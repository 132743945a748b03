"""What a loop may do with a model under ZeRO: right, or refused by name; and the same on every rank."""

import copy
import io
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from accel import Accelerator
from accel.errors import CheckpointError, CollectiveError, PrepareError
from accel.runtime import world
from accel.testing import run

from .zero_models import (
    LM,
    STAGES,
    accelerator_for,
    adamw,
    assert_same_gradients,
    assert_same_weights,
    loss_of,
    make,
    tokens,
    whole,
)

stages = pytest.mark.parametrize("stage", STAGES)


def pair(stage, options=None, **settings):
    """A prepared model and optimizer with rank 0's weights, and a plain reference with the same."""
    accelerator = accelerator_for(stage, options, **settings)
    model, reference = make(seed=accelerator.process_index), make(seed=0)
    return accelerator, *accelerator.prepare(model, adamw(model)), reference, adamw(reference)


def shares(step, accelerator):
    x = tokens(step, 2 * accelerator.num_processes)
    return x, x.chunk(accelerator.num_processes)


# -- what a step uses --------------------------------------------------------------------------------------------------


def steps(stage, uses, options=None, times=3):
    """Train with the blocks that `uses` gives each rank; weights and gradients are one process's."""
    accelerator, model, optimizer, reference, expected = pair(stage, options)
    rank, size = accelerator.process_index, accelerator.num_processes
    for step in range(times):
        _, parts = shares(step, accelerator)
        accelerator.backward(loss_of(model(parts[rank], uses[rank]), parts[rank]))
        (sum(loss_of(reference(parts[r], uses[r]), parts[r]) for r in range(size)) / size).backward()
        assert_same_gradients(model, reference)
        optimizer.step(), optimizer.zero_grad(), expected.step(), expected.zero_grad()
    assert_same_weights(model, reference)


@stages
def test_blocks_that_no_rank_uses_keep_no_gradient(stage):
    run(2, steps, stage, [(0, 2), (0, 2)])


@pytest.mark.parametrize("uses", [[(0, 1, 2), (0, 2)], [(0,), (2,)], [(0, 1, 2), ()]], ids=str)
@stages
def test_ranks_may_use_different_blocks(stage, uses):
    run(2, steps, stage, uses)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_ranks_may_use_different_blocks_that_are_gathered_ahead(stage):
    run(2, steps, stage, [(0, 1, 2), (0, 2)], {"prefetch": 2})


def test_zero3_gathers_once_where_ranks_use_different_blocks():
    run(2, steps, "zero3", [(0, 1, 2), (0, 2)], {"reshard_after_forward": False})


@stages
def test_without_the_search_for_unused_parameters_all_is_used_right(stage):
    run(2, steps, stage, [None, None], {"find_unused_parameters": False})


