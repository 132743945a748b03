"""Settings as YAML text: files, variables and answers in, files out."""

from __future__ import annotations

import types
import typing
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from ..errors import ConfigError
from .parse import Setting, describe
from .settings import Config


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


def load(text: str, origin: str) -> Any:
    """The plain value of YAML text. Raises a ConfigError of one line that begins with `origin`."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{origin}: not valid YAML: {where}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}") from None


def load_value(declared: Setting, text: str, origin: str) -> Any:
    """The plain value of a setting that was given as text; what is declared as text is taken as it stands."""
    if declared.type is str:
        return text
    value = load(text, origin)
    is_union = typing.get_origin(declared.type) in (typing.Union, types.UnionType)
    only_text = is_union and set(typing.get_args(declared.type)) == {str, type(None)}
    return text if only_text and value is not None else value


def one_line(value: Any) -> str:
    """A plain value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=2**31, allow_unicode=True).removesuffix("...\n").strip()


def render(values: Mapping[str, Any]) -> str:
    """A config file with these plain values: settings in their declared order, each under a comment, then the rest."""
    meanings = {s.name: s.meaning.partition("\n")[0] for s in describe(Config)}
    order = [name for name in meanings if name in values] + [name for name in values if name not in meanings]
    return "\n".join(
        f"# {meanings.get(name, 'Not a setting that accel knows.')}\n{_dump({name: values[name]})}" for name in order
    )


def _dump(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
