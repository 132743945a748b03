"""Products with matrices of which each process holds some rows or columns: the two halves of a pair.

Between pairs, where `Peers.sequence` says so, each process keeps some positions of what all would hold alike
(Korthikanti et al. 2022, "Reducing Activation Recomputation"): what a pair leaves is divided along them, what the
next one takes is put together. Norms, dropout and shortcuts between work on parts, by the rules for divided tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .operators import uneven
from .peers import Peers
from .tensor import Divided, Division, divide, part_of, whole_of

SEQUENCE = frozenset({"sequence"})
"""The source of what is divided along positions."""


def by_columns(x: Tensor, weight: Tensor, bias: Tensor | None, peers: Peers, pieces: int = 1) -> Any:
    """[.., in] by a part of the rows of [out, in] -> [.., out], divided along the last dim."""
    out = F.linear(input_for_parts(x, peers), weight, bias)
    return divide(out, Division(peers, out.dim() - 1, pieces))


def by_rows(x: Tensor, weight: Tensor, bias: Tensor | None, peers: Peers, like: Division | None = None) -> Any:
    """[.., in] by a part of the columns of [out, in] -> [.., out]; all hold `bias`. `like` is as in `added_up`."""
    out = added_up(F.linear(part_of_input(x, peers), weight), peers, like)
    return out if bias is None else out + bias.to(out.dtype)


def input_for_parts(x: Tensor, peers: Peers) -> Tensor:
    """The whole of a layer's input, for use on parts of its work; each process adds its share of the gradient.

    Layers that take this very tensor one after another share one exchange: query, key and value one, not three.
    """
    if x.is_inference():  # nothing tells whether it has changed since
        return _for_parts(x, peers)
    state = [x._version, torch.is_grad_enabled()]
    if not peers.shared or peers.shared[0] is not x or peers.shared[1] != state:
        peers.shared[:] = [x, state, _for_parts(x, peers)]
    result: Tensor = peers.shared[2]
    return result


def _for_parts(x: Tensor, peers: Peers) -> Tensor:
    if not isinstance(x, Divided):
        return peers.copy(x)
    division = x.division
    return peers.gather_for_parts(part_of(x), division.dim, division.outer, division.length)


def part_of_input(x: Tensor, peers: Peers) -> Tensor:
    """This process's part of a row layer's input along its last dim, which may be divided, or held whole by all."""
    last = x.dim() - 1
    if isinstance(x, Divided) and (x.division.dim, x.division.outer) == (last, 1):
        return part_of(x)
    return peers.take(whole_of(x), last)


def added_up(share: Tensor, peers: Peers, like: Division | None = None) -> Any:
    """The sum of the processes' shares [.., positions, width]: of all positions, or of this process's, divided.

    `like` says how positions are divided, if not along the last dim but one. Fewer of them than processes stay whole.
    """
    dim, outer = (share.dim() - 2, 1) if like is None else (like.dim, like.outer)
    if not peers.sequence or dim < 0 or share.shape[dim] < peers.parts:
        return peers.add(share)
    length = uneven(share.shape[dim], peers.parts)
    division = Division(peers, dim, outer, SEQUENCE, length)
    return divide(peers.add_parts(share, dim, outer), division)
