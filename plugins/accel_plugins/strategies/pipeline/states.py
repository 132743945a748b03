"""What a model's forward changes besides making an output: buffers, and numbers that its modules keep.

A part runs once for each micro-batch. The model's own forward runs for each on every stage, then at the end once for
the whole batch: what it changes there counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accel.errors import PrepareError
from accel.runtime.collectives import broadcast_in_place
from accel.runtime.example import numbers_of, tried_out

from .batches import Batch

_Value = Tensor | float


@dataclass(frozen=True)
class Changes:
    """Names of buffers that a forward changes: those of parts with their part, and those of the model's own forward."""

    parts: Mapping[str, str] = field(default_factory=dict)
    own: Sequence[str] = ()


def find_changes(model: nn.Module, parts: Iterable[str], batch: Batch, once: bool) -> Changes:
    """What a forward of an example changes, in the mode that the model is in; called by each rank on its own.

    `once` says whether parts run once in a step. Raises PrepareError for what would not be changed as on one process.
    """
    before = _values(model)
    after = _after(model, batch, None)
    changed = {name: _part_of(name, parts) for name, value in after.items() if not _same(value, before.get(name))}
    if changed:
        again, of_some = _after(model, batch, None, times=2), _after(model, batch, 0)
        for name, part in changed.items():
            counts, depends = (not _same(after[name], other.get(name)) for other in (again, of_some))
            reason = _objection(isinstance(after[name], Tensor), bool(part), counts, depends and batch.count > 1, once)
            if reason:
                raise PrepareError(f"prepare: pipeline cannot train this {type(model).__name__}: {name!r} {reason}")
    buffers = {name: part for name, part in changed.items() if isinstance(after[name], Tensor)}
    return Changes({n: part for n, part in buffers.items() if part}, [n for n, part in buffers.items() if not part])


def _objection(is_buffer: bool, in_part: bool, counts: bool, depends: bool, once: bool) -> str | None:
    """Why a value would not become what it does on one process; None if it would."""
    if in_part and not once and (counts or depends):
        return (
            "is changed by each forward of its module, which runs for each micro-batch; set micro_batches: 1 with "
            "schedule: gpipe"
        )
    if not in_part and not is_buffer and (counts or depends):
        return "is changed by the model's own forward, which every stage runs; make it a buffer (register_buffer)"
    if not in_part and depends:
        return (
            "is computed from the batch by the model's own forward, which runs for each micro-batch; set "
            "micro_batches: 1, or compute it in a module with parameters"
        )
    return None


class OwnBuffers:
    """The buffers that the model's own forward changes."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        split = [name.rpartition(".") for name in names]
        self._places = [(model.get_submodule(path)._buffers, name) for path, _, name in split]

    def copies(self) -> list[Tensor]:
        """Their values as they are now."""
        return [place[name].clone() for place, name in self._places]  # type: ignore[union-attr]

    @contextmanager
    def as_of(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Inside, they have these values; what is done to them there is forgotten."""
        held = [place[name] for place, name in self._places]
        for (place, name), value in zip(self._places, values, strict=True):
            place[name] = value.clone()
        try:
            yield
        finally:
            for (place, name), buffer in zip(self._places, held, strict=True):
                place[name] = buffer

    def share(self, group: dist.ProcessGroup, source: int) -> None:
        """Give all processes those of one, the rank `source` of the group; all ranks of it."""
        if self._places:
            broadcast_in_place([place[name] for place, name in self._places], group, source)  # type: ignore[misc]


def _after(model: nn.Module, batch: Batch, index: int | None, times: int = 1) -> dict[str, _Value]:
    """What is kept after so many forwards of a micro-batch, or of all."""
    args, kwargs = batch.arguments(batch.values(index))
    with tried_out(model), torch.no_grad():
        for _ in range(times):
            model(*args, **kwargs)
        return _values(model)


def _values(model: nn.Module) -> dict[str, _Value]:
    """Copies of all buffers and numbers that modules keep, by name."""
    found: dict[str, _Value] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for path, module in model.named_modules():
        found |= {f"{path}.{name}" if path else name: value for name, value in numbers_of(module).items()}
    return found


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def _part_of(name: str, parts: Iterable[str]) -> str:
    return next((part for part in parts if name.startswith(f"{part}.")), "")
