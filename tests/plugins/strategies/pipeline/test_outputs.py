"""What a loop may compute from outputs that are on the last stage only: any loss, also of tensors that are here."""

from types import SimpleNamespace

import pytest
import torch
from accel_plugins.strategies.pipeline.outputs import Awaited, await_output, tell_loss
from torch.nn import functional as F

CPU = torch.device("cpu")
TARGETS, MASK, WEIGHTS = torch.tensor([3, 1]), torch.tensor([1.0, 0.0]), torch.rand(5)

LOSSES = {
    "masked": lambda x: (F.cross_entropy(x, TARGETS, reduction="none") * MASK).sum() / MASK.sum(),
    "weighted": lambda x: F.cross_entropy(x, TARGETS, weight=WEIGHTS, label_smoothing=0.1),
    "gathered": lambda x: -(x.log_softmax(-1).gather(1, TARGETS[:, None]).squeeze(1) * MASK).sum(),
    "focal": lambda x: ((1 - x.softmax(-1)) ** 2 * x.log_softmax(-1)).gather(1, TARGETS[:, None]).mean(),
    "chosen": lambda x: x[torch.tensor([0])].sum() + x.max(-1).values.sum(),
    "between": lambda x: F.smooth_l1_loss(x, torch.rand(2, 5)) + F.mse_loss(x * WEIGHTS, torch.rand(2, 5)),
    "divergence": lambda x: F.kl_div(x.log_softmax(-1), torch.rand(2, 5), reduction="batchmean"),
    "similarity": lambda x: (
        F.cosine_similarity(x, torch.rand(2, 5)).mean() + F.cosine_embedding_loss(x, x + 1, MASK - 1)
    ),
    "margin": lambda x: F.multi_margin_loss(x, TARGETS) + F.multilabel_margin_loss(x, TARGETS[:, None].expand(2, 5)),
    "masks": lambda x: x[MASK > 0].sum() + x[:, WEIGHTS > 0.5].square().sum(),
    "written to": lambda x: torch.ones_like(x).mul_(x).sub_(torch.zeros_like(x)).sum(),
    "product": lambda x: torch.einsum("bc,c->b", x, WEIGHTS).sum() + x.norm(),
}


class Model(torch.autograd.Function):
    """Stands for a model whose last stage is elsewhere."""

    @staticmethod
    def forward(ctx, anchor, found):
        ctx.known, ctx.found = set(), found
        return await_output((2, 5), torch.float32, CPU, "Model")

    @staticmethod
    def backward(ctx, gradient):
        ctx.found.append(gradient)
        return None, None


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_goes_back_to_the_outputs_without_values(name, scaled):
    found = []
    loss = LOSSES[name](Model.apply(torch.zeros((), requires_grad=True), found))
    group = SimpleNamespace(size=lambda: 2)
    wire = SimpleNamespace(group=group, device=CPU, share=lambda *told, waits: torch.tensor(2.0))
    tell_loss(loss, wire)
    assert loss.item() == 2.0
    (loss * 0.5 if scaled else loss).backward()
    assert [(isinstance(gradient, Awaited), gradient.shape) for gradient in found] == [(True, (2, 5))]
