"""One question for each kind of setting: its name, its meaning, its default on Enter.

A question is wiped once it is answered and leaves one line behind, so that the screen ends up reading like the file.
"""

from __future__ import annotations

import shutil
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import questionary
from prompt_toolkit import print_formatted_text
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from ..config import Setting, load_value, one_line, parse_setting
from ..errors import ConfigError

STYLE = questionary.Style(
    [
        ("qmark", "fg:ansicyan bold"),
        ("question", "bold"),
        ("instruction", "fg:ansibrightblack"),
        ("placeholder", "fg:ansibrightblack"),
        ("answer", "fg:ansicyan"),
        ("pointer", "fg:ansicyan bold"),
        ("highlighted", "fg:ansicyan bold"),
        ("selected", "noinherit"),
        ("dim", "fg:ansibrightblack"),
        ("warning", "fg:ansiyellow"),
        ("done", "fg:ansigreen bold"),
    ]
)
_NOTHING = "none"


def say(text: str = "", style: Literal["dim", "warning", "done", "question", "text"] = "text") -> None:
    """Print a line in one of the wizard's styles."""
    print_formatted_text(FormattedText([(f"class:{style}", text)]), style=STYLE)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a line as long as something takes, then wipe it."""
    print(f"  {text}", end="", flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * (len(text) + 2)}\r", end="", flush=True)


def ask(declared: Setting, default: Any, path: str) -> Any:
    """The plain value that the user gives to a setting; `default`, plain too, on Enter."""
    choices = _choices(declared.type)
    if declared.type is bool:
        answer: Any = _confirm(path, declared.meaning, bool(default))
    elif choices:
        shown = {_NOTHING if value is None else str(value): value for value in choices}
        start = next((name for name, value in shown.items() if value == default), None)
        answer = shown[_select(path, declared.meaning, dict.fromkeys(shown, ""), start)]
    else:
        answer = _text(declared, default, path)
    _leave(path, one_line(answer))
    return answer


def choose(name: str, meaning: str, summaries: Mapping[str, str], default: str | None) -> str:
    """One of several names, each shown with its summary."""
    answer = _select(name, meaning, summaries, default)
    _leave(name, answer)
    return answer


def choose_several(name: str, meaning: str, summaries: Mapping[str, str], checked: Iterable[str] = ()) -> list[str]:
    """Any number of several names, each shown with its summary."""
    marked = set(checked)
    boxes = [questionary.Choice(t, value=n, checked=n in marked) for n, t in _titles(summaries).items()]
    instruction = _below(f"{meaning} Space marks, Enter goes on.")
    answer: list[str] = questionary.checkbox(
        name, boxes, instruction=instruction, style=STYLE, erase_when_done=True
    ).unsafe_ask()
    _leave(name, one_line(answer))
    return answer


def confirm(question: str, default: bool, instruction: str = "") -> bool:
    """Yes or no; leaves no line behind."""
    return _confirm(question, instruction, default)


def _confirm(question: str, instruction: str, default: bool) -> bool:
    hint = "(Y/n) " if default else "(y/N) "
    answer: bool = questionary.confirm(
        question,
        default=default,
        instruction=f"{_below(instruction)}\n  {hint}" if instruction else hint,
        style=STYLE,
        erase_when_done=True,
    ).unsafe_ask()
    return answer


def _select(name: str, meaning: str, summaries: Mapping[str, str], default: str | None) -> str:
    choices = [questionary.Choice(title, value=value) for value, title in _titles(summaries).items()]
    start = default if default in summaries else None
    choices.sort(key=lambda choice: choice.value != start)  # what Enter takes comes first
    answer: str = questionary.select(
        name, choices, default=start, instruction=_below(meaning), style=STYLE, erase_when_done=True
    ).unsafe_ask()
    return answer


def _text(declared: Setting, default: Any, path: str) -> Any:
    shown = default if isinstance(default, str) else one_line(default)

    def problem(text: str) -> bool | str:
        try:
            parse_setting(declared, load_value(declared, text, path) if text.strip() else default, path)
        except ConfigError as error:
            return str(error)
        return True

    answer: str = questionary.text(
        path,
        instruction=f"{_below(declared.meaning)}\n >",
        placeholder=FormattedText([("class:placeholder", _NOTHING if default is None else shown)]),
        validate=problem,
        key_bindings=_spin(default, declared.minimum) if int in _types(declared.type) else None,
        style=STYLE,
        erase_when_done=True,
    ).unsafe_ask()
    return load_value(declared, answer.strip(), path) if answer.strip() else default


def _spin(default: Any, minimum: float | None) -> KeyBindings:
    """The up and down keys count."""
    bindings = KeyBindings()

    def change(event: KeyPressEvent, by: int) -> None:
        text = event.current_buffer.text.strip() or str(default or 0)
        if text.lstrip("-").isdigit():
            value = int(text) + by
            event.current_buffer.text = str(value if minimum is None else max(value, int(minimum)))
            event.current_buffer.cursor_position = len(event.current_buffer.text)

    bindings.add("up")(lambda event: change(event, 1))
    bindings.add("down")(lambda event: change(event, -1))
    return bindings


def _choices(hint: Any) -> list[Any]:
    """The values of a Literal, or of one that may be nothing; empty for other types."""
    types = _types(hint)
    literals = [t for t in types if typing.get_origin(t) is Literal]
    if not literals or len(types) - (type(None) in types) > 1:
        return []
    return [*typing.get_args(literals[0]), *([None] if type(None) in types else [])]


def _types(hint: Any) -> Sequence[Any]:
    is_plain = typing.get_origin(hint) is Literal or not typing.get_args(hint)
    return [hint] if is_plain else typing.get_args(hint)


def _titles(summaries: Mapping[str, str]) -> dict[str, Any]:
    """Names in one column, summaries in a second that does not run over the terminal's edge."""
    width = max(map(len, summaries), default=0)
    room = shutil.get_terminal_size().columns - width - 10
    return {
        name: [("class:text", f"{name:{width}}"), ("class:dim", f"  {_cut(summary, room)}")]
        for name, summary in summaries.items()
    }


def _below(meaning: str) -> str:
    """The meaning of a setting under its name, in lines that the terminal need not break."""
    width = shutil.get_terminal_size().columns - 4
    return "".join(f"\n  {line}" for line in textwrap.wrap(meaning, width, break_on_hyphens=False))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _leave(name: str, answer: str) -> None:
    line = [("class:done", "✓ "), ("class:question", f"{name}: "), ("class:answer", answer)]
    print_formatted_text(FormattedText(line), style=STYLE)
