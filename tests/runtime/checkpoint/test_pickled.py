"""What only a pickle can hold is kept when it is asked for by name, and never otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from accel import Accelerator
from accel.errors import CheckpointError


@dataclasses.dataclass
class Score:
    """What no plain state can hold."""

    best: float


class Keeper:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["kept"]


def registered(state: Any, **options: Any) -> tuple[Accelerator, Keeper]:
    accelerator, keeper = Accelerator(), Keeper(state)
    accelerator.register_for_checkpointing(keeper, **options)
    return accelerator, keeper


def test_it_is_refused_by_default(tmp_path: Path) -> None:
    accelerator, _ = registered(Score(1.0))
    with pytest.raises(CheckpointError, match=r"^Keeper: registered\.0\.kept: a .*Score cannot.*pickle=True"):
        accelerator.save_state(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_it_is_kept_if_asked_for_and_loaded_only_then(tmp_path: Path) -> None:
    accelerator, _ = registered(Score(1.0), pickle=True)
    accelerator.save_state(tmp_path / "c")
    other, keeper = registered(None)
    with pytest.raises(CheckpointError, match=r"registered Keeper was saved as a pickle.*pickle=True"):
        other.load_state(tmp_path / "c")
    assert keeper.state is None
    trusting, keeper = registered(None, pickle=True)
    trusting.load_state(tmp_path / "c")
    assert keeper.state == Score(1.0)


def test_what_was_saved_without_loads_with(tmp_path: Path) -> None:
    registered(3)[0].save_state(tmp_path / "c")
    accelerator, keeper = registered(None, pickle=True)
    accelerator.load_state(tmp_path / "c")
    assert keeper.state == 3


def test_what_not_even_a_pickle_holds(tmp_path: Path) -> None:
    accelerator, _ = registered(lambda: None, pickle=True)
    with pytest.raises(CheckpointError, match="Keeper: its state cannot be pickled"):
        accelerator.save_state(tmp_path / "c")
