"""The arguments of a forward call as micro-batches, and what micro-batches return as one batch again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accel.errors import PrepareError
from accel.runtime.nested import leaves, map_tensors, tensors

from .message import Called, Leaf, Message
from .nest import Left, Place, put_together
from .split import Split
from .trace import Result


@dataclass(frozen=True)
class Layout:
    """Which dim of the arguments counts samples, and which tensors have it, by their paths: those of the example."""

    dim: int
    batched: frozenset[str]
    whole: frozenset[str]

    def sizes(self, named: Sequence[tuple[str, Tensor]]) -> int | None:
        """The samples of a call; None if no tensor counts them."""
        known = [tensor for path, tensor in named if path in self.batched]
        others = [tensor for path, tensor in named if path not in self.whole]
        found = [tensor.shape[self.dim] for tensor in known or others if tensor.dim() > self.dim]
        return max(found, default=None)

    def is_batched(self, path: str, tensor: Tensor, samples: int | None) -> bool:
        """Whether a tensor is cut into micro-batches."""
        if path in self.whole or samples is None or tensor.dim() <= self.dim:
            return False
        return tensor.shape[self.dim] == samples


def layout_of(forward: Callable[..., Any], args: Any, kwargs: Any, dim: int) -> Layout | None:
    """The layout of an example, if its samples are along this dim of its first tensor."""
    named = named_tensors(forward, args, kwargs)
    first = next((tensor for _, tensor in named if tensor.dim() > dim), None)
    if first is None:
        return None
    fits = {path for path, tensor in named if tensor.dim() > dim and tensor.shape[dim] == first.shape[dim]}
    return Layout(dim, frozenset(fits), frozenset(path for path, _ in named) - fits)


def named_tensors(forward: Callable[..., Any], args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
    """The tensors among arguments, by the names of the arguments, however they were passed."""
    return list(tensors(dict(inspect.signature(forward).bind(*args, **kwargs).arguments)))


class Batch:
    """The arguments of one forward call, whole and in micro-batches of nearly equal size.

    Where there are fewer samples than `count`, there are fewer micro-batches. With `padded`, as many as that go through
    the stages all the same: the others repeat the first, and count for nothing.
    """

    def __init__(
        self, forward: Callable[..., Any], args: Any, kwargs: Any, layout: Layout, count: int, padded: bool = False
    ) -> None:
        _refuse_divided(args, kwargs)
        named = named_tensors(forward, args, kwargs)
        paths = {id(tensor): path for path, tensor in named}
        self.samples = layout.sizes(named)
        self.dim = layout.dim
        self.tensors: list[Tensor] = []
        self.skeleton = map_tensors(self._place, (args, kwargs))
        self.batched = [layout.is_batched(paths.get(id(t), ""), t, self.samples) for t in self.tensors]
        count, wanted = max(min(count, self.samples or 1), 1), count
        self.passes = wanted if padded else count
        """Micro-batches that go through the stages."""
        self.sizes = [len(part) for part in torch.arange(self.samples or 1).tensor_split(count)]
        with torch.no_grad():
            self._parts = [
                torch.split(t.detach(), self.sizes, self.dim) if batched else [t.detach()] * count
                for t, batched in zip(self.tensors, self.batched, strict=True)
            ]
        self._gradients: dict[int, dict[int, Tensor]] = {}
        self._kinds: dict[int | None, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors[0].device

    @property
    def count(self) -> int:
        """Micro-batches that hold samples."""
        return len(self.sizes)

    def values(self, index: int | None) -> list[Tensor]:
        """The tensors of a micro-batch, or of the whole."""
        if index is None:
            return [t.detach() for t in self.tensors]
        return [parts[index if index < self.count else 0] for parts in self._parts]

    def kind(self, index: int | None) -> Any:
        """What micro-batches that are alike have in common: the shapes of their tensors."""
        if index not in self._kinds:
            self._kinds[index] = tuple(tuple(value.shape) for value in self.values(index))
        return self._kinds[index]

    def arguments(self, values: list[Tensor]) -> Any:
        """Positional and named arguments with these tensors."""
        return put_together(self.skeleton, values)

    def learning(self) -> list[int]:
        """The places of tensors that want a gradient."""
        return [place for place, tensor in enumerate(self.tensors) if tensor.requires_grad]

    def add_gradient(self, place: int, index: int | None, gradient: Tensor | None) -> None:
        """Note the gradient of a micro-batch's tensor, or of the whole one."""
        if gradient is None or (index is not None and index >= self.count):
            return
        total = self._gradients.setdefault(place, {}).setdefault(0, torch.zeros_like(self.tensors[place]))
        if index is None or not self.batched[place]:
            total += gradient
        else:
            torch.split(total, self.sizes, self.dim)[index].add_(gradient)

    def gradients(self, group: dist.ProcessGroup) -> list[Tensor]:
        """The gradients of the tensors that want one, summed over the stages, all of which have these tensors."""
        found = []
        for place in self.learning():
            total = self._gradients.get(place, {}).get(0)
            total = torch.zeros_like(self.tensors[place]) if total is None else total
            dist.all_reduce(total, group=group)
            found.append(total)
        return found

    def _place(self, tensor: Tensor) -> Place:
        self.tensors.append(tensor)
        return Place(len(self.tensors) - 1)


