"""The house rules that a machine can check: floors, cycles, import costs, sizes, entry points."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import distribution
from pathlib import Path

import pytest

from accel import registry
from accel.testing import run

ROOT = Path(__file__).parents[1]
SOURCES = {"accel": ROOT / "accel", "accel_plugins": ROOT / "plugins" / "accel_plugins"}

BASE = {"errors", "config", "registry", "interfaces", "plan"}
CORE = BASE | {"storage", "runtime", "accelerator"}
FLOORS = {
    "errors": set[str](),
    "config": {"errors"},
    "registry": {"errors", "config"},
    "interfaces": {"errors", "config", "registry"},
    "plan": BASE,
    "storage": BASE,
    "runtime": BASE | {"storage"},
    "accelerator": BASE | {"storage", "runtime"},
    "compat": CORE,
    "utils": CORE | {"compat"},
    "logging": CORE | {"compat", "utils"},
    "launch": BASE,
    "cli": BASE | {"launch", "storage"},
    "testing": CORE,
}
"""What each part of accel may import, besides itself."""

PLUGIN_FLOOR = {"accel.interfaces", "accel.runtime", "accel.errors", "accel.config"}
LAUNCHER_FLOOR = PLUGIN_FLOOR | {"accel.launch", "accel.plan"}  # a launcher is the worker's side of the command line

ALLOWED = {("accel.cli.test", "testing")}
"""`accel test` runs the contracts; it imports them only when it is called."""

ENVIRONMENT = {"accel.runtime.world", "accel.config", "accel.launch", "accel_plugins.launchers", "accel.testing"}
"""World and config read the environment; launchers, and `run` in tests, write what their workers find there."""

MAX_FILE, MAX_FUNCTION = 400, 60


@dataclass(frozen=True)
class Import:
    """One import statement's target module, and whether it happens when the importing module is imported."""

    target: str
    at_import: bool


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of accel and of its plugins, by name."""
    found = {}
    for package, folder in SOURCES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text("utf-8"))


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    """What a module imports, wherever the statement stands."""
    return tuple(_imports(module, tree(module), at_import=True))


def _imports(module: str, node: ast.AST, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from (Import(target, at_import) for target in _targets(module, child))
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(module, child, at_import=False)
        else:
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(module, child, at_import and not inside)


def _targets(module: str, statement: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    source = statement.module or ""
    if statement.level:
        up = statement.level - (modules()[module].name == "__init__.py")
        package = module.split(".")[: len(module.split(".")) - up]
        source = ".".join([*package, *([source] if source else [])])
    inner = [f"{source}.{alias.name}" for alias in statement.names]
    return [name if name in modules() else source for name in inner]


def part(module: str) -> str:
    """The part of accel that a module belongs to: `runtime` for `accel.runtime.world`."""
    return module.split(".")[1] if "." in module else ""


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_reading_of_imports() -> None:
    assert Import("accel.errors", True) in imports("accel.config.parse")
    assert Import("torch", False) in imports("accel.interfaces.precision")
    assert part("accel.runtime.world") == "runtime"


def test_every_part_has_a_floor() -> None:
    assert {part(module) for module in modules() if within(module, {"accel"})} - {""} <= FLOORS.keys()


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_only_from_lower_floors(floor: str) -> None:
    wrong = [
        f"{module} imports {found.target}"
        for module in modules()
        if within(module, {f"accel.{floor}"})
        for found in imports(module)
        if within(found.target, {"accel"})
        and part(found.target) not in FLOORS[floor] | {floor, ""}
        and (module, part(found.target)) not in ALLOWED
    ]
    assert wrong == []


def test_no_part_imports_the_public_face() -> None:
    """`accel` itself resolves names of all floors; only the command line, for the version, and compat look there."""
    wrong = [m for m in modules() for found in imports(m) if found.target == "accel" and part(m) in CORE]
    assert wrong == []


def test_plugins_stand_on_interfaces_and_runtime() -> None:
    wrong = []
    for module in (m for m in modules() if within(m, {"accel_plugins"})):
        floor = LAUNCHER_FLOOR if within(module, {"accel_plugins.launchers"}) else PLUGIN_FLOOR
        wrong += [
            f"{module} imports {found.target}"
            for found in imports(module)
            if within(found.target, {"accel"}) and not within(found.target, floor)
        ]
    assert wrong == []


def test_plugins_of_one_kind_import_none_of_another() -> None:
    wrong = [
        f"{module} imports {found.target}"
        for module in modules()
        for found in imports(module)
        if within(found.target, {"accel_plugins"}) and part(found.target) != part(module)
    ]
    assert wrong == []


def test_core_never_imports_the_plugins() -> None:
    wrong = [m for m in modules() if within(m, {"accel"}) and "accel_plugins" in modules()[m].read_text("utf-8")]
    assert wrong == []


def test_no_cycles() -> None:
    graph = {m: {i.target for i in imports(m) if i.at_import and i.target in modules()} for m in modules()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_only_named_modules_touch_the_environment() -> None:
    wrong = [
        f"{module}:{node.lineno}"
        for module in modules()
        if not within(module, ENVIRONMENT)
        for node in ast.walk(tree(module))
        if isinstance(node, (ast.Attribute, ast.Name)) and re.fullmatch(r"(os\.)?(environ|getenv)", ast.unparse(node))
    ]
    assert wrong == []


NO_TORCH = """
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name + " imports torch")
"""


def test_import_without_torch() -> None:
    """`import accel`, the command line and what it reads of plugins; in one process, so one name at fault is told."""
    free = {"accel.errors", "accel.config", "accel.registry", "accel.interfaces", "accel.plan", "accel.cli"}
    free |= {"accel.launch", "accel.storage", "accel.testing.processes"}
    names = ["accel", *(m for m in modules() if within(m, free) and not m.endswith("__main__"))]
    names += sorted({listing.target.partition(":")[0] for listing in registry.listings()} & modules().keys())
    result = subprocess.run([sys.executable, "-c", NO_TORCH.format(modules=names)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def import_each_alone(names: list[str]) -> dict[str, str]:
    """What goes wrong when each module is the first of accel to be imported, each in a fork of its own."""
    wrong = {}
    for name in names:
        reader, writer = os.pipe()
        if not os.fork():
            try:
                for known in [m for m in sys.modules if m.partition(".")[0] in SOURCES]:
                    del sys.modules[known]
                importlib.import_module(name)
            except BaseException as error:  # noqa: BLE001 - it is reported
                os.write(writer, repr(error).encode()[:4000])
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            if text := pipe.read():
                wrong[name] = text.decode()
        os.wait()
    return wrong


@pytest.mark.timeout(300)
def test_every_module_imports_alone_without_a_warning() -> None:
    names = [module for module in modules() if not module.endswith("__main__")]
    assert run(1, import_each_alone, names, timeout=110) == [{}]


def resolve_public_names() -> list[str]:
    import accel

    return [name for name in accel.__all__ if getattr(accel, name) is None]


def test_public_names_resolve() -> None:
    assert run(1, resolve_public_names) == [[]]


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]  # type: ignore[no-any-return]


def declared_points() -> list[tuple[str, str, str]]:
    groups: dict[str, dict[str, str]] = project()["entry-points"]  # type: ignore[assignment]
    return [(group, name, target) for group, points in groups.items() for name, target in points.items()]


def test_entry_points_are_installed_as_declared() -> None:
    installed = {(p.group, p.name, p.value) for p in distribution("accel-torch").entry_points}
    missing = set(declared_points()) - installed
    assert not missing, f"run `pip install -e .` again: {missing}"


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, name, _ in declared_points()])
def test_entry_point_loads_and_fits(group: str, name: str) -> None:
    [kind] = [kind for kind in registry.KINDS if registry.INTERFACES[kind][0] == group]
    assert registry.load(kind, name).__doc__


def test_files_are_short() -> None:
    lengths = {module: len(file.read_text("utf-8").splitlines()) for module, file in modules().items()}
    assert {module: lines for module, lines in lengths.items() if lines > MAX_FILE} == {}


def test_functions_are_short() -> None:
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in modules()
        for node in ast.walk(tree(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION} == {}


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[:1] == [project()["version"]]
    assert distribution("accel-torch").version == project()["version"]
