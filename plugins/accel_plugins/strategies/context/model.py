"""One model of whose sequences each process takes some positions: found out where, and held against the whole."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from accel.errors import PrepareError
from accel.runtime.collectives import broadcast_in_place, gather_object
from accel.runtime.divided import check
from accel.runtime.divided.borders import Borders, Whereabouts
from accel.runtime.divided.numbers import Numbers
from accel.runtime.divided.tensor import Divided, Division, divide, part_of
from accel.runtime.example import Inputs, example_inputs
from accel.runtime.nested import map_tensors
from accel.runtime.shards import Elsewhere

from .gradients import average_gradients
from .inputs import Arguments, lengthened, sequence_dims
from .peers import SequencePeers

if TYPE_CHECKING:
    from .strategy import Context


class SequenceModel:
    """A model, and the dims along which its inputs are divided.

    `announced` is whether `accelerator.backward` is under way; a bare `loss.backward()` exchanges at its end.
    """

    def __init__(self, model: nn.Module, strategy: Context) -> None:
        self.model, self.strategy = model, strategy
        axis, options = strategy.mesh, strategy.options
        self.group = axis.group
        self.peers = SequencePeers(axis.size, axis.index, axis.size, self.group, method=options.attention)
        self.announced, self._queued, self._depth = False, False, 0
        self._modules = dict(model.named_modules())
        self.check_compiled()
        self._check_parameters()
        broadcast_in_place([*model.parameters(), *model.buffers()], self.group)
        inputs = example_inputs(model, options.example, "strategies.context.example")
        self.arguments = Arguments(model)
        self.dims = sequence_dims(model, inputs, options.dims)
        inputs = lengthened(self.model, inputs, self.dims, axis.size)
        self.numbers = Numbers(model, inputs, self.group, strategy.device)
        self.borders = Borders(model)
        self._divide(inputs)
        self.numbers.share()

    def __reduce__(self) -> Any:
        """Copies of the model are whole: nobody would average their gradients."""
        return type(None), ()

    def check_compiled(self) -> None:
        """Raise PrepareError for a module that is compiled."""
        check.refuse_compiled(self._modules, "strategies.context")

    def before_forward(self) -> None:
        """Let all processes go on alike where they compute the same, such as dropout on what is whole.

        Raises PrepareError for what was compiled since.
        """
        self.check_compiled()
        self._queued = False
        self.borders.mark()
        if self.model.training:
            self.numbers.share()

    def run(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One forward call: the outermost takes its part of the inputs, and puts its outputs together."""
        if self._depth or not self._divides(args, kwargs):
            return forward(*args, **kwargs)
        self._depth += 1
        try:
            args, kwargs = self._enter(args, kwargs)
            return map_tensors(self._leave, forward(*args, **kwargs))
        finally:
            self._depth -= 1
            self.borders.clear()

    def exchange(self) -> None:
        """Average the gradients over the processes."""
        self._queued = False
        average_gradients(list(self.model.parameters()), self.group, self.strategy.device)

    def describe(self) -> dict[str, str]:
        """How inputs are divided, and which modules put sequences together again."""
        size = self.peers.size
        found = {f"forward({name})": f"divided along dim {dim} over {size}" for name, dim in self.dims.items()}
        for name, reasons in self.together.items():
            found[name or "forward"] = f"puts the whole sequence together: {'; '.join(sorted(reasons))}"
        return found

    def _divides(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call's sequences are divided. Raises PrepareError if they cannot be, in training."""
        given = self.arguments.tensors(args, kwargs)
        dims = {name: self._dim(name, tensor) for name, tensor in given.items()}
        lengths = {name: given[name].shape[dim] for name, dim in dims.items() if dim is not None}
        uneven = [f"{name} has {length}" for name, length in lengths.items() if length % self.peers.size]
        if lengths and not uneven:
            return True
        if torch.is_grad_enabled() and self.model.training:
            what = f"{uneven[0]} positions" if uneven else f"none of {', '.join(self.dims)} was given"
            raise PrepareError(
                f"strategies.context: {type(self.model).__name__} was called in training with sequences that cannot "
                f"be divided among {self.peers.size} processes: {what}; pad them to a multiple of {self.peers.size}, "
                "or name other inputs in strategies.context.dims"
            )
        return False  # all compute the whole: right, and what single tokens need

    def _dim(self, name: str, tensor: Tensor) -> int | None:
        """The dim of an input that counts positions; None if it has none, though that of the example had."""
        dim = self.dims.get(name)
        return dim if dim is not None and dim < tensor.dim() else None

    def _enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        new = {}
        for name, whole in self.arguments.tensors(args, kwargs).items():
            dim = self._dim(name, whole)
            entered = self.peers.enter(whole, dim)
            division = None if dim is None else Division(self.peers, dim, sources=frozenset({name}))
            new[name] = entered if division is None else divide(entered, division)
        return self.arguments.replace(args, kwargs, new)

    def _leave(self, output: Tensor) -> Tensor:
        if isinstance(output, Divided):
            division = output.division
            output = self.peers.leave(part_of(output), division.dim, division.outer)
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(self._began_backward)  # type: ignore[no-untyped-call]
        return output

    def _began_backward(self, gradient: Tensor) -> None:
        """Let a bare `loss.backward()` exchange when it is over, after what other axes have put there to be done."""
        if not (self.announced or self._queued):
            self._queued = True
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self.exchange))

    def _divide(self, inputs: Inputs) -> None:
        """Let forward divide its inputs, and compare with the whole. Raises PrepareError where it differs."""
        expected = check.run(self.model, inputs)
        self.model.__dict__["_sequence"] = self
        self.model.__class__ = _adopted_class(type(self.model))  # type: ignore[arg-type]
        with Whereabouts(self.model) as where:
            self.peers.divided_whole = where.note
            fault = self._fault(inputs, expected)
            self.peers.divided_whole = None
        self.together = where.found
        if fault:
            raise PrepareError(
                f"prepare: context cannot divide the sequences of this {type(self.model).__name__} "
                f"({', '.join(f'{name} along dim {dim}' for name, dim in self.dims.items())}): {fault}"
                f"{self._suspects()}; name other inputs in strategies.context.dims, or use `zero3`"
            )

    def _fault(self, inputs: Inputs, expected: check.Result) -> str:
        """The first difference or failure on any process; empty if there is none."""
        try:
            fault = check.compare(check.run(self.model, inputs), expected)
            fault = fault and f"on an example it changes {fault}"
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
            fault = f"it fails with {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        return next(filter(None, gather_object(fault, self.group)), "")

    def _suspects(self) -> str:
        modules = [f"{name or 'forward'}: {', '.join(sorted(why))}" for name, why in self.together.items()]
        return f" (not divided: {'; '.join(modules[:5])})" if modules else ""

    def _check_parameters(self) -> None:
        for name, parameter in self.model.named_parameters():
            if isinstance(parameter, DTensor | Elsewhere):
                raise PrepareError(
                    f"prepare: context cannot divide the sequences of this {type(self.model).__name__}: parameter "
                    f"{name!r} is not whole on each process; leave out `tensor` and `pipeline`, and divide parameters "
                    "with `zero3`"
                )


class SequenceForward:
    """Mixin of a model whose sequences are divided."""

    _sequence: SequenceModel | None


@functools.cache
def _adopted_class(own: type[nn.Module]) -> type[Any]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._sequence is None:
            return own.forward(self, *args, **kwargs)
        return self._sequence.run(functools.partial(own.forward, self), args, kwargs)

    return type(own.__name__, (SequenceForward, own), {**names, "forward": forward})
