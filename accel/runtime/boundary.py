"""Step boundaries: the instants at which a loop asks for its next batch and nothing of the last one is left to do.

A checkpoint holds no gradients. One that is saved amid an accumulation window is therefore that of the window's
start: weights and optimizers have not changed since, and the data and the random generators are put back there. The
alternative, keeping each process's sum of gradients, would cost as much as the weights and fit no other number of
processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .loader import PreparedLoader
from .random import generator_states


class Boundaries:
    """Notices step boundaries, and remembers where the accumulation window under way began.

    `active` are the loaders under way, outermost first, `loaders` all that were prepared. `window_open` tells
    whether gradients of a started window wait for their step; `reached` is called at each step boundary.
    """

    def __init__(
        self,
        active: Sequence[PreparedLoader],
        loaders: Sequence[PreparedLoader],
        device: torch.device,
        window_open: Callable[[], bool],
        reached: Callable[[], None] | None,
        remember: bool,
    ) -> None:
        self._active, self._loaders, self._device = active, loaders, device
        self._window_open, self._reached, self._remember = window_open, reached, remember
        self._trained: set[int] = set()
        """Positions of the loaders that were under way when an optimizer last stepped."""
        self._stepped = True
        self._start: tuple[Mapping[int, dict[str, Any]], dict[str, Any]] | None = None

    def stepped(self) -> None:
        """An optimizer has stepped."""
        self._stepped = True
        self._trained = {id(loader.position) for loader in self._active}

    def asked(self, loader: PreparedLoader) -> None:
        """A loader is asked for its next batch: a boundary, if it is the outermost and its batches train."""
        if self._window_open():
            return
        if self._remember and (self._stepped or not self._others_moved(loader)):
            self._take_note()
        if self._reached and self._active[:1] == [loader] and id(loader.position) in self._trained:
            self._trained = set()
            self._reached()

    def positions(self) -> list[Mapping[str, Any]]:
        """Where each prepared loader is to go on: its position, amid a window that at the window's start."""
        start = self._start[0] if self._start and self._window_open() else {}
        return [start.get(id(loader.position)) or loader.state_dict() for loader in self._loaders]

    def generators(self) -> dict[str, Any]:
        """The random generators to go on with: as they are, amid a window as at its start."""
        if self._start and self._window_open():
            return self._start[1]
        return generator_states(self._device)

    def forget(self) -> None:
        """The run goes on from elsewhere."""
        self._stepped, self._start, self._trained = True, None, set()

    def _others_moved(self, loader: PreparedLoader) -> bool:
        """Whether another loader under way has yielded since: in `zip(a, b)`, b is asked when a is a batch further."""
        noted = self._start[0] if self._start else {}
        others = (other for other in self._active if other is not loader)
        return any(other.state_dict() != noted.get(id(other.position)) for other in others)

    def _take_note(self) -> None:
        self._stepped = False
        positions = {id(loader.position): loader.state_dict() for loader in self._loaders}
        self._start = positions, generator_states(self._device)