class Branches(nn.Module):
    """Uses `left` or `right`, as asked; `idle` never."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, right):
        return self.right(x) if right else self.left(x)


def branches(stage):
    accelerator = accelerator_for(stage)
    rank = accelerator.process_index
    model, reference = accelerator.prepare(make(model=Branches)), make(model=Branches)
    for right in ((False, True), (False, False), (True, True)):
        accelerator.backward(model(torch.ones(2, 4) + rank, right[rank]).square().mean())
        (sum(reference(torch.ones(2, 4) + r, right[r]).square().mean() for r in range(2)) / 2).backward()
        assert_same_gradients(model, reference)
        model.zero_grad(), reference.zero_grad()


@stages
def test_ranks_may_use_different_parameters_of_a_group(stage):
    run(2, branches, stage)


def unreached(stage):
    """On rank 1 the loss depends on no parameter of the model."""
    accelerator = accelerator_for(stage)
    model, reference = accelerator.prepare(make()), make()
    x = tokens(0, 2)
    logits = model(x)
    accelerator.backward(loss_of(logits, x) if accelerator.is_main_process else torch.zeros((), requires_grad=True))
    (loss_of(reference(x), x) / 2).backward()
    assert_same_gradients(model, reference)


@stages
def test_a_rank_whose_loss_does_not_reach_the_model_takes_part(stage):
    run(2, unreached, stage)


def bare_unreached(stage, late):
    """Two steps, the second of which a bare `loss.backward()` does not reach on rank 1, before rank 0 or after."""
    accelerator, model, optimizer, *_ = pair(stage)
    x = tokens(0, 2)
    for reaches in (True, accelerator.is_main_process):
        loss = loss_of(model(x), x)
        if reaches:
            time.sleep(late if optimizer.state else 0)
            loss.backward()
        optimizer.step(), optimizer.zero_grad()
    dist.barrier()


@pytest.mark.parametrize(("stage", "late"), [("zero1", 0), ("zero2", 0.5), ("zero3", 0)])
def test_a_bare_backward_that_a_rank_never_comes_to_is_refused(stage, late):
    with pytest.raises(CollectiveError, match=r"rank 0 came to a bare .*, and rank 1 came to a step"):
        run(2, bare_unreached, stage, late)


def grad_on_one(late, forward):
    """In the second step rank 1 leaves out a gradient penalty, and goes on before rank 0 comes to it or after.

    What it goes on to is its next backward, or a `forward`.
    """
    accelerator, model, *_ = pair("zero3")
    x, seen = tokens(0, 2), []
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    for penalised in (True, accelerator.is_main_process):
        logits = model(x)
        loss = loss_of(logits, x)
        if penalised:
            time.sleep(late)
            [gradient] = torch.autograd.grad(logits.sum(), seen[-1], create_graph=True)
            loss = loss + gradient.square().mean()
        if forward:
            model(x)
        accelerator.backward(loss)
    dist.barrier()


@pytest.mark.parametrize(("late", "forward"), [(0, False), (0.5, False), (0, True), (0.5, True)])
def test_autograd_grad_that_a_rank_never_comes_to_is_refused(late, forward):
    with pytest.raises(CollectiveError, match=r"rank 0 came to .* torch\.autograd\.grad at .*, and rank 1 came to a"):
        run(2, grad_on_one, late, forward)


def evaluated_on_one(stage, late):
    """Rank 0 evaluates between two steps, without the other or after it."""
    accelerator, model, optimizer, *_ = pair(stage)
    for step in range(2):
        if step and accelerator.is_main_process:
            time.sleep(late)
            with torch.no_grad():
                model(tokens(0, 2)), model(tokens(1, 2))
        train_one(accelerator, model, optimizer, step)


@pytest.mark.parametrize(("stage", "late"), [("zero1", 0), ("zero3", 0.5)])
def test_a_forward_on_one_rank_alone_is_refused(stage, late):
    with pytest.raises(CollectiveError, match=r"rank . came to a forward .*: call the model on all"):
        run(2, evaluated_on_one, stage, late)


def evaluated_on_some_of_two_machines(ranks):
    """Some of four processes evaluate, which believe that they are on two machines."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    world._machine = lambda: f"machine {rank // 2}"
    accelerator, model, optimizer, *_ = pair("zero3")
    train_one(accelerator, model, optimizer, 0)
    points = accelerator.strategies[-1].models[model].exchange.wholes.points
    dist.all_gather_object(asked := [0] * 4, len(points._stores))
    assert sorted(asked) == [1, 1, 2, 2]  # one process of a machine asks what all machines share
    if rank in ranks:
        with torch.no_grad():
            model(tokens(0, 2))
    train_one(accelerator, model, optimizer, 1)


@pytest.mark.parametrize("ranks", [{3}, {0, 1}])
def test_a_forward_on_some_of_two_machines_is_refused(ranks):
    with pytest.raises(CollectiveError, match=r"rank . came to a forward .*: call the model on all"):
        run(4, evaluated_on_some_of_two_machines, ranks)


def twice(stage):
    """Two forwards and one backward, then one forward and two backwards."""
    accelerator, model, _, reference, _ = pair(stage)
    rank = accelerator.process_index
    for losses in (
        lambda m, x: [loss_of(m(x), x) + loss_of(m(x.flip(0)), x)],
        lambda m, x: [loss_of(m(x), x), loss_of(m(x.flip(0)), x)],
    ):
        _, parts = shares(0, accelerator)
        for loss in losses(model, parts[rank]):
            accelerator.backward(loss)
        sum(sum(losses(reference, part)) for part in parts).div(2).backward()
        assert_same_gradients(model, reference)
        model.zero_grad(), reference.zero_grad()


@stages
def test_several_forwards_and_backwards_add_up(stage):
    run(2, twice, stage)


# -- ways into a model -------------------------------------------------------------------------------------------------


def parts_of_a_model(stage):
    accelerator, model, _, reference, _ = pair(stage)
    rank = accelerator.process_index
    _, parts = shares(0, accelerator)

    def logits(m, x):
        hidden = m.embedding(x)
        for block in m.blocks:
            hidden = block(hidden)
        return m.head(hidden)

    for step in range(2):
        accelerator.backward(loss_of(logits(model, parts[rank]), parts[rank]))
        (sum(loss_of(logits(reference, part), part) for part in parts) / 2).backward()
        assert_same_gradients(model, reference)
        assert step or model(parts[rank]).shape == (2, 6, 37)  # a forward of the whole is still possible


@stages
def test_parts_of_a_model_can_be_called_on_their_own(stage):
    run(2, parts_of_a_model, stage)


def methods(stage):
    accelerator, model, _, reference, _ = pair(stage, {"methods": ["score"]})
    rank = accelerator.process_index
    _, parts = shares(0, accelerator)
    accelerator.backward(loss_of(model.score(parts[rank]), parts[rank]))
    (sum(loss_of(reference.score(part), part) for part in parts) / 2).backward()
    assert_same_gradients(model, reference)
    with torch.no_grad():
        torch.testing.assert_close(model.score(parts[0]), reference.score(parts[0]))
    other = accelerator_for(stage).prepare(make())
    with pytest.raises(PrepareError, match=rf"score\(\): uses .*, as in strategies\.{stage}\.methods: \[score\]"):
        other.score(parts[0])
    with pytest.raises(PrepareError, match=rf"strategies\.{stage}\.methods: it has no method 'generate'"):
        accelerator_for(stage, {"methods": ["generate"]}).prepare(make())


@stages
def test_methods_named_in_the_settings_find_parameters_whole(stage):
    run(2, methods, stage)


def evaluation(stage):
    """Evaluate, step, evaluate again: the second sees the new weights. Parameters are always divided ones."""
    accelerator, model, optimizer, reference, expected = pair(stage)
    rank = accelerator.process_index
    kinds = set()
    for step in range(2):
        x, parts = shares(step, accelerator)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(model.eval()(x), reference.eval()(x))
            kinds |= {type(p.data).__name__ for p in model.parameters()}
        model.train()
        logits = model(parts[rank])
        kinds |= {type(p.data).__name__ for p in model.parameters()}
        accelerator.backward(loss_of(logits, parts[rank]))
        (sum(loss_of(reference(part), part) for part in parts) / 2).backward()
        kinds |= {type(p.data).__name__ for p in model.parameters()}
        numbers_of(model, reference)
        optimizer.step(), optimizer.zero_grad(), expected.step(), expected.zero_grad()
    assert kinds == {"DTensor"}


def numbers_of(model, reference):
    """A number of a whole parameter is asked for on all ranks together; torch's `item` would give this one's share."""
    norms = [parameter.detach().norm() for parameter in model.parameters()]
    expected = [parameter.detach().norm() for parameter in reference.parameters()]
    torch.testing.assert_close([norm.full_tensor() for norm in norms], expected)
    shares = [norm for norm in norms if not norm.placements[0].is_replicate()]
    assert shares
    for ask in (torch.Tensor.item, float, bool):
        with pytest.raises(PrepareError, match=r"item\(\): each process has only its share of this number"):
            ask(shares[0])
    for norm, value in zip(norms, expected, strict=True):
        assert any(norm is share for share in shares) or norm.item() == pytest.approx(value.item())


@stages
def test_evaluation_sees_what_the_optimizer_made(stage):
    run(2, evaluation, stage)


def failing_forward(stage):
    accelerator, model, _, reference, _ = pair(stage)
    _, parts = shares(0, accelerator)
    with pytest.raises(IndexError):
        model(torch.full((2, 6), 1000))
    accelerator.backward(loss_of(model(parts[accelerator.process_index]), parts[accelerator.process_index]))
    (sum(loss_of(reference(part), part) for part in parts) / 2).backward()
    assert_same_gradients(model, reference)


@stages
def test_training_goes_on_after_a_forward_that_raised(stage):
    run(2, failing_forward, stage)


# -- gradients ---------------------------------------------------------------------------------------------------------


def clipping(stage):
    accelerator, model, _, reference, _ = pair(stage)
    rank = accelerator.process_index
    _, parts = shares(0, accelerator)
    accelerator.backward(loss_of(model(parts[rank]), parts[rank]))
    (sum(loss_of(reference(part), part) for part in parts) / 2).backward()
    for kind in (2.0, float("inf"), 1.0):
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5 / kind, norm_type=kind)
        assert type(norm) is torch.Tensor
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.5 / kind, norm_type=kind))
        assert_same_gradients(model, reference)
    theirs = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert float(theirs) == pytest.approx(float(nn.utils.clip_grad_norm_(reference.parameters(), 0.01)), rel=1e-6)
    accelerator.clip_grad_value_(model.parameters(), 1e-3)
    nn.utils.clip_grad_value_(reference.parameters(), 1e-3)
    assert_same_gradients(model, reference)


