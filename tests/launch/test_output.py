"""Output with the rank in front of each line."""

from __future__ import annotations

from collections import Counter

import pytest

from .conftest import Launch

OPTIONS = ["{preload: false, prefix: true}", "{preload: false, prefix: true, start: exec}"]


@pytest.mark.parametrize("options", OPTIONS)
def test_rank_before_each_line(launch: Launch, options: str) -> None:
    script = launch.script(
        "for i in range(300): print(i, 'x' * 300)\nsys.stderr.write('10%\\r\\r20%\\n')\nsys.stdout.write('end')\n"
    )
    result = launch.run("--cpu", "--num_processes", "2", "--launcher", f"{{local: {options}}}", script)
    expected = Counter([f"[{rank}] {i} {'x' * 300}" for rank in (0, 1) for i in range(300)] + ["[0] end", "[1] end"])
    assert result.returncode == 0
    assert Counter(result.stdout.splitlines()) == expected
    for rank in (0, 1):
        assert f"[{rank}] 10%" in result.stderr and f"[{rank}] 20%\n" in result.stderr
    assert result.stderr.count("[") == 4


def test_report_follows_the_output(launch: Launch) -> None:
    script = launch.script("print('said', file=sys.stderr)\nsys.exit(3)\n")
    result = launch.run("--cpu", "--launcher", "{local: {preload: false, prefix: true}}", script)
    assert (result.returncode, result.stderr) == (3, "[0] said\n")
