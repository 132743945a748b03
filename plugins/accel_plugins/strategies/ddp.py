"""Data parallel on torch's DistributedDataParallel (Li et al. 2020, "PyTorch Distributed").

Torch arms its gradient exchange when the forward pass returns. Here it is armed when backward begins, which makes
it right whatever the loss was computed with: a method other than forward, several forwards, one of several outputs.
The reducer, its buckets and its overlap with backward are torch's own.

Parameters that a step, or a rank's step, does not use are found after backward, from the gradients that did not
arrive, and contributed then. Torch's own search costs a walk of the graph and one more all-reduce in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
        """Let a step, or a rank's step, leave parameters unused; off saves a third of a microsecond for each."""

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
        if model in self._replicas:
            self._replicas[model].arm(exchange)
        return loss

    def after_backward(self, model: nn.Module, exchange: bool) -> None:
        if model in self._replicas:
            self._replicas[model].finish(exchange, alone=len(self._replicas) == 1)

    def exchange(self, model: nn.Module) -> None:
        if model in self._replicas:
            self._replicas[model].exchange()

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
    """One model and its reducer, armed at rest too, so that a bare `loss.backward()` exchanges as well.

    Torch's reducer takes no DTensors, which another axis makes. It is then given leaves of its own that share their
    memory, and exchanges when backward is over.
    """

    def __init__(self, model: nn.Module, strategy: DDP) -> None:
        self.model, self.strategy, self.options = model, strategy, strategy.options
        self._arrived: list[nn.Parameter] = []
        self._build()

    def _build(self) -> None:
        """Broadcast rank 0's weights and make a reducer for the parameters that train now; all ranks."""
        from accel.runtime.collectives import broadcast_in_place
        from accel.runtime.shards import held_parameters, held_part

        held = held_parameters(self.model)
        state = [held_part(tensor) for tensor in (*held, *self.model.buffers())]
        broadcast_in_place(state, self.strategy.mesh.group)
        self._trains = [parameter.requires_grad for parameter in self.model.parameters()]
        self._trained = [parameter for parameter in held if parameter.requires_grad]
        self._leaves = self._make_leaves()
        self._divided = self._leaves is not self._trained
        self._ddp = self._wrap() if self._trained else None
        self._first_static = self.options.static_graph
        for hook in getattr(self, "_hooks", ()):
            hook.remove()
        notice = self._trained if self.options.find_unused_parameters and not self.options.static_graph else ()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._arrived.append)  # type: ignore[no-untyped-call]
            for p in notice
        ]
        self._rest()

    def _make_leaves(self) -> list[nn.Parameter]:
        """What the reducer sees: the parameters themselves, unless some are divided along another axis."""
        from torch import nn
        from torch.distributed.tensor import DTensor

        from accel.runtime.shards import held_part

        if not any(isinstance(parameter, DTensor) for parameter in self._trained):
            return self._trained
        if self.options.static_graph:
            raise PrepareError("strategies.ddp.static_graph: sees no divided parameters; leave it off beside tensor")
        return [nn.Parameter(held_part(parameter)) for parameter in self._trained]

    def _wrap(self) -> DistributedDataParallel:
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        holder = nn.Module()  # of which the reducer sees the parameters; its forward is never called
        holder.leaves = nn.ParameterList(self._leaves)
        return DistributedDataParallel(
            holder,
            process_group=self.strategy.mesh.group,
            init_sync=False,
            bucket_cap_mb=self.options.bucket_size,
            gradient_as_bucket_view=self.options.gradient_as_bucket_view,
            static_graph=self.options.static_graph,
        )

    def arm(self, exchange: bool) -> None:
        """Before backward: expect gradients, or let them add up."""
        if self._trains != [parameter.requires_grad for parameter in self.model.parameters()]:
            self._build()
        if self._ddp is None:
            return
        self._arrived.clear()
        reducer = self._ddp.reducer
        reducer._reset_state()
        if exchange or self._first_static:  # static_graph learns from one exchange, even in the middle of a window
            self._expect()

    def finish(self, exchange: bool, alone: bool) -> None:
        """After backward: what is still owed to the exchange, the buffers, and back to rest."""
        if self._ddp is None:
            return
        if self._divided and exchange:
            self.exchange()
            return
        if self._first_static:
            self._ddp.reducer._delay_all_reduce()  # type: ignore[attr-defined]
            self._first_static = False
        if exchange:
            if self._hooks and (self._arrived or alone):
                self._contribute_unused()
            self._check_finalized(
                "strategies.ddp.find_unused_parameters: is off, but this step did not use all of them"
            )
            self._broadcast_buffers()
        self._rest()

    def check_exchanged(self) -> None:
        """Raise PrepareError if a bare backward left gradients that were not exchanged."""
        if self._ddp is None:
            return
        if self._divided:
            self.exchange()
            return
        if self.options.static_graph:
            raise PrepareError(
                "loss.backward(): is not seen by strategies.ddp.static_graph; call accelerator.backward(loss)"
            )
        self._check_finalized(
            "loss.backward(): a bare loss.backward() used only some of the model's parameters, so that their gradients "
            "were not exchanged; call accelerator.backward(loss)"
        )
        self._broadcast_buffers()
        self._rest()

    def exchange(self) -> None:
        """Exchange what `.grad` holds, after backward. A pass of negative zeros, which add nothing, sets it off."""
        if self._ddp is None:
            return
        self._ddp.reducer._reset_state()
        self._expect()
        self._arrived.clear()
        if self._divided:
            self._lend_gradients()
        self._contribute_unused()
        if self._divided:
            self._take_gradients()
        self._check_finalized("exchange: torch's reducer did not finish; this is a bug of accel, please report it")
        self._broadcast_buffers()
        self._rest()

    def _expect(self) -> None:
        """Let the reducer exchange in the coming pass."""
        assert self._ddp is not None
        self._ddp.reducer._rebuild_buckets()
        self._ddp.reducer.prepare_for_forward()
        self._ddp.reducer.prepare_for_backward([])

    def _lend_gradients(self) -> None:
        from accel.runtime.shards import held_part

        for parameter, leaf in zip(self._trained, self._leaves, strict=True):
            gradient: Any = parameter.grad
            if gradient is not None:
                placements = getattr(parameter, "placements", None)
                if placements != getattr(gradient, "placements", None):  # such as sums that are not complete
                    gradient = gradient.redistribute(placements=placements)
            leaf.grad = None if gradient is None else held_part(gradient)

    def _take_gradients(self) -> None:
        from accel.runtime.shards import like_part

        for parameter, leaf in zip(self._trained, self._leaves, strict=True):
            parameter.grad = None if leaf.grad is None else like_part(leaf.grad, parameter)

    def _contribute_unused(self) -> None:
        """Take part in the exchange of the parameters that this rank's backward did not reach.

        The contribution is negative zero, which adds nothing: -0 + x = x, also for x = +0. Where the sum is still
        negative zero everywhere, no rank used the parameter, and it has no gradient, as on one process.
        """
        import torch

        reached = set(map(id, self._arrived))
        unused = [leaf for leaf in self._leaves if id(leaf) not in reached]
        if not unused:
            return
        empty = [parameter for parameter in unused if parameter.grad is None]
        torch.autograd.backward(unused, [torch.full_like(parameter, -0.0) for parameter in unused])
        for parameter in empty:
            if parameter.grad is not None and bool(((parameter.grad == 0) & parameter.grad.signbit()).all()):
                parameter.grad = None

    def _check_finalized(self, message: str) -> None:
        assert self._ddp is not None
        try:
            self._ddp.reducer._check_reducer_finalized()
        except RuntimeError:
            raise PrepareError(message) from None

    def _rest(self) -> None:
        """Expect a gradient for every parameter, from whatever backward comes next."""
        if self._ddp is not None and not self.options.static_graph:
            self._ddp.reducer.prepare_for_backward([])

    def _broadcast_buffers(self) -> None:
        from accel.runtime.collectives import broadcast_in_place

        if self.options.broadcast_buffers and self.model.training:
            broadcast_in_place(list(self.model.buffers()), self.strategy.mesh.group)
