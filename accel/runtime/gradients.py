"""When gradients are exchanged and when optimizers step: windows of micro-batches.

A window is the `gradient_accumulation_steps` micro-batches whose gradients make one optimizer step; the end of
the loader cuts it short. Because a prepared loader looks ahead, the number of micro-batches in a window is known
when the window begins, so each loss can be divided by it at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import nn


class Source(Protocol):
    """What a window needs to know of the loader that feeds it."""

    @property
    def remaining(self) -> int:
        """Batches left in the epoch, the current one included; exact up to the length of a window."""


class Window:
    """Counts the micro-batches of one accumulation window. `sources` are the loaders under way, innermost last."""

    def __init__(self, length: int, sources: Sequence[Source]) -> None:
        self.length, self.sources = length, sources
        self.held = 0
        self._planned = length

    @property
    def planned(self) -> int:
        """Micro-batches that the window under way will hold."""
        return self._planned if self.held else min(self.length, self._remaining())

    def closes_with(self, micro_batch: int) -> bool:
        """Whether the window ends with its `micro_batch`-th micro-batch, counted from 1."""
        return micro_batch >= self.planned or self._remaining() == 1

    def add(self) -> None:
        """Count one more micro-batch."""
        self._planned = self.planned
        self.held += 1

    def restart(self) -> None:
        """Begin a new window with the next micro-batch."""
        self.held = 0

    def _remaining(self) -> int:
        return self.sources[-1].remaining if self.sources else self.length


class ExplicitWindow(Window):
    """The window that the loop itself counts with `with accelerator.accumulate(model):`."""

    def __init__(self, length: int, sources: Sequence[Source]) -> None:
        super().__init__(length, sources)
        self.entries = 0
        self.inside = False
        self._closed = True

    @property
    def closing(self) -> bool:
        """Whether the micro-batch under way closes the window."""
        return self.closes_with(self.held)

    @property
    def open(self) -> bool:
        """Whether micro-batches were counted that no step has used."""
        return self.held > 0 and not self._closed

    def abandon(self) -> None:
        """Forget the window under way."""
        self._closed = True

    def enter(self) -> bool:
        """A micro-batch begins; returns whether a window begins with it."""
        if self._closed:
            self.restart()
        self.add()
        self._closed = self.closing
        self.entries += 1
        self.inside = True
        return self.held == 1

    def leave(self) -> None:
        """The micro-batch ends."""
        self.inside = False


class Arrivals:
    """Notices gradients that reach a model outside `Accelerator.backward`.

    The hook is a builtin: it costs about a third of a microsecond a parameter. FSDP2 calls it for its shards too.
    """

    def __init__(self) -> None:
        self._seen: deque[nn.Parameter] = deque(maxlen=1)

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """Notice gradients of these parameters from now on."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._seen.append)  # type: ignore[no-untyped-call]

    def __bool__(self) -> bool:
        return bool(self._seen)

    def clear(self) -> None:
        """Forget what has arrived so far."""
        self._seen.clear()
