"""`accel config` as a user sees it: through a terminal, by the keys that they press."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml

from ..package_site import PackageSite

ENTER, UP, DOWN, SPACE, CTRL_C = "\r", "\x1b[A", "\x1b[B", " ", "\x03"

DEFAULTS = {"num_processes": 1, "mixed_precision": "fp32", "strategies": "ddp", "gradient_accumulation_steps": 1}

STRATEGY = """
from dataclasses import dataclass
from typing import Literal
from accel.config import setting
from accel.interfaces import Strategy

class Plugin(Strategy):
    '''Gossips with its neighbours.'''

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        '''Options.'''

        topology: Literal["ring", "tree"] = "ring"
        '''Who talks to whom.'''

        rounds: int = setting(2, minimum=1)
        '''How often in a step.'''

        secret: bool = False
        '''Whether others may listen.'''

        room: str
        '''Where they meet.'''
"""


class Session:
    """The wizard in a pseudo-terminal of 200 columns."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "accel.cli", "config", *arguments],
            env=environment,
            encoding="utf-8",
            dimensions=(50, 200),
            timeout=60,
        )

    def answer(self, question: str, keys: str = ENTER) -> None:
        """Wait until a text is on the screen, then press keys."""
        self.child.expect_exact(question)
        self.child.send(keys)

    def finish(self) -> int:
        """The exit code, once the wizard has ended."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)


@pytest.fixture
def without_torch(child_site: PackageSite) -> None:
    """Hide torch from the child processes: detection is then quick, and the questions are the same."""
    (child_site.folder / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")


@pytest.fixture
def session(config_path: Path, without_torch: None) -> Iterator[Session]:
    session = Session()
    yield session
    session.child.close(force=True)


@pytest.fixture
def existing(config_path: Path, without_torch: None) -> Path:
    """A file with settings that the wizard asks about, and some that it does not."""
    config_path.parent.mkdir(parents=True)
    config_path.write_text(
        "# mine\nproject_dir: runs\nnum_processes: 2\ndata_seed: 0\nmixed_precision: {fp16: {initial_scale: 1024}}\n"
        "strategies: {ddp: {bucket_size: 50}}\ngradient_accumulation_steps: 4\n"
    )
    return config_path


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


MACHINES, PROCESSES = "Machines that take part", "Worker processes over all machines"
PRECISION, STRATEGIES = "The numbers that forward", "How models are spread"
ACCUMULATION, OTHERS, REVIEW = "Micro-batches whose gradients", "Change other settings?", "Write this file?"
TENSOR = (
    "How layers are held",
    "Divide activations",
    "Leave the logits",
    "What an optimizer sees",
    "Inputs on which the model runs",
)


def test_enter_all_the_way(config_path: Path) -> None:
    session = Session()
    for question in (MACHINES, PROCESSES, PRECISION, ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    session.child.expect_exact("Start a run with: accel launch script.py")
    assert session.finish() == 0
    assert _read(config_path) == DEFAULTS
    assert "# Worker processes over all machines, one per device.\nnum_processes: 1\n" in config_path.read_text()


def test_bf16_on_two_processes_by_arrow_keys(session: Session, config_path: Path) -> None:
    session.answer(MACHINES)
    session.answer(PROCESSES, UP + ENTER)
    session.answer(PRECISION, DOWN + ENTER)
    session.answer(STRATEGIES)
    session.answer("Change options of ddp?")
    session.answer(ACCUMULATION, UP + UP + DOWN + ENTER)
    session.answer(OTHERS)
    session.answer(REVIEW)
    assert session.finish() == 0
    assert _read(config_path) == {
        **DEFAULTS,
        "num_processes": 2,
        "mixed_precision": "bf16",
        "gradient_accumulation_steps": 2,
    }


def test_options_of_a_plugin(session: Session, config_path: Path) -> None:
    session.answer(MACHINES)
    session.answer(PROCESSES)
    session.answer(PRECISION, DOWN + DOWN + ENTER)
    session.answer("Change options of fp16?", "y")
    session.answer("The loss scale to begin with", "1024" + ENTER)
    session.answer("What the scale is multiplied by after")
    session.answer("Steps without overflow before", DOWN + ENTER)
    session.answer("when gradients overflow")
    session.answer("The scale never falls below")
    session.answer("Overflows before the scale backs off")
    session.answer("Whether the scale changes", "n")
    session.answer(ACCUMULATION)
    session.answer(OTHERS)
    session.answer(REVIEW)
    assert session.finish() == 0
    assert _read(config_path)["mixed_precision"] == {
        "fp16": {"initial_scale": 1024, "growth_interval": 1999, "dynamic": False}
    }


def test_an_existing_file_gives_the_defaults(existing: Path, config_path: Path) -> None:
    before, session = existing.read_text(), Session()
    for question in (MACHINES, PROCESSES, PRECISION, "Change options of fp16?", STRATEGIES, "Change options of ddp?"):
        session.answer(question)
    session.answer(ACCUMULATION)
    session.answer(OTHERS)
    session.child.expect_exact("Nothing changed")
    assert session.finish() == 0
    assert existing.read_text() == before


def test_editing_keeps_what_is_not_asked_about(existing: Path) -> None:
    existing.write_text(existing.read_text() + "colour: red\n")
    session = Session()
    session.answer(MACHINES)
    session.answer(PROCESSES, UP + ENTER)
    for question in (PRECISION, "Change options of fp16?", STRATEGIES, "Change options of ddp?", ACCUMULATION, OTHERS):
        session.answer(question)
    session.child.expect_exact("colour: no such setting")
    session.answer(REVIEW, "y")
    assert session.finish() == 0
    assert _read(existing) == {
        "num_processes": 3,
        "mixed_precision": {"fp16": {"initial_scale": 1024}},
        "strategies": {"ddp": {"bucket_size": 50}},
        "gradient_accumulation_steps": 4,
        "data_seed": 0,
        "project_dir": "runs",
        "colour": "red",
    }


def test_a_value_that_makes_no_sense_is_asked_anew(config_path: Path, without_torch: None) -> None:
    config_path.parent.mkdir(parents=True)
    config_path.write_text("num_processes: four\nmixed_precision: 7\n")
    session = Session()
    session.child.expect_exact("num_processes: expected int, got 'four'; left out")
    for question in (MACHINES, PROCESSES, PRECISION, ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    assert session.finish() == 0
    assert _read(config_path) == DEFAULTS


@pytest.mark.parametrize("at", [MACHINES, REVIEW])
def test_ctrl_c_leaves_the_file_as_it_was(existing: Path, at: str) -> None:
    before, session = existing.read_text(), Session()
    if at == REVIEW:
        session.answer(MACHINES)
        session.answer(PROCESSES, UP + ENTER)
        for text in (PRECISION, "Change options of fp16?", STRATEGIES, "Change options of ddp?", ACCUMULATION, OTHERS):
            session.answer(text)
    session.answer(at, CTRL_C)
    session.child.expect_exact("Nothing was written")
    assert session.finish() == 130
    assert existing.read_text() == before
    assert list(existing.parent.iterdir()) == [existing]


def test_no_at_the_end_writes_nothing(session: Session, config_path: Path) -> None:
    for question in (MACHINES, PROCESSES, PRECISION, ACCUMULATION, OTHERS):
        session.answer(question)
    session.answer(REVIEW, "n")
    session.child.expect_exact("Nothing was written")
    assert session.finish() == 1
    assert not config_path.exists()


def test_a_wrong_answer_is_refused_at_once(session: Session, config_path: Path) -> None:
    session.answer(MACHINES)
    session.answer(PROCESSES, "0" + ENTER)
    session.answer("num_processes: must be at least 1, got 0", "\x7f" + "4" + ENTER)
    for question in (PRECISION, STRATEGIES, "Change options of ddp?"):
        session.answer(question)
    session.answer(ACCUMULATION, "two" + ENTER)
    session.answer("gradient_accumulation_steps: expected int, got 'two'", "\x7f\x7f\x7f" + "3" + ENTER)
    session.answer(OTHERS)
    session.answer(REVIEW)
    assert session.finish() == 0
    written = _read(config_path)
    assert (written["num_processes"], written["gradient_accumulation_steps"]) == (4, 3)


def test_several_machines_are_asked_how_they_meet(session: Session, config_path: Path) -> None:
    session.answer(MACHINES, UP + ENTER)
    session.answer("Which of the machines this is", "1" + ENTER)
    session.answer("Address of machine 0", "10.0.0.1" + ENTER)
    session.answer("Port on machine 0", "29500" + ENTER)
    for question in (PROCESSES, PRECISION, STRATEGIES, "Change options of ddp?", ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    assert session.finish() == 0
    written = _read(config_path)
    assert {name: written[name] for name in written if "machine" in name or "main" in name} == {
        "num_machines": 2,
        "machine_rank": 1,
        "main_process_ip": "10.0.0.1",
        "main_process_port": 29500,
    }
    assert written["num_processes"] == 2


def test_other_settings_are_chosen_from_a_list(session: Session, config_path: Path) -> None:
    for question in (MACHINES, PROCESSES, PRECISION, ACCUMULATION):
        session.answer(question)
    session.answer(OTHERS, "y")
    session.answer("Space marks, Enter goes on", SPACE + ENTER)
    session.answer("Shuffling is a function", "5" + ENTER)
    session.answer(REVIEW)
    assert session.finish() == 0
    assert _read(config_path) == {**DEFAULTS, "data_seed": 5}


def test_a_third_party_plugin_is_asked_about_like_any_other(
    child_site: PackageSite, config_path: Path, without_torch: None
) -> None:
    child_site.install("gossip-strategy", "strategy", "gossip", STRATEGY)
    session = Session()
    session.answer(MACHINES)
    session.answer(PROCESSES, "2" + ENTER)
    session.answer(PRECISION)
    session.answer("Gossips with its neighbours.", DOWN + ENTER)
    session.answer("Processes along this axis")  # a setting without default is missing, so there is no choice
    session.answer("Who talks to whom", DOWN + ENTER)
    session.answer("How often in a step", "0" + ENTER)
    session.answer("strategies.gossip.rounds: must be at least 1, got 0", "\x7f3" + ENTER)
    session.answer("Whether others may listen", "y")
    session.answer("Where they meet", "2024" + ENTER)
    for question in (ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    assert session.finish() == 0
    options = {"topology": "tree", "rounds": 3, "secret": True, "room": "2024"}
    assert _read(config_path)["strategies"] == {"gossip": options}


def test_other_axes_are_asked_about_where_that_is_wanted(config_path: Path, without_torch: None) -> None:
    session = Session()
    session.answer(MACHINES)
    session.answer(PROCESSES, "4" + ENTER)
    for question in (PRECISION, STRATEGIES, "Change options of ddp?", ACCUMULATION):
        session.answer(question)
    session.answer(OTHERS, "y")
    session.answer("Space marks, Enter goes on", UP + SPACE + ENTER)  # the last of them
    session.answer("strategies (tensor axis)", DOWN + ENTER)
    session.answer("Processes along this axis", "2" + ENTER)
    for question in (*TENSOR, REVIEW):
        session.answer(question)
    assert session.finish() == 0
    assert _read(config_path)["strategies"] == ["ddp", {"tensor": {"size": 2}}]


def test_axes_that_the_file_fills_are_asked_about(existing: Path) -> None:
    existing.write_text(
        "num_processes: 4\nmixed_precision: fp32\n"
        "strategies: [{tensor: {size: 2}}, ddp]\ngradient_accumulation_steps: 1\n"
    )
    before, session = existing.read_text(), Session()
    for question in (MACHINES, PROCESSES, PRECISION, "strategies (data axis)", "Change options of ddp?"):
        session.answer(question)
    session.answer("strategies (tensor axis)")
    for question in ("Processes along this axis", *TENSOR):
        session.answer(question)
    session.answer(ACCUMULATION)
    session.answer(OTHERS)
    session.child.expect_exact("Nothing changed")
    assert session.finish() == 0
    assert existing.read_text() == before


def test_a_broken_plugin_does_not_stop_the_wizard(
    child_site: PackageSite, config_path: Path, without_torch: None
) -> None:
    child_site.install("broken-precision", "precision", "broken", "raise RuntimeError('no such card')")
    session = Session()
    session.answer(MACHINES)
    session.answer(PROCESSES)
    session.child.expect_exact("RuntimeError: no such card")
    for question in (PRECISION, ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    assert session.finish() == 0


def test_without_torch_it_says_so_and_goes_on(session: Session, config_path: Path) -> None:
    session.answer(MACHINES)
    session.child.expect_exact("torch is not installed")
    for question in (PROCESSES, PRECISION, ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    assert session.finish() == 0
    assert _read(config_path) == DEFAULTS


def test_another_file(tmp_path: Path, config_path: Path, without_torch: None) -> None:
    file = tmp_path / "other.yaml"
    session = Session("--config_file", str(file))
    for question in (MACHINES, PROCESSES, PRECISION, ACCUMULATION, OTHERS, REVIEW):
        session.answer(question)
    session.child.expect_exact(f"accel launch --config_file {file} script.py")
    assert session.finish() == 0
    assert _read(file) == DEFAULTS
    assert not config_path.exists()
