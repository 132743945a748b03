"""ZeRO's promises: one process's weights under every option, the bytes and the memory of the paper's arithmetic."""

import pytest
import torch
from accel_plugins.strategies.zero.groups import groups_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from accel import Accelerator
from accel.errors import ConfigError, PrepareError
from accel.testing import run

from .zero_models import (
    LM,
    STAGES,
    Block,
    Wire,
    accelerator_for,
    adamw,
    assert_same_weights,
    loss_of,
    make,
    tokens,
    whole,
)

stages = pytest.mark.parametrize("stage", STAGES)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train(stage, options, optimizer=adamw, accumulation=1, frozen=False, tied=True, clip=0.1):
    """Three optimizer steps on this rank's share; weights and norms are those of a plain loop over the whole."""
    accelerator = accelerator_for(stage, options, gradient_accumulation_steps=accumulation)
    rank, size = accelerator.process_index, accelerator.num_processes
    model, reference = make(seed=rank, tied=tied), make(seed=0, tied=tied)
    for m in (model, reference):
        m.blocks[0].requires_grad_(not frozen), m.blocks[1].up.weight.requires_grad_(not frozen)
    mine, theirs = optimizer(model), optimizer(reference)
    model, mine = accelerator.prepare(model, mine)
    for step in range(3):
        for micro in range(accumulation):
            x = tokens(step * accumulation + micro, 2 * size)
            part = x.chunk(size)[rank]
            accelerator.backward(loss_of(model(part), part))
            (loss_of(reference(x), x) / accumulation).backward()
            norm = accelerator.clip_grad_norm_(model.parameters(), clip)
            mine.step(), mine.zero_grad()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), clip), rtol=1e-5, atol=0)
        theirs.step(), theirs.zero_grad()
    assert_same_weights(model, reference)
    assert (model.head.weight is model.embedding.weight) == tied


@stages
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"minimum_size": 100_000},
        {"blocks": ["blocks.1"]},
        {"offload": "cpu"},
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        {"find_unused_parameters": False},
        {"broadcast_buffers": False},
        {"prefetch": 2},
    ],
    ids=str,
)
def test_every_option_gives_one_processs_weights(stage, options):
    run(2, train, stage, options, adamw, 2)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("zero1", {}),
        ("zero2", {"accumulate": "sharded"}),
        ("zero3", {"accumulate": "sharded"}),
        ("zero3", {"reshard_after_forward": False}),
        *((stage, {"replicas": 2}) for stage in STAGES),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_four_ranks_give_one_processs_weights(stage, options, accumulation):
    run(4, train, stage, options, sgd, accumulation)


@stages
def test_frozen_and_untied_weights(stage):
    run(3, train, stage, {}, adamw, 2, True, False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own imports and guards
@stages
def test_compiled_blocks_give_one_processs_weights(stage):
    run(2, train, stage, {"compile": True}, timeout=110)


def beside_tensor(stage):
    """Two replicas of two shards, of parameters that two processes divide already."""
    tensor = {"size": 2, "example": {"tokens": "int64[2, 6] < 37"}}
    accelerator = Accelerator(device="cpu", strategies={"tensor": tensor, stage: {"replicas": 2, "minimum_size": 0}})
    data = accelerator.mesh.axis(accelerator.strategies[-1].axis)
    model, reference = make(seed=accelerator.process_index), make()
    mine, theirs = adamw(model), adamw(reference)
    model, mine = accelerator.prepare(model, mine)
    for step in range(2):
        x = tokens(step, 8)
        part = x.chunk(data.size)[data.index]
        accelerator.backward(loss_of(model(part), part))
        loss_of(reference(x), x).backward()
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1), rtol=1e-5, atol=0)
        mine.step(), mine.zero_grad(), theirs.step(), theirs.zero_grad()
    found = accelerator.get_state_dict(model)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.slow
@stages
def test_replicas_beside_tensor(stage):
    run(8, beside_tensor, stage)


def test_a_single_process_recomputes_too():
    run(1, train, "zero3", {"activation_checkpointing": "full"})


# -- bytes -------------------------------------------------------------------------------------------------------------


