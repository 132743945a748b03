"""What tensor parallelism promises besides parity: plans, parts, bytes, refusals, and the objects that a loop uses."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from accel.config import Config
from accel.errors import ConfigError, PrepareError
from accel.plan import Plan
from accel.testing import run

from . import models
from .training import accelerator_for, adamw, make_of_seed


class Sent(TorchDispatchMode):
    """Counts the elements of each collective call."""

    def __init__(self):
        super().__init__()
        self.elements, self.calls = [], []

    def least(self, n):
        """What a process would have to send at least: an all-reduce twice what a gather or an exchange does."""
        counts = zip(self.calls, self.elements, strict=True)
        return sum(count * (n - 1) * (2 if "allreduce" in name else 1) // n for name, count in counts)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = args[0][0] if isinstance(args[0][0], list) else args[0]
            self.elements.append(sum(tensor.numel() for tensor in tensors))
            self.calls.append(function.__name__)
        return function(*args, **(kwargs or {}))


def prepared(make=models.GPT, n=2, seed=0, **options):
    accelerator = accelerator_for(n, {"tensor": {"size": n, **options}})
    return accelerator, accelerator.prepare(make_of_seed(make, seed))


def described(make, n, options):
    accelerator, model = prepared(make, n, **options)
    return accelerator.strategies[0].describe(model)


def parts():
    """Each process holds half of what is divided, and no more memory than that; one exchange where one is enough."""
    accelerator, model = prepared(models.tied_gpt)
    assert model.head.weight is model.embedding.weight and isinstance(model.blocks[0].up, nn.Linear)
    for name in ("embedding.weight", "blocks.0.attention.q.weight", "blocks.1.down.weight", "blocks.0.up.bias"):
        parameter = model.get_parameter(name)
        local = parameter.to_local()
        assert 2 * local.numel() == parameter.numel() == 2 * local.untyped_storage().nbytes() // 4, name
        assert accelerator.strategies[0].owns(parameter)
    assert accelerator.strategies[0].owns(model.norm.weight) == (accelerator.process_index == 0)
    assert model.blocks[0].down.bias.to_local().numel() == models.WIDTH
    optimizer = accelerator.prepare(adamw(model))
    with Sent() as sent:
        loss = models.loss_of(model, 0)
        forward, sent.elements = sent.elements, []
        accelerator.backward(loss)
    activations = 4 * models.LENGTH * models.WIDTH
    logits = 4 * models.LENGTH * models.VOCABULARY // 2
    assert forward == [activations] * 5 + [2 * logits], forward  # the embedding, two for each block, the head
    assert sent.elements == [activations] * 5, sent.elements  # the head, two for each block
    optimizer.step()
    assert optimizer.state[model.embedding.weight]["exp_avg"].to_local().numel() == model.embedding.weight.numel() // 2


def test_each_process_holds_and_sends_what_it_should():
    run(2, parts)


def evaluate():
    """Without gradients, in evaluation, in parts, and from a module's own method, numbers are those of one process."""
    reference = make_of_seed(models.Encoder, 0).eval()
    accelerator, model = prepared(models.Encoder)
    model.eval()
    x = models.tokens(3)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x), rtol=1e-5, atol=1e-6)
        hidden = model.encoder(model.embedding(x))
        torch.testing.assert_close(hidden, reference.encoder(reference.embedding(x)), rtol=1e-5, atol=1e-6)
        assert type(model.encoder.layers[0].linear1(hidden)) is torch.Tensor
    state = accelerator.get_state_dict(model)
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in state.items())
    model.load_state_dict(make_of_seed(models.Encoder, 5).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(x), make_of_seed(models.Encoder, 5).eval()(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(PrepareError, match="copy it before prepare"):
        copy.deepcopy(model)


def undivided():
    """What has nothing to divide is held whole, which is said once."""
    accelerator = accelerator_for(2, {"tensor": {"size": 2}})
    with warnings.catch_warnings(record=True, action="always") as told:
        accelerator.prepare(nn.Conv2d(3, 4, 3))
    said = ["tensor divides nothing of this Conv2d, and each of 2 processes computes all (it has no linear layers)"]
    assert [str(warning.message) for warning in told] == said * (accelerator.process_index == 0)
    assert {warning.filename for warning in told} <= {__file__}


def test_evaluation_parts_and_states():
    run(2, evaluate)
    run(2, undivided)


def infer():
    """Where torch leaves autograd out altogether."""
    _, model = prepared(models.fused_gpt)
    reference = make_of_seed(models.fused_gpt, 0)
    with torch.inference_mode():
        torch.testing.assert_close(model(models.tokens(3)), reference(models.tokens(3)), rtol=1e-5, atol=1e-6)
    with pytest.raises(PrepareError, match="gradients of gradients"):
        torch.autograd.grad(models.loss_of(model, 0), model.norm.weight, create_graph=True)
    model.blocks[1].compile(backend="eager")
    with pytest.raises(PrepareError, match=r"'blocks\.1' is compiled, and torch.compile does not follow"):
        model(models.tokens(3))


def test_inference_mode_gradients_of_gradients_and_compiled_blocks():
    run(2, infer)


class Dropouts(models.GPT):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        return super().forward(tokens) * self.dropout(torch.ones(len(tokens), 1, 1))


def drop():
    """Dropout of what all hold is alike, even after a loop has seeded each process in its own way."""
    accelerator, model = prepared(Dropouts)
    for seed in range(3):
        torch.manual_seed(10 * seed + accelerator.process_index)
        mask = model(models.tokens(0)).abs().sum((1, 2)) > 0
        yield mask.tolist()


def drops():
    return list(drop())


def test_dropout_of_what_all_hold_is_alike():
    first, second = run(2, drops)
    assert first == second and len(set(map(tuple, first))) > 1


def save(folder, n, make):
    accelerator = accelerator_for(n, {"tensor": {"size": n}} if n > 1 else "single")
    model = make_of_seed(make, 0)
    model, optimizer = accelerator.prepare(model, adamw(model))
    losses = [one_step(accelerator, model, optimizer, seed) for seed in range(2)]
    accelerator.save_state(folder)
    return losses + [one_step(accelerator, model, optimizer, seed) for seed in range(2, 4)]


def load(folder, n, make):
    accelerator = accelerator_for(n, {"tensor": {"size": n}} if n > 1 else "single")
    model = make_of_seed(make, 7)
    model, optimizer = accelerator.prepare(model, adamw(model))
    accelerator.load_state(folder)
    return [one_step(accelerator, model, optimizer, seed) for seed in range(2, 4)]


def one_step(accelerator, model, optimizer, seed):
    loss = models.loss_of(model, seed)
    accelerator.backward(loss)
    optimizer.step(), optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(("saved", "loaded", "make"), [(2, 1, models.tied_gpt), (1, 2, models.Encoder)])
def test_checkpoints_load_on_another_number_of_processes(saved, loaded, make, tmp_path):
    expected = run(saved, save, str(tmp_path / "state"), saved, make)[0]
    assert run(loaded, load, str(tmp_path / "state"), loaded, make)[0] == pytest.approx(expected[2:], rel=1e-6)


class OneHead(nn.Module):
    """Attention with three heads, which two processes cannot share."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 10)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(F.normalize(x + self.down(self.up(x).relu()), dim=-1))


def test_what_does_not_divide_stays_whole_and_says_why():
    for found in run(2, described, OneHead, 2, {}):
        assert found["q"] == found["v"] == "replicated (it is cut into 3, which do not divide by 2)"
        assert (
            found["up"] == "column over 2 (derived: feeds down)" and found["down"] == "row over 2 (derived: fed by up)"
        )


def test_the_users_plan_comes_first():
    plan = {"blocks.0": "replicate", "blocks.*.attention": "replicate", "head": "vocabulary", "embedding": "replicate"}
    for found in run(2, described, models.GPT, 2, {"plan": plan}):
        assert found["blocks.0.up"] == found["blocks.1.attention.q"] == "replicated (strategies.tensor.plan)"
        assert found["blocks.1.up"] == "column over 2 (derived: feeds blocks.1.down)"
        assert found["head"] == "column over 2, gathered (strategies.tensor.plan)"


REFUSED = [
    ({"q": "column"}, "plan: 'q' cannot be divided: it is cut into 3, which do not divide by 2"),
    ({"layers.*": "column"}, "plan: 'layers.*' names no linear or embedding layer of OneHead; it has: embedding, q"),
    ({"embedding": "column"}, "plan: 'embedding' is an embedding: vocabulary or replicate, not column"),
]


def refuse(options):
    with pytest.raises(PrepareError) as caught:
        prepared(OneHead, **options)
    return str(caught.value)


@pytest.mark.parametrize(("plan", "message"), REFUSED)
def test_plans_that_cannot_be_followed_are_refused(plan, message):
    assert all(message in said for said in run(2, refuse, {"plan": plan}))


def refuse_models():
    said = [refuse({"example": {"tokens": "float32[2]"}})]
    model = models.GPT()
    accelerator_for(2, {"tensor": {"size": 2}}).prepare(model)
    with pytest.raises(PrepareError) as caught:
        accelerator_for(2, {"tensor": {"size": 2}}).prepare(nn.Sequential(model))
    said.append(str(caught.value))
    model = models.GPT()
    model.blocks[0].compile(backend="eager")
    with pytest.raises(PrepareError) as caught:
        accelerator_for(2, {"tensor": {"size": 2}}).prepare(model)
    said.append(str(caught.value))
    with pytest.raises(PrepareError) as caught:
        accelerator_for(2, {"tensor": {"size": 2}}).prepare(Spoils())
    return [*said, str(caught.value)]


class Spoils(models.GPT):
    """Changes, in evaluation, what its backward needs."""

    def forward(self, tokens):
        weights = self.embedding(tokens).softmax(-1)
        out = super().forward(tokens) + weights.mean()
        return out if self.training else out + weights.zero_().mean()


def test_models_that_cannot_be_tried_out_or_are_divided_or_compiled_already_are_refused():
    for example, divided, compiled, spoilt in run(2, refuse_models):
        assert "those of the whole Spoils, in evaluation mode, where the whole one fails: one of the" in spoilt
        assert (
            "'blocks.0' is compiled" in compiled
            and "leave `compile` out, here and beside strategies.tensor" in compiled
        )
        assert "found no inputs on which OneHead runs" in example and "strategies.tensor.example" in example
        assert "is already divided over" in divided


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": {"q": "columns"}}, r"^strategies\.tensor\.plan\.q: expected one of column, .* got 'columns'"),
        ({"example": {"x": "float[2]"}}, r"^strategies\.tensor\.example\.x: expected a tensor as in"),
    ],
)
def test_wrong_options_are_refused_before_a_worker_starts(options, message):
    with pytest.raises(ConfigError, match=message):
        Plan.of(Config().replace(strategies={"tensor": {"size": 2, **options}}, num_processes=2))


class Change(torch.optim.Optimizer):
    """Gradient descent by what a function makes of each parameter and its gradient."""

    def __init__(self, parameters, change):
        super().__init__(parameters, {})
        self.change = change

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.change(p, p.grad), alpha=0.01)


def muon(parameters):
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.01)


def relative(p, gradient):
    return gradient * p.norm() / (gradient.norm() + 1e-3)


def inverted(p, gradient):
    return gradient if p.dim() != 2 else torch.linalg.solve(gradient @ gradient.T + torch.eye(len(p)), gradient)


def noisy(p, gradient):
    return gradient + torch.randn_like(gradient)


OPTIMIZERS = {
    "LARS": (lambda p: Change(p, relative), None, None),
    "Muon": (muon, "depend on the number of processes; set strategies.tensor.step_on: whole, or", None),
    "Adafactor": (torch.optim.Adafactor, "set strategies.tensor.step_on: whole, or", None),
    "Shampoo": (lambda p: Change(p, inverted), "mixed torch.Tensor and DTensor.*step_on: whole, or", None),
    "noise": (lambda p: Change(p, noisy), "randn_like: random numbers", "depends on chance.*; use another"),
    "LBFGS": (torch.optim.LBFGS, "flattens all parameters.*itself; use another", "flattens all .*; use another"),
}
"""Each with why it may not step divided parameters, and why not whole ones."""


def step(step_on, make, refused):
    accelerator, model = prepared(models.tied_gpt, step_on=step_on)
    if refused:
        with pytest.raises(PrepareError, match=f"(?s)tensor cannot train with the optimizer .*{refused}"):
            accelerator.prepare(make(model.parameters()))
        return
    reference = make_of_seed(models.tied_gpt, 0)
    optimizer, expected = accelerator.prepare(make(model.parameters())), make(reference.parameters())
    for seed in range(2):
        accelerator.backward(models.loss_of(model, seed))
        models.loss_of(reference, seed).backward()
        optimizer.step(), optimizer.zero_grad(), expected.step(), expected.zero_grad()
    for (name, found), wanted in zip(model.named_parameters(), reference.parameters(), strict=True):
        if not name.endswith("k.bias"):  # attention does not depend on it: its gradient is noise
            close = 1e-3 if make is muon else 2e-5  # Muon computes in bfloat16
            torch.testing.assert_close(found.full_tensor().detach(), wanted.detach(), rtol=close, atol=close)


def steps():
    for make, in_parts, whole in OPTIMIZERS.values():
        step("parts", make, in_parts)
        step("whole", make, whole)


def test_optimizers_step_as_on_one_process_or_are_refused_by_name():
    run(2, steps)


class Wrong(models.GPT):
    """Differs between calls: no division can be told from the whole."""

    calls = itertools.count(1)

    def forward(self, tokens):
        return super().forward(tokens) * next(self.calls)


def refuse_wrong():
    with pytest.raises(PrepareError) as caught:
        prepared(Wrong)
    return str(caught.value)


def test_a_model_that_differs_when_it_is_divided_is_refused():
    assert all("tensor cannot divide this Wrong: on an example it changes output by" in e for e in run(2, refuse_wrong))
