"""State of registered objects that only a pickle can hold, for those who ask for it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import CheckpointError

KEY = "__pickle__"
"""What such state is saved under: a tensor of bytes."""


class Pickled:
    """Stands for an object whose state is written as a pickle. Loading one can run any code that is in it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """The object's own, as bytes; raises CheckpointError for what not even pickle can hold."""
        try:
            data = pickle.dumps(self.value.state_dict())
        except Exception as error:
            name = type(self.value).__name__
            raise CheckpointError(f"{name}: its state cannot be pickled: {type(error).__name__}: {error}") from error
        return {KEY: torch.frombuffer(bytearray(data), dtype=torch.uint8)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what was saved with or without a pickle."""
        self.value.load_state_dict(pickle.loads(state[KEY].numpy().tobytes()) if set(state) == {KEY} else state)


def check_pickles(saved: list[Any], registered: list[Any]) -> None:
    """Raise CheckpointError where a pickle is to be loaded into an object that was registered without `pickle=True`."""
    for state, value in zip(saved, registered, strict=True):
        if isinstance(state, dict) and set(state) == {KEY} and not isinstance(value, Pickled):
            name = type(value).__name__
            raise CheckpointError(
                f"the state of the registered {name} was saved as a pickle, which can run code when it is loaded; if "
                "you trust the checkpoint, register it with register_for_checkpointing(..., pickle=True)"
            )
