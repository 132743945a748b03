"""Losses that are divided tensors: those that come from divided parameters alone, such as an L2 penalty by itself.

What operators make of a divided tensor and a plain one is plain, as `handling` sees to. Torch's functions make a
divided tensor of them, if the plain one is a single number, and take it to be the same on all processes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import PrepareError
from .graph import nodes_of


def check_divided(loss: Tensor) -> None:
    """Raise PrepareError for a loss that a function has made of divided tensors and plain ones."""
    if isinstance(loss, DTensor) and _meets_plain(loss):
        raise PrepareError(
            "backward: a function, such as torch.add or torch.stack, took divided parameters, or what comes from them, "
            "together with plain tensors; use operators, as in loss + penalty, or the divided tensor's .full_tensor()"
        )


def _meets_plain(loss: Tensor) -> bool:
    """Whether some of a loss's nodes are of plain tensors which were used together with divided ones."""
    users: dict[Any, set[Any]] = defaultdict(set)
    for node in nodes_of(loss):
        for following, _ in node.next_functions:
            users[following].add(node)
    divided: set[Any] = {loss.grad_fn}
    waiting = [node for node in users if node and _makes_divided(node)]
    while waiting:
        node = waiting.pop()
        divided.add(node)
        waiting += (user for user in users[node] if user not in divided and user.name() != "_ToTorchTensorBackward")
    inner = (node for node in divided if not _makes_divided(node))
    return any(following not in divided for node in inner for following, _ in node.next_functions if following)


def _makes_divided(node: Any) -> bool:
    """Whether a divided tensor begins at this node: a parameter, or what the loop has made one of."""
    return isinstance(getattr(node, "variable", None), DTensor) or node.name() == "_FromTorchTensorBackward"
