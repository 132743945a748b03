"""`accel config`: asks what applies, shows the file, and writes it only if told to.

The questions are the settings that `Config` and each plugin's `Options` declare; nothing is asked about here by a
plugin's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import registry
from ..config import Choice, Setting, default_path, describe, one_line, parse_setting, read_file, render
from ..errors import AccelError, ConfigError
from ..interfaces.strategy import MESH_ORDER, Axis
from . import questions
from .editing import SETTINGS, complete, current_choices, plain_default, problems, shorten, write
from .hardware import Detection, Hardware

NEEDS_SEVERAL = {
    "machine_rank": "num_machines",
    "main_process_ip": "num_machines",
    "main_process_port": "num_machines",
    "strategies": "num_processes",
    "even_batches": "num_processes",
    "split_batches": "num_processes",
    "dispatch_batches": "num_processes",
    "timeout": "num_processes",
}
"""Settings that mean something only if another one is more than 1."""


def run_wizard(path: Path) -> int:
    """Ask, show, write. Returns an exit code; Ctrl-C raises KeyboardInterrupt and leaves the file as it was."""
    before = read_file(path) if path.exists() else {}
    try:
        with Detection() as detection:
            _greet(path, bool(before))
            values = Wizard(before, detection).ask_all()
        return _review(path, before, complete(values, before))
    except KeyboardInterrupt:
        questions.say("\nStopped. Nothing was written.", "warning")
        raise


class Wizard:
    """The answers so far, as plain values by setting; they begin as what the file holds."""

    def __init__(self, before: Mapping[str, Any], detection: Detection) -> None:
        self.values, self._detection = _usable(before), detection
        self.asked: set[str] = set()

    def ask_all(self) -> dict[str, Any]:
        """Ask everything that applies, most important first, and return the answers."""
        for name in ("num_machines", "machine_rank", "main_process_ip", "main_process_port"):
            self.ask(name)
        hardware = self._hardware()
        self._ask_device(hardware)
        self.ask("num_processes", self._processes(hardware))
        self.ask("mixed_precision", notes=_precision_notes(hardware))
        self.ask("strategies")
        self.ask("gradient_accumulation_steps")
        self._ask_others()
        return self.values

    def ask(self, name: str, default: Any = None, notes: Mapping[str, str] | None = None) -> None:
        """Ask for one setting, if it applies. What the file says is the default, then `default`, then accel's own."""
        declared = SETTINGS[name]
        self.asked.add(name)
        if not self.applies(name):
            return
        if not declared.plugin:
            current = self.current(name) if default is None or name in self.values else default
            self.values[name] = questions.ask(declared, current, name)
        elif name == "strategies":
            self._ask_strategies(declared)
        elif isinstance(declared.default, tuple):
            self._ask_several(declared)
        else:
            self._ask_plugin(declared, notes or {})

    def current(self, name: str) -> Any:
        """The plain value of a setting, given the answers so far."""
        return self.values.get(name, plain_default(SETTINGS[name]))

    def applies(self, name: str) -> bool:
        """Whether the setting means anything, given the answers so far."""
        return name not in NEEDS_SEVERAL or self.current(NEEDS_SEVERAL[name]) > 1

    def _hardware(self) -> Hardware:
        with questions.waiting("looking at the hardware …"):
            hardware = self._detection.wait()
        for line in hardware.describe():
            questions.say(f"  {line}", "warning" if line.startswith("(") else "dim")
        return hardware

    def _ask_device(self, hardware: Hardware) -> None:
        """Only where there is a choice."""
        available = sum(found.count > 0 for found in hardware.devices.values())
        self.asked.add("device")
        absent = {name: "not on this machine" for name, found in hardware.devices.items() if not found.count}
        if available != 1 or "device" in self.values:
            self._ask_plugin(SETTINGS["device"], absent)

    def _processes(self, hardware: Hardware) -> int:
        """One for each device of all machines, taking the others to be like this one."""
        chosen = current_choices(SETTINGS["device"], self.values)
        here = hardware.processes(chosen[0].name if chosen else None)
        return here * int(self.current("num_machines"))

    def _ask_plugin(self, declared: Setting, notes: Mapping[str, str]) -> None:
        """One plugin of a kind, then its options."""
        chosen = current_choices(declared, self.values)
        names = _summaries(str(declared.plugin), notes)
        if declared.default is None:
            names = {"automatic": declared.meaning.partition(";")[2].strip(), **names}
        default = chosen[0].name if chosen else "automatic"
        name = questions.choose(declared.name, declared.meaning, names, default)
        if name == "automatic" and declared.default is None:
            self.values.pop(declared.name, None)
        else:
            self.values[declared.name] = self._with_options(declared, name, chosen).dump()

    def _ask_several(self, declared: Setting) -> None:
        """Any number of plugins of a kind, each with its options."""
        chosen = current_choices(declared, self.values)
        names = _summaries(str(declared.plugin), {})
        marked = questions.choose_several(declared.name, declared.meaning, names, [c.name for c in chosen])
        self.values[declared.name] = [self._with_options(declared, name, chosen).dump() for name in marked]

    def _ask_strategies(self, declared: Setting) -> None:
        """The one on the data axis, and those on axes that the file fills already."""
        chosen = {choice.name for choice in current_choices(declared, self.values)}
        for axis, names in self._axes().items():
            if axis is Axis.DATA or not chosen.isdisjoint(names):
                self._ask_axis(declared, axis, names)

    def _ask_axis(self, declared: Setting, axis: Axis, names: Mapping[str, str]) -> None:
        """One strategy for an axis of the mesh, or none; those on other axes stay."""
        chosen = current_choices(declared, self.values)
        others = [choice for choice in chosen if choice.name not in names]
        default = next((choice.name for choice in chosen if choice.name in names), "none")
        place = next((i for i, choice in enumerate(chosen) if choice.name in names), len(chosen))
        offered = {**names, "none": ""} if others or axis is not Axis.DATA else names
        asked = f"{declared.name} ({axis} axis)" if others or axis is not Axis.DATA else declared.name
        name = questions.choose(asked, declared.meaning, offered, default)
        if name != "none":  # of several axes, all but the data axis need a size
            others.insert(place, self._with_options(declared, name, chosen, ask=axis is not Axis.DATA))
        self.values[declared.name] = shorten(declared, [choice.dump() for choice in others])

    def _axes(self) -> dict[Axis, dict[str, str]]:
        """The strategies of each axis, with what there is to say of each."""
        return _strategies_by_axis(self.current("num_processes"))

    def _with_options(self, declared: Setting, name: str, chosen: list[Choice], ask: bool = False) -> Choice:
        """A plugin with the options that it had, changed if the user wants to, or has to."""
        given = next((dict(choice.options) for choice in chosen if choice.name == name), {})
        options = describe(registry.load(str(declared.plugin), name, declared.name).Options)
        current = {option.name: given.get(option.name, _plain(option)) for option in options}
        ask = ask or any(option.required and option.name not in given for option in options)
        shown = ", ".join(f"{option}: {one_line(value)}" for option, value in current.items())
        if options and (ask or questions.confirm(f"Change options of {name}?", False, shown)):
            for option in options:
                value = questions.ask(option, current[option.name], f"{declared.name}.{name}.{option.name}")
                if option.name in given or value != _plain(option):
                    given[option.name] = value
        return Choice(name=name, options=given)

    def _ask_others(self) -> None:
        """The settings that most runs leave alone, if the user wants to see them."""
        others = {
            name: f"{one_line(self.current(name))}  {declared.meaning}"
            for name, declared in SETTINGS.items()
            if name not in self.asked and self.applies(name)
        }
        axes = self._other_axes()
        others |= {name: ", ".join(names) for name, (_, names) in axes.items()}
        if questions.confirm("Change other settings?", False, ", ".join(others)):
            for name in questions.choose_several("other settings", "Those to change.", others):
                if name in axes:
                    self._ask_axis(SETTINGS["strategies"], *axes[name])
                else:
                    self.ask(name)

    def _other_axes(self) -> dict[str, tuple[Axis, dict[str, str]]]:
        """The axes, besides that of the data, that have not been asked about."""
        if not self.applies("strategies"):
            return {}
        chosen = {choice.name for choice in current_choices(SETTINGS["strategies"], self.values)}
        return {
            f"strategies ({axis} axis)": (axis, names)
            for axis, names in self._axes().items()
            if axis is not Axis.DATA and chosen.isdisjoint(names)
        }


def _usable(before: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds, less what cannot be; what is no setting at all is kept, for the user to judge."""
    values = dict(before)
    for name, declared in SETTINGS.items():
        try:
            parse_setting(declared, values.get(name, plain_default(declared)), name)
        except ConfigError as error:
            questions.say(f"  {error}; left out", "warning")
            del values[name]
    return values


def _greet(path: Path, exists: bool) -> None:
    questions.say()
    questions.say("accel config", "question")
    questions.say(f"  {'Changes' if exists else 'Writes'} {path}.", "dim")
    questions.say("  Enter takes what is offered, arrow keys choose or count, Ctrl-C stops.\n", "dim")


def _review(path: Path, before: Mapping[str, Any], after: dict[str, Any]) -> int:
    """Show the file, ask, write."""
    if after == before:
        questions.say(f"\nNothing changed; {path} stays as it is.", "done")
        return 0
    questions.say(f"\n{path}\n", "question")
    questions.say("\n".join(f"  {line}".rstrip() for line in render(after).splitlines()) + "\n")
    found = problems(after)
    for problem in found:
        questions.say(f"  ! {problem}", "warning")
    if not questions.confirm("Write this file?", default=not found):
        questions.say("Nothing was written.", "warning")
        return 1
    write(path, after)
    named = "" if path == default_path() else f"--config_file {path} "
    questions.say(f"Written. Start a run with: accel launch {named}script.py", "done")
    return 0


def _summaries(kind: str, notes: Mapping[str, str]) -> dict[str, str]:
    """The usable plugins of a kind with their meaning, and what there is to say of each on this machine."""
    found = {}
    for listing in registry.listings():
        if listing.kind == kind and listing.name not in found:
            try:
                registry.load(kind, listing.name)
            except AccelError as error:
                questions.say(f"  left out: {error}", "warning")
                continue
            note = notes.get(listing.name)
            found[listing.name] = f"({note}) {listing.summary}" if note else listing.summary
    if not found:
        raise ConfigError(f"no {kind} is installed that can be used; `accel plugins {kind}` says why")
    return found


def _strategies_by_axis(processes: int) -> dict[Axis, dict[str, str]]:
    """Summaries by name by axis, data first; one that cannot run on so many processes says so."""
    order = sorted(MESH_ORDER, key=lambda axis: axis is not Axis.DATA)
    by_axis: dict[Axis, dict[str, str]] = {axis: {} for axis in order}
    for name, summary in _summaries("strategy", {}).items():
        plugin = registry.load("strategy", name)
        refusal = ""
        if plugin.axis is Axis.DATA:
            try:
                plugin.check(registry.load_choice("strategy", Choice(name=name), "strategies")[1], processes)
            except ConfigError:
                refusal = f"(not for {processes} processes) "
        by_axis[plugin.axis][name] = refusal + summary
    return {axis: names for axis, names in by_axis.items() if names}


def _precision_notes(hardware: Hardware) -> dict[str, str]:
    notes = {"emulated": "slow on this machine", "none": "not on this machine"}
    return {name: notes[support] for name, support in hardware.support.items() if support in notes}


def _plain(option: Setting) -> Any:
    """The default of an option as plain YAML."""
    if option.required:
        return None
    return list(option.default) if isinstance(option.default, tuple) else option.default
