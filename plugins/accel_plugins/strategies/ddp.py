"""Data parallel on torch's DistributedDataParallel (Li et al. 2020, "PyTorch Distributed").

Torch arms its gradient exchange when the forward pass returns, and looks for unused parameters from what forward
returned. Here the exchange is armed when backward begins, from the loss itself. That is what makes it right
whatever the loss was computed with: a method other than forward, one of several outputs, parameters that this
step or this rank does not use. The reducer, its buckets and its overlap with backward are torch's own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from accel.config import setting
from accel.errors import ConfigError, PrepareError
from accel.interfaces import Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel


class DDP(Strategy):
    """Every process holds the whole model; gradients are averaged while backward runs."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        """The settings of `ddp`."""

        bucket_size: float = setting(25.0, minimum=0)
        """Gradients are exchanged in buckets of about this many MiB."""

        find_unused_parameters: bool = True
        """Look in each backward graph for parameters that it does not use; off saves that search."""

        static_graph: bool = False
        """Promise that every step uses the same parameters in the same way: the first step finds out which."""

        gradient_as_bucket_view: bool = True
        """Let `.grad` be a view of the bucket, which saves a copy of all gradients."""

        broadcast_buffers: bool = True
        """Give every process rank 0's buffers after each exchange, such as batch norm's running statistics."""

        sync_batchnorm: bool = False
        """Compute batch norm over the samples of all processes; GPU only."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._replicas: dict[nn.Module, _Replica] = {}

    @classmethod
    def check(cls, options: Any, size: int) -> None:
        if options.static_graph and not options.gradient_as_bucket_view:
            raise ConfigError("static_graph: needs gradient_as_bucket_view: true")

    def setup(self, model: nn.Module) -> None:
        if self.mesh.size == 1:
            return
        if self.options.sync_batchnorm:
            self._convert_batchnorm(model)
        self._replicas[model] = _Replica(model, self)

    def before_backward(self, model: nn.Module, loss: Tensor, exchange: bool) -> Tensor:
        if model not in self._replicas:
            return loss
        return self._replicas[model].arm(loss, exchange, alone=len(self._replicas) == 1)

    def after_backward(self, model: nn.Module, exchange: bool) -> None:
        if model in self._replicas:
            self._replicas[model].finish(exchange)

    def settle(self, model: nn.Module) -> None:
        if model in self._replicas:
            self._replicas[model].check_exchanged()

    def release(self) -> None:
        self._replicas.clear()

    def _convert_batchnorm(self, model: nn.Module) -> None:
        from torch import nn

        if self.device.type == "cpu":
            raise ConfigError(
                "strategies.ddp.sync_batchnorm: torch's synchronised batch norm needs a GPU; leave it off"
            )
        for name, child in list(model.named_children()):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(child, self.mesh.group)  # type: ignore[no-untyped-call]
            setattr(model, name, converted)


class _Replica:
    """One model's reducer: armed when backward begins, and again at rest so that a bare backward exchanges too."""

    def __init__(self, model: nn.Module, strategy: DDP) -> None:
        self.model, self.strategy, self.options = model, strategy, strategy.options
        self.searches: bool = self.options.find_unused_parameters and not self.options.static_graph
        self._build()

    def _build(self) -> None:
        """Broadcast rank 0's weights and make a reducer for the parameters that train now; all ranks."""
        import torch

        from accel.runtime.collectives import broadcast_in_place

        state = [tensor.detach() for tensor in (*self.model.parameters(), *self.model.buffers())]
        broadcast_in_place(state, self.strategy.mesh.group)
        self.trains = [parameter.requires_grad for parameter in self.model.parameters()]
        self.ddp: DistributedDataParallel | None = None
        if not any(self.trains):
            return
        self.anchor = torch.nn.Parameter(torch.zeros((), device=self.strategy.device))
        self.ddp = self._wrap()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.everything = _touch_all(trained)
        self.first_static = self.options.static_graph
        if self.searches:
            with _without_reducer_warning():
                self._expect(_touch_all([*trained, self.anchor]))
        self._rest()

    def _wrap(self) -> DistributedDataParallel:
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        holder = nn.Module()
        holder.model = self.model
        if self.searches:
            holder.anchor = self.anchor
        return DistributedDataParallel(
            holder,
            process_group=self.strategy.mesh.group,
            init_sync=False,
            bucket_cap_mb=self.options.bucket_size,
            find_unused_parameters=self.searches,
            gradient_as_bucket_view=self.options.gradient_as_bucket_view,
            static_graph=self.options.static_graph,
        )

    def arm(self, loss: Tensor, exchange: bool, alone: bool) -> Tensor:
        """Expect gradients from this loss. Returns the loss to run backward from.

        Where this is the only model, the loss is tied to the anchor, so that every rank takes part in the
        exchange even if its loss happens to reach no parameter.
        """
        if self.trains != [parameter.requires_grad for parameter in self.model.parameters()]:
            self._build()
        if self.ddp is None:
            return loss
        reducer = self.ddp.reducer
        reducer._reset_state()
        if exchange or self.first_static:  # static_graph learns from one exchange, even in the middle of a window
            if alone and self.searches:
                loss = loss + self.anchor
            reducer._rebuild_buckets()
            reducer.prepare_for_forward()
            self._expect(loss)
        return loss

    def finish(self, exchange: bool) -> None:
        """After backward: what static_graph still owes, the buffers, and back to rest."""
        if self.ddp is None:
            return
        if self.first_static:
            self.ddp.reducer._delay_all_reduce()  # type: ignore[attr-defined]
            self.first_static = False
        if exchange:
            self._broadcast_buffers()
        self._rest()

    def check_exchanged(self) -> None:
        """Raise PrepareError if a bare backward left gradients that were not exchanged."""
        if self.ddp is None:
            return
        try:
            self.ddp.reducer._check_reducer_finalized()
        except RuntimeError:
            self._refuse_bare_backward(
                "used only some of the model's parameters, so their gradients were not exchanged"
            )
        if self.options.static_graph:
            self._refuse_bare_backward("is not seen by strategies.ddp.static_graph")
        self._broadcast_buffers()
        self._rest()

    def _refuse_bare_backward(self, reason: str) -> NoReturn:
        raise PrepareError(
            f"loss.backward(): a bare loss.backward() {reason}; call accelerator.backward(loss), which sees what the "
            "loss uses"
        ) from None

    def _rest(self) -> None:
        """Expect a gradient for every parameter, from whatever backward comes next."""
        self.anchor.grad = None
        if not self.options.static_graph:
            self._expect(self.everything)

    def _expect(self, root: Tensor) -> None:
        assert self.ddp is not None
        self.ddp.reducer.prepare_for_backward([root] if self.searches else [])

    def _broadcast_buffers(self) -> None:
        from accel.runtime.collectives import broadcast_in_place

        if self.options.broadcast_buffers and self.model.training:
            broadcast_in_place(list(self.model.buffers()), self.strategy.mesh.group)


def _touch_all(parameters: list[nn.Parameter]) -> Tensor:
    """A tensor whose graph reaches every parameter; never computed with."""
    import torch

    class Everything(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            return inputs[0].new_zeros(())

    result: Tensor = Everything.apply(*parameters)  # type: ignore[no-untyped-call]
    return result


@contextlib.contextmanager
def _without_reducer_warning() -> Iterator[None]:
    """Keep the reducer from advising, once a process, to turn off the search for unused parameters.

    It writes straight to file descriptor 2, past Python's warnings; nothing else writes there meanwhile.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
