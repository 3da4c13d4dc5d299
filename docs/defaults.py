"""An extension of griffe for the reference: a default that has a name is shown as its value."""

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Puts the value of a constant in place of its name, where a function has it as a default."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Replace the defaults of all functions, as soon as the names in all modules are known."""
        for module in modules(pkg):
            for function in module.functions.values():
                if not function.is_alias:
                    for parameter in function.parameters:
                        parameter.default = value_of(parameter.default, module)


def modules(module: griffe.Module) -> list[griffe.Module]:
    """A module and all modules inside of it."""
    return [module, *(found for inner in module.modules.values() for found in modules(inner))]


def value_of(default: Any, module: griffe.Module) -> Any:
    """What a constant of a module stands for; anything else as it is."""
    if isinstance(default, griffe.ExprName) and default.name in module.members:
        return module[default.name].value
    return default
