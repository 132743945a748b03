"""Messages between processes: forth along the stages, gradients back, and the output from the last to all.

A message is three numbers, a text where it differs from the last on this way, and its tensors. The text tells the
shapes, so that they may change from one micro-batch to the next; while they do not, a message is its tensors and
24 bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .message import Failure

_SAME, _NEW, _FAILED = range(3)


class _Spec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


class Wire:
    """The processes along the pipeline. `sent` counts the bytes that this one has sent to others."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.sent = 0
        self._waiting: list[tuple[Any, Tensor]] = []
        self._texts: dict[Any, bytes] = {}

    def send(self, to: int, way: Any, text: Any, tensors: Sequence[Tensor], seed: int = 0) -> None:
        """Send tensors and what is to be said of them; `way` names the kind of message, alike on both ends."""
        said = pickle.dumps((text, [_Spec(tuple(t.shape), t.dtype) for t in tensors]))
        header, body = self._header(("out", to, way), said, seed)
        for tensor in [header, *body, *tensors]:
            self._send(to, tensor)

    def fail(self, to: int, failure: Failure) -> None:
        """Send, instead of a message, that there is none."""
        body = self._bytes(failure.text.encode())
        self._send(to, self._numbers(_FAILED, body.numel(), 0))
        self._send(to, body)

    def receive(self, source: int, way: Any) -> tuple[Any, list[Tensor], int] | Failure:
        """What was said, the tensors and the seed; or that the stage failed."""
        kind, length, seed = self._receive(source, _Spec((3,), torch.int64)).tolist()
        body = bytes(self._receive(source, _Spec((length,), torch.uint8)).tolist()) if length else b""
        if kind == _FAILED:
            return Failure(body.decode())
        text, specs = pickle.loads(self._remember(("in", source, way), body))
        return text, [self._receive(source, spec) for spec in specs], seed

    def send_gradients(self, to: int, gradients: Sequence[Tensor | None]) -> None:
        """Send the gradients of tensors that were received from there; None where there is none."""
        if gradients:
            self._send(to, torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=self.device))
            for gradient in gradients:
                if gradient is not None:
                    self._send(to, gradient)

    def receive_gradients(self, source: int, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of tensors that were sent there."""
        if not tensors:
            return []
        flags = self._receive(source, _Spec((len(tensors),), torch.uint8)).tolist()
        return [
            self._receive(source, _Spec(tuple(t.shape), t.dtype)) if flag else None
            for flag, t in zip(flags, tensors, strict=True)
        ]

    def send_tensor(self, to: int, tensor: Tensor) -> None:
        """Send one tensor, of which the other knows the shape."""
        self._send(to, tensor)

    def receive_tensor(self, source: int, like: Tensor) -> Tensor:
        """Receive one tensor of the shape and dtype of another."""
        return self._receive(source, _Spec(tuple(like.shape), like.dtype))

    def broadcast(self, source: int, text: Any, tensors: Sequence[Tensor], failure: Failure | None) -> Any:
        """What `source` brings, on all: text and tensors, or its failure; all processes along the pipeline."""
        mine = self.group.rank() == source
        header, body = self._numbers(0, 0, 0), list[Tensor]()
        if mine and failure is None:
            said = pickle.dumps((text, [_Spec(tuple(t.shape), t.dtype) for t in tensors]))
            header, body = self._header(("broadcast",), said, 0)
        elif mine and failure is not None:
            body = [self._bytes(failure.text.encode())]
            header = self._numbers(_FAILED, body[0].numel(), 0)
        kind, length, _ = self._broadcast(source, header).tolist()
        said = b""
        if length:
            found = self._broadcast(
                source, body[0] if mine else torch.empty(length, dtype=torch.uint8, device=self.device)
            )
            said = bytes(found.tolist())
        if kind == _FAILED:
            return Failure(said.decode())
        text, specs = pickle.loads(self._remember(("broadcast",), said))
        if not mine:
            tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in specs]
        return text, [self._broadcast(source, tensor) for tensor in tensors]

    def finish(self) -> None:
        """Wait until everything has been sent."""
        for work, _ in self._waiting:
            work.wait()
        self._waiting.clear()

    def _header(self, way: Any, said: bytes, seed: int) -> tuple[Tensor, list[Tensor]]:
        if self._texts.get(way) == said:
            return self._numbers(_SAME, 0, seed), []
        self._texts[way] = said
        return self._numbers(_NEW, len(said), seed), [self._bytes(said)]

    def _remember(self, way: Any, said: bytes) -> bytes:
        if said:
            self._texts[way] = said
        return self._texts[way]

    def _numbers(self, kind: int, length: int, seed: int) -> Tensor:
        return torch.tensor([kind, length, seed], dtype=torch.int64, device=self.device)

    def _bytes(self, said: bytes) -> Tensor:
        return torch.frombuffer(bytearray(said), dtype=torch.uint8).to(self.device)

    def _send(self, to: int, tensor: Tensor) -> None:
        tensor = tensor.detach().contiguous()
        if tensor.numel():
            self.sent += tensor.numel() * tensor.element_size()
            self._waiting.append((dist.isend(tensor, group=self.group, group_dst=to), tensor))

    def _receive(self, source: int, spec: _Spec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        if tensor.numel():
            dist.recv(tensor, group=self.group, group_src=source)
        return tensor

    def _broadcast(self, source: int, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        if tensor.numel():
            if self.group.rank() == source:
                self.sent += tensor.numel() * tensor.element_size()
            dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor
