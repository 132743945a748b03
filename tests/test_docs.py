"""README and docs: every command runs, every block is valid, every link leads somewhere, the tables are the code's.

`python -m tests.test_docs` writes the tables of docs/config.md again.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from accel import Config, registry
from accel.config import Choice, describe
from accel.config.parse import type_name
from accel.testing import run

from .examples.commands import ROOT, install_third_party
from .examples.commands import run as run_command

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = ROOT / "docs" / "config.md"
MARK = "<!-- what follows is written by tests/test_docs.py -->\n"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)


def all_blocks(language: str) -> list[Any]:
    found = [(page, index, block) for page in PAGES for index, block in enumerate(blocks(page, language))]
    return [pytest.param(block, id=f"{page.relative_to(ROOT)}-{index}") for page, index, block in found]


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return sorted({shlex.join(shlex.split(line, comments=True)) for line in lines} - {""})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the docs speak of: examples, a `train.py`, and the third-party package installed in `site`."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "train.py").write_text(blocks(ROOT / "docs" / "quickstart.md", "python")[0])
    install_third_party(folder / "site")
    return folder


@pytest.mark.parametrize("command", commands())
def test_commands(command: str, place: Path) -> None:
    """Each as it stands, but what asks, trains for long or installs: that is only parsed."""
    words = command.split()
    parsed_only = {
        ("accel", "launch"): [*words[:2], "--dry_run", *words[2:]],
        ("accel", "test"): ["accel", "test", "--help"],
        ("make", words[-1]): ["make", "-n", words[-1], "-C", str(ROOT)],
    }
    if command == "accel config":
        words.append("--help")
    elif command == "python -m tests.test_docs":
        return
    elif words[0] == "pip":
        assert (ROOT / words[-1] / "pyproject.toml").is_file()
        return
    elif words[0] == ".ci/run":
        words = ["bash", "-n", str(ROOT / words[0])]
    elif words[0] == "python" and words[1].startswith("examples/"):
        words.append("--help")
    else:
        words = parsed_only.get((words[0], words[-1] if words[0] == "make" else words[1]), words)
    assert words[0] in ("accel", "python", "torchrun", "make", "bash"), "teach this test how to check it"
    run_command(*words, folder=place, path=place / "site", XDG_CONFIG_HOME=str(place / "settings"))


def test_the_first_screen_has_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "bash")[0]
    assert re.findall(r"^make \w+", first, re.M) == ["make demo", "make test"]
    assert (ROOT / "README.md").read_text().index("make test") < 400
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("block", all_blocks("yaml"))
def test_yaml_is_a_config(block: str) -> None:
    from accel.plan import Plan

    config = Config.parse(yaml.safe_load(block))
    assert Plan.of(config).config == config


@pytest.mark.parametrize("config", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_example_configs(config: Path) -> None:
    test_yaml_is_a_config(config.read_text())


@pytest.mark.parametrize("block", all_blocks("python"))
def test_python_compiles(block: str) -> None:
    compile(block, "block", "exec")


@pytest.mark.parametrize("block", all_blocks("toml"))
def test_toml_parses(block: str) -> None:
    assert tomllib.loads(block)


def run_loop(code: str) -> list[torch.Tensor]:
    """Final weights after running a loop of the README on a small problem."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    data = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.randn(20, 1))
    names = {
        "device": torch.device("cpu"),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": torch.utils.data.DataLoader(data, batch_size=6),
        "loss_function": torch.nn.functional.mse_loss,
    }
    exec(code, names)
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_loop_before_and_after_trains_alike() -> None:
    (diff,) = blocks(ROOT / "README.md", "diff")
    before, after = ("".join(line[1:] for line in diff.splitlines(True) if line[0] in f" {sign}") for sign in "-+")
    assert "accel" in after
    assert "accel" not in before
    for one, other in zip(*run(1, run_loop, before), *run(1, run_loop, after), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


def test_every_page_is_reached_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT)})" in readme


def test_the_changelog_knows_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_make_targets_exist() -> None:
    for target in ("demo", "test", "lint", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def table(cls: type) -> str:
    """The settings that a dataclass declares, as a table."""
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for setting in describe(cls):
        least = f", at least {setting.minimum:g}" if setting.minimum is not None else ""
        meaning = " ".join(setting.meaning.split())
        rows.append(f"| `{setting.name}` | {type_name(setting.type)}{least} | {shown(setting.default)} | {meaning} |")
    return "\n".join(rows)


def shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(shown(item) for item in default) or "none"
    if default is None:
        return "none"
    value = default.dump() if isinstance(default, Choice) else default
    return f"`{yaml.safe_dump(value).removesuffix(chr(10)).removesuffix('...').strip()}`"


def tables() -> str:
    """Everything that accel and its own plugins can be told."""
    parts = [table(Config)]
    for listing in registry.listings():
        options = registry.load(listing.kind, listing.name).Options
        if listing.package == "accel-torch" and describe(options):
            parts.append(f"## {listing.kind}: {listing.name}\n\n{listing.summary}\n\n{table(options)}")
    return "\n\n".join(parts) + "\n"


def test_tables_of_settings_are_the_codes() -> None:
    written = SETTINGS.read_text("utf-8").partition(MARK)[2]
    assert written == "\n" + tables(), "run `python -m tests.test_docs`"


if __name__ == "__main__":
    head = SETTINGS.read_text("utf-8").partition(MARK)[0]
    SETTINGS.write_text(f"{head}{MARK}\n{tables()}", "utf-8")
