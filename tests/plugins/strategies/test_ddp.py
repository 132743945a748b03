"""Data parallel: what one process would compute, whatever the loss was computed with; and no exchange too many.

Each rank's gradient reference is computed by plain torch on the samples of all ranks together.
"""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from accel import Accelerator
from accel.errors import ConfigError, PrepareError
from accel.testing import run


class Branches(nn.Module):
    """Uses `left` or `right` or both, as asked; `idle` never."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.left(x), self.right(x)

    def encode(self, x):
        return self.left(x)


class Exchanges(TorchDispatchMode):
    """Counts collective calls and the elements they carry."""

    def __init__(self):
        super().__init__()
        self.calls, self.elements = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls += 1
            self.elements += sum(t.numel() for t in args[0]) if isinstance(args[0], list) else args[0].numel()
        return function(*args, **(kwargs or {}))


def model_of_seed(make=Branches, seed=0):
    torch.manual_seed(seed)
    return make()


def batches(size):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=generator) for _ in range(size)]


def first_output(model, x, rank):
    return model(x)[0].mean()


def method(model, x, rank):
    return model.encode(x).mean()


def own_branch(model, x, rank):
    return model(x)[rank % 2].mean()


def nothing_on_rank_1(model, x, rank):
    return torch.zeros((), requires_grad=True) if rank == 1 else model(x)[0].mean()


def twice_forward(model, x, rank):
    return (model(x)[0] + model(2 * x)[1]).mean()


LOSSES = [first_output, method, own_branch, nothing_on_rank_1, twice_forward]


def steps(loss_of, times=3):
    """Gradients after each of some backward passes, and plain torch's over the samples of all ranks."""
    accelerator = Accelerator()
    size, rank = accelerator.num_processes, accelerator.process_index
    model = model_of_seed(seed=rank)  # rank 0's weights must win
    reference = model_of_seed(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    expected = torch.optim.AdamW(reference.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    data = batches(size)
    for _ in range(times):
        accelerator.backward(loss_of(model, data[rank], rank))
        (sum(loss_of(reference, data[r], r) for r in range(size)) / size).backward()
        for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)
        optimizer.step(), optimizer.zero_grad(), expected.step(), expected.zero_grad()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_of", LOSSES, ids=lambda f: f.__name__)
def test_gradients_and_weights_are_one_processs_whatever_the_loss_uses(loss_of):
    run(2, steps, loss_of)


def test_on_three_ranks():
    run(3, steps, own_branch)


def many_backwards():
    """Two losses for one step, the second through a method."""
    accelerator = Accelerator()
    rank = accelerator.process_index
    model, data = accelerator.prepare(model_of_seed()), batches(2)
    reference = model_of_seed()
    for loss_of in (first_output, method):
        accelerator.backward(loss_of(model, data[rank], rank))
        (sum(loss_of(reference, data[r], r) for r in range(2)) / 2).backward()
    torch.testing.assert_close(model.left.weight.grad, reference.left.weight.grad)


def test_several_backwards_for_one_step_add_up():
    run(2, many_backwards)


def bare_backward():
    accelerator = Accelerator()
    rank, data = accelerator.process_index, batches(2)
    model, reference = nn.Linear(4, 1), model_of_seed(functools.partial(nn.Linear, 4, 1))
    model.load_state_dict(reference.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad(), reference.zero_grad()
        model(data[rank]).mean().backward()
        (sum(reference(x).mean() for x in data) / 2).backward()
        torch.testing.assert_close(model.weight.grad, reference.weight.grad)
        optimizer.step()
        torch.optim.SGD(reference.parameters(), lr=0.1).step()
    torch.testing.assert_close(model.weight, reference.weight)


def test_a_bare_backward_exchanges():
    run(2, bare_backward)


def partial_bare_backward():
    accelerator = Accelerator()
    model = model_of_seed()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.encode(batches(1)[0]).mean().backward()
    with pytest.raises(PrepareError, match="used only some of the model's parameters"):
        optimizer.step()


def test_a_bare_backward_that_cannot_be_right_raises():
    run(2, partial_bare_backward)


def count_exchanges(accumulate):
    accelerator = Accelerator(gradient_accumulation_steps=4)
    model = nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    counts = []
    for _ in range(8):
        with Exchanges() as exchanges:
            if accumulate:
                with accelerator.accumulate(model):
                    accelerator.backward(model(torch.ones(2, 4)).mean())
                    optimizer.step()
            else:
                accelerator.backward(model(torch.ones(2, 4)).mean())
                optimizer.step()
        counts.append(exchanges.calls)
    return counts


@pytest.mark.parametrize("accumulate", [False, True])
def test_no_exchange_on_micro_batches_that_do_not_step(accumulate):
    for counts in run(2, count_exchanges, accumulate):
        assert [count > 0 for count in counts] == [False, False, False, True] * 2


def unsynced():
    accelerator = Accelerator()
    rank = accelerator.process_index
    model = accelerator.prepare(model_of_seed(functools.partial(nn.Linear, 4, 1)))
    data = batches(2)
    with accelerator.no_sync(model), Exchanges() as exchanges:
        accelerator.backward(model(data[rank]).mean())
    local = model.weight.grad.clone()
    accelerator.backward(model(data[rank]).mean())
    return exchanges.calls, local, model.weight.grad


def test_no_sync_adds_up_until_the_next_exchange():
    (calls, first, total), (_, second, same) = run(2, unsynced)
    assert calls == 0
    assert not torch.equal(first, second)
    torch.testing.assert_close(total, first + second)
    assert torch.equal(total, same)


def options(settings):
    accelerator = Accelerator(strategies={"ddp": settings}, gradient_accumulation_steps=2)
    rank, data = accelerator.process_index, batches(2)
    model, reference = (model_of_seed(functools.partial(nn.Sequential, nn.Linear(4, 4), nn.Tanh())) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    optimizer, expected = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference))
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.broadcast = None
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            theirs.copy_(mine)
    for _ in range(6):
        accelerator.backward(model(data[rank]).mean())
        optimizer.step(), optimizer.zero_grad()
    for _ in range(3):
        (sum(reference(x).mean() for x in data) / 2).backward()
        expected.step(), expected.zero_grad()
    torch.testing.assert_close(model[0].weight, reference[0].weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"static_graph": True},
        {"find_unused_parameters": False},
        {"gradient_as_bucket_view": False},
        {"bucket_size": 0.00001},
    ],
    ids=str,
)
def test_every_option_trains_right(settings):
    run(2, options, settings)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.norm(x))


