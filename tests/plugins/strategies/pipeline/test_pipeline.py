"""Pipeline: losses, gradients, weights are those of one plain process; each process holds and sends what it should."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import warnings
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accel_plugins.strategies.pipeline.questions import Recorder
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from accel import Accelerator
from accel.errors import PrepareError
from accel.interfaces import Axis
from accel.runtime.shards import Elsewhere
from accel.testing import run

from .models import CASES, CNN, GPT, VECTORS, WIDTH, Case, Skips, accelerator_for, adamw, loss_of, make, train_plainly

TOLERANCE = 1e-5
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


@functools.cache
def references(size=8):
    """What one plain process gives for each case."""
    [found] = run(1, train_all_plainly, size)
    return found


def train_all_plainly(size):
    return {name: train_plainly(name, size=size) for name in CASES}


def prepared(name, options=None, others=None, **settings):
    case = CASES[name]
    accelerator = accelerator_for(case, options, others, num_processes=dist_size(), **settings)
    model = make(case)
    model, optimizer = accelerator.prepare(model, adamw(model))
    return accelerator, model, optimizer


def dist_size():
    import os

    return int(os.environ["WORLD_SIZE"])


def train(name, reference, options=None, others=None, steps=5, size=8):
    """How far this process is from the reference: in losses, and in gradients and weights of what it holds."""
    accelerator, model, optimizer = prepared(name, options, others)
    data, losses = accelerator.mesh.axis(Axis.DATA), []
    for step in range(steps):
        optimizer.zero_grad()
        dim = 1 if name == "transformer" else 0
        batch = {k: v.chunk(data.size, dim)[data.index] for k, v in CASES[name].batch(step, size).items()}
        loss = loss_of(CASES[name], model, batch)
        accelerator.backward(loss)
        optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return distance(model, losses, reference)


def distance(model, losses, reference):
    found = [abs(a - b) / abs(b) for a, b in zip(losses, reference.losses, strict=True)]
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Elsewhere):
            assert parameter.grad is None
            continue
        gradient, expected = parameter.grad, reference.gradients.get(name)
        assert (gradient is None) == (expected is None), name
        pairs = [(parameter.detach(), reference.weights[name])]
        pairs += [] if gradient is None else [(gradient, expected)]
        for mine, theirs in pairs:
            mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
            found.append((mine - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-3))
    return max(found)


def train_cases(names, references, options, others=None, size=8):
    return {name: train(name, references[name], options, others, size=size) for name in names}


def assert_close(results):
    for rank, distances in enumerate(results):
        for name, found in distances.items():
            assert found < TOLERANCE, f"{name} on rank {rank}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_schedule_trains_as_one_process(schedule):
    options = {"micro_batches": 4, "schedule": schedule}
    names = ["gpt", "skips", "shared"] if schedule == "interleaved" else list(CASES)
    assert_close(run(2, train_cases, names, references(), options, timeout=100))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
def test_four_stages(schedule):
    options = {"micro_batches": 4, "schedule": schedule, "outputs": "last"}
    assert_close(run(4, train_cases, ["gpt", "transformer", "shared"], references(), options, timeout=100))


@pytest.mark.parametrize(
    ("other", "schedule"),
    [("ddp", "gpipe"), ("zero2", "zero_bubble"), ("zero3", "1f1b"), ("zero3", "zero_bubble")],
)
def test_beside_a_strategy_on_the_data_axis(other, schedule):
    options = {"size": 2, "micro_batches": 3 if schedule == "1f1b" else 2, "schedule": schedule}
    options["outputs"] = "last" if other == "zero2" else "all"
    others = {other: {} if other == "ddp" else {"minimum_size": 0}}
    assert_close(run(4, train_cases, ["gpt", "shared"], references(), options, others, timeout=100))


@pytest.mark.parametrize(("n", "others"), [(4, {}), (8, {"zero3": {"minimum_size": 0}})])
def test_beside_divided_layers_and_in_three_dimensions(n, others):
    others = {"tensor": {"size": 2, **CASES["gpt"].options}, **others}
    options = {"size": 2, "micro_batches": 2, "schedule": "zero_bubble" if n == 4 else "gpipe"}
    assert_close(run(n, train_cases, ["gpt"], references(), options, others, timeout=100))


def train_uneven(five, one):
    found = {}
    for schedule in SCHEDULES:
        for size, expected in ((5, five), (1, one)):
            distances = train_cases(expected, expected, {"micro_batches": 3, "schedule": schedule}, size=size)
            found |= {f"{name} of {size} samples by {schedule}": distance for name, distance in distances.items()}
    return found


def test_uneven_micro_batches():
    five, one = ({name: references(size)[name] for name in ("gpt", "skips")} for size in (5, 1))
    assert_close(run(2, train_uneven, five, one, timeout=100))


def held_elements():
    """Those of all parameters, of the blocks', and of the state of an optimizer that has it from the start."""
    case = CASES["deep gpt"]
    model = make(case)
    optimizer = torch.optim.Adagrad(model.parameters())
    model, optimizer = accelerator_for(case, num_processes=dist_size()).prepare(model, optimizer)
    held, of_blocks = (
        sum(p.numel() for p in module.parameters() if not isinstance(p, Elsewhere)) for module in (model, model.blocks)
    )
    return held, of_blocks, sum(state["sum"].numel() for state in optimizer.state.values())


