"""One forward pass on an example, watched: whose output reaches which layer, and what becomes of it between.

Every linear layer is taken to be divided by outputs, though its output stays whole, and the rules for divided tensors
(`rules`) carry that through the model's own code. Where such an output arrives at another linear layer, still divided
along its last dim, the two make a pair of column and row: an attention layer or a feed-forward layer, whatever its
names. Where something needs the whole, the reason is noted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from accel.runtime.divided.peers import Peers, Undividable
from accel.runtime.divided.tensor import Divided, Division, divide, part_of
from accel.runtime.example import Inputs, tried_out
from accel.runtime.nested import map_tensors

from .layers import is_linear, is_table


@dataclass
class Observation:
    """What was seen of the layers of a model, each by its name."""

    feeds: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """The layers whose outputs reach a layer, divided as it can take them."""

    needed_whole: dict[str, str] = field(default_factory=dict)
    """Layers whose output something else needs whole, and what."""

    indivisible: dict[str, str] = field(default_factory=dict)
    """Layers whose output has something, such as heads, whose number does not divide; and what."""

    pieces: dict[str, int] = field(default_factory=dict)
    """Layers whose output could be divided if of each of so many equal pieces: query, key and value of one layer."""

    read_elsewhere: set[str] = field(default_factory=set)
    """Layers whose weight is used by other code than their own forward."""

    called: list[str] = field(default_factory=list)
    """Linear and embedding layers, in the order of their first call."""

    plain_inputs: set[str] = field(default_factory=set)
    """Linear layers that also take inputs that are not divided."""

    @classmethod
    def joined(cls, parts: Sequence[Observation]) -> Observation:
        """What several processes saw, each of its own stage of the model."""
        whole = cls()
        for part in parts:
            for name, feeding in part.feeds.items():
                whole.feeds[name] |= feeding
            whole.needed_whole = part.needed_whole | whole.needed_whole
            whole.indivisible = part.indivisible | whole.indivisible
            whole.pieces = part.pieces | whole.pieces
            whole.read_elsewhere |= part.read_elsewhere
            whole.plain_inputs |= part.plain_inputs
            whole.called += [name for name in part.called if name not in whole.called]
        return whole

    def again(self, second: Observation) -> Observation:
        """What to make of a second look, with these pieces: they hold where they helped; reasons are the first's."""
        second.pieces = {name: count for name, count in self.pieces.items() if name not in second.needed_whole}
        second.indivisible = {name: why for name, why in self.indivisible.items() if name in second.needed_whole}
        second.needed_whole = {name: self.needed_whole.get(name, why) for name, why in second.needed_whole.items()}
        return second


def observe(model: nn.Module, inputs: Inputs, size: int, pieces: Mapping[str, int]) -> Observation:
    """Watch a forward pass on inputs on which the model runs; it is left as it was.

    `size` is that of the axis, `pieces` the number of equal pieces in the outputs of some layers.
    """
    observation = Observation()
    watch = _Watch(model, Peers(size), observation, pieces)
    args, kwargs = inputs
    with tried_out(model), torch.no_grad(), watch:
        model.eval()
        map_tensors(watch.leave, model(*args, **kwargs), Divided)
    return observation


class _Watch(TorchFunctionMode):
    """Hooks on the layers of a model, and an eye on who uses their weights."""

    def __init__(self, model: nn.Module, peers: Peers, observation: Observation, pieces: Mapping[str, int]) -> None:
        super().__init__()
        self.peers, self.seen, self.pieces = peers, observation, pieces
        peers.divided_whole = self.note
        self.layers = {m: n for n, m in model.named_modules() if is_linear(m) or is_table(m)}
        self.owners: Mapping[int, set[str]] = _owners(self.layers)
        self.current: list[str] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for layer in self.layers:
            self.handles.append(layer.register_forward_pre_hook(self.before, prepend=True))
            self.handles.append(layer.register_forward_hook(self.after, always_call=True))
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            names = self.owners.get(id(value))
            if names and names.isdisjoint(self.current) and getattr(function, "__name__", "") not in _HARMLESS:
                self.seen.read_elsewhere |= names
        return function(*args, **(kwargs or {}))

    def before(self, layer: nn.Module, args: tuple[Any, ...]) -> Any:
        """A layer is called: note whose output its input is."""
        name = self.layers[layer]
        self.current.append(name)
        if name not in self.seen.called:
            self.seen.called.append(name)
        if not args or not isinstance(args[0], Divided):
            self.seen.plain_inputs.add(name)
            return None
        division, dims = args[0].division, args[0].dim()
        if (division.dim, division.outer) == (dims - 1, 1) and is_linear(layer):
            self.seen.feeds[name] |= division.sources
        else:
            self.note(division.sources, Undividable(f"it reaches {name} in pieces"))
        return (part_of(args[0]), *args[1:])

    def after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        """A linear layer returns: take its output to be divided."""
        name = self.current.pop()
        if not is_linear(layer) or not isinstance(output, torch.Tensor):
            return None
        return divide(output, Division(self.peers, output.dim() - 1, self.pieces.get(name, 1), frozenset({name})))

    def note(self, sources: frozenset[str], reason: Undividable) -> None:
        """Something needs the whole of what comes from these layers."""
        for name in sources:
            self.seen.needed_whole.setdefault(name, str(reason))
            if reason.indivisible:
                self.seen.indivisible.setdefault(name, str(reason))
            if reason.pieces > 1:
                self.seen.pieces.setdefault(name, reason.pieces)

    def leave(self, output: Divided) -> Any:
        """The model returns something."""
        self.note(output.division.sources, Undividable("the model returns it"))


_HARMLESS = {"__get__", "size", "dim", "numel", "is_floating_point", "__set__"}


def _owners(layers: Mapping[nn.Module, str]) -> dict[int, set[str]]:
    owners: dict[int, set[str]] = defaultdict(set)
    for layer, name in layers.items():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)].add(name)
    return owners