@stages
def test_clipping_is_by_the_norm_over_all_ranks(stage):
    run(2, clipping, stage)


def bare_backward(stage, uses):
    accelerator, model, optimizer, reference, expected = pair(stage)
    rank = accelerator.process_index
    for step in range(3):
        _, parts = shares(step, accelerator)
        loss_of(model(parts[rank], uses[rank]), parts[rank]).backward()
        (sum(loss_of(reference(part, use), part) for part, use in zip(parts, uses, strict=True)) / 2).backward()
        assert_same_gradients(model, reference)
        optimizer.step(), optimizer.zero_grad(), expected.step(), expected.zero_grad()
    assert_same_weights(model, reference)


@pytest.mark.parametrize("uses", [[None, None], [(0, 1, 2), (0, 2)], [(0,), (2,)]], ids=str)
@stages
def test_a_bare_backward_exchanges_whichever_blocks_a_rank_uses(stage, uses):
    run(2, bare_backward, stage, uses)


def bare_from_within(stage):
    """Both ranks compute all blocks, but the losses are of the outputs of different ones."""
    accelerator, model, _, reference, _ = pair(stage)
    rank = accelerator.process_index
    _, parts = shares(0, accelerator)
    outputs = {id(m): [] for m in (model, reference)}
    for m in (model, reference):
        for block in m.blocks:
            block.register_forward_hook(lambda module, args, output, m=m: outputs[id(m)].append(output))
    for block in (1, 2):
        model(parts[rank]), reference(parts[0]), reference(parts[1])
        outputs[id(model)][block * rank].square().mean().backward()
        sum(outputs[id(reference)][i].square().mean() for i in (0, 3 + block)).div(2).backward()
        assert_same_gradients(model, reference)
        for found in (*outputs.values(), model.zero_grad(), reference.zero_grad()):
            if found:
                found.clear()


