"""Data parallel on torch's DistributedDataParallel (Li et al. 2020, "PyTorch Distributed").

Torch arms its gradient exchange when the forward pass returns, and looks for unused parameters from what forward
returned. Here the exchange is armed when backward begins, from the loss itself. That is what makes it right
whatever the loss was computed with: a method other than forward, one of several outputs, parameters that this
step or this rank does not use. The reducer, its buckets and its overlap with backward are torch's own.
"""

from __future__ import annotations

import warnings
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
        """Look in each backward graph for parameters that it does not use; off saves that search."""

        static_graph: bool = False
        """Promise that every step uses the same parameters in the same way; found out once, then not looked at again."""

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
            raise ConfigError("strategies.ddp.sync_batchnorm: torch's synchronised batch norm needs a GPU; leave it off")
        for name, child in list(model.named_children()):
            setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child, self.mesh.group))


class _Replica:
    """One model's reducer: armed when backward begins, and again at rest so that a bare backward exchanges too."""

    def __init__(self, model: nn.Module, strategy: DDP) -> None:
        self.model, self.strategy, self.options = model, strategy, strategy.options
        self._build()

    def _build(self) -> None:
        """Broadcast rank 0's weights and make a reducer for the parameters that train now; all ranks."""
        import torch
        import torch.distributed as dist

        group = self.strategy.mesh.group
        state = [t.detach() for t in (*self.model.parameters(), *self.model.buffers())]
        if state:
            dist._broadcast_coalesced(group, state, 250 << 20, 0)
        self.trains = [parameter.requires_grad for parameter in self.model.parameters()]
        self.anchor: nn.Parameter | None = None
        self.ddp: DistributedDataParallel | None = None
        if any(self.trains):
            self.anchor = torch.nn.Parameter(torch.zeros((), device=self.strategy.device))
            self.ddp = self._wrap(self.anchor)
            self.everything = _touch_all(self.ddp)
            self.synced = False
            self._rest()

    def _wrap(self, anchor: nn.Parameter) -> DistributedDataParallel:
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel

        holder = nn.Module()
        holder.model, holder.anchor = self.model, anchor
        return DistributedDataParallel(
            holder,
            process_group=self.strategy.mesh.group,
            broadcast_buffers=False,
            init_sync=False,
            bucket_cap_mb=self.options.bucket_size,  # type: ignore[arg-type]
            find_unused_parameters=self.options.find_unused_parameters and not self.options.static_graph,
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
        if exchange or self._first_static:
            if alone:
                loss = loss + self.anchor
            reducer._rebuild_buckets()
            reducer.prepare_for_forward()
            self._expect(loss)
        return loss

    def finish(self, exchange: bool) -> None:
        """After backward: what static_graph still owes, the buffers, and back to rest."""
        if self.ddp is None or self.anchor is None:
            return
        if self._first_static:
            self.ddp.reducer._delay_all_reduce()
            self.synced = True
        self.anchor.grad = None
        if exchange:
            self._broadcast_buffers()
        self._rest()

    def check_exchanged(self) -> None:
        """Raise PrepareError if a bare backward left gradients that were not exchanged."""
        if self.ddp is None or self.anchor is None:
            return
        try:
            self.ddp.reducer._check_reducer_finalized()
        except RuntimeError as error:
            raise PrepareError(
                "loss.backward(): a bare loss.backward() used only some of the model's parameters, so their gradients "
                "were not exchanged; call accelerator.backward(loss), which sees what the loss uses"
            ) from error
        self.anchor.grad = None
        self._broadcast_buffers()
        self._rest()

    @property
    def _first_static(self) -> bool:
        """Whether static_graph has yet to see its one step; it is exchanged even in the middle of a window."""
        return self.options.static_graph and not self.synced

    def _rest(self) -> None:
        """Expect a gradient for every parameter, from whatever backward comes next."""
        if not self.options.static_graph:
            self._expect(self.everything)

    def _expect(self, root: Tensor) -> None:
        assert self.ddp is not None
        roots = [root] if self.ddp.find_unused_parameters else []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            self.ddp.reducer.prepare_for_backward(roots)

    def _broadcast_buffers(self) -> None:
        import torch.distributed as dist

        buffers = [buffer for buffer in self.model.buffers() if buffer is not None]
        if buffers and self.options.broadcast_buffers and self.model.training:
            dist._broadcast_coalesced(self.strategy.mesh.group, buffers, 250 << 20, 0)


def _touch_all(module: nn.Module) -> Tensor:
    """A tensor whose graph reaches every parameter; never computed with."""
    import torch

    class Everything(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *parameters: Tensor) -> Tensor:
            return parameters[0].new_zeros(())

    result: Tensor = Everything.apply(*(p for p in module.parameters() if p.requires_grad))
    return result
