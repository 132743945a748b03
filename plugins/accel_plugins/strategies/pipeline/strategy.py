"""Pipeline parallel: each process holds some consecutive blocks of the model and passes micro-batches on.

Made for the ordinary loop (GPipe, Huang et al. 2019; PipeDream's 1F1B, Narayanan et al. 2019; interleaved stages,
Narayanan et al. 2021; gradients of weights put off, Qi et al. 2023). The model is neither traced nor exported: each
stage runs the user's own forward, in which parts of other stages do not compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from accel.config import setting
from accel.config.example import parse_example
from accel.errors import PrepareError
from accel.interfaces import Axis, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from .engine import StagedModel


class Pipeline(Strategy):
    """Each process computes some consecutive blocks of the model, and passes micro-batches on to the next."""

    axis = Axis.PIPELINE
    waits: ClassVar[bool] = True
    hides_parameters: ClassVar[bool] = True
    splits_backward: ClassVar[bool] = True
    places_parameters: ClassVar[bool] = True
    takes_empty: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Options(Strategy.Options):
        """The settings of `pipeline`."""

        micro_batches: int | None = setting(None, minimum=1)
        """Parts of each batch that are under way at once; by default twice the processes along the pipeline."""

        schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "gpipe"
        """gpipe keeps the activations of all micro-batches; 1f1b those of few, and computes the others again;
        interleaved gives each process several stages, which shortens the wait for the first micro-batch; zero_bubble
        passes gradients on before it computes those of the weights."""

        split: Literal["auto"] | tuple[str, ...] = "auto"
        """Names of the first block of each further stage; by default stages take equal time and memory."""

        outputs: Literal["all", "last"] = "all"
        """Stages that get the output of a forward that learns; with `last`, accelerator.backward(loss) tells others
        the loss."""

        example: Mapping[str, Any] = setting({})
        """Inputs to try the model out on, by argument of forward: `tokens: int64[2, 8] < 100`; by default made up."""

        def __post_init__(self) -> None:
            parse_example(self.example)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._models: dict[nn.Module, StagedModel] = {}

    def setup(self, model: nn.Module) -> None:
        if self.mesh.size == 1:
            return
        from .checks import check_model
        from .engine import StagedModel

        check_model(model, self.options)
        self._models[model] = StagedModel(model, self)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        from accel.runtime.elementwise import objection_apart

        if self._models and (found := objection_apart(optimizer)):
            raise PrepareError(
                f"prepare: pipeline cannot train with the optimizer {type(optimizer).__name__}, which sees only the "
                f"parameters of its stage: {found}; use another, such as torch.optim.AdamW"
            )

    def complete_loss(self, loss: Tensor) -> None:
        from .outputs import refuse_weights, tell_loss

        refuse_weights(loss)
        if self._models and self.options.outputs == "last":
            tell_loss(loss, next(iter(self._models.values())).wire)

    def after_backward(self, model: nn.Module, exchange: bool) -> None:
        if model in self._models:
            self._models[model].share_buffers()

    def settle(self, model: nn.Module) -> None:
        import torch.distributed as dist

        if dist.is_initialized() and dist.get_world_size() > self.mesh.size:
            raise PrepareError(
                "loss.backward(): the other strategies do not see when the pipeline is drained; call "
                "accelerator.backward(loss)"
            )
        if self.options.outputs == "last":
            raise PrepareError(
                "loss.backward(): under strategies.pipeline.outputs: last the last stage tells the loss to the others "
                "in accelerator.backward(loss); call that"
            )
        self.after_backward(model, exchange=True)

    def owns(self, parameter: nn.Parameter) -> bool:
        owners = (staged.owner_of(parameter) for staged in self._models.values())
        return next((owner == self.mesh.index for owner in owners if owner is not None), True)

    def describe(self, model: nn.Module) -> dict[str, str]:
        return self._models[model].describe() if model in self._models else {}

    def staged(self, model: nn.Module) -> StagedModel:
        """What this process holds of a prepared model, for those who measure."""
        return self._models[model]

    def release(self) -> None:
        self._models.clear()