def test_a_process_holds_its_stage_only():
    torch.manual_seed(0)
    whole = GPT(8)
    each_block = sum(p.numel() for p in whole.blocks[0].parameters())
    outside = sum(p.numel() for p in whole.parameters()) - 8 * each_block
    for held, of_blocks, of_state in run(4, held_elements):
        assert of_state == held
        assert of_blocks == 2 * each_block
        assert held <= of_blocks + outside


class Counted(nn.Module):
    """Its input; counts how often it was computed, its graphs that are alive, and the most of them at once."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def forward(self, x):
        self.found["calls"] += 1
        if not torch.is_grad_enabled():
            return x
        x = x.clone()
        self.found["alive"] += 1
        self.found["most"] = max(self.found["most"], self.found["alive"])
        weakref.finalize(x.untyped_storage(), self.forget)
        return Keeping.apply(x)

    def forget(self):
        self.found["alive"] -= 1


class Keeping(torch.autograd.Function):
    """Saves its input as what computes does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.saved_tensors  # noqa: B018 - which have to be there
        return gradient


class DeepGPT(GPT):
    """Eight blocks, each of which counts."""

    def __init__(self):
        super().__init__(8)
        for block in self.blocks:
            block.first = nn.Sequential(block.first, Counted())


def in_flight(micro_batches):
    found, case = {}, CASES["deep gpt"]._replace(make=DeepGPT)
    for schedule in SCHEDULES:
        accelerator = accelerator_for(case, {"schedule": schedule, "micro_batches": micro_batches}, num_processes=4)
        model = accelerator.prepare(make(case))
        counted = [block.first[1] for block in model.blocks]
        for counter in counted:
            counter.found.update(calls=-counter.found["calls"], most=-counter.found["most"])
        accelerator.backward(loss_of(case, model, case.batch(0, micro_batches)))
        mine = [(c.found["most"], c.found["calls"]) for c in counted if c.found["calls"]]
        found[schedule] = accelerator.strategies[0].staged(model).peak, mine
    told = accelerator.describe(model).parts["pipeline"]
    return found, [said for said in told.values() if said.startswith("gradients of weights wait")]


