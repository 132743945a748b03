"""What a forward asks about its data in Python, as `if mask.all():`, and whether all micro-batches answer alike.

One process asks once, of the whole batch, and goes one way; here each micro-batch goes its own. That may be as well,
as where a mask that hides nothing is left out, or give other numbers. Which of these, only its author knows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from accel.runtime.lines import warn

_ASKING = {
    Tensor.__bool__,
    Tensor.__contains__,
    Tensor.__float__,
    Tensor.item,
    Tensor.equal,
    Tensor.allclose,
    Tensor.is_nonzero,
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
}
"""What gives Python a yes, a no or a number. Of numbers, integers are left out: they are lengths, counts and places."""

_BETWEEN = {torch.overrides.__file__, torch._tensor.__file__}
"""Where torch itself passes questions on."""


class Progress(Protocol):
    """How far a forward is."""

    inside: bool
    """Whether a part is computing."""

    @property
    def returned(self) -> int:
        """Parts that have returned so far."""


class Answer(NamedTuple):
    """What Python was told, at which line of which file, whether in a part, and after how many had returned."""

    place: str
    value: bool | float
    inside: bool
    after: int


class Recorder(TorchFunctionMode):
    """Notes the answers that a forward gets, in order."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        self._progress = progress

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _ASKING and isinstance(result, (bool, float)):
            self.answers.append(Answer(_place(), result, self._progress.inside, self._progress.returned))
        return result

    @contextmanager
    def aside(self, part: nn.Module) -> Iterator[None]:
        """Inside, nothing is heard of a part that is compiled: torch would compile listening in, and later anew."""
        compiled = any(module._compiled_call_impl is not None for module in part.modules())
        on_top = torch.overrides._get_current_function_mode() is self  # type: ignore[no-untyped-call]
        with torch.overrides._pop_mode_temporarily() if compiled and on_top else nullcontext():
            yield

    def deciding(self) -> list[Answer]:
        """Those that a part or what it was given may depend on: without what was asked after the last one."""
        return [answer for answer in self.answers if answer.inside or answer.after < self._progress.returned]


def _place() -> str:
    """The line that asks."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Questions:
    """Those of one model, of which `last` is the last stage."""

    def __init__(self, name: str, last: int) -> None:
        self.name, self.last = name, last
        self.told = False
        self.silent: set[Any] = set()
        """Kinds of batches, by shapes and modes, with which nothing was asked: they cost no more."""

    def hear(self, kind: Any) -> Hearing:
        """The answers of a forward call with this kind of batch, of which there are none yet."""
        return Hearing(self, kind)

    def tell(self, one: Answer, other: Answer) -> None:
        """Warn, once, that micro-batches of one batch get different answers."""
        self.told = True
        warn(
            f"pipeline: {self.name} asks about its data at {one.place}, and micro-batches of one batch answer "
            f"differently ({one.value} and {other.value}), where one process asks once, of the whole batch. Unless the "
            "numbers are the same either way, set strategies.pipeline.micro_batches: 1, or ask about each sample"
        )


class Hearing:
    """The answers in one forward call, compared as they come.

    Parts are asked on their stage. What is asked between them is asked on every stage, and compared on the last: there
    it is asked once more, of the whole batch.
    """

    def __init__(self, questions: Questions, kind: Any) -> None:
        self._questions, self._kind = questions, kind
        self.listens = not questions.told and kind not in questions.silent
        self._first: dict[int | None, list[Answer]] = {}

    def compare(self, stage: int, answers: list[Answer]) -> None:
        """Compare what a micro-batch got on a stage, or the whole batch after the last, with what the first got."""
        if stage <= self._questions.last:
            self._compare(stage, [answer for answer in answers if answer.inside])
        if stage >= self._questions.last:
            self._compare(None, [answer for answer in answers if not answer.inside])

    def end(self) -> None:
        """The forward is over: remember whether anything was asked."""
        if self.listens and not any(self._first.values()):
            self._questions.silent.add(self._kind)

    def _compare(self, where: int | None, answers: list[Answer]) -> None:
        for one, other in zip(self._first.setdefault(where, answers), answers, strict=False):
            if one.place != other.place:  # they went different ways for another reason
                return
            if str(one.value) != str(other.value) and not self._questions.told:  # nan is as nan
                self._questions.tell(one, other)
