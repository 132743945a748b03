"""How the processes agree about a checkpoint: on a group of their own, so that training is not disturbed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ...errors import AccelError, CheckpointError
from .. import collectives
from ..world import World

T = TypeVar("T")


class Exchange:
    """Messages among all processes over the host's network, also from another thread than the training's."""

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self._group: ProcessGroup | None = None

    def connect(self) -> None:
        """Make the group, once; all ranks, in the main thread."""
        if self._group is None and self.world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout))

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank; all ranks. Raises CheckpointError if a process is gone."""
        try:
            return collectives.gather_object(value, self._group)
        except RuntimeError as error:
            raise CheckpointError(f"a process was lost before the checkpoint was complete: {error}") from error

    def together(self, act: Callable[[], T], failure: type[CheckpointError] = CheckpointError) -> list[T]:
        """Let each rank act, and return every rank's result, which can be pickled; all ranks.

        If any of them fails, all raise `failure` with what went wrong where: nobody waits for who has failed.
        """
        return self._share(act, lambda result: result, failure)[1]

    def each(self, act: Callable[[], T]) -> T:
        """Let each rank act, and return its own result; all ranks. Errors as in `together`."""
        return self._share(act, lambda result: None, CheckpointError)[0]

    def from_main(self, act: Callable[[], T], failure: type[CheckpointError] = CheckpointError) -> T:
        """Let rank 0 act, and return its result on all ranks; errors as in `together`."""
        return self.together(lambda: act() if self.world.rank == 0 else None, failure)[0]  # type: ignore[return-value]

    def fill(self, state: dict[str, Any]) -> None:
        """Replace tensors on the meta device by CPU copies of those of the first process that has them; all ranks."""
        holders = self.gather(
            {name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta}
        )
        for name, value in state.items():
            having = [rank for rank, names in enumerate(holders) if name in names]
            if having and len(having) < len(holders):
                state[name] = torch.empty_like(value, device="cpu") if value.is_meta else value
                dist.broadcast(state[name], group=self._group, group_src=having[0])

    def _share(
        self, act: Callable[[], T], told: Callable[[T], Any], kind: type[CheckpointError]
    ) -> tuple[T, list[Any]]:
        outcome: list[T] = []
        failure, cause = "", None
        try:
            outcome.append(act())
        except Exception as error:  # noqa: BLE001 - it is raised on all ranks
            known = isinstance(error, AccelError)
            cause, failure = error, str(error) if known else f"{type(error).__name__}: {error}"
        outcomes = self.gather((None if failure else told(outcome[0]), failure))
        failures = {rank: text for rank, (_, text) in enumerate(outcomes) if text}
        if not failures:
            return outcome[0], [value for value, _ in outcomes]
        if len(set(failures.values())) == 1:
            raise kind(next(iter(failures.values()))) from cause
        raise kind("; ".join(f"rank {rank}: {text}" for rank, text in failures.items())) from cause
