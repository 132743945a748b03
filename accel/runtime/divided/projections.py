"""Gradients that are too large to be kept: products with random vectors tell as well whether two are the same.

Where G v = H v for a vector v that knows nothing of G and H, they are equal but for luck (Freivalds 1977). The product
that leaves out all dims but one is as long as that dim, and a part of the gradient gives a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..deferred import made_up
from ..shards import held_part


class Projections:
    """A context in which gradients of these parameters, by name, are dropped as soon as a backward pass brings them.

    `found` has their projections by name and dim: onto each dim, or onto that along which the gradient is divided.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.found: dict[tuple[str, int | None], Tensor] = {}

    def __enter__(self) -> Self:
        names = {parameter: name for name, parameter in self.parameters.items()}

        def drop(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._note(names[parameter], parameter.grad)  # type: ignore[index]
            parameter.grad = None

        self._hooks = [
            parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
            for parameter in self.parameters.values()
        ]
        return self

    def __exit__(self, *raised: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, gradient: Tensor) -> None:
        """Add a gradient's projections to those that came before."""
        divided = [p.dim for p in gradient.placements if isinstance(p, Shard)] if isinstance(gradient, DTensor) else []
        dims: list[int | None] = [*(divided or range(gradient.dim()))] or [None]
        for dim in dims:
            onto = held_part(gradient) if dim is None else _project(held_part(gradient), dim)
            if divided:
                assert isinstance(gradient, DTensor)
                onto = DTensor.from_local(onto, gradient.device_mesh, [Shard(0)], run_check=False)
            known = self.found.get((name, dim))
            self.found[name, dim] = onto if known is None else known + onto


def _project(gradient: Tensor, dim: int) -> Tensor:
    """[.., n, ..] -> [n]: the sum along all other dims with random weights."""
    rows = gradient.movedim(dim, 0).flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1)
    rows = rows if rows.is_complex() else rows.float()
    weights = made_up(rows.shape[1], 1 / math.sqrt(rows.shape[1]), 0.0, rows)
    return (rows @ weights).to(gradient.dtype)
