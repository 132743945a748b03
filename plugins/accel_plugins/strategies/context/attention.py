"""scaled_dot_product_attention on queries of which each process has some positions.

By heads: two exchanges give each process all positions of some heads, and back; between them attention is torch's own.
In a ring: `ring`. To keys that all processes have whole, such as a cache: each process takes its own rows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from accel.errors import PrepareError
from accel.runtime.divided.peers import Undividable
from accel.runtime.divided.tensor import Call, Divided, divide, part_of, whole_of

from .peers import SequencePeers
from .ring import ring


@dataclass(frozen=True)
class Attention:
    """The arguments of one call, with [.., heads, positions, width] for the first three."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool

    @classmethod
    def of(cls, call: Call) -> Attention:
        """Those of a call, the mask whole."""
        values = [call.option(place, name, value) for place, (name, value) in enumerate(_DEFAULTS.items())]
        values[3] = whole_of(values[3])
        return cls(*values)

    def run(self, peers: SequencePeers) -> Tensor:
        """Torch's own, on what this process has."""
        numbers = peers.own_numbers(self.query.device) if self.dropout else contextlib.nullcontext()
        with numbers:
            return scaled_dot_product_attention(
                self.query,
                self.key,
                self.value,
                self.mask,
                self.dropout,
                self.causal,
                scale=self.scale,
                enable_gqa=self.grouped,
            )


_DEFAULTS = {
    "query": None,
    "key": None,
    "value": None,
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
"""What the arguments are called, in their order."""


def attention(peers: SequencePeers, call: Call) -> Any:
    """The rule for scaled_dot_product_attention, see above. Raises PrepareError if the chosen way cannot be right."""
    asked = Attention.of(call)
    query: Any = asked.query
    division, parts = query.division, [value for value in (asked.key, asked.value) if isinstance(value, Divided)]
    peers.meet(division.sources.union(*(value.division.sources for value in parts)))
    if division.outer > 1 or len(parts) == 1:
        raise Undividable("it meets attention in another form")
    if any((part.division.dim - part.dim(), part.division.outer) != (-2, 1) for part in parts):
        raise Undividable("keys or values are divided otherwise")
    own = replace(asked, query=_cast(part_of(query)))
    if parts:
        own = replace(own, key=_cast(part_of(parts[0])), value=_cast(part_of(parts[1])))
    if peers.parts == 1:
        return divide(own.run(peers), division)
    result = _chosen(peers, own)(peers, own) if parts else _rows(peers, own)
    return divide(result, division)


def _cast(tensor: Tensor) -> Tensor:
    """What torch's attention would make of an operand under autocast; before it is sent."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _chosen(peers: SequencePeers, asked: Attention) -> Any:
    """By heads or in a ring."""
    tensors = (asked.query, asked.key, asked.value)
    counts = [tensor.shape[-3] if tensor.dim() > 2 else 1 for tensor in tensors]
    uneven = any(count % peers.size for count in counts)
    if peers.method == "ulysses" and uneven:
        raise PrepareError(
            f"strategies.context.attention: ulysses divides heads among {peers.size} processes, but this attention "
            f"has {counts[0]} heads of queries and {counts[1]} of keys; use ring"
        )
    if peers.method == "ulysses" or (peers.method == "auto" and not uneven):
        return _by_heads
    gradient = asked.mask is not None and asked.mask.requires_grad
    if asked.dropout or gradient:
        what = "drops attention weights" if asked.dropout else "has a mask that trains"
        raise PrepareError(
            f"strategies.context.attention: this attention {what}, which a ring cannot; use ulysses, with a size by "
            f"which the {counts[0]} heads of queries and {counts[1]} of keys divide"
        )
    return _in_ring


def _by_heads(peers: SequencePeers, asked: Attention) -> Tensor:
    """All positions of some heads on each process, and back."""
    tensors = [asked.query, asked.key, asked.value]
    if len({tensor.shape[-2:] for tensor in tensors}) == 1:  # one message
        counts = [tensor.shape[-3] // peers.size for tensor in tensors]
        together = torch.cat([tensor.unflatten(-3, (peers.size, -1)) for tensor in tensors], -3)  # type: ignore[no-untyped-call]
        query, key, value = _to_heads(peers, together).split(counts, -3)  # type: ignore[no-untyped-call]
    else:
        query, key, value = (_to_heads(peers, tensor.unflatten(-3, (peers.size, -1))) for tensor in tensors)  # type: ignore[no-untyped-call]
    mask = asked.mask
    if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
        mask = peers.own(mask, mask.dim() - 3)
    out = replace(asked, query=query, key=key, value=value, mask=mask).run(peers)
    return _to_positions(peers, out)


def _to_heads(peers: SequencePeers, x: Tensor) -> Tensor:
    """[.., size, heads, own positions, width] -> [.., heads, all positions, width], some heads of all."""
    return peers.swap(x.movedim(-4, 0)).movedim(0, -3).flatten(-3, -2)


def _to_positions(peers: SequencePeers, x: Tensor) -> Tensor:
    """[.., some heads, all positions, width] -> [.., all heads, own positions, width]."""
    parts = x.unflatten(-2, (peers.size, -1)).movedim(-3, 0)  # type: ignore[no-untyped-call]
    return peers.swap(parts).movedim(0, -4).flatten(-4, -3)


def _rows(peers: SequencePeers, asked: Attention) -> Tensor:
    """Own queries, with keys and values that are whole."""
    mask, rows = asked.mask, asked.query.shape[-2]
    if asked.causal:
        device = asked.query.device
        places = peers.index * rows + torch.arange(rows, device=device)
        mask = torch.arange(asked.key.shape[-2], device=device) <= places[:, None]
    elif mask is not None and mask.shape[-2] > 1:
        mask = peers.own(mask, mask.dim() - 2)
    return replace(asked, mask=mask, causal=False).run(peers)


def _in_ring(peers: SequencePeers, asked: Attention) -> Tensor:
    """Own queries, with the keys and values of one process after another."""
    key, value = asked.key, asked.value
    if asked.grouped:
        key, value = (t.repeat_interleave(asked.query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scale = asked.query.shape[-1] ** -0.5 if asked.scale is None else asked.scale
    return ring(asked.query, key, value, asked.mask, asked.causal, scale, peers)
