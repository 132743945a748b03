"""Try a model out on an example, decide on its stages, and make sure that they give what the whole model gives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accel.errors import PrepareError
from accel.runtime.blocks import computes, has_parameters, repeated_modules
from accel.runtime.collectives import broadcast_object
from accel.runtime.example import example_inputs, tried_out
from accel.runtime.nested import map_tensors, tensors

from .batches import Batch, Layout, layout_of, merge
from .checks import check_compiled, runs_once
from .message import Message
from .parts import Stage, find_parts, listen_to
from .run import Run
from .split import Split, balance, split
from .states import Changes, find_changes
from .trace import Result, Trace, measure, trace

if TYPE_CHECKING:
    from .strategy import Pipeline

_TOLERANCE = 1e-4
"""How far micro-batches in stages may be from the whole model, relative to the largest output."""


@dataclass
class Plan:
    """A model's parts by name, its stages, and how its arguments are cut into micro-batches."""

    parts: dict[str, nn.Module]
    stage: Stage
    split: Split
    layout: Layout
    found: Trace
    blocks: set[str]
    cuts: Sequence[int] = ()
    """The calls with which further stages begin."""

    changes: Changes = dataclasses.field(default_factory=Changes)

    def begins_stage(self, part: str) -> bool:
        """Whether a further stage begins with a call of this part."""
        return any(self.found.calls[cut].part == part for cut in self.cuts)


def make_plan(model: nn.Module, strategy: Pipeline) -> Plan:
    """Find the stages of a model; all ranks. Raises PrepareError, naming what blocked it."""
    args, kwargs = example_inputs(model, strategy.options.example, "strategies.pipeline.example")
    args, kwargs = _at_least_two_samples(args, kwargs)
    blocks = _find_blocks(model, strategy, args, kwargs)
    parts = find_parts(model, blocks)
    names = {name for name, module in parts.items() if id(module) in {id(block) for block in blocks}}
    check_compiled(model, parts.values())
    stage = listen_to(parts)
    with tried_out(model):
        found = trace(model, stage, args, kwargs)
        measure(model, stage, args, kwargs, found)
    names = names or {call.part for call in found.calls}
    cuts = _cuts(model, strategy, found, names, parts)
    made = split(found, names, cuts)
    made = dataclasses.replace(made, glue=_glue(parts, made))
    plan = Plan(parts, stage, made, Layout(0, frozenset(), frozenset()), found, names, cuts)
    count = 1 if strategy.options.micro_batches == 1 else 2
    _settle_layout(model, plan, args, kwargs, count)
    batch = Batch(model.forward, args, kwargs, plan.layout, count)
    return dataclasses.replace(plan, changes=find_changes(model, parts, batch, runs_once(strategy.options)))


def _at_least_two_samples(args: Any, kwargs: Any) -> Any:
    """Repeat an example of one sample, which says nothing of micro-batches."""
    first = next((tensor for _, tensor in tensors((args, kwargs)) if tensor.dim()), None)
    if first is None or first.shape[0] != 1:
        return args, kwargs
    return map_tensors(lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, (args, kwargs))


def _find_blocks(model: nn.Module, strategy: Pipeline, args: Any, kwargs: Any) -> list[nn.Module]:
    """The blocks of which stages are made: repeated in the structure, called repeatedly, or named by the setting."""
    blocks = list(repeated_modules(model))
    named = strategy.options.split
    if named != "auto":
        for name in named:
            blocks.append(_named(model, name))
    if len(blocks) < strategy.mesh.size and named == "auto":
        blocks = _called_repeatedly(model, args, kwargs)  # none: then every part is a block
    return blocks


def _named(model: nn.Module, name: str) -> nn.Module:
    found: nn.Module | None = dict(model.named_modules()).get(name)
    if found is None or found is model or not computes(found):
        names = [n for n, module in model.named_modules() if n and computes(module) and has_parameters(module)]
        raise PrepareError(
            f"strategies.pipeline.split: {name!r} names no module of {type(model).__name__} that has a forward; it "
            f"has: {', '.join(names[:20])}"
        )
    return found


def _called_repeatedly(model: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """The outermost modules with parameters that one forward calls more than once, as blocks that share weights."""
    calls: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda m, _: calls.update([m]))
        for module in model.modules()
        if has_parameters(module)
    ]
    with tried_out(model), torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    found = [module for module, count in calls.items() if count > 1]
    inner = {id(m) for module in found for m in module.modules() if m is not module}
    return [module for module in found if id(module) not in inner]


