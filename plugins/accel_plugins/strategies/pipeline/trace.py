"""What flows where in one forward pass of the whole model: which results each part, and the end, are made from.

Flow is followed from memory to memory, below autograd, so that views, changes in place and whatever Python does in
between are seen as they are. It errs on the side of too much: what is written into counts with what it held before.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel.runtime.blocks import has_parameters
from accel.runtime.deferred.operations import written_to
from accel.runtime.example import tried_out
from accel.runtime.nested import tensors

from .absent import FRESH
from .checks import refuse_autograd_functions
from .nest import take_apart
from .parts import Stage


class Result(NamedTuple):
    """One tensor among those that a part returned; `ordinal` counts the calls of the part in one forward."""

    part: str
    ordinal: int
    place: int


class Parameter(NamedTuple):
    """A parameter that is used."""

    name: str


class Inside(NamedTuple):
    """A tensor that a part made and did not return, but left somewhere."""

    part: str
    ordinal: int


Source = Result | Parameter | Inside


@dataclass
class Call:
    """One call of a part. `needs` is what it read; `shapes` are those of the tensors it returned."""

    part: str
    ordinal: int
    needs: set[Source] = field(default_factory=set)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)
    """Places of returned tensors that were changed in place before the next part was called."""
    memory: int = 0
    """Bytes of everything that it computed."""
    seconds: float = 0.0


@dataclass
class Trace:
    """The calls of one forward in order; what was read as a number after so many calls; what the outputs are of."""

    calls: list[Call] = field(default_factory=list)
    reads: list[tuple[int, set[Source]]] = field(default_factory=list)
    outputs: set[Source] = field(default_factory=set)

    def named(self) -> dict[tuple[str, int], int]:
        """The place of each call in the order of all."""
        return {(call.part, call.ordinal): place for place, call in enumerate(self.calls)}

    def add(self, other: Trace) -> None:
        """What the same calls read and change in another mode, and what the outputs are made of there, counts too."""
        places = self.named()
        for call in other.calls:
            if (call.part, call.ordinal) in places:
                mine = self.calls[places[call.part, call.ordinal]]
                mine.needs |= _among(call.needs, places)
                mine.changed |= call.changed
        self.outputs |= _among(other.outputs, places)


def trace(model: nn.Module, stage: Stage, args: Any, kwargs: Any) -> Trace:
    """Run the model on an example, as it is and in evaluation, and see.

    There a dropout returns the tensor that it is given, which the model may change, and some models return more.
    """
    found = _trace(model, stage, args, kwargs)
    if any(module.training for module in model.modules()):
        with tried_out(model):
            model.eval()
            found.add(_trace(model, stage, args, kwargs))
    return found


def _trace(model: nn.Module, stage: Stage, args: Any, kwargs: Any) -> Trace:
    tracer = _Tracer(model)
    stage.listener = tracer
    try:
        with torch.no_grad(), tracer:
            output = model(*args, **kwargs)
    finally:
        stage.listener = None
    tracer.note_changes()
    tracer.found.outputs = set[Source]().union(*(tracer.sources_of(t) for _, t in tensors(output)))
    return tracer.found


def measure(model: nn.Module, stage: Stage, args: Any, kwargs: Any, found: Trace, times: int = 3) -> None:
    """Note the seconds that each call takes, the least of some times: others may use the machine too."""
    clock = _Clock()
    stage.listener = clock
    try:
        for _ in range(times):
            clock.ordinals.clear()
            with torch.no_grad():
                model(*args, **kwargs)
    finally:
        stage.listener = None
    for call in found.calls:
        call.seconds = min(clock.seconds[call.part, call.ordinal], default=0.0)


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows flow as each operation is dispatched."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found, self.inside = Trace(), False
        self._ordinals: Counter[str] = Counter()
        self._sources: dict[int, set[Source]] = {}
        self._alive: list[Any] = []
        self._returned: list[_Returned] = []
        self._here = _Inside()
        self._parameters = {name: has_parameters(module) for name, module in model.named_modules()}
        for name, parameter in model.named_parameters():
            self._add(parameter, {Parameter(name)})

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A part is called: note what it reads and returns. One without parameters or random numbers is no part."""
        refuse_autograd_functions(name, trace.__code__)
        self.note_changes()
        before = {key: set(sources) for key, sources in self._sources.items()}
        self.inside, self._here = True, _Inside()
        try:
            output = forward(*args, **kwargs)
        finally:
            self.inside = False
        if self._parameters[name] or self._here.random:
            self._note(name, output, before)
        else:
            self.found.reads += [(len(self.found.calls), read) for read in self._here.reads]
        return output

    def note_changes(self) -> None:
        """Note which results were changed in place between the parts, since this was last asked."""
        for returned in self._returned:
            if returned.tensor._version != returned.version:
                returned.call.changed.add(returned.place)
                returned.version = returned.tensor._version

    def sources_of(self, tensor: Tensor) -> set[Source]:
        """What a tensor was made from."""
        return self._sources.get(_key(tensor), set())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fresh = function.overloadpacket in FRESH
        read = set() if fresh else set[Source]().union(*(self.sources_of(tensor) for tensor in given))
        for tensor in given:
            if _key(tensor) not in self._sources:  # it was there before: an input, or a buffer
                self._add(tensor, set())
                self._here.met.add(_key(tensor))
        result = function(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._here.random |= torch.Tag.nondeterministic_seeded in function.tags
        self._here.needs |= read
        if given and not made and read:
            if self.inside:
                self._here.reads.append(read)
            else:
                self.found.reads.append((len(self.found.calls), read))
        known = {_key(tensor) for tensor in given}
        self._here.memory += sum(t.untyped_storage().nbytes() for t in made if _key(t) not in known)
        for tensor in [*made, *written_to(function, args, kwargs)]:
            self._add(tensor, read)
        return result

    def _note(self, name: str, output: Any, before: dict[int, set[Source]]) -> None:
        """A part returned: what it made is known by its results, and what it left elsewhere cannot be had."""
        ordinal = self._ordinals[name]
        self._ordinals[name] += 1
        call = Call(name, ordinal, self._here.needs, memory=self._here.memory)
        before |= {key: set() for key in self._here.met}
        for key, sources in self._sources.items():
            if before.get(key) != sources:
                self._sources[key] = before.get(key, set()) | {Inside(name, ordinal)}
        results = take_apart(output)[1]
        for tensor in results:
            self._sources[_key(tensor)] = before.get(_key(tensor), set()).copy()
        for place, tensor in enumerate(results):
            self._add(tensor, {Result(name, ordinal, place)})
        call.shapes = [tuple(tensor.shape) for tensor in results]
        for returned in self._returned:
            returned.version = returned.tensor._version  # what a part changes, it changes once
        self._returned += [_Returned(call, place, tensor, tensor._version) for place, tensor in enumerate(results)]
        self.found.calls.append(call)

    def _add(self, tensor: Tensor, sources: set[Source]) -> None:
        key = _key(tensor)
        if key not in self._sources:
            self._alive.append(tensor.untyped_storage())
        self._sources.setdefault(key, set()).update(sources)


@dataclass
class _Inside:
    """What happens inside one call, or between two."""

    needs: set[Source] = field(default_factory=set)
    reads: list[set[Source]] = field(default_factory=list)
    met: set[int] = field(default_factory=set)
    """What was there before and was not known."""
    memory: int = 0
    random: bool = False


@dataclass
class _Returned:
    """A result, and its version when last looked at."""

    call: Call
    place: int
    tensor: Tensor
    version: int


def _among(sources: set[Source], places: Mapping[tuple[str, int], int]) -> set[Source]:
    """Those that are parameters, or of these calls."""
    return {source for source in sources if isinstance(source, Parameter) or (source.part, source.ordinal) in places}


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Clock:
    """Takes the time of each call."""

    def __init__(self) -> None:
        self.inside = False
        self.ordinals: Counter[str] = Counter()
        self.seconds: defaultdict[tuple[str, int], list[float]] = defaultdict(list)

    def call(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.inside = True
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            self.inside = False
            self.seconds[name, self.ordinals[name]].append(time.perf_counter() - start)
            self.ordinals[name] += 1