def wire(strategy, accumulation=1):
    """What one optimizer step sends, in times the parameters' bytes, and its calls by name."""
    accelerator = Accelerator(device="cpu", strategies=strategy, gradient_accumulation_steps=accumulation)
    size = accelerator.num_processes
    model = make(width=64, tied=False)
    bytes_of_parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    model, optimizer = accelerator.prepare(model, adamw(model))
    for _ in range(2):
        with Wire(size) as sent:
            for micro in range(accumulation):
                x = tokens(micro, 2)
                accelerator.backward(loss_of(model(x), x))
                optimizer.step(), optimizer.zero_grad()
    return sent.total / bytes_of_parameters / ((size - 1) / size), sent.calls


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("stage", "gathers"), [("zero1", 1), ("zero2", 1), ("zero3", 2)])
def test_a_step_sends_what_the_arithmetic_says(stage, gathers, size, accumulation):
    """Gradients are reduced once a step. Zero3 gathers each block but the last twice a micro-batch and the rest once;
    zero2 gathers all once; zero1 once a step."""
    sent, calls = run(size, wire, {stage: {"minimum_size": 0}}, accumulation)[0]
    forwards = 1 if stage == "zero1" else accumulation
    rest = 0.093 + 0.907 / 3 if stage == "zero3" else 0  # of the model's parameters, with one of three blocks
    assert sent == pytest.approx(1 + forwards * (gathers - rest), rel=0.02)
    assert not {"alltoall", "allgather", "reduce_scatter"} & set(calls)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_beside_ddp(size):
    ddp = run(size, wire, "ddp")[0][0]
    assert ddp == pytest.approx(2, rel=0.02)
    for stage, factor in (("zero1", 1), ("zero2", 1), ("zero3", 1.5)):
        assert run(size, wire, {stage: {"minimum_size": 0}})[0][0] <= 1.02 * factor * ddp, stage


def test_sharded_accumulation_reduces_every_micro_batch():
    sent, _ = run(2, wire, {"zero2": {"minimum_size": 0, "accumulate": "sharded"}}, 3)[0]
    assert sent == pytest.approx(3 * 2, rel=0.02)


def test_replicas_send_less_between_them():
    _, calls = run(4, wire, {"zero3": {"minimum_size": 0, "replicas": 2}})[0]
    assert calls["allreduce"] == 4 + 1  # and what the processes agree on before backward


def narrow(strategy):
    """The bytes gathered by a bf16 forward, and the weights after three."""
    bf16 = {"mixed_precision": "bf16"}
    accelerator = accelerator_for(*strategy, **bf16) if strategy else Accelerator(device="cpu", **bf16)
    model = make(width=64, tied=False)
    model, optimizer = accelerator.prepare(model, sgd(model))
    for step in range(3):
        x = tokens(step, 4).chunk(2)[accelerator.process_index]
        with Wire(2) as sent:
            loss = loss_of(model(x), x)
        accelerator.backward(loss)
        optimizer.step(), optimizer.zero_grad()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return sent.bytes.get("send", 0), accelerator.get_state_dict(model)


@stages
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_gathering_in_half_width_computes_the_same(stage, reduce_dtype):
    options = {"reduce_dtype": reduce_dtype}
    wide, expected = run(2, narrow, (stage, options))[0]
    half, found = run(2, narrow, (stage, {**options, "gather_dtype": "compute"}))[0]
    assert 0.5 < half / wide < 0.56  # embedding, position and norms stay as they are
    _, ddp = run(2, narrow, None)[0]
    for name in ddp:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        if reduce_dtype == "float32":
            torch.testing.assert_close(found[name], ddp[name], rtol=1e-5, atol=1e-5, msg=name)


# -- memory ------------------------------------------------------------------------------------------------------------


def held(stage, options):
    """Bytes of parameters, gradients and optimizer state for each parameter that this process holds between steps."""
    accelerator = accelerator_for(stage, options)
    model = make(width=64, tied=False)
    originals = list(model.parameters())
    total = sum(p.numel() for p in originals)
    model, optimizer = accelerator.prepare(model, adamw(model))
    x = tokens(0, 2)
    accelerator.backward(loss_of(model(x), x))
    gradients = [p.grad.to_local() for p in model.parameters()]
    optimizer.step()
    states = [v.to_local() for state in optimizer.state.values() for v in state.values() if v.dim()]
    parts = [p.to_local() for p in model.parameters()]
    assert memory_behind(parts) < 1.5 * sum(part.nbytes for part in parts), "who copies parts would copy the whole"
    tensors = parts + gradients + states
    assert all(p.untyped_storage().size() == 0 for p in originals), "the whole model must not stay in memory"
    unsharded = [p._unsharded_param for g in _groups(model) for p in g.fsdp_params]
    return memory_behind(tensors + unsharded) / total


