"""Precisions really compute in their dtype; fp16 scales, skips and recovers as a reference says it must."""

import warnings

import pytest
import torch
from accel_plugins.devices.cpu import CPU
from torch import nn

from accel import Accelerator
from accel.errors import ConfigError, PrepareError
from accel.interfaces import Support
from accel.testing import run


class Probe(nn.Module):
    """Remembers the dtype that its product was computed in."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.linear(x)
        self.seen = hidden.dtype
        return {"out": hidden, "pair": (hidden.sum(), "text")}


def accelerator_of(precision, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is emulated on this cpu")
        return Accelerator(device="cpu", mixed_precision=precision, **settings)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_forward_computes_in_the_dtype_and_returns_float32(name, dtype):
    accelerator = accelerator_of(name)
    model = accelerator.prepare(Probe())
    output = model(torch.ones(2, 4))
    assert model.seen is dtype
    assert output["out"].dtype is output["pair"][0].dtype is torch.float32
    assert output["pair"][1] == "text"
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
    with accelerator.autocast():
        assert nn.functional.linear(torch.ones(1, 4), model.linear.weight).dtype is dtype


def fp16(**options):
    return {"fp16": {"initial_scale": 8.0, **options}}


def weight_after(accelerator, gradients):
    """Steps of SGD with a model whose gradient is the given number, and the scale after each."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    trace = []
    for gradient in gradients:
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, 1)).sum() * gradient)
        optimizer.step()
        trace.append((model.weight.item(), accelerator.precision.loss_scale, accelerator.optimizer_step_was_skipped))
    return trace


def test_the_scale_cancels_and_an_overflow_skips_and_backs_off():
    trace = weight_after(accelerator_of(fp16()), [1.0, float("inf"), 2.0])
    assert trace == [(-1.0, 8.0, False), (-1.0, 4.0, True), (-3.0, 4.0, False)]


def test_every_knob():
    inf = float("inf")
    scales = [s for _, s, _ in weight_after(accelerator_of(fp16(growth_interval=2, growth_factor=4.0)), [1, 1, 1, 1])]
    assert scales == [8, 32, 32, 128]
    scales = [s for _, s, _ in weight_after(accelerator_of(fp16(backoff_factor=0.25, minimum_scale=1.5)), [inf] * 3)]
    assert scales == [2, 1.5, 1.5]
    scales = [s for _, s, _ in weight_after(accelerator_of(fp16(hysteresis=2)), [inf] * 4)]
    assert scales == [8, 4, 4, 2]
    scales = [s for _, s, _ in weight_after(accelerator_of(fp16(dynamic=False)), [inf, 1.0])]
    assert scales == [8, 8]


def test_gradients_are_plain_when_they_are_clipped():
    accelerator = accelerator_of(fp16())
    model = nn.Linear(3, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(1, 3)).sum() * 2)
    assert accelerator.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(12**0.5)
    assert model.weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    before = model.weight.detach().clone()
    optimizer.step()
    assert (model.weight - before).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_backward_after_clipping_is_refused():
    accelerator = accelerator_of("fp16")
    model = nn.Linear(3, 1)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    accelerator.backward(model(torch.ones(1, 3)).sum())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(PrepareError, match="call every backward of a step before clipping"):
        accelerator.backward(model(torch.ones(1, 3)).sum())


def test_a_scale_that_changes_between_two_optimizers_moves_the_others_gradients():
    accelerator = accelerator_of(fp16())
    models = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for model in models:
        nn.init.zeros_(model.weight)
    first, second, one, two = accelerator.prepare(*models, *(torch.optim.SGD(m.parameters(), lr=1.0) for m in models))
    accelerator.backward(first(torch.ones(1, 1)).sum() * float("inf"))
    accelerator.backward(second(torch.ones(1, 1)).sum() * 3)
    one.step()
    assert accelerator.precision.loss_scale == 4
    two.step()
    assert (first.weight.item(), second.weight.item()) == (0.0, -3.0)


def test_the_scheduler_does_not_advance_with_a_skipped_step():
    accelerator = accelerator_of(fp16())
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    rates = []
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, 1)).sum() * factor)
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == [0.5, 0.5, 0.25]


def overflow_on_one_rank():
    accelerator = accelerator_of(fp16())
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.item()
    accelerator.backward(model(torch.ones(1, 1)).sum() * (float("inf") if accelerator.process_index else 1.0))
    optimizer.step()
    return model.weight.item() == before, accelerator.optimizer_step_was_skipped, accelerator.precision.loss_scale


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    assert run(2, overflow_on_one_rank) == [(True, True, 4.0)] * 2


def test_a_closure_is_refused():
    accelerator = accelerator_of("fp16")
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(PrepareError, match=r"optimizer\.step\(closure\): cannot be used with fp16"):
        optimizer.step(lambda: None)


def test_a_step_without_gradients_does_nothing():
    accelerator = accelerator_of("fp16")
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.step()
    assert not accelerator.optimizer_step_was_skipped


def test_a_bare_backward_is_refused():
    accelerator = accelerator_of("fp16")
    model = nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.ones(1, 1)).sum().backward()
    with pytest.raises(PrepareError, match=r"mixed_precision: fp16 scales the loss; call accelerator\.backward"):
        optimizer.step()


def test_an_emulated_precision_is_said_once(monkeypatch):
    monkeypatch.setattr(CPU, "support", lambda self, dtype: Support.EMULATED)
    with pytest.warns(
        UserWarning, match="mixed_precision: fp16 is emulated on this cpu and slower than fp32"
    ) as caught:
        Accelerator(device="cpu", mixed_precision="fp16")
    assert len(caught) == 1


def test_a_precision_that_the_device_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(CPU, "support", lambda self, dtype: Support.NONE)
    with pytest.raises(ConfigError, match="mixed_precision: bf16 does not run on cpu; fp32 does"):
        Accelerator(device="cpu", mixed_precision="bf16")


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"mixed_precision\.fp16\.backoff_factor: must be below 1, got 1"):
        Accelerator(mixed_precision={"fp16": {"backoff_factor": 1}})


def test_a_checkpoint_keeps_the_scale_for_its_own_precision(tmp_path):
    backed_off = accelerator_of(fp16())
    backed_off.prepare(nn.Linear(1, 1, bias=False))
    backed_off.precision.loss_scale = 4.0
    backed_off.save_state(tmp_path / "fp16")
    other = accelerator_of("bf16")
    other.prepare(nn.Linear(1, 1, bias=False))
    other.load_state(tmp_path / "fp16")
    other.save_state(tmp_path / "bf16")
    again = accelerator_of(fp16())
    again.prepare(nn.Linear(1, 1, bias=False))
    again.load_state(tmp_path / "bf16")
    assert again.precision.loss_scale == 8.0
    again.load_state(tmp_path / "fp16")
    assert again.precision.loss_scale == 4.0