def buffers(broadcast):
    accelerator = Accelerator(strategies={"ddp": {"broadcast_buffers": broadcast}})
    model = accelerator.prepare(Normed())
    accelerator.backward(model(torch.randn(8, 4) + accelerator.process_index).mean())
    return model.norm.running_mean


def test_buffers_are_rank_0s_after_each_exchange():
    first, second = run(2, buffers, True)
    assert torch.equal(first, second)
    first, second = run(2, buffers, False)
    assert not torch.equal(first, second)


def unfreeze():
    """Gradual unfreezing: a layer that begins to train after prepare is exchanged too."""
    accelerator = Accelerator()
    rank, data = accelerator.process_index, batches(2)
    model = model_of_seed()
    model.right.requires_grad_(False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(twice_forward(model, data[rank], rank))
    optimizer.step(), optimizer.zero_grad()
    model.right.requires_grad_(True)
    accelerator.backward(twice_forward(model, data[rank], rank))
    return model.right.weight.grad


def test_parameters_that_begin_to_train_later_are_exchanged():
    first, second = run(2, unfreeze)
    assert torch.equal(first, second)


def adversaries():
    """Two models, two optimizers: each phase exchanges only the model that steps."""
    accelerator = Accelerator()
    rank, data = accelerator.process_index, batches(2)
    torch.manual_seed(0)
    nets = [nn.Linear(4, 4), nn.Linear(4, 1)]
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in nets]
    expected_nets = copy.deepcopy(nets)
    expected = [torch.optim.Adam(net.parameters(), lr=0.1) for net in expected_nets]
    make, judge, make_optimizer, judge_optimizer = accelerator.prepare(*nets, *optimizers)
    other_make, other_judge = expected_nets
    for _ in range(3):
        judge_optimizer.zero_grad(), expected[1].zero_grad()
        accelerator.backward(judge(make(data[rank]).detach()).mean())
        (sum(other_judge(other_make(x).detach()).mean() for x in data) / 2).backward()
        judge_optimizer.step(), expected[1].step()
        make_optimizer.zero_grad(), expected[0].zero_grad()
        accelerator.backward(-judge(make(data[rank])).mean())
        (-sum(other_judge(other_make(x)).mean() for x in data) / 2).backward()
        make_optimizer.step(), expected[0].step()
    for mine, theirs in zip(nets, expected_nets, strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight)


def test_two_models_and_two_optimizers():
    run(2, adversaries)


def batchnorm_on_cpu():
    accelerator = Accelerator(strategies={"ddp": {"sync_batchnorm": True}})
    with pytest.raises(ConfigError, match=r"strategies\.ddp\.sync_batchnorm: .* needs a GPU"):
        accelerator.prepare(Normed())


def test_sync_batchnorm_needs_a_gpu():
    run(2, batchnorm_on_cpu)
