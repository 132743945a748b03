"""Which layers of a model are divided, and how: what the user says, what the model says, what was observed.

A pair is divided where it stands: columns whose outputs, divided, arrive at one row. Between them nothing is sent.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from accel.errors import PrepareError

from .composites import is_attention, is_experts, why_whole
from .layers import is_linear, is_table, is_transposed
from .observe import Observation

SETTING = "strategies.tensor.plan"

_OWN_STYLES = {
    "colwise": "column",
    "rowwise": "row",
    "colwise_rep": "gathered",
    "colwise_gather_output": "gathered",
    "embedding_rowwise": "vocabulary",
}
"""What Hugging Face's `_tp_plan` calls the styles that are known here."""


@dataclass(frozen=True)
class Decision:
    """How a layer is held (a key of `layers.STYLES`), and why."""

    style: str
    why: str = ""
    pieces: int = 1
    """Equal pieces of a column layer's outputs, of each of which a process has its part."""

    def describe(self, size: int) -> str:
        """A line for people."""
        held = {"gathered": f"column over {size}, gathered", "out": f"row over {size}", "replicate": "replicated"}
        if self.pieces > 1:
            held["column"] = f"column over {size}, in {self.pieces} pieces"
        return held.get(self.style, f"{self.style} over {size}") + (f" ({self.why})" if self.why else "")


Decisions = dict[str, Decision]