def _cuts(
    model: nn.Module, strategy: Pipeline, found: Trace, blocks: set[str], parts: dict[str, nn.Module]
) -> Sequence[int]:
    """Where stages begin, decided by process 0 for all: times differ."""
    named, ranks = strategy.options.split, strategy.mesh.size
    if named == "auto":
        sizes = {name: sum(p.numel() * p.element_size() for p in module.parameters()) for name, module in parts.items()}
        stages = ranks * (2 if strategy.options.schedule == "interleaved" else 1)
        return broadcast_object(balance(found, blocks, stages, sizes), dist.group.WORLD)
    if (len(named) + 1) % ranks or (strategy.options.schedule != "interleaved" and len(named) + 1 != ranks):
        raise PrepareError(
            f"strategies.pipeline.split: names the first blocks of {len(named)} further stages, but there are {ranks} "
            "processes along the pipeline; name one less than those (interleaved: than a multiple of those)"
        )
    order = found.named()
    cuts = [order.get((name, 0), 0) for name in named]
    if cuts != sorted(set(cuts)) or 0 in cuts:
        called = list(dict.fromkeys(call.part for call in found.calls))
        raise PrepareError(
            f"strategies.pipeline.split: {', '.join(named)} are not called in this order after the first; "
            f"the parts of {type(model).__name__} are called in the order {', '.join(called)}"
        )
    return cuts


def _glue(parts: dict[str, nn.Module], made: Split) -> frozenset[str]:
    return frozenset(name for name, module in parts.items() if name not in made.places and not has_parameters(module))


def _settle_layout(model: nn.Module, plan: Plan, args: Any, kwargs: Any, count: int) -> None:
    """Find along which dim samples lie, by what gives the whole model's output; raises PrepareError if none does."""
    failures = []
    for dim in (0, 1):
        layout = layout_of(model.forward, args, kwargs, dim)
        if layout is None:
            continue
        plan.layout = layout
        failure = _differs(model, plan, args, kwargs, count)
        if failure is None:
            return
        failures.append(f"samples along dim {dim}: {failure}")
    raise PrepareError(
        f"strategies.pipeline: {type(model).__name__} in micro-batches and stages does not give what it gives as a "
        f"whole: {'; '.join(failures) or 'its arguments hold no tensor'}. If the example is not like your data, "
        "describe it in strategies.pipeline.example"
    )


@torch.no_grad()
def _differs(model: nn.Module, plan: Plan, args: Any, kwargs: Any, count: int) -> str | None:
    """How stages on so many micro-batches differ from the whole model on an example; None if they do not."""
    with tried_out(model):
        model.eval()
        with tried_out(model):
            expected = [tensor for _, tensor in tensors(model(*args, **kwargs))]
        batch = Batch(model.forward, args, kwargs, plan.layout, count)
        if batch.count < count:
            return "one sample only"
        try:
            _learn_batch_dims(model, plan, batch)
            messages = [_through_stages(model, plan, batch, index) for index in range(batch.count)]
            message, _ = merge(messages, batch.sizes, plan.split)
            output = _run(model, plan, plan.split.stages, batch, None, message)[0]
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, PrepareError) as error:
            return f"{type(error).__name__}: {error}"
    return _compare(expected, [tensor for _, tensor in tensors(output)])


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> str | None:
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one.shape != other.shape:
            return f"output {index} has shape {list(other.shape)} rather than {list(one.shape)}"
        if one.is_floating_point() and one.numel():
            difference, size = (one - other).abs().max().item(), one.abs().max().item()
            if not difference <= _TOLERANCE * max(size, 1e-6):
                return f"output {index} differs by {difference:.1e} of {size:.1e}; are samples computed together?"
    return None if len(expected) == len(found) else f"{len(found)} rather than {len(expected)} tensors"


def _learn_batch_dims(model: nn.Module, plan: Plan, batch: Batch) -> None:
    """The dim in which the shapes of a result for the whole example and for a micro-batch differ counts samples."""
    whole, part = (_through_stages(model, plan, batch, index) for index in (None, 0))
    for one, other in zip(whole.calls, part.calls, strict=True):
        for place, (a, b) in enumerate(zip(one.leaves, other.leaves, strict=True)):
            differ = [dim for dim, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y]
            if differ:
                plan.split.batch_dims[Result(one.part, one.ordinal, place)] = differ[0]


def _through_stages(model: nn.Module, plan: Plan, batch: Batch, index: int | None) -> Message:
    message = Message(0, [], [], [])
    for stage in range(plan.split.stages):
        message = _run(model, plan, stage, batch, index, message)[1]
    return message


def _run(
    model: nn.Module, plan: Plan, stage: int, batch: Batch, index: int | None, message: Message
) -> tuple[Any, Message]:
    run = Run(plan.split, plan.stage, stage, batch.device, message, message.payload)
    args, kwargs = batch.arguments(batch.values(index))
    with tried_out(model):  # each run begins with what the model keeps
        output = run.forward(model, args, kwargs)
    if stage == plan.split.stages:
        return output, message
    calls, payload = run.results()
    return output, Message(0, calls, payload, [False] * len(payload))
