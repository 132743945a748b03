"""The simulation in three dimensions finds what the formulas say, on a small model."""

import re
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parallel_scale.py"


def test_stored_and_sent_as_the_formulas_say() -> None:
    mesh = ["--pipeline", "2", "--data", "4", "--tensor", "2"]
    shape = ["--width", "128", "--layers", "6", "--heads", "4", "--vocabulary", "512", "--length", "32"]
    done = subprocess.run([sys.executable, BENCHMARK, *mesh, *shape], capture_output=True, text=True, timeout=120)
    rows = re.findall(r"^\| (first|middle|last) +\|(.*)\|$", done.stdout, re.M)
    assert [stage for stage, _ in rows] == ["first", "middle", "last"], done.stderr
    for _, cells in rows:
        ratios = [float(cells.split("|")[column]) for column in (1, 3, 5)]
        assert all(0.99 < ratio < 1.01 for ratio in ratios), cells
