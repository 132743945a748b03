"""What a folder holds against what is prepared here: every difference by its key, with what to do about it."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ... import storage
from ...errors import CheckpointError
from ...interfaces import Place
from ...storage import Manifest

FOREIGN = {
    ".metadata": "torch's distributed checkpoint; read it with torch.distributed.checkpoint into an unprepared model",
    "pytorch_model.bin": "a pickled model; torch.load it and call model.load_state_dict before prepare()",
    "pytorch_model.bin.index.json": "a pickled model in parts; its own library can save it as safetensors",
    "latest": "DeepSpeed; its zero_to_fp32.py makes weights of it",
    "*mp_rank_*_states.pt": "a part of what DeepSpeed saved; its zero_to_fp32.py makes weights of the folder above",
    "trainer_state.json": "Hugging Face's Trainer; load_model() reads its weights if they are safetensors; the rest is "
    "pickled",
    "pytorch_model_fsdp*_rank*.bin": "a model that Hugging Face Accelerate pickled, a part from each process; let it "
    "load that and save with fsdp_state_dict_type: SHARDED_STATE_DICT",
    "pytorch_model_fsdp*.bin": "a model that Hugging Face Accelerate pickled; torch.load it and call "
    "model.load_state_dict before prepare()",
    "pytorch_model_fsdp_*": "sharded by Hugging Face Accelerate; accelerate merge-weights makes safetensors of it",
    "optimizer*.bin": "Hugging Face Accelerate; load_model() reads its weights if they are safetensors; "
    "the rest is pickled",
}
"""Patterns of files by which folders of other libraries are known, and what to do with them; the first counts."""


WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Files by which folders of weights are known."""


@dataclass
class Differences:
    """Keys that are here and not in the folder, those in the folder and not here, shapes and kinds that differ."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes or self.kinds)

    @property
    def untouched(self) -> list[str]:
        """Keys here that get no value from the folder."""
        return [*self.missing, *self.reshaped]

    @property
    def reshaped(self) -> list[str]:
        """Keys that have other shapes here."""
        return [description.partition(" ")[0] for description in self.shapes]

    def describe(self) -> str:
        """All of it in a sentence."""
        parts = {"missing": self.missing, "unexpected": self.unexpected, "other shapes": self.shapes}
        parts["other kinds"] = self.kinds
        return "; ".join(f"{title}: {_some(names)}" for title, names in parts.items() if names)

    def advice(self) -> str:
        """What would work."""
        for name in self.unexpected:
            prefix, _, rest = name.partition(".")
            if rest in self.missing:
                return f"keys there begin with {prefix + '.'!r}; save the model inside, or rename them"
            if close := difflib.get_close_matches(name, self.missing, n=1, cutoff=0.5):
                return f"was {name!r} renamed to {close[0]!r}? rename it in the file or in the model"
        for name in self.missing:
            prefix, _, rest = name.partition(".")
            if rest in self.unexpected:
                return f"keys here begin with {prefix + '.'!r}; load into the model inside"
        return "prepare what was saved, or pass strict=False to leave these as they are"


def compare(here: Mapping[str, Sequence[int]], places: Mapping[str, Place], same: Mapping[str, str]) -> Differences:
    """Shapes by name here, against a folder. `same` gives another name of what is known by two, as tied weights are."""
    found = {same.get(name, name) for name in places}
    return Differences(
        missing=[name for name in here if same.get(name, name) not in found],
        unexpected=[name for name in places if name not in here],
        shapes=[
            f"{name} is {tuple(places[name].entry.shape)}, here {tuple(shape)}"
            for name, shape in here.items()
            if name in places and places[name].entry.shape != tuple(shape)
        ],
    )


def foreign(folder: Path) -> str:
    """What a folder, or a file, seems to be if another library wrote it; empty if nothing is known."""
    names = os.listdir(folder) if folder.is_dir() else [folder.name]
    known = [what for pattern, what in FOREIGN.items() if fnmatch.filter(names, pattern)]
    if known:
        return f"this looks like {known[0]}"
    return "this is a file; name the folder of a model.safetensors" if folder.is_file() else ""


def other_names(folder: Path) -> str:
    """What to do about a folder of weights in files of other names; empty if it is none."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found or any((folder / name).exists() for name in WEIGHTS):
        return ""
    return f"it holds {_some(found)}; weights are read from model.safetensors, or what its index names"


def complete(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint; an error says what the folder may be instead. Raises CheckpointError."""
    try:
        return storage.complete(folder)
    except CheckpointError as error:
        hint = foreign(folder)
        if not hint and any((folder / name).exists() for name in WEIGHTS) and not (folder / "state.json").exists():
            hint = "it holds weights alone, which load_model() reads"
        raise CheckpointError(f"{error}; {hint}") if hint else error from None


def check_counts(folder: Path, saved: Mapping[str, int], here: Mapping[str, int]) -> None:
    """Raise CheckpointError unless the checkpoint was made with as many objects of each kind."""
    if saved != here:
        differences = ", ".join(f"{saved[k]} {k} (here {here[k]})" for k in here if saved[k] != here[k])
        raise CheckpointError(f"{folder}: holds {differences}; prepare the same objects before load_state")


def compare_kinds(folder: Path, saved: Sequence[str], here: Sequence[str], strict: bool) -> dict[int, Differences]:
    """Schedulers, by their places, that are of another class than those saved; raises CheckpointError if strict.

    Torch would take over any attributes, and go on with numbers that mean nothing.
    """
    pairs = enumerate(zip(saved, here, strict=True))
    differing = {index: Differences(kinds=[f"{was}, here {now}"]) for index, (was, now) in pairs if was != now}
    for differences in differing.values() if strict else ():
        raise CheckpointError(
            f"{folder}: holds the state of {differences.kinds[0]}; prepare the same schedulers in the same order, or "
            "pass strict=False to leave this one as it is"
        )
    return differing


def _some(names: Collection[str], most: int = 8) -> str:
    shown = ", ".join(list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
