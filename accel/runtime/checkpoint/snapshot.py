"""What is copied when, for a checkpoint that is written behind the training.

Before `save_state` returns: weights, buffers and all that is small, since a loop may change them at any moment. Behind
the next forward and backward pass: the state of optimizers, most of the bytes, which nothing but their steps changes.
A step that comes earlier waits, and so does who asks a prepared optimizer for its `state`. What is changed by other
means, through a tensor that somebody has kept, torch has counted: then the checkpoint is not written. The idea is that
of DataStates-LLM (Maurya et al. 2024).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import CheckpointError
from ..optimizer import OptimizerPart, optimizer_part
from .contents import State, group_of
from .memory import LARGE, copy_bytes, fresh
from .write import Piece, Work, size_of

WORTH = 1 << 18
"""The least bytes of a piece that is copied later: to keep an eye on a smaller one takes longer than to copy it."""


class Snapshot:
    """Copies of what this process writes of one checkpoint. `buffers` is memory that is kept from one to the next."""

    def __init__(self, state: State, buffers: dict[str, Tensor]) -> None:
        self._state, self._buffers = state, buffers
        self._parts: dict[str, OptimizerPart] = {}
        for index, optimizer in enumerate(state.optimizers):
            if part := optimizer_part(optimizer):
                self._parts[group_of("optimizer", index)] = part
        self._later: list[tuple[Piece, Tensor, Tensor, tuple[int, ...]]] = []
        """Of each piece that is copied later: its copy, its bytes, and how often they have been changed."""

        self._done = threading.Event()

    def take(self, work: Work) -> None:
        """Copy what may change at any moment, and note the rest; another call begins anew."""
        later = set(map(id, self._able_to_wait(work.pieces)))
        pieces = [piece for piece in work.pieces if id(piece) in later]
        self.copy("now", [piece for piece in work.pieces if id(piece) not in later])
        self._later = [
            (piece, copy, piece.bytes(), _changes(piece.tensor)) for piece, copy in self._place("later", pieces)
        ]

    def copy(self, kind: str, pieces: Sequence[Piece]) -> None:
        """Copy pieces at once."""
        ready = []
        for piece, copy in self._place(kind, pieces):
            if len(copy) >= LARGE and piece.is_ready:
                ready.append((copy, piece.bytes()))
            else:
                copy.copy_(piece.bytes())
            piece.copy = copy
        if ready:
            copy_bytes(ready)

    def hold(self) -> None:
        """Let nobody change what is still to be copied, until `complete` has copied it."""
        for group in {piece.duty.held.group for piece, *_ in self._later}:
            self._parts[group].hold(self._done.wait)

    def complete(self, begin: Callable[[], object]) -> None:
        """Copy the rest, once `begin` returns; in the thread behind the training.

        Raises CheckpointError if it has been changed meanwhile, and what `begin` raises.
        """
        try:
            begin()
            for piece, copy, source, _ in self._later:
                copy_later(copy, source)
                piece.copy = copy
            changed = [piece for piece, _, _, before in self._later if _changes(piece.tensor) != before]
        finally:
            self._done.set()
        if changed:
            held = changed[0].duty.held
            raise CheckpointError(
                f"{held.group}: {held.entry.name} was changed while it was copied behind the training, by other means "
                "than its optimizer's step; change it before save_state(), or save with blocking=True"
            )

    def _place(self, kind: str, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Tensor]]:
        """Memory for the copy of each; it is kept for the next time, as fresh memory costs more than the copy."""
        size, done = size_of(pieces), 0
        if kind not in self._buffers or len(self._buffers[kind]) != size:
            self._buffers.pop(kind, None)
            self._buffers[kind] = fresh((size,), torch.uint8)
        buffer = self._buffers[kind]
        for piece in pieces:
            length = piece.duty.stop - piece.duty.start
            yield piece, buffer[done : done + length]
            done += length

    def _able_to_wait(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Those that only an optimizer's step changes, and that are worth it.

        That holds in the host's memory alone: a device may still be at work on what was asked of it before, and may
        begin what is asked of it later.
        """
        taken = {None, *map(_address, self._changing())}
        return [
            piece
            for piece in pieces
            if piece.duty.held.group in self._parts
            and piece.duty.stop - piece.duty.start >= WORTH
            and piece.is_ready
            and _changes(piece.tensor)
            and _address(piece.tensor) not in taken
        ]

    def _changing(self) -> Iterator[Tensor]:
        """Weights, buffers and gradients: state that shares their memory changes with them."""
        for model in self._state.models:
            yield from model.parameters()
            yield from model.buffers()
        for part in self._parts.values():
            for parameter in part.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad


def copy_later(copy: Tensor, source: Tensor) -> None:
    """Copy bytes without keeping Python from running."""
    np.copyto(copy.numpy(), source.numpy())


def _layers(tensor: Tensor) -> list[Tensor]:
    """A tensor, and what a DTensor holds: an operation on either leaves the other's count of changes as it was."""
    return [tensor, tensor._local_tensor] if isinstance(tensor, DTensor) else [tensor]


def _changes(tensor: Tensor) -> tuple[int, ...]:
    """How often a tensor has been changed in place; empty if torch does not count."""
    layers = _layers(tensor)
    return () if any(layer.is_inference() for layer in layers) else tuple(layer._version for layer in layers)


def _address(tensor: Tensor) -> int | None:
    """Where the memory begins that a tensor shares with its views; None for one that is made of others."""
    inner = _layers(tensor)[-1]
    plain = inner.layout is torch.strided and not hasattr(inner, "__tensor_flatten__")
    return inner.untyped_storage().data_ptr() if plain else None