def memory_behind(tensors):
    """Bytes of the memory behind tensors, each counted once."""
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (t.untyped_storage() for t in tensors))
    total = end = 0
    for first, last in spans:
        total, end = total + max(last - max(first, end), 0), max(end, last)
    return total


def _groups(model):
    return [g for state in fully_shard.state(model)._state_ctx.all_states for g in groups_of(state)]


@stages
@pytest.mark.parametrize(("size", "options", "shards"), [(2, {}, 2), (4, {}, 4), (4, {"replicas": 2}, 2)])
def test_each_rank_holds_its_part_between_steps(stage, size, options, shards):
    """16 bytes a parameter with AdamW in float32 (Rajbhandari et al. 2020, section 3), divided by the processes; but
    for the 4 of the parameter itself, which over gloo only zero3 divides."""
    whole = 0 if stage == "zero3" else 4
    found = run(size, held, stage, options)
    assert sum(found) / size == pytest.approx(whole + (16 - whole) / shards, rel=0.03)


def gathered(stage, options):
    """Blocks whose parameters are whole: after forward, and at the backward of the first block."""
    accelerator = accelerator_for(stage, options)
    model = accelerator.prepare(make(tied=False))
    counts = []

    def count(*_):
        counts.append(sum(not group.is_sharded for group in _groups(model)[1:]))

    x = tokens(0, 2)
    model.embedding.register_forward_hook(lambda module, args, output: output.register_hook(count) and None)
    logits = model(x)
    count()
    accelerator.backward(loss_of(logits, x))
    count()
    return counts


@pytest.mark.parametrize(
    ("stage", "options", "counts"),
    [
        ("zero1", {}, [3, 0, 0]),
        ("zero2", {}, [3, 0, 0]),
        ("zero3", {}, [1, 0, 0]),
        ("zero3", {"reshard_after_forward": False}, [3, 0, 0]),
    ],
)
def test_when_blocks_are_whole(stage, options, counts):
    assert run(2, gathered, stage, options) == [counts] * 2


# -- models of all kinds -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Parameters of size 0, smaller than the number of ranks, not contiguous; types that backends cannot send."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.small = nn.Parameter(torch.randn(1, 3))
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("phases", torch.randn(2, 3, dtype=torch.complex64))
        self.register_buffer("counts", torch.randint(9, (3,)).short())
        self.narrow = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
        self.spread = nn.Parameter(torch.randn(1, 3).expand(2, 3), requires_grad=False)
        self.halves = nn.ParameterList(torch.randn(4, 3).split(2))  # beside each other in one memory
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))

    def forward(self, x):
        self.steps += 1
        x = self.normed(x * self.narrow.float() + self.phases.real.sum() * self.counts)
        x = x * self.spread.sum(0) + (self.halves[0] - self.halves[1].square()).sum(0)
        return (x * self.small * self.mask) @ self.turned.t() + self.empty.sum()


def odd(stage):
    accelerator = accelerator_for(stage)
    rank, size = accelerator.process_index, accelerator.num_processes
    model, reference = make(rank, Odd), make(0, Odd)
    mine, theirs = adamw(model), adamw(reference)
    model, mine = accelerator.prepare(model, mine)
    x = torch.randn(size, 2, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        accelerator.backward(model(x[rank]).square().mean())
        reference(x.flatten(0, 1)).square().mean().backward()
        accelerator.clip_grad_norm_(model.parameters(), 1.0), nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        mine.step(), mine.zero_grad(), theirs.step(), theirs.zero_grad()
    found = accelerator.get_state_dict(model)
    for name, value in reference.state_dict().items():
        mine, theirs = (tensor.to(torch.complex64) for tensor in (found[name], value))
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, msg=name)
    assert model.steps == 3


@stages
def test_odd_parameters_and_buffers(stage):
    run(4, odd, stage)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(True)) for _ in "ab")
        )

    def forward(self, x):
        return self.stages(x).mean((2, 3))


def buffers(stage, broadcast):
    accelerator = accelerator_for(stage, {"broadcast_buffers": broadcast})
    model = accelerator.prepare(Normed())
    accelerator.backward(model(torch.randn(2, 3, 8, 8) + accelerator.process_index).mean())
    return model.stages[0][1].running_mean


