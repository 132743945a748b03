"""Losses with a part that comes from divided parameters themselves, such as an L2 penalty.

Torch makes a DTensor of whatever such a parameter takes part in, the loss too, and so of the gradient that flows back
into the rest of the loss, which is plain and knows no DTensors. There the gradient has to be plain again.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import PrepareError
from ..interfaces import Axis
from .graph import nodes_of
from .shards import whole_tensor


@contextmanager
def penalties(loss: Tensor, weight: float) -> Iterator[None]:
    """Let a backward pass from `loss` go on from divided tensors to plain ones; all ranks.

    `weight` is what this process's samples count in the mean over processes. Gradients of divided parameters are not
    averaged: a plain loss was multiplied by it, which is undone for them; of a DTensor only what is plain is. Raises
    PrepareError where the two cannot be told apart.
    """
    hooks = []
    if isinstance(loss, DTensor):
        nodes = list(nodes_of(loss))
        leaves = _divided_leaves(nodes)
        hooks = [node.register_prehook(functools.partial(_plain, weight)) for node in _borders(loss, nodes, leaves)]
        hooks += [leaf.register_prehook(functools.partial(_lay_out, leaf.variable)) for leaf in leaves]
    elif weight != 1.0:
        leaves = _divided_leaves(nodes_of(loss))
        hooks = [leaf.register_prehook(functools.partial(_unweigh, weight)) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _divided_leaves(nodes: Iterable[Any]) -> list[Any]:
    """Those of a loss's nodes through which it gives parameters that are divided over batches their gradients."""
    return [node for node in nodes if _is_divided(getattr(node, "variable", None))]


def _is_divided(value: Any) -> bool:
    """Whether this is divided among processes with other batches: layers of `Axis.TENSOR` see the same one."""
    return isinstance(value, DTensor) and value.device_mesh.mesh_dim_names != (Axis.TENSOR,)


def _borders(loss: Tensor, nodes: Iterable[Any], leaves: Iterable[Any]) -> list[Any]:
    """Those of a loss's nodes that are of plain tensors which were used together with divided ones."""
    users: dict[Any, set[Any]] = defaultdict(set)
    for node in nodes:
        for following, _ in node.next_functions:
            users[following].add(node)
    divided = {loss.grad_fn}
    waiting = [*leaves, *(node for node in users if node and node.name() == "_FromTorchTensorBackward")]
    while waiting:
        node = waiting.pop()
        divided.add(node)
        waiting += (user for user in users[node] if user not in divided and user.name() != "_ToTorchTensorBackward")
    borders = [node for node, by in users.items() if node and node not in divided and not by.isdisjoint(divided)]
    if not all(users[node] <= divided for node in borders):
        raise PrepareError(
            "backward: a part of this loss is used both together with divided parameters and without them; add what "
            "comes from the parameters themselves, such as a penalty, last"
        )
    return borders


def _plain(weight: float, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(whole_tensor(g) * weight if isinstance(g, DTensor) else g for g in gradients)


def _lay_out(parameter: DTensor, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients divided as the parameter is: where it does not divide evenly, torch may make them whole."""
    return tuple(g if g is None else g.redistribute(placements=parameter.placements) for g in gradients)


def _unweigh(weight: float, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    if not weight:
        raise PrepareError(
            "backward: this process has no samples of the last batch, whose loss counts nothing, and with it a part "
            "that comes from divided parameters; leave out full_tensor(), or drop the last batch"
        )
    return tuple(g if g is None else g / weight for g in gradients)
