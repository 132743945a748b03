"""What became of a model: the numbers it works with, and how each part of it is held. For people to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..interfaces.precision import Precision
from ..interfaces.strategy import Axis, Strategy
from .shards import held_parameters, held_part


@dataclass(frozen=True)
class Contract:
    """The dtypes of a model's numbers, the same whatever strategy holds it (Micikevicius et al. 2018)."""

    parameters: tuple[str, ...]
    """In which each process keeps its parameters between steps."""

    compute: str
    """In which matrix products and convolutions run."""

    reduce: tuple[str, ...]
    """In which gradients are exchanged."""

    master: tuple[str, ...]
    """In which the optimizer updates."""


@dataclass(frozen=True)
class Description:
    """How a run holds one model; `str()` of it is for people."""

    model: str
    mesh: Mapping[Axis, int]
    contract: Contract
    elements: int
    """Of all parameters, each counted once."""

    held: int
    """Of what this process holds of them."""

    parts: Mapping[Axis, Mapping[str, str]]
    """For each axis: name of a module or parameter -> how it is held and why."""

    def __str__(self) -> str:
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        contract = self.contract
        lines = [
            f"{self.model}: {self.elements:,} parameters, {self.held:,} of them on this process",
            f"  mesh: {axes}",
            f"  dtypes: parameters {_either(contract.parameters)}, compute {contract.compute}, "
            f"reduce {_either(contract.reduce)}, master {_either(contract.master)}",
        ]
        for axis, parts in self.parts.items():
            width = max(map(len, parts), default=0)
            lines += [f"  {axis}:", *(f"    {name or '(the rest)':<{width}}  {how}" for name, how in parts.items())]
        return "\n".join(lines)


def describe(
    model: nn.Module, strategies: Sequence[Strategy], precision: Precision, mesh: Mapping[Axis, int]
) -> Description:
    """Describe a prepared model as this process sees it."""
    parameters = list(model.parameters())
    kinds = _names(parameter.dtype for parameter in parameters)
    asked = [strategy.reduce_dtype for strategy in strategies if strategy.mesh.size > 1]
    reduced = tuple(dict.fromkeys(name for name in asked if name)) or kinds
    return Description(
        model=type(model).__name__,
        mesh=mesh,
        contract=Contract(kinds, precision.dtype, reduced, kinds),
        elements=sum(math.prod(parameter.shape) for parameter in parameters),
        held=sum(held_part(parameter).numel() for parameter in held_parameters(model)),
        parts={strategy.axis: parts for strategy in strategies if (parts := strategy.describe(model))},
    )


def _names(dtypes: Iterable[torch.dtype]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _either(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
