"""Parameters of an existing module, selected by name, pattern, submodule or object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_bilevel.errors import value_error
from lightning_bilevel.host import LightningModule
from lightning_bilevel.modules.levels import abbreviate

Names = str | nn.Module | nn.Parameter
"""A parameter's or submodule's name, an ``fnmatch`` pattern of parameter names, or the thing itself."""

_MAKERS = ("setup", "configure_model")
"""The hooks in which a module may make layers."""


def as_patterns(module: LightningModule, level: str, selection: Any) -> list[str]:
    """Turn a selection into names and patterns, which stay right in a copy of the module.

    Args:
        module: the module.
        level: ``"inner"`` or ``"outer"``, for messages.
        selection: one of :data:`Names`, or an iterable of them.

    Raises:
        ValueError: an entry of another kind, or an object that is not of the module.

    >>> class Net(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.head = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)
    >>> net = Net()
    >>> as_patterns(net, "inner", ["*.bias", net.head])
    ['*.bias', 'head']
    """
    if isinstance(selection, (str, nn.Module, nn.Parameter)) or not isinstance(selection, Iterable):
        selection = [selection]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    children = {id(child): name for name, child in module.named_modules()}
    found: list[str] = []
    for entry in selection:
        if isinstance(entry, str) or children.get(id(entry)):
            found.append(entry if isinstance(entry, str) else children[id(entry)])
            continue
        parameters = list(entry.parameters()) if isinstance(entry, nn.Module) else [entry]
        if not isinstance(entry, (nn.Module, nn.Parameter)) or any(id(p) not in names for p in parameters):
            elsewhere = f"a `{type(entry).__name__}` from elsewhere"
            raise _no_match(module, level, elsewhere if isinstance(entry, (nn.Module, nn.Parameter)) else repr(entry))
        found += [names[id(parameter)] for parameter in parameters]
    return found


def matching(module: LightningModule, level: str, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters that are there by now, in the order of the patterns, each once.

    Raises:
        ValueError: a pattern that matches none.
    """
    chosen = (_matching(module, level, pattern) for pattern in patterns)
    return list({id(parameter): parameter for some in chosen for parameter in some}.values())


def require_trained(module: LightningModule, level: str, chosen: Sequence[nn.Parameter]) -> None:
    """Refuse a level without a parameter that requires gradients.

    Raises:
        ValueError: all are frozen, or there are none.
    """
    if not any(parameter.requires_grad for parameter in chosen):
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        raise value_error(
            f"bilevel({level}=...)",
            f"parameters of `{type(module).__name__}` that require gradients",
            f"frozen ones: {abbreviate([names[id(parameter)] for parameter in chosen])}" if chosen else "none",
            "Call `requires_grad_()` on them before." if chosen else "",
        )


def beside_layers(module: nn.Module, chosen: Sequence[nn.Parameter]) -> list[str]:
    """Return the names of the chosen parameters that are not part of a layer: such as penalties, rates and weights.

    Those are parameters of the LightningModule itself, those in a ``ParameterList`` or a ``ParameterDict``, and single
    numbers.

    >>> class Net(LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net, self.penalties = nn.Linear(1, 1), nn.ParameterList([nn.Parameter()])
    >>> net = Net()
    >>> beside_layers(net, list(net.parameters()))
    ['penalties.0']
    """
    wanted, found = {id(parameter) for parameter in chosen}, []
    for prefix, owner in module.named_modules():
        apart = isinstance(owner, (LightningModule, nn.ParameterList, nn.ParameterDict))
        for name, parameter in owner.named_parameters(prefix, recurse=False):
            if id(parameter) in wanted and (apart or not parameter.ndim):
                found.append(name)
    return found


def made_later(module: LightningModule) -> str:
    """Return the hooks in which a module may make layers that are not there yet, for a message; empty without any."""
    return " or ".join(f"`{name}`" for name in _MAKERS if defines(module, name))


def defines(module: LightningModule, name: str) -> bool:
    """Return whether a hook is not Lightning's own, on the class or on the instance.

    >>> module = LightningModule()
    >>> module.configure_optimizers = lambda: None
    >>> defines(module, "configure_optimizers"), defines(module, "setup")
    (True, False)
    """
    return getattr(getattr(module, name), "__func__", None) is not getattr(LightningModule, name)


def _matching(module: LightningModule, level: str, pattern: str) -> list[nn.Parameter]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    if pattern in parameters:
        return [parameters[pattern]]
    children = dict(module.named_modules(remove_duplicate=False))
    child = children.get(pattern) if pattern else None
    found = [p for name, p in parameters.items() if fnmatchcase(name, pattern)]
    found = found if child is None else list(child.parameters())
    if not found:
        raise _no_match(module, level, repr(pattern))
    return found


def _no_match(module: LightningModule, level: str, got: str) -> ValueError:
    owner, hooks = type(module).__name__, made_later(module)
    later = f"; what {hooks} makes is there once it was called" if hooks else ""
    return value_error(
        f"bilevel({level}=...)",
        f"names, patterns, submodules or parameters of `{owner}`",
        _Verbatim(got),
        f"`{owner}` has {abbreviate([name for name, _ in module.named_parameters()])}{later}.",
    )


class _Verbatim(str):
    def __repr__(self) -> str:
        return str(self)
