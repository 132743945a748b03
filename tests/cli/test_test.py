"""`accel test`: a table of what works, and an exit code."""

from __future__ import annotations

import pytest

from accel.cli.main import main
from accel.testing import contracts
from accel.testing.contracts import checkpoint, tracker


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_one_row_for_each_plugin_and_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "tracker"]) == 0
    *table, summary = rows(capsys.readouterr().out)
    assert [row[:4] for row in table] == [
        ["tracker", "jsonl", "takes a whole run", "ok"],
        ["tracker", "jsonl", "writes only into its folder", "ok"],
    ]
    assert all(row[4].endswith(" s") for row in table)
    assert summary == ["2 ok"]


def test_skipped_rows_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "precision", "fp32"]) == 0
    skipped = [row for row in rows(capsys.readouterr().out) if "skipped" in row]
    assert [row[-1] for row in skipped] == ["does not scale the loss, so it skips no step"]


def broken(case: contracts.Case) -> None:
    raise AssertionError("promised 2, found 3\nand much more")


def raising(case: contracts.Case) -> None:
    raise OSError("disk full")


def test_a_broken_contract_is_told_and_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(contracts.CONTRACTS, "tracker", (broken, raising, *tracker.CONTRACTS))
    assert main(["test", "tracker"]) == 1
    table = rows(capsys.readouterr().out)
    assert table[0][3] == "failed" and table[0][-1] == "promised 2, found 3"
    assert table[1][3] == "failed" and table[1][-1] == "OSError: disk full"
    assert table[-1] == ["2 failed, 2 ok"]


def test_the_number_of_processes_is_honoured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setitem(contracts.CONTRACTS, "checkpoint", (lambda case: seen.append((case.sizes, case.device)),))
    assert main(["test", "checkpoint", "--num_processes", "4", "--device", "cpu"]) == 0
    assert main(["test", "checkpoint", "--num_processes", "1"]) == 0
    assert seen == [((1, 2, 4), "cpu"), ((1,), None)]
    assert checkpoint.CONTRACTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategy", "dpp"], "strategy: no strategy named 'dpp' is installed; there are: "),
        (["--num_processes", "0"], "num_processes: must be at least 1, got 0"),
        (["--device", "gpu"], "device: no device named 'gpu' is installed; there are: "),
    ],
)
def test_bad_input_is_one_message(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["test", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"accel: {message}")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--device", "cuda"]) == 2
    assert "device: cuda is not available on this machine" in capsys.readouterr().err
