"""What a loop asks of its process and of the others: who am I, only once, in turn, together."""

from __future__ import annotations

import builtins
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..errors import AccelError
from . import collectives
from .points import meeting
from .world import World

P = ParamSpec("P")
R = TypeVar("R")


class Process:
    """One process of a run: its place, and its dealings with the others.

    `world` is its place; `device` its device; `data_group()` gives the processes that see different batches.
    """

    world: World
    device: torch.device

    def data_group(self) -> ProcessGroup | None:
        """The processes that see different batches; None if there is only this one."""
        raise NotImplementedError

    @property
    def num_processes(self) -> int:
        """Processes in the run."""
        return self.world.size

    @property
    def process_index(self) -> int:
        """This process among all, from 0."""
        return self.world.rank

    @property
    def local_process_index(self) -> int:
        """This process among those of its machine, from 0."""
        return self.world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is process 0."""
        return self.world.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is process 0 of its machine."""
        return self.world.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the process with the highest index."""
        return self.world.rank == self.world.size - 1

    def print(self, *values: Any, **options: Any) -> None:
        """`print`, once on each machine."""
        if self.is_local_main_process:
            builtins.print(*values, **options)

    @meeting
    def wait_for_everyone(self) -> None:
        """Return once all processes have called this."""
        if self.num_processes > 1:
            dist.barrier()

    @meeting
    def gather(self, tensors: Any) -> Any:
        """Concatenate tensors over the processes, on all of them: [B, ...] -> [n * B, ...]; all ranks.

        Takes any nesting of tensors; a scalar becomes a vector. Raises CollectiveError where shapes or dtypes differ.
        """
        return collectives.gather(tensors, self.data_group())

    @meeting
    def reduce(self, tensors: Any, reduction: Literal["mean", "sum", "none"] = "sum", scale: float = 1.0) -> Any:
        """Sum or average tensors over the processes, on all of them, times `scale`; all ranks."""
        return collectives.reduce(tensors, self.data_group(), reduction, scale)

    @meeting
    def pad_across_processes(self, tensors: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Pad tensors along `dim` with `pad_index` to the longest of any process; all ranks."""
        return collectives.pad_across_processes(tensors, self.data_group(), dim, pad_index, pad_first)

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the body on the main process, then on the others; all ranks."""
        with self._first(self.is_main_process):
            yield

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Run the body on each machine's main process, then on the others; all ranks."""
        with self._first(self.is_local_main_process):
            yield

    @contextlib.contextmanager
    def _first(self, first: bool) -> Iterator[None]:
        if not first:
            self.wait_for_everyone()
        yield
        if first:
            self.wait_for_everyone()

    def on_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: the function runs on the main process only, and returns None elsewhere."""
        return _only(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: the function runs on each machine's main process only, and returns None elsewhere."""
        return _only(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorator: the function runs on the last process only, and returns None elsewhere."""
        return _only(function, lambda: self.is_last_process)

    def on_process(
        self, function: Callable[P, R] | None = None, process_index: int | None = None
    ) -> Callable[P, R | None] | Callable[[Callable[P, R]], Callable[P, R | None]]:
        """Decorator: the function runs on one process only, and returns None elsewhere."""
        if function is None:
            return functools.partial(self._on_process, index=self._checked(process_index, self.num_processes))
        return self._on_process(function, index=self._checked(process_index, self.num_processes))

    def _on_process(self, function: Callable[P, R], index: int) -> Callable[P, R | None]:
        return _only(function, lambda: self.process_index == index)

    def on_local_process(
        self, function: Callable[P, R] | None = None, local_process_index: int | None = None
    ) -> Callable[P, R | None] | Callable[[Callable[P, R]], Callable[P, R | None]]:
        """Decorator: the function runs on one process of each machine only, and returns None elsewhere."""
        index = self._checked(local_process_index, self.world.local_size)

        def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
            return _only(function, lambda: self.local_process_index == index)

        return decorate if function is None else decorate(function)

    @staticmethod
    def _checked(index: int | None, count: int) -> int:
        if index is None or not 0 <= index < count:
            raise AccelError(f"process index: expected one of 0 to {count - 1}, got {index}")
        return index

    @contextlib.contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This process's contiguous part of a list, tuple, tensor, or dict of them, in near-equal parts.

        The first processes get one more where it does not come out even. With `apply_padding` the last element
        is repeated so that all parts are as long as the first.
        """
        yield _part(inputs, self.process_index, self.num_processes, apply_padding)


def _only(function: Callable[P, R], allowed: Callable[[], bool]) -> Callable[P, R | None]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if allowed() else None

    return call


def _part(inputs: Any, index: int, count: int, pad: bool) -> Any:
    if isinstance(inputs, dict):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise AccelError(f"split_between_processes: the values of a dict must be equally long, got {lengths}")
        return {key: _part(value, index, count, pad) for key, value in inputs.items()}
    base, extra = divmod(len(inputs), count)
    start = index * base + min(index, extra)
    part = inputs[start : start + base + (index < extra)]
    missing = base + bool(extra) - len(part) if pad and len(inputs) else 0
    if not missing:
        return part
    last = inputs[-1:]
    return torch.cat([part, *[last] * missing]) if isinstance(part, Tensor) else part + last * missing
