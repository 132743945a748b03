"""`accel.logging`: a message once, on each process, or on each in turn."""

from __future__ import annotations

import io
import logging

import pytest

from accel import ConfigError, PartialState
from accel.logging import get_logger
from accel.testing import run


def speak() -> str:
    state = PartialState(cpu=True)
    stream = io.StringIO()
    logger = get_logger("accel.test.logging", log_level="info")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(filename)s %(funcName)s %(message)s"))
    logger.logger.addHandler(handler)
    logger.info("once %d", state.process_index)
    logger.warning("each %d", state.process_index, main_process_only=False)
    logger.info("in turn %d", state.process_index, main_process_only=False, in_order=True)
    logger.debug("too quiet", main_process_only=False)
    return stream.getvalue()


def test_who_speaks() -> None:
    first, second = run(2, speak, env={"ACCEL_NUM_PROCESSES": "2"})
    here = "test_logging.py speak"
    assert first.splitlines() == [f"{here} once 0", f"{here} each 0", f"{here} in turn 0"]
    assert second.splitlines() == [f"{here} each 1", f"{here} in turn 1"]


def log_in_turn(path: str) -> None:
    state = PartialState(cpu=True)
    logger = get_logger("accel.test.logging", log_level="INFO")
    logger.logger.addHandler(logging.FileHandler(path))
    for _ in range(20):
        logger.info("%d", state.process_index, main_process_only=False, in_order=True)


def test_messages_in_order_of_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "all.log"
    run(2, log_in_turn, str(path), env={"ACCEL_NUM_PROCESSES": "2"})
    assert path.read_text().split() == ["0", "1"] * 20


def test_alone_and_with_extra(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("accel.test.alone", log_level=logging.DEBUG)
    logger.debug("hello %s", "you", extra={"run": 7}, in_order=True, main_process_only=False)
    (record,) = caplog.records
    assert (record.getMessage(), record.run, record.funcName) == ("hello you", 7, "test_alone_and_with_extra")


@pytest.mark.parametrize("level", ["loud", [1]])
def test_levels_that_are_none(level: object) -> None:
    with pytest.raises(ConfigError, match=r"log_level: .* is no level; there are: .*DEBUG"):
        get_logger("accel.test.none", log_level=level)  # type: ignore[arg-type]
