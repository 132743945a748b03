"""Each contract fails on a plugin that breaks it, and holds for a sound one from a package of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel import registry
from accel.testing import contracts

from ..package_site import PackageSite, on_path

PLUGINS = '''
"""Plugins that break one promise each, and one strategy that breaks none."""
import os, sys
from contextlib import nullcontext
from pathlib import Path

from accel.interfaces import Checkpoint, Device, File, Launcher, Memory, Place, Precision, Strategy, Support, Tracker
from accel.config import Choice


class Sound(Strategy):
    """Averages gradients by hand, as late as it can."""

    def setup(self, model):
        import torch.distributed as dist

        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0, group=self.mesh.group)

    def after_backward(self, model, exchange):
        import torch
        import torch.distributed as dist

        if exchange:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    dist.all_reduce(gradient, group=self.mesh.group)
                    parameter.grad = gradient / self.mesh.size


class Forgetful(Strategy):
    """Exchanges nothing."""


class Restless(Strategy):
    """Starts from other weights every time."""

    def setup(self, model):
        import torch

        with torch.no_grad():
            next(model.parameters()).add_(int.from_bytes(os.urandom(2), "big"))


class Refuser(Strategy):
    """Runs nowhere."""

    @classmethod
    def check(cls, options, size):
        from accel.errors import ConfigError

        raise ConfigError("size: never enough")


class Doubling(Precision):
    """Forgets to undo its loss scale."""

    def scale(self, loss):
        return loss * 2


class Pretender(Precision):
    """Says bfloat16 and computes in float32."""

    dtype = "bfloat16"


class Halving(Precision):
    """Hands bfloat16 to the loop."""

    def output(self, value):
        return value.bfloat16()


class Reckless(Precision):
    """Steps on overflow."""

    scales_loss = True


class Amnesiac(Precision):
    """Forgets its state."""

    def state_dict(self):
        return {"id": id(self)}


class Boaster(Device):
    """Claims more memory in use than there is, and a type that it does not drive."""

    type = "meta"
    shared = True
    priority = -1

    @classmethod
    def count(cls):
        return 1

    def select(self, local_rank):
        import torch

        return torch.device("cpu")

    def support(self, dtype):
        return Support.EMULATED

    def memory(self):
        return Memory(2, 2, 1)


class Deaf(Launcher):
    """Starts nothing and is content."""

    def launch(self, command, config):
        return 0


class Lossy(Checkpoint):
    """Lays all tensors over one another, and takes any folder for a checkpoint."""

    def layout(self, group, entries, max_shard_size):
        places = tuple(Place(entry, group, 0, 60) for entry in entries)
        return [File(group, b"", 60, places)]

    def places(self, folder, group):
        return {}


class Littering(Tracker):
    """Writes wherever it is, and takes no text."""

    def log(self, values, step=None):
        Path("log.txt").write_text(str(values))


class Numeric(Tracker):
    """Takes no text."""

    def log(self, values, step=None):
        float(next(iter(values.values())))
'''

BROKEN = {
    "strategy": {
        "forgetful": ["trains_as_one_process_does"],
        "restless": ["trains_as_one_process_does", "repeats_bitwise", "saves_on_n_and_loads_on_m"],
    },
    "precision": {
        "doubling": ["gradients_are_within_its_tolerance"],
        "pretender": ["computes_in_its_dtype"],
        "halving": ["loop_sees_float32"],
        "reckless": ["overflow_skips_the_step_on_every_rank"],
        "amnesiac": ["state_survives_a_checkpoint"],
    },
    "device": {"boaster": ["drives_its_device", "computes_in_the_dtypes_it_supports", "measures_memory"]},
    "launcher": {"deaf": ["gives_workers_their_place", "ends_the_rest_at_the_first_failure"]},
    "checkpoint": {
        "lossy": [
            "gives_back_the_same_bytes",
            "gives_every_byte_one_place",
            "refuses_a_folder_without_a_checkpoint",
            "refuses_a_file_cut_short",
        ]
    },
    "tracker": {"littering": ["writes_only_into_its_folder"], "numeric": ["takes_a_whole_run"]},
}


@pytest.fixture
def kind() -> str:
    return "strategy"


@pytest.fixture
def installed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugins of a kind, installed as a package of their own: a module and its entry points on the import path."""
    site = PackageSite(tmp_path)
    (tmp_path / "broken_plugins.py").write_text(PLUGINS)
    names = [*BROKEN[kind], *(["sound", "refuser"] if kind == "strategy" else [])]
    points = "".join(f"{name} = broken_plugins:{name.capitalize()}\n" for name in names)
    site.register("broken-plugins", f"[{registry.INTERFACES[kind][0]}]\n{points}")
    if kind == "tracker":
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")  # which `littering` litters
    with on_path(site, monkeypatch):
        yield
    sys.modules.pop("broken_plugins", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "name", "contract"),
    [(kind, name, contract) for kind in BROKEN for name in BROKEN[kind] for contract in BROKEN[kind][name]],
)
def test_contract_fails_on_a_plugin_that_breaks_it(kind: str, name: str, contract: str) -> None:
    [case] = [case for case in contracts.cases(kind, name) if case.contract.__name__ == contract]
    with pytest.raises(ValueError if name == "numeric" else AssertionError):
        case.check()


def test_every_contract_is_broken_by_some_plugin() -> None:
    broken = {contract for plugins in BROKEN.values() for names in plugins.values() for contract in names}
    every = {contract.__name__ for promises in contracts.CONTRACTS.values() for contract in promises}
    assert every - broken == {"counts_without_initialising"}  # which takes a GPU to break


@pytest.mark.usefixtures("installed")
def test_strategy_of_another_package_keeps_the_contracts() -> None:
    cases = contracts.cases("strategy", "sound")
    assert [case.name for case in cases] == ["sound"] * 3
    for case in cases:
        case.check()


@pytest.mark.usefixtures("installed")
def test_strategy_that_refuses_everything_is_skipped_with_its_reason() -> None:
    reasons: list[str] = []
    contracts.check(contracts.cases("strategy", "refuser")[0], skip=reasons.append)
    assert reasons == ["refuses: strategies.refuser.size: never enough"]