def test_1f1b_keeps_few_micro_batches_and_computes_the_others_again():
    """Two blocks on each process: graphs that the pipeline has, and of each block those alive and its forwards."""
    found, told = zip(*run(4, in_flight, 6), strict=True)
    assert [each["gpipe"] for each in found] == [(6, [(6, 6)] * 2)] * 4
    assert [each["1f1b"] for each in found] == [(n, [(n, 6 + 6 - n)] * 2) for n in (4, 3, 2, 1)]
    assert [each["interleaved"] for each in found] == [(12, [(6, 6)] * 2)] * 4, "of stages of half the size"
    assert [each["zero_bubble"] for each in found] == [(6, [(6, 6)] * 2)] * 4
    assert [len(lines) for lines in told] == [0, 1, 1, 2], "for the first stage nobody waits; the end is one more"


def sent_bytes(outputs):
    accelerator, model, _ = prepared("deep gpt", {"micro_batches": 4, "outputs": outputs})
    case, staged = CASES["deep gpt"], accelerator.strategies[0].staged(model)
    accelerator.backward(loss_of(case, model, case.batch(0, 8)))
    before = staged.wire.sent
    accelerator.backward(loss_of(case, model, case.batch(1, 8)))
    return staged.wire.sent - before


@pytest.mark.parametrize("outputs", ["all", "last"])
def test_bytes_are_those_of_the_hidden_states(outputs):
    """Once shapes are known: hidden states forth, gradients back, tied gradients, 16 bytes a message, and the end."""
    hidden, logits, tied, headers = 8 * 6 * WIDTH * 4, 8 * 6 * 37 * 4, 37 * WIDTH * 4, 4 * 16
    first, middle, _, last = run(4, sent_bytes, outputs)
    assert first == hidden + headers + tied
    assert middle == 2 * (hidden + headers)
    assert last == hidden + headers + tied + 16 + (logits if outputs == "all" else 4)


ASKED = {
    "a number": lambda logits: logits.mean().item(),
    "a choice": lambda logits: bool((logits > 0).any()),
    "text": lambda logits: f"{logits.mean():.2f}",
    "an array": lambda logits: logits.detach().numpy(),
    "a file": lambda logits: torch.save(logits, io.BytesIO()),
    "which": lambda logits: logits[logits > 0],
    "written": lambda logits: torch.zeros(()).add_(logits.mean()),
    "written to several": lambda logits: torch._foreach_add_([torch.zeros(())], [logits.mean()]),
}


def log_and_ask():
    """What a loop logs, before backward and after; and what is said to questions about the outputs."""
    accelerator, model, optimizer = prepared("gpt", {"outputs": "last"})
    case, losses, before, after = CASES["gpt"], [], 0, 0
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(case, model, case.batch(step, 8))
        before += loss.detach().float()
        accelerator.backward(loss)
        after += loss.detach()
        optimizer.step()
        assert f"{loss:.3f}" == f"{loss.detach().numpy():.3f}" == f"{loss.tolist():.3f}"
        losses.append(loss.item())
    logits = model(**case.batch(3, 8))
    answers = [answer(question, logits) for question in ASKED.values()]
    case.loss(logits, case.batch(3, 8)).backward()
    return losses, [before.item(), after.item()], answers, answer(lambda _: optimizer.step(), None)


def answer(question, logits):
    try:
        question(logits)
    except PrepareError as error:
        return str(error)
    return ""


def test_with_outputs_on_the_last_stage_the_loss_is_known_to_all():
    expected = train_plainly("gpt", steps=3).losses
    for rank, (losses, sums, answers, bare) in enumerate(run(2, log_and_ask)):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert sums == pytest.approx([sum(expected)] * 2, rel=1e-5)
        assert ["outputs: all" in told for told in answers] == [rank == 0] * len(ASKED)
        assert "accelerator.backward(loss)" in bare


def bf16_losses():
    losses = []
    for schedule in SCHEDULES:
        losses += three_losses(*prepared("gpt", {"schedule": schedule}, mixed_precision="bf16"))
    return losses


def three_losses(accelerator, model, optimizer):
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(CASES["gpt"], model, CASES["gpt"].batch(step, 8))
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def bf16_reference():
    accelerator = Accelerator(device="cpu", mixed_precision="bf16")
    model = make(CASES["gpt"])
    model, optimizer = accelerator.prepare(model, adamw(model))
    return three_losses(accelerator, model, optimizer)