@stages
def test_a_bare_backward_may_begin_anywhere(stage):
    run(2, bare_from_within, stage)


def discarding(stage, dropping):
    """`zero_grad` between forward and backward, and after gradients that were never exchanged."""
    accelerator, model, optimizer, reference, _ = pair(stage)
    rank = accelerator.process_index
    _, parts = shares(0, accelerator)
    with accelerator.no_sync(model):
        accelerator.backward(loss_of(model(parts[rank]), parts[rank]))
    for _ in range(2):
        loss = loss_of(model(parts[rank]), parts[rank])
        (model if dropping == "model" else optimizer).zero_grad()
        accelerator.backward(loss)
    (sum(loss_of(reference(part), part) for part in parts) / 2).backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("dropping", ["model", "optimizer"])
@stages
def test_zero_grad_discards_all_gradients(stage, dropping):
    run(2, discarding, stage, dropping)


def overflow(stage):
    accelerator, model, optimizer, _, _ = pair(stage, mixed_precision="fp16")
    before = accelerator.get_state_dict(model)
    x = tokens(0, 2)
    loss = loss_of(model(x), x)
    accelerator.backward(loss * float("inf") if accelerator.process_index == 1 else loss)
    optimizer.step()
    after = accelerator.get_state_dict(model)
    return accelerator.optimizer_step_was_skipped, all(torch.equal(before[name], after[name]) for name in before)


