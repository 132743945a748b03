"""The user's forward on one stage: parts of earlier stages return what was received, those of later ones end it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from accel.errors import PrepareError
from accel.runtime.divided.tensor import whole_of
from accel.runtime.nested import tensors as tensors_in

from .absent import Absent, AbsentParameter, absent
from .checks import refuse_autograd_functions
from .message import Called, Leaf, Message
from .nest import put_together, take_apart
from .parts import Stage
from .questions import Recorder
from .split import Split
from .streams import Streams
from .trace import Result


class _Done(BaseException):
    """Ends the user's forward; no `except Exception` of theirs stops it."""


@dataclass
class _Kept:
    """A result that may be sent on. `version` tells whether it was changed in place since."""

    tensor: Tensor
    version: int


class Run:
    """One forward of one micro-batch on one stage, from a message with its tensors as this stage computes with them.

    `part_of` tells the parts who listens.
    """

    def __init__(
        self, split: Split, parts: Stage, stage: int, device: torch.device, message: Message, arrived: Sequence[Tensor]
    ) -> None:
        self.split, self.parts, self.stage, self.message, self.arrived = split, parts, stage, message, arrived
        self.inside = False
        self.recorder: Recorder | None = None
        """Who listens to this forward."""
        self._streams = Streams(device)
        self._device = device
        self._calls = list(message.calls)
        self._wanted = split.carried[stage + 1] if stage < split.stages else frozenset[Result]()
        self._replayed = self._current = 0
        self._ordinals: Counter[str] = Counter()
        self._kept: dict[Result, _Kept] = {}
        for called in message.calls:
            for place, leaf in enumerate(called.leaves):
                if leaf.payload is not None:
                    tensor = arrived[leaf.payload]
                    self._kept[Result(called.part, called.ordinal, place)] = _Kept(tensor, _version(tensor))

    def forward(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the user's forward as far as this stage goes; returns its output, None if a later stage has it."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it skips the parts of torch's own transformer
        self.parts.listener, self._learns = self, torch.is_grad_enabled()
        try:
            with self._streams.shared(self.message.seed):
                return function(*args, **kwargs)
        except _Done:
            return None
        finally:
            self.parts.listener = None
            torch.backends.mha.set_fastpath_enabled(fast)
            self._check_unchanged()

    @property
    def returned(self) -> int:
        """Parts that have returned so far, here and on earlier stages."""
        return len(self._calls)

    def call(self, part: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A part is called: compute it, return what came of it on an earlier stage, or end."""
        if part in self.split.glue:
            return forward(*args, **kwargs)
        ordinal = self._ordinals[part]
        self._ordinals[part] += 1
        self._current = max(self._current, self.split.stage_of(part, ordinal, self._current))
        if self._current > self.stage:
            raise _Done
        self._check_unchanged()
        if self._current == self.stage:
            return self._compute(part, ordinal, forward, args, kwargs)
        if self.stage == self.split.stages:
            return self._replay_at_end(part, ordinal, forward, args, kwargs)
        return _heard(self._replay(part, ordinal), forward.__self__, args, kwargs)  # type: ignore[attr-defined]

    def results(self) -> tuple[list[Called], list[Tensor]]:
        """All calls so far, and the tensors that later stages need of them, each once."""
        payload: list[Tensor] = []
        places: dict[int, int] = {}
        calls = []
        for called in self._calls:
            leaves = []
            for place, leaf in enumerate(called.leaves):
                result = Result(called.part, called.ordinal, place)
                sent = None
                if result in self._kept and (
                    result in self._wanted or not self._is_planned(called) or called is self._calls[-1]
                ):
                    tensor = self._kept[result].tensor
                    sent = places.setdefault(id(tensor), len(payload))
                    if sent == len(payload):
                        payload.append(tensor)
                leaves.append(leaf._replace(payload=sent))
            calls.append(called._replace(leaves=tuple(leaves)))
        return calls, payload

    def _compute(self, part: str, ordinal: int, forward: Any, args: Any, kwargs: Any) -> Any:
        if self._replayed < len(self.message.calls) and self.stage < self.split.stages:
            self._diverged(part)
        if self._learns and not torch.is_grad_enabled():
            refuse_autograd_functions(part, Run.forward.__code__)
        self.inside = True
        try:
            aside = self.recorder.aside(forward.__self__) if self.recorder is not None else nullcontext()
            with self._streams.own(), aside:
                output = forward(*args, **kwargs)
        finally:
            self.inside = False
        for kept in self._kept.values():
            kept.version = _version(kept.tensor)  # what a part changes in place, it changes on one stage
        skeleton, tensors = take_apart(output)
        self._drop_last()
        self._calls.append(Called(part, ordinal, skeleton, tuple(Leaf(tuple(t.shape), t.dtype, None) for t in tensors)))
        for place, tensor in enumerate(tensors):
            if isinstance(tensor, Absent):
                self._refuse_absent(part, tensor)
            self._keep(Result(part, ordinal, place), tensor)
        return output

    def _replay(self, part: str, ordinal: int) -> Any:
        known = self.message.calls[self._replayed] if self._replayed < len(self.message.calls) else None
        if known is None or (known.part, known.ordinal) != (part, ordinal):
            self._diverged(part)
        self._replayed += 1
        return self._result(known)

    def _replay_at_end(self, part: str, ordinal: int, forward: Any, args: Any, kwargs: Any) -> Any:
        """What micro-batches made of a part; where not all of them came to it, it is computed for the whole batch."""
        known = next((c for c in self.message.calls if (c.part, c.ordinal) == (part, ordinal)), None)
        if known is not None and known.everywhere:
            return _heard(self._result(known), forward.__self__, args, kwargs)
        given = [tensor for _, tensor in tensors_in((args, kwargs))]
        held = not any(isinstance(parameter, AbsentParameter) for parameter in forward.__self__.parameters())
        if held and not any(isinstance(tensor, Absent) for tensor in given):
            return self._compute(part, ordinal, forward, args, kwargs)
        if known is None:
            self._diverged(part)
        return self._result(known)

    def _result(self, known: Called) -> Any:
        """What a part returned elsewhere, as far as it is here."""
        tensors = [
            self._handed_out(Result(known.part, known.ordinal, place))
            if leaf.payload is not None
            else absent(leaf.shape, leaf.dtype, self._device, known.part)
            for place, leaf in enumerate(known.leaves)
        ]
        return put_together(known.skeleton, tensors)

    def _keep(self, result: Result, tensor: Tensor) -> None:
        """Keep a result for later stages; as it is now, where it is known to be changed between parts."""
        tensor = whole_of(tensor)
        if result in self.split.changed:
            tensor = tensor.clone()
        self._kept[result] = _Kept(tensor, _version(tensor))

    def _handed_out(self, result: Result) -> Tensor:
        tensor = self._kept[result].tensor
        return tensor.clone() if result in self.split.changed else tensor

    def _drop_last(self) -> None:
        """Let go of what the call before returned, unless later stages need it; the end asks for that of all."""
        if self._calls and self.stage < self.split.stages:
            last = self._calls[-1]
            for place in range(len(last.leaves)):
                result = Result(last.part, last.ordinal, place)
                if self._is_planned(last) and result not in self._wanted:
                    self._kept.pop(result, None)

    def _is_planned(self, called: Called) -> bool:
        return self.split.plans(called.part, called.ordinal)

    def _check_unchanged(self) -> None:
        for result, kept in self._kept.items():
            if _version(kept.tensor) != kept.version:
                raise PrepareError(
                    f"pipeline: what {result.part} returned was changed in place by the model's own forward, which "
                    "every stage runs; the example did not do so: describe one that does in strategies.pipeline.example"
                )

    def _refuse_absent(self, part: str, tensor: Absent) -> NoReturn:
        raise PrepareError(
            f"pipeline: {part} needs {tensor.origin!r}, which is on another stage; the example did not need it there: "
            "let strategies.pipeline.example describe inputs with which it does"
        )

    def _diverged(self, part: str) -> NoReturn:
        expected = (
            self.message.calls[self._replayed].part if self._replayed < len(self.message.calls) else "no other part"
        )
        raise PrepareError(
            f"pipeline: stage {self.stage} comes to {part} where an earlier stage came to {expected}; the model's own "
            "forward must go the same way on all stages, and may not depend on Python's or numpy's random numbers"
        )


def _heard(output: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a part returned elsewhere, after the user's hooks have heard of it, as those that collect hidden states."""
    for key, hook in list(module._forward_hooks.items()):
        origin = getattr(getattr(hook, "func", hook), "__module__", None) or ""
        if origin.startswith(("torch.distributed", "accel")):  # they serve those who compute
            continue
        named = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        changed = hook(module, args, *named, output)
        output = output if changed is None else changed
    return output


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
