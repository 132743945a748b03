"""Messages between processes: forth along the stages, gradients back, and the output from the last to all.

A message is tensors, a text that tells their shapes and what they are, and a header of two numbers. The text is sent
where it differs from that of the last message of this kind. While it does not, all is one transfer: the tensors, and
16 bytes behind them.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .message import Failure

_SAME, _NEW, _FAILED = range(3)
_HEADER = 16
_ALIGNED = 64
"""Bytes to a multiple of which tensors begin, as kernels like it."""

_MANY = 1000
"""Kinds of message that are remembered."""


class _Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Form:
    """What messages of one kind were like last: their text, and how they are laid out."""

    said: bytes
    text: Any
    specs: tuple[_Spec, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Where each tensor begins, and then the header."""
        ends = accumulate((_round_up(spec.bytes, _ALIGNED) for spec in self.specs[:-1]), initial=0)
        if not self.specs:
            return [0]
        found = list(ends)
        return [*found, _round_up(found[-1] + self.specs[-1].bytes, 8)]

    @cached_property
    def strides(self) -> list[tuple[int, ...]]:
        """Those of each tensor."""
        return [torch.empty(spec.shape, device="meta").stride() for spec in self.specs]

    @cached_property
    def size(self) -> int:
        """Bytes of a message."""
        return self.starts[-1] + _HEADER

    def views(self, packed: Tensor) -> list[Tensor]:
        """The tensors in a message, each with a version of its own: it does not change where another is changed."""
        storage, found = packed.untyped_storage(), []
        for start, spec, strides in zip(self.starts, self.specs, self.strides, strict=False):
            whole = torch.empty(0, dtype=spec.dtype, device=packed.device)
            found.append(whole.set_(storage, start // spec.dtype.itemsize, spec.shape, strides))
        return found


_BARE = _Form(b"", None, ())


class Wire:
    """The processes along the pipeline. `sent` counts the bytes that this one has sent to others."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.sent = 0
        self._waiting: list[tuple[Any, Tensor]] = []
        self._expected: tuple[Any, Tensor] | None = None
        self._forms: dict[Any, dict[Any, _Form]] = {}

    def send(self, to: int, way: Any, text: Any, tensors: Sequence[Tensor], seed: int = 0) -> None:
        """Send tensors and what is to be said of them; `way` names the kind of message, alike on both ends."""
        for part in self._encode(("to", to), way, text, tensors, seed):
            self._send(to, part)

    def fail(self, to: int, way: Any, failure: Failure) -> None:
        """Send, instead of a message, that there is none."""
        for part in self._encode_failure(("to", to), way, failure):
            self._send(to, part)

    def expect(self, source: int, way: Any) -> None:
        """Let the next message from there arrive while this process computes; `receive` must ask for it next.

        Only over gloo, which moves nothing before it is asked for. NCCL takes what two processes ask of each other in
        order, and would wait for each to answer the other first.
        """
        if self.device.type == "cpu":
            packed = self._empty(self._form(("from", source), way).size)
            self._expected = dist.irecv(packed, group=self.group, group_src=source), packed

    def receive(self, source: int, way: Any) -> tuple[Any, list[Tensor], int] | Failure:
        """What was said, the tensors and the seed; or that the stage failed."""
        return self._decode(("from", source), way, lambda size: self._pull(source, size))

    def send_gradients(self, to: int, way: Any, gradients: Sequence[Tensor | None]) -> None:
        """Send the gradients of tensors that were received from there; None where there is none."""
        if gradients:
            present = [gradient is not None for gradient in gradients]
            self.send(to, ("back", way), present, [gradient for gradient in gradients if gradient is not None])

    def receive_gradients(self, source: int, way: Any, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of tensors that were sent there."""
        if not tensors:
            return []
        found = self.receive(source, ("back", way))
        assert not isinstance(found, Failure)
        present, gradients = found[0], iter(found[1])
        return [next(gradients) if there else None for there in present]

    def expect_gradients(self, source: int, way: Any) -> None:
        """As `expect`, for `receive_gradients`."""
        self.expect(source, ("back", way))

    def send_tensor(self, to: int, tensor: Tensor) -> None:
        """Send one tensor, of which the other knows the shape."""
        self._send(to, tensor)

    def receive_tensor(self, source: int, like: Tensor) -> Tensor:
        """Receive one tensor of the shape and dtype of another."""
        return self._receive(source, _Spec(tuple(like.shape), like.dtype))

    def broadcast(self, source: int, way: Any, text: Any, tensors: Sequence[Tensor], failure: Failure | None) -> Any:
        """What `source` brings, on all: text and tensors, or its failure; all processes along the pipeline."""
        ends = ("all", source)
        if self.group.rank() != source:
            found = self._decode(ends, way, lambda size: self.share(source, self._empty(size)))
            return found if isinstance(found, Failure) else found[:2]
        parts = self._encode_failure(ends, way, failure) if failure else self._encode(ends, way, text, tensors, 0)
        for part in parts:
            self.share(source, part)
        return failure or (text, tensors)

    def share(self, source: int, tensor: Tensor, waits: bool = True) -> Tensor:
        """A tensor of `source`, on all processes along the pipeline; the others give one of its shape and dtype.

        `waits` says whether the source waits here until it has been sent, or in `finish`.
        """
        tensor = tensor.detach().contiguous()
        if not tensor.numel():
            return tensor
        work = dist.broadcast(tensor, group=self.group, group_src=source, async_op=True)
        if self.group.rank() == source:
            self.sent += tensor.numel() * tensor.element_size()
            self._waiting.append((work, tensor))
        if waits or self.group.rank() != source:
            work.wait()
        return tensor

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self._waiting:
            work.wait()
        self._waiting.clear()

    def _encode(self, ends: Any, way: Any, text: Any, tensors: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
        """The transfers that make up a message."""
        specs = tuple(_Spec(tuple(t.shape), t.dtype) for t in tensors)
        said, last = pickle.dumps((text, specs)), self._form(ends, way)
        if last.said != said:
            yield self._packed(last, [], _NEW, len(said))
            yield self._bytes(said)
            last = self._remember(ends, way, _Form(said, text, specs))
        yield self._packed(last, tensors, _SAME, seed)

    def _encode_failure(self, ends: Any, way: Any, failure: Failure) -> Iterator[Tensor]:
        said = failure.text.encode()
        yield self._packed(self._form(ends, way), [], _FAILED, len(said))
        yield self._bytes(said)

    def _decode(self, ends: Any, way: Any, pull: Callable[[int], Tensor]) -> tuple[Any, list[Tensor], int] | Failure:
        """What a message says; `pull` gets the next so many bytes of it."""
        form = self._form(ends, way)
        packed = pull(form.size)
        kind, number = self._header(packed)
        if kind == _FAILED:
            return Failure(bytes(pull(number).tolist()).decode())
        if kind == _NEW:
            said = bytes(pull(number).tolist())
            form = self._remember(ends, way, _Form(said, *pickle.loads(said)))
            packed = pull(form.size)
            _, number = self._header(packed)
        return form.text, form.views(packed), number

    def _packed(self, form: _Form, tensors: Sequence[Tensor], kind: int, number: int) -> Tensor:
        """One transfer of the form: the tensors, or none, and the header."""
        packed = self._empty(form.size)
        for view, tensor in zip(form.views(packed) if tensors else (), tensors, strict=True):
            view.copy_(tensor.detach())
        packed[-_HEADER:].view(torch.int64).copy_(torch.tensor([kind, number]))
        return packed

    def _header(self, packed: Tensor) -> list[int]:
        found: list[int] = packed[-_HEADER:].view(torch.int64).tolist()
        return found

    def _form(self, ends: Any, way: Any) -> _Form:
        return self._forms.get(ends, {}).get(way, _BARE)

    def _remember(self, ends: Any, way: Any, form: _Form) -> _Form:
        known = self._forms.setdefault(ends, {})
        if len(known) >= _MANY:  # both ends forget at the same message
            known.clear()
        known[way] = form
        return form

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _bytes(self, said: bytes) -> Tensor:
        return torch.frombuffer(bytearray(said), dtype=torch.uint8).to(self.device)

    def _send(self, to: int, tensor: Tensor) -> None:
        tensor = tensor.detach().contiguous()
        if tensor.numel():
            self.sent += tensor.numel() * tensor.element_size()
            self._waiting.append((dist.isend(tensor, group=self.group, group_dst=to), tensor))

    def _pull(self, source: int, size: int) -> Tensor:
        if self._expected is None:
            return self._receive(source, _Spec((size,), torch.uint8))
        (work, packed), self._expected = self._expected, None
        work.wait()
        return packed

    def _receive(self, source: int, spec: _Spec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        if tensor.numel():
            dist.recv(tensor, group=self.group, group_src=source)
        return tensor


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