@stages
def test_an_overflow_on_one_rank_skips_the_step_on_all(stage):
    assert run(2, overflow, stage) == [(True, True)] * 2


# -- state -------------------------------------------------------------------------------------------------------------


def states(stage):
    accelerator, model, optimizer, *_ = pair(stage)
    other = make(seed=5)
    x = tokens(0, 2)
    loss_of(other(x), x).backward()
    other_optimizer = adamw(other)
    other_optimizer.step()
    model.load_state_dict(other.state_dict())
    optimizer.load_state_dict(copy.deepcopy(other_optimizer.state_dict()))
    found = accelerator.get_state_dict(model)
    assert list(found) == list(other.state_dict())
    for name, value in other.state_dict().items():
        assert type(found[name]) is torch.Tensor and torch.equal(found[name], value), name
    other.zero_grad()
    accelerator.backward(loss_of(model(x), x))
    loss_of(other(x), x).backward()
    optimizer.step(), other_optimizer.step()
    assert_same_weights(model, other)
    for state in (model.state_dict(), optimizer.state_dict()):
        copy.deepcopy(state)
        with pytest.raises(CheckpointError, match=r"get_state_dict\(model\)"):
            torch.save(state, io.BytesIO())


@stages
def test_whole_states_load_and_divided_ones_are_not_pickled(stage):
    run(2, states, stage)


def save(stage, folder):
    accelerator, model, optimizer, *_ = pair(stage) if stage != "ddp" else plain_pair()
    for step in range(2):
        train_one(accelerator, model, optimizer, step)
    accelerator.save_state(folder)
    train_one(accelerator, model, optimizer, 2)
    return accelerator.get_state_dict(model)


def load(stage, folder):
    accelerator, model, optimizer, *_ = pair(stage) if stage != "ddp" else plain_pair()
    accelerator.load_state(folder)
    train_one(accelerator, model, optimizer, 2)
    return accelerator.get_state_dict(model)


def plain_pair():
    accelerator, model = Accelerator(device="cpu"), make(seed=3)
    return accelerator, *accelerator.prepare(model, adamw(model))


def train_one(accelerator, model, optimizer, step):
    x = tokens(step, 8).chunk(accelerator.num_processes)[accelerator.process_index]
    accelerator.backward(loss_of(model(x), x))
    optimizer.step(), optimizer.zero_grad()


@pytest.mark.parametrize(("before", "after"), [("zero3", "ddp"), ("ddp", "zero2"), ("zero1", "zero3")])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 2), (2, 1)])
def test_a_checkpoint_loads_under_another_strategy_and_number_of_processes(before, after, n, m, tmp_path):
    expected = run(n, save, before, tmp_path / "state")[0]
    found = run(m, load, after, tmp_path / "state")[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def averages(stage):
    """An EMA of the weights: a copy made before prepare, by hand or by torch, and prepared too."""
    accelerator = accelerator_for(stage)
    model = make()
    ema = copy.deepcopy(model).requires_grad_(False)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    model, ema, torchs, optimizer = accelerator.prepare(model, ema, torchs, adamw(model))
    with pytest.raises(PrepareError, match=r"copy\.deepcopy: this LM is divided .* AveragedModel, before prepare\(\)"):
        copy.deepcopy(model)
    torchs.update_parameters(model)  # the first of all copies
    train_one(accelerator, model, optimizer, 0)
    torchs.update_parameters(model)
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(parameter, 0.5)
        ema(tokens(0, 2))
    late = accelerator.prepare(make(seed=7))
    late.load_state_dict(model.state_dict())
    assert_same(accelerator.get_state_dict(late), accelerator.get_state_dict(model))
    start, trained, found = make().state_dict(), accelerator.get_state_dict(model), accelerator.get_state_dict(ema)
    for name in start:
        torch.testing.assert_close(found[name], (start[name] + trained[name]) / 2)
        torch.testing.assert_close(accelerator.get_state_dict(torchs)[f"module.{name}"], found[name])


def assert_same(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@stages
def test_an_average_of_the_weights_is_a_model_prepared_beside(stage):
    run(2, averages, stage)


def judged(make_, judge, x):
    """What the judge learns from: its verdict, with a gradient penalty (Gulrajani et al. 2017)."""
    made = make_(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(judge(made).sum(), made, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), made, create_graph=True)
    (worse,) = torch.autograd.grad(judge(made).sum(), made)
    return judge(made + 0.1 * worse.sign()).mean() + (slope.norm(2, 1) - 1).square().mean() + curve.mean()


def make_judge():
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in "ab"), nn.Linear(4, 1))


