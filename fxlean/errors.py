"""The errors that fxlean raises; all descend from `FxleanError`."""


class FxleanError(Exception):
    """Something that fxlean cannot do; the message says what, where and what to do next."""


class ArgumentError(FxleanError, ValueError):
    """An argument that makes no sense; raised before anything is touched."""


class TraceError(FxleanError, RuntimeError):
    """The model could not be run on the example inputs, so there is no graph to prune."""


class CompactionError(FxleanError, RuntimeError):
    """The compacted model does not compute what the pruned one does; nothing was changed."""