def test_bf16():
    [expected] = run(1, bf16_reference)
    for losses in run(2, bf16_losses):
        assert losses[:3] == pytest.approx(expected, rel=2e-2)
        assert losses == pytest.approx(losses[:3] * len(SCHEDULES), rel=1e-6)


def accumulate_and_clip():
    return [accumulate_and_clip_in(schedule) for schedule in SCHEDULES]


def accumulate_and_clip_in(schedule):
    accelerator, model, optimizer = prepared("gpt", {"schedule": schedule}, gradient_accumulation_steps=2)
    norms = []
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(CASES["gpt"], model, CASES["gpt"].batch(step, 8)))
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
    return norms[1::2], accelerator.get_state_dict(model)


def accumulate_and_clip_plainly():
    model = make(CASES["gpt"])
    optimizer, norms = adamw(model), []
    for step in range(4):
        (loss_of(CASES["gpt"], model, CASES["gpt"].batch(step, 8)) / 2).backward()
        if step % 2:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
    return norms, model.state_dict()


def test_accumulation_and_the_norm_over_all_stages():
    [(norms, weights)] = run(1, accumulate_and_clip_plainly)
    for found, state in itertools.chain(*run(2, accumulate_and_clip, timeout=100)):
        assert found == pytest.approx(norms, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def evaluate():
    _, model, _ = prepared("gpt")
    model.eval()
    tokens = CASES["gpt"].batch(0, 3)["tokens"]
    with torch.no_grad():
        positional, named = model(tokens), model(tokens=tokens)
    with torch.inference_mode():
        inference = model(tokens[:1, :4])
    assert not positional.requires_grad and torch.equal(positional, named)
    return positional, inference


def evaluate_plainly():
    model = make(CASES["gpt"]).eval()
    tokens = CASES["gpt"].batch(0, 3)["tokens"]
    with torch.no_grad():
        return model(tokens), model(tokens[:1, :4])


def test_evaluation_gives_the_output_on_every_stage():
    [expected] = run(1, evaluate_plainly)
    for found in run(2, evaluate):
        torch.testing.assert_close(found, expected)


def statistics(case, options):
    """Buffers and gradients after two steps, in stages and plain."""
    accelerator = accelerator_for(case, options, num_processes=2)
    model, plain = accelerator.prepare(make(case)), make(case)
    for step in range(2):
        loss_of(case, plain, case.batch(step, 8)).backward()
        accelerator.backward(loss_of(case, model, case.batch(step, 8)))
    gradients = {n: p.grad for n, p in model.named_parameters() if not isinstance(p, Elsewhere)}
    expected = {n: p.grad for n, p in plain.named_parameters() if n in gradients}
    return [(dict(model.named_buffers()), dict(plain.named_buffers())), (gradients, expected)]


class Counts(Skips):
    """Scales its input by the number of forwards, counted in a buffer that is another tensor each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.forwards = self.forwards + 1
        output = super().forward(x / self.forwards)
        self.last.copy_(self.forwards)
        return output


def all_statistics():
    normed = Case(functools.partial(CNN, norm=True), *CASES["cnn"][1:])
    counting = CASES["skips"]._replace(make=Counts)
    one = statistics(normed, {"micro_batches": 1})
    return one + [pair for schedule in SCHEDULES[:2] for pair in statistics(counting, {"schedule": schedule})]


def test_buffers_are_those_of_one_process_on_all_stages():
    for results in run(2, all_statistics):
        for found, expected in results:
            torch.testing.assert_close(found, expected)


def two_models():
    """A model that is judged by another, both in stages: the weights of both, and those of plain ones."""
    accelerator, results = accelerator_for(CASES["skips"], num_processes=2), []
    for prepare in (lambda *objects: objects, accelerator.prepare):
        judged, judge = prepare(make(Case(Widened, None, None))), prepare(make(CASES["skips"]))
        judged, judge = (value[0] if isinstance(value, tuple) else value for value in (judged, judge))
        optimizer = prepare(adamw(judged))
        optimizer = optimizer[0] if isinstance(optimizer, tuple) else optimizer
        loss = (judge(judged(CASES["skips"].batch(0, 8)["x"])) - 1).square().mean()
        accelerator.backward(loss) if results else loss.backward()
        optimizer.step()
        results.append(accelerator.get_state_dict(judged))
    return results


class Widened(Skips):
    """[b, WIDTH] -> [b, WIDTH]"""

    def forward(self, x):
        return super().forward(x).repeat(1, 6)[:, :WIDTH]


def test_gradients_go_through_one_model_into_another():
    for expected, found in run(2, two_models):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def several_passes():
    """Two forwards before one backward, two backwards before one step; the gradients."""
    accelerator, model, _ = prepared("gpt")
    case = CASES["gpt"]
    accelerator.backward(sum(loss_of(case, model, case.batch(step, 8)) for step in range(2)))
    accelerator.backward(loss_of(case, model, case.batch(2, 8)))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_several_forwards_and_backwards_add_up():
    model, case = make(CASES["gpt"]), CASES["gpt"]
    sum(loss_of(case, model, case.batch(step, 8)) for step in range(3)).backward()
    for gradients in run(2, several_passes):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-5, atol=1e-6)


def dropout_gradients(schedule):
    case = Case(lambda: GPT(dropout=0.5), CASES["gpt"].batch, CASES["gpt"].loss, CASES["gpt"].options)
    accelerator = accelerator_for(case, {"schedule": schedule}, num_processes=2)
    model = accelerator.prepare(make(case))
    torch.manual_seed(accelerator.process_index)
    accelerator.backward(loss_of(case, model, case.batch(0, 8)))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, torch.rand(2)


def test_dropout_is_the_same_when_computed_again():
    for (kept, after), (again, later) in zip(
        run(2, dropout_gradients, "gpipe"), run(2, dropout_gradients, "1f1b"), strict=True
    ):
        assert torch.equal(after, later)
        for name, gradient in kept.items():
            torch.testing.assert_close(gradient, again[name], rtol=1e-5, atol=1e-6)


def gradient_of_the_input():
    accelerator, model, _ = prepared("skips")
    x = CASES["skips"].batch(0, 8)["x"].requires_grad_()
    accelerator.backward(loss_of(CASES["skips"], model, {"x": x}))
    return x.grad


def test_gradients_reach_the_input_on_every_stage():
    model = make(CASES["skips"])
    x = CASES["skips"].batch(0, 8)["x"].requires_grad_()
    loss_of(CASES["skips"], model, {"x": x}).backward()
    for gradient in run(2, gradient_of_the_input):
        torch.testing.assert_close(gradient, x.grad, rtol=1e-5, atol=1e-7)


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fail = False

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.fail and index == 2 and x.abs().sum() >= 0:
                raise ValueError("broken")
        return x


def fail_and_go_on():
    case = Case(Fails, None, None, VECTORS)
    accelerator = accelerator_for(case, {"split": ["blocks.2"]}, num_processes=2)
    model = accelerator.prepare(make(case))
    x = torch.ones(4, WIDTH)
    expected = model(x)
    model.fail = accelerator.process_index == 1
    line = rf"^broken|on rank 1, failed at .*{Path(__file__).name}:\d+: ValueError: broken"
    with pytest.raises((ValueError, PrepareError), match=line):
        model(x)
    model.fail = False
    assert torch.equal(model(x), expected)
    return True


def test_an_error_in_one_stage_reaches_the_others_and_the_next_call_works():
    assert run(2, fail_and_go_on) == [True, True]


def fail_in_backward():
    case = Case(Fails, None, None, VECTORS)
    accelerator = accelerator_for(case, {"split": ["blocks.2"], "schedule": "zero_bubble"}, num_processes=2)
    model = accelerator.prepare(make(case))

    def fail(gradient):
        raise ValueError("broken")

    def fail_later(module, args, output):
        if output.requires_grad:
            output.register_hook(fail)

    if accelerator.process_index == 1:
        model.blocks[2].register_forward_hook(fail_later)
    accelerator.backward(model(torch.ones(4, WIDTH)).sum())


class Auxiliary(Skips):
    """[b, WIDTH] -> [b, 3], and a number that is learned from too, as one that balances experts."""

    def forward(self, x):
        output = super().forward(x)
        return output, output.square().mean()


def mix_losses():
    case = CASES["skips"]._replace(make=Auxiliary)
    accelerator = accelerator_for(case, {"outputs": "last"}, num_processes=2)
    model, batch = accelerator.prepare(make(case)), case.batch(0, 8)
    output, number = model(**batch)
    accelerator.backward(case.loss(output, batch) + number)


@pytest.mark.parametrize(
    ("worker", "kind", "says", "rank"),
    [
        (fail_in_backward, ValueError, "broken", 1),
        (mix_losses, PrepareError, r"a number that the model returned.*outputs: all", 0),
    ],
)
def test_an_error_in_backward_ends_all_stages_and_names_its_rank(worker, kind, says, rank):
    with pytest.raises(kind, match=says) as caught:
        run(2, worker)
    assert f"rank {rank}" in "".join(caught.value.__notes__)


def resume(folder, pipelined, save):
    size = dist_size()
    accelerator = (
        accelerator_for(CASES["gpt"], num_processes=size)
        if pipelined
        else Accelerator(device="cpu", num_processes=size)
    )
    model = make(CASES["gpt"])
    model, optimizer = accelerator.prepare(model, adamw(model))
    if not save:
        accelerator.load_state(folder)
    for step in range(2) if save else range(2, 4):
        optimizer.zero_grad()
        accelerator.backward(loss_of(CASES["gpt"], model, CASES["gpt"].batch(step, 8)))
        optimizer.step()
    if save:
        accelerator.save_state(folder)
    return accelerator.get_state_dict(model)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_moves_between_stages_and_one_process(first, tmp_path):
    expected = train_plainly("gpt", steps=4).weights
    run(2 if first else 1, resume, f"{tmp_path}/state", first, True)
    for state in run(1 if first else 2, resume, f"{tmp_path}/state", not first, False):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


class TwoOutputs(nn.Module):
    """Samples that are computed together: each sees the mean of the batch."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x) - x.mean(0)
        return x


class Changes(nn.Module):
    """Changes in place what a block has returned, before it is used again; in evaluation, what is before them too."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        x = F.dropout(self.start(x), 1e-9, self.training)
        x += 1
        x = self.blocks[0](x)
        x += 1
        return self.blocks[1](x)


class Direct(Changes):
    """Calls what its blocks compute, rather than the blocks."""

    def forward(self, x):
        return self.blocks[1].forward(self.blocks[0].forward(x))


class Keeps(nn.Module):
    """[b, WIDTH] -> [b, WIDTH]: keeps something of each forward; its `blocks` are others of this kind."""

    def __init__(self, what, *blocks):
        super().__init__()
        self.weight, self.what, self.count = nn.Parameter(torch.ones(WIDTH)), what, 0
        self.register_buffer("seen", torch.zeros(()))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        self.what(self, x)
        return x * self.weight


def keeps(what, inside=False):
    outside, inner = (nothing, what) if inside else (what, nothing)
    return Keeps(outside, Keeps(inner), Keeps(inner))


def nothing(keeper, x):
    pass


def counts(keeper, x):
    keeper.count += 1


def counts_in_buffer(keeper, x):
    keeper.seen += 1


def averages(keeper, x):
    keeper.seen.lerp_(x.detach().mean(), 0.1)


def sizes(keeper, x):
    keeper.seen.fill_(x.shape[-1])


class Asks(nn.Module):
    """Adds 1 if the data say so, between the blocks, in each or after them."""

    def __init__(self, question, where="between"):
        super().__init__()
        self.blocks = nn.ModuleList(Identity(question if where == "inside" else None) for _ in range(2))
        self.question, self.where = question, where

    def forward(self, x):
        x = self.blocks[0](x)
        x = self.blocks[1](x + 1 if self.where == "between" and self.question(x) else x)
        return x + 1 if self.where == "after" and self.question(x) else x


class Identity(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.weight, self.question = nn.Parameter(torch.ones(WIDTH)), question

    def forward(self, x):
        x = x * self.weight
        return x + 1 if self.question and self.question(x) else x


class Late(nn.Module):
    """Takes a part, between the blocks or after them, for samples that an example of random numbers never is."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.blocks = nn.ModuleList(Identity(None) for _ in range(2))
        self.extra = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.blocks[0](x)
        x = self.blocks[1](self.more(x) if self.between else x)
        return x if self.between else self.more(x)

    def more(self, x):
        return x + self.extra(x) if (x.amax(-1) == x.amin(-1)).all() else x


def positive(x):
    return (x > 0).all()


def positive_number(x):
    return x.min().item() > 0


def alike(x):
    return x.max() - x.min() < 0.1


QUESTIONS = [
    lambda x: not x.mean(),
    lambda x: x.mean() if x.sum() > 3 else x,
    lambda x: 0 in x,
    lambda x: x.sum().item() > 3,
    lambda x: float(x[0]) > 3,
    lambda x: torch.equal(x, x) and torch.allclose(x, x),
]


def test_every_question_is_heard_with_its_line():
    with Recorder(SimpleNamespace(inside=False, returned=0)) as recorder:
        for question in QUESTIONS:
            question(torch.ones(2))
    lines = [question.__code__.co_firstlineno for question in [*QUESTIONS, QUESTIONS[-1]]]
    assert [answer.place for answer in recorder.answers] == [f"{__file__}:{line}" for line in lines]
    assert [answer.value for answer in recorder.answers] == [True, False, False, 2.0, 1.0, True, True]


class Checkpointed(Fails):
    """Blocks whose activations are computed again in backward, each called from within the checkpoint."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of inputs that want no gradient
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def compiled(whole):
    model = Fails()
    if whole:
        model.compile(backend="eager")
    else:
        model.blocks = nn.ModuleList(torch.compile(block, backend="eager") for block in model.blocks)
    return model


OUTCOMES = {
    "a compiled model": (functools.partial(compiled, True), {}, "compile blocks instead"),
    "what torch.compile returns": (functools.partial(compiled, False), {}, "block.compile()"),
    "a checkpoint that is a function": (functools.partial(Checkpointed, True), {}, "use_reentrant=False"),
    "a checkpoint": (functools.partial(Checkpointed, False), {}, "right"),
    "samples computed together": (TwoOutputs, {}, "are samples computed together"),
    "samples computed together in one micro-batch": (TwoOutputs, {"micro_batches": 1}, "right"),
    "batch norm": (functools.partial(CNN, norm=True), {}, "micro_batches: 1"),
    "a number in a block": (
        functools.partial(keeps, counts, inside=True),
        {},
        "'blocks.0.count' is changed by each forward",
    ),
    "a buffer in a block": (
        functools.partial(keeps, averages, inside=True),
        {},
        "'blocks.0.seen' is changed by each forward",
    ),
    "it in one micro-batch": (functools.partial(keeps, averages, inside=True), {"micro_batches": 1}, "right"),
    "a size in a block": (functools.partial(keeps, sizes, inside=True), {}, "right"),
    "a number": (functools.partial(keeps, counts), {}, "'count' is changed by the model's own forward"),
    "a count": (functools.partial(keeps, counts_in_buffer), {}, "right"),
    "an average": (functools.partial(keeps, averages), {}, "'seen' is computed from the batch"),
    "a part that the example left out": (functools.partial(Late, False), {}, "right"),
    "one between blocks": (functools.partial(Late, True), {"micro_batches": 2}, "right"),
    "no such block": (Skips, {"split": ["upp"]}, "names no module"),
    "too many stages": (Skips, {"split": ["up.0", "up.1"]}, "2 processes"),
    "an empty stage": (Skips, {"split": ["start"]}, "are not called in this order"),
    "too few blocks": (
        functools.partial(nn.Linear, WIDTH, 3),
        {"example": {"input": f"float32[4, {WIDTH}]"}},
        "as many blocks",
    ),
    "changes in place": (Changes, {}, "right"),
    "blocks that are not called": (Direct, {}, "write `block(x)`"),
    "a question": (functools.partial(Asks, positive), {}, "answer differently (False and True)"),
    "a question in a block": (functools.partial(Asks, positive, where="inside"), {}, "answer differently (False and"),
    "a question about a number": (functools.partial(Asks, positive_number), {}, "test_pipeline.py:"),
    "a question about the whole": (functools.partial(Asks, alike), {}, "answer differently (True and False)"),
    "a question about one micro-batch": (functools.partial(Asks, alike), {"micro_batches": 1}, "right"),
    "questions in blocks about one": (functools.partial(Asks, positive, where="inside"), {"micro_batches": 1}, "right"),
    "a question after the blocks": (functools.partial(Asks, positive, where="after"), {}, "right"),
}
"""A model and options, and what is said of them; "right" if the output is that of the whole model."""


def outcomes():
    return {name: outcome(make_model, options) for name, (make_model, options, _) in OUTCOMES.items()}


def outcome(make_model, options):
    case = Case(make_model, None, None, {**VECTORS, **options})
    image = "norm" in getattr(make_model, "keywords", {})
    x = torch.ones(4, 1, 8, 8) if image else torch.linspace(-1, 1, 4)[:, None].repeat(1, WIDTH)
    try:
        found = accelerator_for(case, num_processes=2).prepare(make(case))(x)
        torch.testing.assert_close(found, make(case)(x))
    except (PrepareError, UserWarning) as error:
        return str(error)
    return "right"


def test_what_cannot_be_right_is_refused_and_what_may_not_be_is_warned_of():
    for told in run(2, outcomes):
        for name, (_, _, says) in OUTCOMES.items():
            assert says in told[name], name


class Together(torch.optim.Optimizer):
    """Steps by the norm of all gradients, of which a stage has some."""

    @torch.no_grad()
    def step(self):
        used = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        for p in used:
            p.sub_(p.grad / sum(p.grad.square().sum() for p in used))


def optimizers():
    accelerator = accelerator_for(CASES["skips"], num_processes=2)
    model = accelerator.prepare(make(CASES["skips"]))
    accelerator.prepare(torch.optim.Adafactor(model.parameters()))
    with pytest.raises(PrepareError, match="the optimizer Together, which sees only the parameters of its stage"):
        accelerator.prepare(Together(model.parameters(), {}))
    loss = loss_of(CASES["skips"], model, CASES["skips"].batch(0, 4))
    with pytest.raises(PrepareError, match=r"from parameters too, as for a penalty, and so from .* on another stage"):
        accelerator.backward(loss + sum(p.square().sum() for p in model.parameters()))
    with pytest.raises(PrepareError, match="copy it, or make its AveragedModel, before prepare"):
        copy.deepcopy(model)
    others = [p.detach() for p in model.parameters() if isinstance(p, Elsewhere)]
    torch._foreach_lerp_(others, others, 0.5)  # as torch's AveragedModel does
    x = torch.ones(4, WIDTH, requires_grad=True)
    with pytest.raises(PrepareError, match=r"gradients of gradients \(create_graph=True\) do not go through"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)  # without an error, a penalty on it taught nothing


def test_an_optimizer_or_a_loss_that_looks_at_other_parameters_is_refused():
    run(2, optimizers)
