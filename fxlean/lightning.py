"""A callback that prunes while Lightning trains; needs the extra `lightning`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from .errors import ArgumentError, PruneWarning, some, warn
from .masking import is_masked, remove_masks
from .pruning.options import check, check_names
from .pruning.prune_model import prune
from .pruning.result import PruneResult
from .pruning.schedules import schedule
from .selection.methods import METHODS, SHARE
from .tracing.arguments import check_count

WHAT = ("ignore", "prune_outputs", "include_linear", "granularity")  # decide what has masks


class PruningCallback(Callback):
    """Prunes a `LightningModule` step by step, at the end of epochs.

    All masks are put on before training starts, with nothing pruned, so that names in checkpoints
    and the state of optimizers are the same throughout, and `ckpt_path` resumes at the right step.

    Arguments that Lightning's `ModelPruning` has too mean the same, but that checkpoints always
    hold the masks, for training to go on; `fxlean.load` reads their "state_dict". What it calls
    `amount` is how much goes; `ratio` is how much is kept.

    Args:
        ratio: fraction of the prunable kernels that is kept in the end.
        steps: number of steps; step t keeps `ratio ** (t / steps)`.
        apply_pruning: whether to prune after an epoch: a bool, or a function of its number.
        make_pruning_permanent: whether to take the masks off the part that was pruned when
            training ends, with zeros in their places.
        prune_on_train_epoch_end: whether to prune after the training part of an epoch, or after
            its validation, which then has to take place.
        verbose: 0 for silence, 1 for a line after each step, 2 for the table.
        module: path of the part of the module to prune, such as "model"; by default all of it.
        example_inputs: as for `prune`; by default the module's `example_input_array`.
        calibration_batches: how many batches of the training loader `method="relevance"` sees, or
            another method with `norm="share"`; for these only.
        **options: any other keyword argument of `prune`.

    Attributes:
        results: the result of each step of this run.

    Raises:
        ArgumentError: at the call for bad arguments; when training starts for names of layers that
            the module does not have, and where strategies such as "ddp_spawn" train in processes
            whose masks do not come back, unless `make_pruning_permanent`.

    Warns:
        PruneWarning: training has ended before all steps were done.
    """

    def __init__(
        self,
        ratio: float,
        steps: int,
        *,
        apply_pruning: bool | Callable[[int], bool] = True,
        make_pruning_permanent: bool = False,
        prune_on_train_epoch_end: bool = True,
        verbose: int = 0,
        module: str = "",
        example_inputs: Any = None,
        calibration_batches: int = 0,
        **options: Any,
    ) -> None:
        check_names(options, prune)
        if verbose not in (0, 1, 2):
            raise ArgumentError(f"verbose is {verbose!r}. Pass 0, 1 or 2.")
        flags = {
            "apply_pruning": True if callable(apply_pruning) else apply_pruning,
            "make_pruning_permanent": make_pruning_permanent,
            "prune_on_train_epoch_end": prune_on_train_epoch_end,
        }
        check(nn.Identity(), ratio, **_without_layers(options), **flags)
        check_count("calibration_batches", calibration_batches, 0)
        method = options.get("method", "lean")
        order = METHODS[method].norm or options.get("norm")
        if calibration_batches and order != SHARE:
            raise ArgumentError(
                f"calibration_batches is {calibration_batches}, and method is {method!r}, which "
                "looks at no data. Pass method='relevance', or leave it out."
            )
        self.results: list[PruneResult] = []
        self._ratios, self._done = schedule(ratio, steps), 0
        self._apply, self._permanent = apply_pruning, make_pruning_permanent
        self._after_training, self._verbose = prune_on_train_epoch_end, verbose
        self._module, self._inputs = module, example_inputs
        self._batches, self._options = calibration_batches, options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the masks on, before optimizers are made and checkpoints are loaded."""
        if stage == "fit":
            self._check_strategy(trainer)
            check(self._part(pl_module), **self._options)
            if not is_masked(self._part(pl_module)):  # a checkpoint is loaded later
                self.results, self._done = [], 0
            options = {key: self._options[key] for key in WHAT if key in self._options}
            self._prune(pl_module, 1.0, method="l1", redundancy=False, **options)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the next step, if it is time."""
        if self._after_training:
            self._step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the next step, if it is time."""
        if not self._after_training and not trainer.sanity_checking:
            self._step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the masks off, if they are to be made permanent; warn if steps are missing."""
        if self._permanent:
            remove_masks(self._part(pl_module))
        if self._done < len(self._ratios) and trainer.is_global_zero:
            kept = self._ratios[self._done - 1] if self._done else 1.0
            where = "training" if self._after_training else "validation"
            warn(
                f"training has ended after {self._done} of {len(self._ratios)} pruning steps, with "
                f"{kept:.3g} to keep instead of {self._ratios[-1]:.3g}. One step takes place after "
                f"the {where} of each epoch that apply_pruning lets pass: train for more epochs, "
                "pass fewer steps"
                + ("." if self._after_training else ", or give Trainer.fit a validation loader."),
                PruneWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        """How many steps are done."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after so many steps."""
        self._done = state_dict["done"]

    def _step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        apply, epoch = self._apply, trainer.current_epoch
        if self._done == len(self._ratios) or not (apply(epoch) if callable(apply) else apply):
            return
        options = dict(self._options)
        if self._batches:
            loader: Any = trainer.train_dataloader
            options["calibration"] = list(itertools.islice(loader, self._batches))
        result = self._prune(pl_module, self._ratios[self._done], **options)
        self._done += 1
        self.results.append(result)
        if self._verbose:
            rank_zero_info(str(result) if self._verbose == 2 else repr(result))

    def _prune(self, pl_module: LightningModule, ratio: float, **options: Any) -> PruneResult:
        inputs = self._inputs
        if inputs is None:
            inputs = pl_module.example_input_array
        return prune(self._part(pl_module), ratio, inputs, **options)

    def _check_strategy(self, trainer: Trainer) -> None:
        """Reject processes of which only the state of the module comes back, without a word."""
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not self._permanent:
            raise ArgumentError(
                f"{type(trainer.strategy).__name__} trains in processes whose masks do not come "
                "back to the module here, nor would its weights. Pass strategy='ddp' to Trainer, "
                "or make_pruning_permanent=True."
            )

    def _part(self, pl_module: LightningModule) -> nn.Module:
        """The module to prune."""
        parts: dict[str, nn.Module] = dict(pl_module.named_modules())
        if self._module not in parts:
            close = get_close_matches(str(self._module), parts, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            names = some([name for name, _ in pl_module.named_children()])
            raise ArgumentError(
                f"module is {self._module!r}, and {type(pl_module).__name__} has no such module."
                f"{meant} Pass the path of one: {names}, or one inside of them."
            )
        return parts[self._module]


def _without_layers(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that can be checked before the module is known."""
    return {
        name: value
        for name, value in options.items()
        if name != "ignore" and not (name == "at_least" and isinstance(value, Mapping))
    }