def accumulated_penalties(stage):
    accelerator = accelerator_for(stage, gradient_accumulation_steps=2)
    model, reference = make(model=make_judge), make(model=make_judge)
    model, _ = accelerator.prepare(model, adamw(model))
    data = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    for micro_batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(judged(nn.Identity(), model, micro_batch[accelerator.process_index]))
    (sum(judged(nn.Identity(), reference, x) for x in data.flatten(0, 1)) / 4).backward()
    assert_same_gradients(model, reference)


@stages
def test_gradient_penalties_accumulate(stage):
    run(2, accumulated_penalties, stage)


def adversaries(stage):
    """Two models and two optimizers: each phase steps one of them."""
    accelerator = accelerator_for(stage)
    rank = accelerator.process_index
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), make_judge()]
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in nets]
    expected_nets = copy.deepcopy(nets)
    expected = [torch.optim.Adam(net.parameters(), lr=0.1) for net in expected_nets]
    make_, judge, make_optimizer, judge_optimizer = accelerator.prepare(*nets, *optimizers)
    other_make, other_judge = expected_nets
    data = [torch.randn(3, 4) for _ in range(2)]
    for _ in range(3):
        judge_optimizer.zero_grad(), expected[1].zero_grad()
        accelerator.backward(judged(make_, judge, data[rank]))
        (sum(judged(other_make, other_judge, x) for x in data) / 2).backward()
        judge_optimizer.step(), expected[1].step()
        make_optimizer.zero_grad(), expected[0].zero_grad()
        accelerator.backward(-judge(make_(data[rank])).mean())
        (-sum(other_judge(other_make(x)).mean() for x in data) / 2).backward()
        make_optimizer.step(), expected[0].step()
    for mine, theirs in zip(nets, expected_nets, strict=True):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(whole(a), b, rtol=1e-5, atol=1e-6)


@stages
def test_two_models_and_two_optimizers(stage):
    run(2, adversaries, stage)


def late_optimizer(stage):
    """Steps before prepare, prepared apart from its model, a group added later."""
    accelerator = accelerator_for(stage)
    model, reference = make(tied=False), make(tied=False)
    mine, theirs = adamw(model.blocks), adamw(reference.blocks)
    x = tokens(0, 4)
    for m, o in ((model, mine), (reference, theirs)):
        loss_of(m(x), x).backward()
        o.step(), m.zero_grad()
    accelerator.prepare(model)
    accelerator.prepare(mine)
    mine.add_param_group({"params": list(model.head.parameters()), "lr": 1e-3})
    theirs.add_param_group({"params": list(reference.head.parameters()), "lr": 1e-3})
    for step in range(2):
        x, parts = shares(step, accelerator)
        accelerator.backward(loss_of(model(parts[accelerator.process_index]), parts[accelerator.process_index]))
        (sum(loss_of(reference(part), part) for part in parts) / 2).backward()
        mine.step(), theirs.step(), model.zero_grad(), reference.zero_grad()
    assert isinstance(model, LM)
    assert_same_weights(model, reference)


@stages
def test_an_optimizer_with_state_prepared_apart_and_given_a_group_later(stage):
    run(2, late_optimizer, stage)


class Views(nn.Module):
    """Blocks, and a model, whose outputs are views; each is changed in place."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            residual = x
            x = block(x)
            x += residual
        return self.head(x)


def changed_in_place(stage):
    accelerator = accelerator_for(stage)
    rank = accelerator.process_index
    model, reference = accelerator.prepare(make(model=Views)), make(model=Views)
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))

    def loss(m, part):
        output = m(part)
        output *= 2.0
        return output.square().mean()

    accelerator.backward(loss(model, x[rank]))
    (sum(loss(reference, part) for part in x) / 2).backward()
    assert_same_gradients(model, reference)


@stages
def test_outputs_may_be_changed_in_place(stage):
    run(2, changed_in_place, stage)