@stages
def test_buffers_are_rank_0s_after_each_exchange(stage):
    first, second = run(2, buffers, stage, True)
    assert torch.equal(first, second)
    first, second = run(2, buffers, stage, False)
    assert not torch.equal(first, second)


def no_parameters(stage):
    accelerator = accelerator_for(stage)
    model = accelerator.prepare(nn.Sequential(nn.ReLU(), nn.Flatten()))
    return model(torch.ones(2, 3, requires_grad=True)).sum().item()


@stages
def test_a_model_without_parameters(stage):
    assert run(2, no_parameters, stage) == [6.0, 6.0]


class Transformer(nn.Module):
    """torch's own encoder and decoder, attention masks and dropout layers included."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11)

    def forward(self, x):
        embedded = self.embedding(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.body(embedded, embedded, tgt_mask=mask))


def transformer(stage):
    accelerator = accelerator_for(stage)
    rank, size = accelerator.process_index, accelerator.num_processes
    model, reference = make(rank, Transformer), make(0, Transformer)
    mine, theirs = sgd(model), sgd(reference)
    model, mine = accelerator.prepare(model, mine)
    for step in range(2):
        x = torch.randint(11, (2 * size, 5), generator=torch.Generator().manual_seed(step))
        accelerator.backward(F.cross_entropy(model(x.chunk(size)[rank]).flatten(0, 1), x.chunk(size)[rank].flatten()))
        F.cross_entropy(reference(x).flatten(0, 1), x.flatten()).backward()
        mine.step(), mine.zero_grad(), theirs.step(), theirs.zero_grad()
    assert_same_weights(model, reference, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-5)
    return len(_groups(model))


@stages
def test_torchs_own_transformer_is_divided_layer_by_layer(stage):
    assert run(2, transformer, stage) == [5, 5]


# -- refusals ----------------------------------------------------------------------------------------------------------


def mixed():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))


class Alike(nn.Module):
    """Two parameters in one memory."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(4, 4))
        self.other = nn.Parameter(self.one.data)


class Inside(nn.Module):
    """Uses a block's parameters without calling the block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in "ab")

    def forward(self, x):
        return F.linear(x, self.blocks[0].weight)


def holding(tensor):
    model = nn.Module()
    model.weight = nn.Parameter(tensor)
    return model


REFUSED = {
    "script": (lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2))), "'0' is a torch.jit script"),
    "complex": (lambda: holding(torch.ones(2, 2, dtype=torch.complex64)), "'weight' is complex; hold its"),
    "expanded": (lambda: holding(torch.ones(1, 2).expand(2, 2)), "'weight' is expanded: .* make it of a .clone"),
    "alike": (Alike, "'one' and 'other' are different tensors in the same memory"),
    "wrapped": (lambda: nn.parallel.DistributedDataParallel(nn.Linear(2, 2)), "the model is wrapped in Distributed"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "parameter '0.weight' has no shape yet; run one batch"),
    "mixed": (mixed, "'0.bias' is float32, '1.bias' is bfloat16; convert"),
    "sparse": (lambda: nn.Sequential(nn.Embedding(3, 2, sparse=True)), "'0' makes sparse gradients"),
}


def refused():
    accelerator = accelerator_for("zero3")
    mesh = accelerator.mesh.axis(accelerator.strategies[0].axis).device_mesh
    cases = {
        **REFUSED,
        "divided": (lambda: fully_shard(nn.Linear(2, 2), mesh=mesh), "the model was already divided by fully_shard"),
    }
    for build, message in cases.values():
        with pytest.raises(PrepareError, match=f"prepare: zero3 cannot train this .*: .*{message}"):
            accelerator.prepare(build())
    inside, x = accelerator.prepare(Inside()), torch.ones(2, 2)
    with pytest.raises(PrepareError, match=r"parameters other than by calling .* set strategies\.zero3\.blocks"):
        inside(x)
    own = accelerator.prepare(nn.Linear(2, 2))
    with pytest.raises(PrepareError, match=r"forward: 'bias' is not the parameter that was prepared"):
        torch.func.functional_call(own, {"bias": own.bias * 2}, x)
    shared = nn.Linear(2, 2)
    accelerator.prepare(nn.Sequential(shared))
    with pytest.raises(PrepareError, match=r"parameter '1\.weight' belongs to another prepared model too"):
        accelerator.prepare(nn.Sequential(nn.ReLU(), shared))
    with pytest.raises(PrepareError, match=r"strategies\.zero3\.blocks: 'layers\.\*' names no module of LM"):
        accelerator_for("zero3", {"blocks": ["layers.*"]}).prepare(make())
    with pytest.raises(PrepareError, match=r"strategies\.zero3\.compile: found no repeated blocks in this Linear"):
        accelerator_for("zero3", {"compile": True}).prepare(nn.Linear(2, 2))
    with pytest.raises(PrepareError, match=r"strategies\.zero3\.pin_memory: needs an accelerator"):
        accelerator_for("zero3", {"offload": "cpu", "pin_memory": True}).prepare(make())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_models_that_cannot_be_divided_are_refused_by_name():
    run(2, refused)


class Lars(torch.optim.Optimizer):
    """Steps each parameter by its norm (You et al. 2017), which a divided one answers for its part alone."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=-self.param_groups[0]["lr"] * p.norm().item() / (p.grad.norm().item() + 1e-6))


