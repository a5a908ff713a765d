"""Which parameters of a module belong to the inner level, to the outer level, or to both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_bilevel.errors import missing_error, value_error

Selection = nn.Module | nn.Parameter | Iterable[nn.Module | nn.Parameter]

_LISTED = 12
"""Names that a message lists at most."""


@dataclass(frozen=True)
class Levels:
    """Parameter names by level, in the module's order.

    Attributes:
        inner: names of θ.
        outer: names of φ.
    """

    inner: tuple[str, ...]
    outer: tuple[str, ...]

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names in both levels: θ starts at φ there."""
        return frozenset(self.inner) & frozenset(self.outer)

    @cached_property
    def inner_only(self) -> tuple[str, ...]:
        """Names of θ that no outer optimizer touches."""
        return tuple(name for name in self.inner if name not in self.shared)

    @staticmethod
    def of(module: nn.Module, inner: Selection, outer: Selection) -> Levels:
        """Name the parameters that a module's hooks select.

        Args:
            module: the module that owns them.
            inner: what ``inner_parameters()`` returned.
            outer: what ``outer_parameters()`` returned.

        Raises:
            ValueError: a selection has something else in it than parameters and submodules of ``module``.
            MisconfigurationError: a level is empty (frozen parameters do not count), or a lazy layer has no shape yet.
        """
        owner = type(module).__name__
        if lazy := [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]:
            raise missing_error(
                owner,
                f"shapes yet for {abbreviate(lazy)}, which lazy layers take from their first batch",
                "Compute with them once before, as `module(batch)` does where there is a `forward`",
            )
        names = (
            _select(module, f"{owner}.inner_parameters()", inner),
            _select(module, f"{owner}.outer_parameters()", outer),
        )
        for level, chosen in zip(("inner", "outer"), names, strict=True):
            if not any(chosen.values()):
                but = f" but frozen ones: {abbreviate(list(chosen))}" if chosen else ""
                raise missing_error(
                    owner,
                    f"{level} parameters{but}",
                    f"Let `{level}_parameters()` return parameters that require gradients, or a submodule with some",
                )
        inner_names, outer_names = (tuple(name for name, trained in chosen.items() if trained) for chosen in names)
        return Levels(inner_names, outer_names)


def rest(module: nn.Module, taken: Selection, hook: str = "rest(module, taken)") -> list[nn.Parameter]:
    """Return the trainable parameters that are not among ``taken``, which ``hook`` returned.

    >>> net = nn.Linear(2, 2)
    >>> rest(net, [net.weight])[0] is net.bias
    True
    """
    ids = {id(parameter) for parameter in parameters(taken, hook)}
    return [p for p in module.parameters() if id(p) not in ids and p.requires_grad]


def parameters(selection: Any, hook: str) -> list[Any]:
    """Return the entries of what ``hook`` selected: a module, a parameter, or an iterable of both."""
    if isinstance(selection, nn.Module):
        return list(selection.parameters())
    if isinstance(selection, nn.Parameter):
        return [selection]
    if not isinstance(selection, Iterable):
        hint = "Write `return self.net.parameters()`, say."
        raise value_error(hook, "parameters or submodules of the module", selection, hint)
    entries = (parameters(entry, hook) if isinstance(entry, nn.Module) else [entry] for entry in selection)
    return list(chain.from_iterable(entries))


def abbreviate(names: Sequence[str]) -> str:
    """List names for a message; many of them as patterns of those that begin alike.

    >>> abbreviate([f"{block}.{part}" for block in ("body.0", "body.1", "head.0") for part in "abcde"])
    'body.0.* (5), body.1.* (5), head.0.* (5)'
    """
    groups = {name: 1 for name in names}
    depth = max((name.count(".") for name in names), default=0)
    while len(groups) > _LISTED and depth:
        groups = {}
        for name in names:
            head = ".".join(name.split(".")[:depth])
            key = name if head == name else f"{head}.*"
            groups[key] = groups.get(key, 0) + 1
        depth -= 1
    listed = [f"{name} ({count})" if name.endswith(".*") else name for name, count in groups.items()]
    more = [f"{len(listed) - _LISTED} more"] if len(listed) > _LISTED else []
    return ", ".join([*listed[:_LISTED], *more]) or "no parameters"


def _select(module: nn.Module, hook: str, selection: Selection) -> dict[str, bool]:
    """Return the names of what ``hook`` selected, in the module's order, each with whether it requires gradients."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    chosen = {}
    for parameter in parameters(selection, hook):
        if id(parameter) not in names:
            if isinstance(parameter, nn.Parameter):
                got = f"a parameter of shape {tuple(parameter.shape)} from elsewhere"
                hint = "Make it, or the module that has it, an attribute of the module."
            else:
                got, hint = type(parameter).__name__, "Write `return self.net.parameters()`, say."
            raise value_error(hook, "parameters or submodules of the module", got, hint)
        chosen[names[id(parameter)]] = bool(parameter.requires_grad)
    return {name: chosen[name] for name in names.values() if name in chosen}
