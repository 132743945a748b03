"""The benchmark of pipelines runs, and both send what the formulas say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "parallel_pipeline.py"


def test_bytes_are_those_of_the_formulas() -> None:
    command = [sys.executable, BENCHMARK, "2", "2", "--schedules", "zero_bubble"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r"^zero_bubble +(.*)$", done.stdout, re.M)
    assert found, done.stderr
    _, _, _, by_torch, last, to_torch, to_formula, every, to_formula_of_all = map(float, found[1].split())
    hidden = 2 * 4 * 256 * 4 / 1e3
    assert by_torch == 2 * hidden, "forth and back, over one border"
    assert every - last == pytest.approx(hidden - 0.004, abs=1e-3), "the output in place of a number"
    assert all(1 <= ratio < 1.02 for ratio in (to_torch, to_formula, to_formula_of_all))