def muon(parameters):
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.02)


WHOLE = {"Adafactor": torch.optim.Adafactor, "Lars": Lars, "Muon": muon}
"""Optimizers that look at whole parameters."""

OPTIMIZERS = {"LBFGS": torch.optim.LBFGS, "SparseAdam": torch.optim.SparseAdam, **WHOLE}


def optimizers(stage, first):
    for name, kind in OPTIMIZERS.items():
        accelerator = accelerator_for(stage)
        model = make()
        optimizer = kind(list(model.parameters()))
        if first:
            accelerator.prepare(optimizer)
        objects = (model,) if first else (model, optimizer)
        advice = rf"set strategies\.{stage}\.step_on: whole, or use" if name in WHOLE else "use another"
        with pytest.raises(PrepareError, match=f"{stage} cannot divide the optimizer {name}: .* {advice}"):
            accelerator.prepare(*objects)


@stages
@pytest.mark.parametrize("first", [False, True], ids=["together", "before its model"])
def test_optimizers_that_cannot_be_divided_are_refused_by_name(stage, first):
    run(2, optimizers, stage, first)


def others(stage):
    """The rest of torch's optimizers, and those that look at whole parameters, against one process."""
    makers = [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam]
    makers += [torch.optim.RAdam, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.ASGD, torch.optim.Rprop]
    for kind in makers:
        plain = kind in (torch.optim.SGD, torch.optim.ASGD, torch.optim.Rprop)
        settings = {"lr": 1e-2} if plain else {"lr": 1e-2, "eps": 1e-3}
        beside(stage, {}, lambda p, kind=kind, settings=settings: kind(p, **settings), kind.__name__)
    for name, maker in WHOLE.items():
        beside(stage, {"step_on": "whole"}, maker, name)


def beside(stage, options, maker, name):
    """One optimizer, a step of which in the middle is after its state was saved and loaded."""
    accelerator = accelerator_for(stage, options)
    rank = accelerator.process_index
    model, reference = make(rank, Block), make(0, Block)
    mine, theirs = maker(model.parameters()), maker(reference.parameters())
    model, mine = accelerator.prepare(model, mine)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        accelerator.backward(model(x[rank]).square().mean())
        reference(x).square().mean().backward()
        mine.step(), mine.zero_grad(), theirs.step(), theirs.zero_grad()
        mine.load_state_dict(mine.state_dict())
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(a), b, rtol=1e-5, atol=1e-6, msg=name)


@stages
def test_torchs_other_optimizers(stage):
    run(2, others, stage)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 3}, r"strategies\.zero3\.replicas: 3 does not divide 4 processes"),
        ({"replicas": 4}, r"strategies\.zero3\.replicas: 4 of 4 processes leave nothing to divide"),
        ({"pin_memory": True}, r"strategies\.zero3\.pin_memory: is for offloaded memory"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    from accel.config import Config
    from accel.plan import Plan

    with pytest.raises(ConfigError, match=message):
        Plan.of(Config().replace(num_processes=4, strategies={"zero3": options}))


def test_the_model_stays_the_users():
    assert run(2, names, "zero3") == [("LM", True, ["position", "scale", "embedding.weight"])] * 2


def names(stage):
    model = accelerator_for(stage).prepare(make())
    return type(model).__name__, isinstance(model, LM), [name for name, _ in model.named_parameters()][:3]
