"""Where to cut: stages of equal cost, and what each of them holds and needs of those before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from accel.errors import PrepareError

from .trace import Inside, Parameter, Result, Source, Trace


@dataclass(frozen=True)
class Split:
    """A model in stages. After the last stage comes the end: what follows the blocks, on the whole batch at once.

    Stages count from 0; the end is stage `stages`.
    """

    stages: int
    places: dict[str, tuple[int, ...]]
    """For each part the stages of its calls, by ordinal."""

    carried: tuple[frozenset[Result], ...]
    """For each stage, and the end, the results of stages before it that it or a later one needs."""

    parameters: tuple[frozenset[str], ...]
    """For each stage, and the end, the names of parameters that are used outside of the parts that hold them."""

    changed: frozenset[Result]
    """Results that are changed in place between parts, so that they are kept as they were returned."""

    glue: frozenset[str] = frozenset()
    """Modules without parameters and random numbers, which compute on every stage."""

    batch_dims: dict[Result, int] = field(default_factory=dict)
    """Along which dim micro-batches of a result make up the whole batch; none where they are all the same."""

    def plans(self, part: str, ordinal: int) -> bool:
        """Whether the example made this call."""
        return ordinal < len(self.places.get(part, ()))

    def stage_of(self, part: str, ordinal: int, current: int) -> int:
        """The stage of a call; one that the example did not have belongs to the current stage."""
        known = self.places.get(part)
        return known[min(ordinal, len(known) - 1)] if known else current


def split(found: Trace, blocks: set[str], cuts: Sequence[int]) -> Split:
    """The stages that begin with the calls at `cuts`, positions in the trace. Raises PrepareError if that cannot be."""
    stages = len(cuts) + 1
    last = max(place for place, call in enumerate(found.calls) if call.part in blocks)
    bounds = [0, *cuts, last + 1, len(found.calls)]
    places: dict[str, tuple[int, ...]] = {}
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        for call in found.calls[start:stop]:
            places[call.part] = (*places.get(call.part, ()), stage)
    needs = [_needs(found, start, stop) for start, stop in pairwise(bounds)]
    needs[-1] |= found.outputs
    order = found.named()
    carried = []
    for stage, start in enumerate(bounds[:-1]):
        wanted = set[Source]().union(*needs[stage:])
        _check_reachable(wanted, order, start)
        carried.append(frozenset(s for s in wanted if isinstance(s, Result) and order[s.part, s.ordinal] < start))
    return Split(
        stages=stages,
        places=places,
        carried=tuple(carried),
        parameters=tuple(frozenset(s.name for s in wanted if isinstance(s, Parameter)) for wanted in needs),
        changed=frozenset(Result(c.part, c.ordinal, place) for c in found.calls for place in c.changed),
    )


def balance(found: Trace, blocks: set[str], stages: int, sizes: dict[str, int]) -> list[int]:
    """Cuts before block calls so that the costliest stage costs least; `sizes` are bytes of parameters by part.

    Cost is half a call's share of the time, and half its share of the memory for weights and activations. Alike
    blocks count alike. What follows the last block costs memory of the last stage but no time of it, since it runs once
    all micro-batches are there, while the other stages wait wherever the cuts are. Raises PrepareError if there are
    fewer block calls than stages.
    """
    starts = [place for place, call in enumerate(found.calls) if call.part in blocks]
    if len(starts) < stages:
        names = ", ".join(dict.fromkeys(found.calls[place].part for place in starts)) or "none"
        raise PrepareError(
            f"strategies.pipeline: {stages} stages need as many blocks, and this model calls {len(starts)}: {names}; "
            "use fewer processes along the pipeline, another schedule than interleaved, which makes two stages for "
            "each, or name blocks with strategies.pipeline.split; what a model calls as `block.forward(x)` is not "
            "seen: write `block(x)`"
        )
    costs = _costs(found, sizes, starts[-1])
    pieces = [sum(costs[a:b]) for a, b in pairwise([0, *starts[1:], len(costs)])]
    return [starts[place] for place in _partition(pieces, stages)]


def _costs(found: Trace, sizes: dict[str, int], last: int) -> list[float]:
    seconds = [_typical([c.seconds for c in found.calls if _alike(c, call, sizes)]) for call in found.calls[: last + 1]]
    seconds += [0.0] * (len(found.calls) - len(seconds))
    counted: set[str] = set()
    memory = []
    for call in found.calls:
        memory.append(call.memory + (0 if call.part in counted else sizes.get(call.part, 0)))
        counted.add(call.part)
    whole_time, whole_memory = sum(seconds) or 1.0, sum(memory) or 1
    return [0.5 * s / whole_time + 0.5 * m / whole_memory for s, m in zip(seconds, memory, strict=True)]


def _alike(one: object, other: object, sizes: dict[str, int]) -> bool:
    return (one.shapes, sizes.get(one.part), one.memory) == (other.shapes, sizes.get(other.part), other.memory)  # type: ignore[attr-defined]


def _typical(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _partition(pieces: Sequence[float], parts: int) -> list[int]:
    """Where each part but the first begins, so that the largest sum is smallest; no part is empty."""
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
    for stop in range(1, len(pieces) + 1):
        best[1, stop] = sum(pieces[:stop]), ()
        for count in range(2, min(parts, stop) + 1):
            best[count, stop] = min(
                (max(best[count - 1, cut][0], sum(pieces[cut:stop])), (*best[count - 1, cut][1], cut))
                for cut in range(count - 1, stop)
            )
    return list(best[parts, len(pieces)][1])


def _needs(found: Trace, start: int, stop: int) -> set[Source]:
    """What the calls from `start` to `stop` read, and the numbers that the user's forward reads until then."""
    wanted = set[Source]().union(*(call.needs for call in found.calls[start:stop]))
    return wanted.union(*(read for place, read in found.reads if place <= stop))


def _check_reachable(wanted: set[Source], order: dict[tuple[str, int], int], start: int) -> None:
    for source in wanted:
        if isinstance(source, Inside) and order[source.part, source.ordinal] < start:
            raise PrepareError(
                f"strategies.pipeline: {source.part} leaves a tensor behind that it does not return, and a later stage "
                "needs it; return it, or choose stages with strategies.pipeline.split so that both are on one"
            )