class Planner:
    """Decides about each linear and embedding layer of one model, for an axis of `size` processes."""

    def __init__(self, model: nn.Module, seen: Observation, size: int) -> None:
        self.model, self.seen, self.size = model, seen, size
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if is_linear(module) or is_table(module)
        }
        self.composites: dict[str, Any] = {
            name: module for name, module in model.named_modules() if is_attention(module) or is_experts(module)
        }
        self.called = [name for name in seen.called if name in self.layers]
        self.decided: Decisions = {}

    def decide(self, plan: Mapping[str, str]) -> Decisions:
        """All layers by name. Raises PrepareError for a plan that cannot be followed."""
        for pattern, style in plan.items():
            for name in self._matched(pattern):
                if name in self.composites:
                    self._check_composite(name, style)
                    continue
                held = self._checked(name, style)
                self.decided[name] = Decision(held, SETTING, self._pieces(name) if held == "column" else 1)
        self._decide_composites()
        self._decide_pairs()
        self._decide_vocabulary()
        self._decide_uncalled()
        rest = {name: Decision("replicate", self._why_not(name)) for name in self.layers if name not in self.decided}
        return self.decided | rest

    def _matched(self, pattern: str) -> list[str]:
        """The layers that a pattern of the user's names, or that are in a module that it names."""
        known = [*self.layers, *self.composites]
        names = [name for name in known if _expression(pattern, inside=True).fullmatch(name)]
        if not names:
            raise PrepareError(
                f"{SETTING}: {pattern!r} names no linear or embedding layer of {type(self.model).__name__}; it has: "
                f"{', '.join(list(self.layers)[:20])}"
            )
        return names

    def _checked(self, name: str, style: str) -> str:
        """The style for a layer that the user's plan names. Raises PrepareError if it cannot be held so."""
        table, fault = is_table(self.layers[name]), ""
        style = "gathered" if style == "vocabulary" and not table else style
        if style != "replicate":
            if table and style != "vocabulary":
                fault = f"is an embedding: vocabulary or replicate, not {style}"
            elif style == "column" and name in self.seen.indivisible:
                fault = f"cannot be divided: {self.seen.indivisible[name]}"
            else:
                fault = self._uneven(name, style)
        if fault:
            raise PrepareError(f"{SETTING}: {name!r} {fault}")
        return style

    def _check_composite(self, name: str, style: str) -> None:
        """Take down what the user's plan says of attention or experts. Raises PrepareError but for `replicate`."""
        if style != "replicate":
            raise PrepareError(f"{SETTING}: {name!r} holds its matrices itself: replicate, or left out, not {style}")
        self.decided[name] = Decision("replicate", SETTING)

    def _decide_composites(self) -> None:
        """torch's attention by heads, experts by expert."""
        for name, module in self.composites.items():
            out = f"{name}.out_proj"
            if fault := why_whole(module, self.size):
                self.decided.setdefault(name, Decision("replicate", fault))
            elif name in self.decided or out in self.decided:
                self.decided.setdefault(name, Decision("replicate", SETTING))
            elif is_attention(module):
                self.decided[name] = Decision("heads", f"derived: {module.num_heads} heads, feeds {out}")
                self.decided[out] = Decision("out", f"derived: fed by {name}")
            else:
                self.decided[name] = Decision("experts", f"derived: {module.num_experts} experts")

    def _decide_pairs(self) -> None:
        """Columns and the rows that they feed, in the order in which the model calls the rows."""
        own = self._own_plan()
        for row in self.called:
            columns = sorted(self.seen.feeds.get(row, ()), key=self.called.index)
            if not columns or row in self.seen.plain_inputs or not self._can("row", row):
                continue
            if all(self._can("column", name) for name in columns):
                source = "its own plan" if own.get(row) == "row" else "derived"
                for name in columns:
                    self.decided.setdefault(name, Decision("column", f"{source}: feeds {row}", self._pieces(name)))
                self.decided.setdefault(row, Decision("row", f"{source}: fed by {', '.join(columns)}"))

    def _can(self, style: str, name: str) -> bool:
        """Whether a layer may be held so, for all that is decided and was seen."""
        if name in self.decided:
            return self.decided[name].style == style
        busy = style == "column" and name in self.seen.needed_whole
        return not (busy or self._uneven(name, style) or self._shared(name))

    def _decide_vocabulary(self) -> None:
        """The tables of the vocabulary and its heads: as many rows and outputs; what is tied is held alike."""
        tables = [name for name in self.called if is_table(self.layers[name])]
        heads = [name for name in self.called if name not in tables and name not in self.decided]
        matched = [self._rows(name) for name in tables if self._rows(name) in map(self._rows, heads)]
        rows = max(matched or map(self._rows, tables), default=0)
        for name in [name for name in (*tables, *heads) if self._rows(name) == rows]:
            together = [name, *self._sharing(name)]
            style = "vocabulary" if name in tables else "gathered"
            fits = not any(other in self.seen.read_elsewhere or self._uneven(other, style) for other in together)
            if fits and not any(other in self.decided and self._dim(other) != 0 for other in together):
                why = f"{'its own plan' if name in self._own_plan() else 'derived'}: {rows} rows of the vocabulary"
                self.decided.setdefault(name, Decision(style, why))

    def _decide_uncalled(self) -> None:
        """Layers that the example left out are held as those in their place in other blocks are."""
        for name in self.layers.keys() - set(self.called) - self.decided.keys():
            alike = {self.decided.get(other) for other in self.called if _kind(other) == _kind(name)}
            styles = {(decision.style, decision.pieces) for decision in alike if decision}
            if None not in alike and len(styles) == 1 and not self._sharing(name):
                style, pieces = styles.pop()
                self.decided[name] = Decision(style, f"derived: as {_kind(name)}", pieces)

    def _why_not(self, name: str) -> str:
        """Why a layer is not divided."""
        style = "vocabulary" if is_table(self.layers[name]) else "column"
        return (
            ("not called on the example" if name not in self.called else "")
            or self._shared(name)
            or self.seen.indivisible.get(name, "")
            or self.seen.needed_whole.get(name, "")
            or self._uneven(name, style)
            or "no layer that it feeds, or that feeds it, can be divided with it"
        )

    def _uneven(self, name: str, style: str) -> str:
        """Why a layer's sizes or options do not let it be held so; empty if they do."""
        layer = self.layers[name]
        options = [option for option in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(layer, option, None)]
        if options:
            return f"is an embedding with {options[0]}, which needs all rows"
        size = layer.weight.shape[not is_transposed(layer)] if style == "row" else self._rows(name)
        parts = self.size * (self._pieces(name) if style == "column" else 1)
        return f"has {size} {'inputs' if style == 'row' else 'outputs'}, which do not divide" if size % parts else ""

    def _pieces(self, name: str) -> int:
        return self.seen.pieces.get(name, 1)

    def _shared(self, name: str) -> str:
        """Why the weight of a layer must stay whole; empty if it need not."""
        if name in self.seen.read_elsewhere:
            return "its weight is read by other code than its own forward"
        sharing = self._sharing(name)
        return f"shares its weight with {sharing[0]}" if sharing else ""

    def _sharing(self, name: str) -> list[str]:
        """Other layers with the same weight."""
        weight = self.layers[name].weight
        return [other for other, layer in self.layers.items() if layer.weight is weight and other != name]

    def _rows(self, name: str) -> int:
        """Outputs of a linear layer, or rows of a table."""
        layer = self.layers[name]
        return int(layer.weight.shape[is_transposed(layer)])

    def _dim(self, name: str) -> int | None:
        """The dim of the weight along which a decided layer is divided."""
        style, transposed = self.decided[name].style, is_transposed(self.layers[name])
        return None if style == "replicate" else int((style == "row") != transposed)

    def _own_plan(self) -> dict[str, str]:
        """What a Hugging Face model declares of its layers, in the words of `layers.STYLES`."""
        declared = getattr(self.model, "_tp_plan", None)
        found: dict[str, str] = {}
        for pattern, style in declared.items() if isinstance(declared, Mapping) else ():
            names = [name for name in self.layers if _expression(pattern).fullmatch(name)]
            found |= dict.fromkeys(names, _OWN_STYLES.get(style, ""))
        return found


def groups(decisions: Decisions) -> list[dict[str, Decision]]:
    """Divided layers that belong together, those that repeat over blocks as one: what can be tried on its own."""
    found: dict[str, dict[str, Decision]] = defaultdict(dict)
    for name, decision in decisions.items():
        if decision.style != "replicate":
            row = decision.why.rpartition("feeds ")[2] if "feeds " in decision.why else name
            found["" if decision.style in ("vocabulary", "gathered") else _kind(row)][name] = decision
    return [found[kind] for kind in sorted(found)]


def _kind(name: str) -> str:
    """A name without the numbers of its blocks."""
    return re.sub(r"\d+", "*", name)


def _expression(pattern: str, inside: bool = False) -> re.Pattern[str]:
    """`*` stands for anything but a dot; `inside` takes what is in a named module too."""
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]*") + (r"(\..*)?" if inside else ""))
