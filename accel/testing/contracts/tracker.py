"""What a tracker promises: to take what loops log, in the order in which `Accelerator` calls it."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from .case import Case


def takes_a_whole_run(case: Case) -> None:
    """A run is started, logs numbers of all kinds with and without a step, and is finished, twice over."""
    with TemporaryDirectory() as folder:
        case.run(1, _log_run, case, folder)


def writes_only_into_its_folder(case: Case) -> None:
    """The working folder is as it was: what a tracker writes goes into the folder that it was given."""
    with TemporaryDirectory() as folder:
        [found] = case.run(1, _files_elsewhere, case, folder)
    assert found == [], f"in the working folder: {found}"


CONTRACTS = (takes_a_whole_run, writes_only_into_its_folder)


def _log_run(case: Case, folder: str) -> None:
    for run in ("first", "second"):
        tracker = case.make(Path(folder))
        tracker.start(run, {"lr": 1e-3, "name": "text", "nested": {"layers": [1, 2]}, "nothing": None})
        tracker.log({"loss": 1.5, "count": 3, "good": True}, 0)
        tracker.log({"loss": float("nan"), "worst": float("inf")}, 1)
        tracker.log({"note": "text"})
        tracker.finish()


def _files_elsewhere(case: Case, folder: str) -> list[str]:
    work, own = Path(folder, "work"), Path(folder, "own")
    work.mkdir()
    os.chdir(work)
    _log_run(case, str(own))
    return sorted(os.listdir(work))