def merge(messages: Sequence[Message], sizes: Sequence[int], split: Split) -> tuple[Message, list[list[int | None]]]:
    """What the micro-batches brought to the end, as of one batch.

    Returns also, for each tensor of it, its place in each micro-batch's payload. A result that not all of them have,
    as where the forward takes a part for some samples only, is left out. So is that of a call which the example did not
    make, of which nobody knows along which dim it counts samples: the end makes it again, of the whole batch.
    """
    calls: dict[tuple[str, int], Called] = {}
    payload: list[Tensor] = []
    learns: list[bool] = []
    origins: list[list[int | None]] = []
    tables = [{(called.part, called.ordinal): called for called in message.calls} for message in messages]
    for key, first in {key: called for table in reversed(tables) for key, called in table.items()}.items():
        planned = split.plans(*key) or len(messages) == 1
        found = [table.get(key) for table in tables]
        whole = []
        for place, leaf in enumerate(first.leaves):
            same = [called.leaves[place] if called is not None else None for called in found]
            dim = split.batch_dims.get(Result(key[0], key[1], place)) if planned else _likely_dim(same, sizes)
            sent = None
            if planned and all(each is not None and each.payload is not None for each in same):
                sent = len(payload)
                places = [each.payload for each in same if each is not None]
                values = [message.payload[p] for message, p in zip(messages, places, strict=True) if p is not None]
                payload.append(values[0] if dim is None or len(values) == 1 else torch.cat(values, dim))
                learns.append(any(m.learns[p] for m, p in zip(messages, places, strict=True) if p is not None))
                origins.append(places)
            whole.append(Leaf(_whole_shape(leaf, same, dim, sizes), leaf.dtype, sent))
        calls[key] = first._replace(leaves=tuple(whole), everywhere=planned and None not in found)
    return Message(messages[0].seed, list(calls.values()), payload, learns), origins


def separate(
    gradients: Sequence[Tensor | None],
    merged: Message,
    origins: Sequence[Sequence[int | None]],
    messages: Sequence[Message],
    split: Split,
) -> list[list[Tensor | None]]:
    """The gradients of merged tensors, for each micro-batch those of its payload."""
    found: list[list[Tensor | None]] = [[None] * len(message.payload) for message in messages]
    results = {leaf.payload: Result(c.part, c.ordinal, p) for c in merged.calls for p, leaf in enumerate(c.leaves)}
    for place, gradient in enumerate(gradients):
        if gradient is None:
            continue
        dim = split.batch_dims.get(results[place])
        if dim is None:
            pieces: Sequence[Tensor] = [gradient]  # the first micro-batch's was taken
        else:
            sizes = [m.payload[o].shape[dim] for m, o in zip(messages, origins[place], strict=True) if o is not None]
            pieces = torch.split(gradient, sizes, dim)
        for index, piece in enumerate(pieces):
            origin = origins[place][index]
            assert origin is not None
            known = found[index][origin]
            found[index][origin] = piece if known is None else known + piece
    return found


def _likely_dim(same: Sequence[Leaf | None], sizes: Sequence[int]) -> int | None:
    """The dim that seems to count samples, for the shape of what has no values."""
    size, known = next((size, each) for size, each in zip(sizes, same, strict=True) if each is not None)
    return next((dim for dim, length in enumerate(known.shape) if length == size), None)


def _whole_shape(leaf: Leaf, same: Sequence[Leaf | None], dim: int | None, sizes: Sequence[int]) -> tuple[int, ...]:
    if dim is None:
        return leaf.shape
    size, known = next((size, each) for size, each in zip(sizes, same, strict=True) if each is not None)
    each_sample, samples = known.shape[dim] // size, sum(sizes)
    return (*leaf.shape[:dim], each_sample * samples, *leaf.shape[dim + 1 :])


def _refuse_divided(args: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what would be in parts on several stages: what grows with each call, or is collected inside blocks."""
    for name in ("output_attentions", "output_router_logits"):
        if kwargs.get(name):
            raise PrepareError(f"pipeline: {name}=True asks for what is collected inside blocks, on their stages only")
    for path, leaf in leaves(dict(kwargs, **{str(i): value for i, value in enumerate(args)})):
        kinds = {kind.__name__ for kind in type(leaf).__mro__}
        if isinstance(leaf, Left) or any(name.endswith("Cache") for name in kinds):
            raise PrepareError(
                f"pipeline: the argument {path} is a {type(leaf).__name__}, of which each stage would have another "
                "part; pass use_cache=False, also to generate()"
            )
