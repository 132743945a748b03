"""The Accelerator as a loop sees it. What goes wrong is named; the user's objects stay the user's."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator, CheckpointError, ConfigError, LaunchError, PrepareError
from accel.testing import run

from .runtime.loaders import Stream


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.extra = "kept"

    def forward(self, x, scale=1.0):
        return self.layer(x) * scale

    def describe(self):
        return f"a net of {self.extra}"


def pair(model=None, **settings):
    accelerator = Accelerator(device="cpu", **settings)
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return accelerator, *accelerator.prepare(model, optimizer)


# -- the user's objects ---------------------------------------------------------------------------------------------


def test_objects_come_back_in_order_and_are_the_users_own():
    accelerator = Accelerator()
    model, loader = Net(), DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1)
    a, b, c, d, e = accelerator.prepare(scheduler, loader, None, optimizer, model)
    assert (a, c, d, e) == (scheduler, None, optimizer, model)
    assert isinstance(b, DataLoader)
    assert accelerator.prepare(model) is model
    assert accelerator.unwrap_model(model) is model


def test_a_prepared_model_answers_as_before():
    names = list(Net().state_dict())
    _, model, optimizer = pair()
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert isinstance(optimizer, torch.optim.SGD)
    assert model.describe() == "a net of kept"
    assert list(model.state_dict()) == names
    assert torch.equal(model(torch.ones(1, 4), scale=2.0), 2 * model.layer(torch.ones(1, 4)))


def test_copies_and_pickles_are_plain_and_independent():
    _, model, optimizer = pair(gradient_accumulation_steps=2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is Net
        assert twin.layer.weight is not model.layer.weight
        assert torch.equal(twin(torch.ones(1, 4)), model(torch.ones(1, 4)))
    twin = copy.deepcopy(optimizer)
    assert type(twin) is torch.optim.SGD
    parameter = twin.param_groups[0]["params"][0]
    parameter.grad = torch.ones_like(parameter)
    before = parameter.detach().clone()
    twin.step()
    assert not torch.equal(parameter, before), "a plain optimizer steps whenever it is called"


def test_a_forward_set_on_the_instance_is_kept():
    model = Net()
    model.forward = lambda x: x + 1
    _, model, _ = pair(model)
    assert model(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_preparing_in_several_calls(order):
    accelerator = Accelerator()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for value in (model, optimizer) if order == "model first" else (optimizer, model):
        assert accelerator.prepare(value) is value
    before = model.layer.bias.detach().clone()
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    torch.testing.assert_close(model.layer.bias, before - 0.1)


@pytest.mark.parametrize("value", [3, "model", [Net()], torch.ones(1)])
def test_objects_of_no_known_kind_are_refused(value):
    with pytest.raises(PrepareError, match=r"prepare: expected a model .* got .*; keep it out of prepare"):
        Accelerator().prepare(Net(), value)


# -- losses, gradients, steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [torch.ones(1), 3.0])
def test_backward_on_what_has_no_gradient_is_refused(loss):
    with pytest.raises(PrepareError, match="backward: the loss must be a tensor that requires grad, got"):
        Accelerator().backward(loss)


def unprepared_model():
    accelerator = Accelerator()
    with pytest.raises(PrepareError, match="backward: no model was prepared, so no gradients would be exchanged"):
        accelerator.backward(Net()(torch.ones(1, 4)).sum())


def test_training_apart_by_mistake_is_refused():
    run(2, unprepared_model)


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 2}, {"mixed_precision": "fp16"}], ids=str)
def test_an_optimizer_left_out_is_refused_where_it_could_not_be_right(settings):
    accelerator = Accelerator(device="cpu", **settings)
    model = accelerator.prepare(Net())
    with pytest.raises(PrepareError, match=r"backward: no optimizer was prepared.*call prepare\(optimizer\)"):
        accelerator.backward(model(torch.ones(1, 4)).sum())


def test_an_optimizer_over_strange_parameters_is_refused():
    accelerator = Accelerator()
    other = nn.Linear(2, 2)
    optimizer = accelerator.prepare(torch.optim.SGD([*Net().parameters(), *other.parameters()], lr=0.1))
    accelerator.prepare(other)
    accelerator.backward(other(torch.ones(1, 2)).sum())
    with pytest.raises(PrepareError, match=r"2 of 4 parameters of this SGD \(the first of shape \(4, 4\)\)"):
        optimizer.step()


def test_a_group_added_later_is_checked_and_trained():
    accelerator, model, optimizer = pair()
    late = accelerator.prepare(nn.Linear(4, 1))
    accelerator.backward(late(model(torch.ones(1, 4))).sum())
    optimizer.step()
    optimizer.add_param_group({"params": late.parameters(), "lr": 1.0})
    before = late.bias.item()
    optimizer.step()
    assert late.bias.item() == pytest.approx(before - 1.0)
    optimizer.add_param_group({"params": nn.Linear(1, 1).parameters()})
    with pytest.raises(PrepareError, match="belong to no prepared model"):
        optimizer.step()


def batches(count):
    return DataLoader(TensorDataset(torch.arange(4.0 * count).view(count, 4) / count), batch_size=1)


def reference(windows, zero_first):
    """Weights after plain torch has trained on windows of samples."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for window in windows:
        optimizer.zero_grad()
        for (x,) in window:
            (model(x).square().mean() / len(window)).backward()
        optimizer.step()
    return model.layer.weight


@pytest.mark.parametrize(
    "style", ["zero first", "zero last", "accumulate zero first", "accumulate zero last", "guarded"]
)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_every_way_to_write_accumulation(style, length):
    torch.manual_seed(0)
    model = Net()
    accelerator = Accelerator(gradient_accumulation_steps=length)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(7))
    synced = []
    for _ in range(2):
        for (x,) in loader:
            if style == "guarded":
                with accelerator.accumulate(model):
                    accelerator.backward(model(x).square().mean())
                    synced.append(accelerator.sync_gradients)
                    if accelerator.sync_gradients:
                        optimizer.step()
                    optimizer.zero_grad()
            elif style.startswith("accumulate"):
                with accelerator.accumulate(model):
                    if style.endswith("first"):
                        optimizer.zero_grad()
                    accelerator.backward(model(x).square().mean())
                    synced.append(accelerator.sync_gradients)
                    optimizer.step()
                    if style.endswith("last"):
                        optimizer.zero_grad()
            else:
                if style.endswith("first"):
                    optimizer.zero_grad()
                accelerator.backward(model(x).square().mean())
                synced.append(accelerator.sync_gradients)
                optimizer.step()
                if style.endswith("last"):
                    optimizer.zero_grad()
    data = list(batches(7))
    windows = [data[start : start + length] for start in range(0, 7, length)] * 2
    torch.testing.assert_close(model.layer.weight, reference(windows, style), rtol=1e-6, atol=1e-7)
    ends = [index == len(window) - 1 for window in windows for index in range(len(window))]
    assert synced == ends


def test_evaluation_between_micro_batches_does_not_count():
    torch.manual_seed(0)
    model, accelerator = Net(), Accelerator(gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, batches(4), batches(3))
    for (x,) in loader:
        accelerator.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            assert len([model(y) for (y,) in held_out]) == 3
    data = list(batches(4))
    torch.testing.assert_close(model.layer.weight, reference([data[:2], data[2:]], None))


def test_clipping_returns_the_global_norm_and_waits_for_the_window():
    accelerator, model, optimizer = pair(gradient_accumulation_steps=2)
    norms = []
    for _ in range(2):
        accelerator.backward(model(torch.ones(1, 4)).sum() * 10)
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0).item())
        after = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        optimizer.step()
    whole = (20 * 10.0**2) ** 0.5
    assert norms == pytest.approx([whole / 2, whole], rel=1e-5)
    assert after == pytest.approx(1.0, rel=1e-4)


def test_clipping_values():
    accelerator, model, _ = pair()
    accelerator.backward(model(torch.ones(1, 4)).sum() * 10)
    accelerator.clip_grad_value_(model.parameters(), 0.5)
    assert model.layer.bias.grad.tolist() == [0.5] * 4


def test_a_bare_backward_in_a_window_is_refused():
    _, model, optimizer = pair(gradient_accumulation_steps=2)
    for _ in range(2):
        model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(
        PrepareError, match=r"gradient_accumulation_steps: 2 divides the loss; call accelerator\.backward"
    ):
        optimizer.step()


def test_an_optimizer_that_calls_the_model():
    accelerator = Accelerator()
    model = Net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    model, optimizer = accelerator.prepare(model, optimizer)
    x = torch.randn(8, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        accelerator.backward(loss)
        return loss

    before = closure().item()
    optimizer.step(closure)
    assert closure().item() < before / 10


def test_a_closure_cannot_accumulate():
    _, _, optimizer = pair(gradient_accumulation_steps=2)
    with pytest.raises(PrepareError, match="set gradient_accumulation_steps: 1, got 2"):
        optimizer.step(lambda: None)


# -- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "step": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 6),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
}


def rates(make, prepared_first, length, once_an_epoch=False):
    accelerator = Accelerator(gradient_accumulation_steps=length)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if prepared_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = make(optimizer)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    loader = accelerator.prepare(DataLoader(TensorDataset(torch.ones(12, 4)), batch_size=2))
    trace = []
    for _ in range(2):
        for (x,) in loader:
            accelerator.backward(model(x).mean())
            optimizer.step(), optimizer.zero_grad()
            if not once_an_epoch:
                scheduler.step()
                if accelerator.sync_gradients:
                    trace.append(scheduler.get_last_lr()[0])
        if once_an_epoch:
            scheduler.step()
            trace.append(scheduler.get_last_lr()[0])
    return trace


def plain_rates(make, steps):
    optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)
    scheduler = make(optimizer)
    trace = []
    for _ in range(steps):
        optimizer.step(), scheduler.step()
        trace.append(scheduler.get_last_lr()[0])
    return trace


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("prepared_first", [False, True])
def test_schedulers_move_with_the_steps(make, prepared_first):
    for length in (1, 3):
        trace = rates(make, prepared_first, length)
        assert trace == pytest.approx(plain_rates(make, 12 // length)[: len(trace)])
    assert rates(make, prepared_first, 3, once_an_epoch=True) == pytest.approx(plain_rates(make, 2))


def test_schedules_on_two_processes():
    results = run(2, rates_by_name, "step")
    assert results == [pytest.approx(plain_rates(SCHEDULERS["step"], 6))] * 2


def rates_by_name(name):
    return rates(SCHEDULERS[name], False, 1)


# -- metrics --------------------------------------------------------------------------------------------------------


def metrics(samples, batch, kind):
    accelerator = Accelerator()
    data = Stream(samples) if kind == "a stream" else list(range(samples))
    loader = accelerator.prepare(DataLoader(data, batch_size=batch))
    seen = []
    for x in loader:
        if kind == "objects":
            seen += accelerator.gather_for_metrics([str(v) for v in x.tolist()])
        elif kind == "nested":
            seen += [str(v) for v in accelerator.gather_for_metrics({"x": [x]})["x"][0].tolist()]
        else:
            seen += [str(v) for v in accelerator.gather_for_metrics(x).tolist()]
    return seen


@pytest.mark.parametrize("kind", ["tensor", "nested", "objects", "a stream"])
@pytest.mark.parametrize(("samples", "batch"), [(1, 4), (7, 2), (12, 3), (13, 4)])
def test_each_sample_is_counted_once(kind, samples, batch):
    assert run(2, metrics, samples, batch, kind) == [[str(i) for i in range(samples)]] * 2


class Ones(Stream):
    """Without a length."""

    def __iter__(self):
        return (torch.ones(1) for _ in super().__iter__())


def in_step():
    """How often one is warned of a loss by two loaders in step, and by one inside of the other."""
    accelerator = Accelerator()
    model = accelerator.prepare(nn.Linear(1, 1))
    first, second = (accelerator.prepare(DataLoader(Ones(n), batch_size=2)) for n in (7, 8))
    told = []
    for make in (lambda: zip(first, second, strict=True), lambda: ((x, y) for x in second for y in first)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for x, y in make():
                accelerator.backward((model(x) * model(y).mean()).mean())
        told.append(
            ["in step, as by zip(), and the processes have (2, 1) and (2, 2)" in str(w.message) for w in caught]
        )
    return told


def test_loaders_in_step_that_are_divided_unlike_are_told_of():
    assert run(2, in_step)[0] == [[True], []]


def batches_of_the_dataset():
    accelerator = Accelerator()
    dataset = [torch.arange(3 * i, 3 * i + 3) for i in range(3)]
    loader = accelerator.prepare(DataLoader(dataset, batch_size=None))
    tensors, objects = [], []
    for x in loader:
        tensors += accelerator.gather_for_metrics(x).tolist()
        objects += accelerator.gather_for_metrics([str(v) for v in x.tolist()])
    return tensors, objects


def test_batches_that_the_dataset_makes_count_whole():
    assert run(2, batches_of_the_dataset) == [(list(range(9)), [str(i) for i in range(9)])] * 2


# -- processes ------------------------------------------------------------------------------------------------------


def places(folder):
    accelerator = Accelerator()
    order = folder / "order"
    with accelerator.main_process_first():
        with order.open("a") as file:
            file.write(str(accelerator.process_index))
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(list(range(5))) as mine:
        part = mine
    with accelerator.split_between_processes({"t": torch.arange(5)}, apply_padding=True) as mine:
        padded = mine["t"].tolist()
    flags = [accelerator.check_trigger()]
    if accelerator.is_last_process:
        accelerator.set_trigger()
    flags += [accelerator.check_trigger(), accelerator.check_trigger()]
    only = [
        accelerator.on_main_process(lambda: "main")(),
        accelerator.on_last_process(lambda: "last")(),
        accelerator.on_process(lambda: "one", process_index=1)(),
        accelerator.on_local_process(local_process_index=0)(lambda: "local")(),
    ]
    return order.read_text()[0], part, padded, flags, only


def test_places_and_turns(tmp_path):
    first, second, third = run(3, places, tmp_path)
    assert first == ("0", [0, 1], [0, 1], [False, True, False], ["main", None, None, "local"])
    assert second == ("0", [2, 3], [2, 3], [False, True, False], [None, None, "one", None])
    assert third == ("0", [4], [4, 4], [False, True, False], [None, "last", None, None])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(
        LaunchError, match="num_processes: 2, but this process is one of 1; start the script with `accel launch`"
    ):
        Accelerator(num_processes=2)
    with pytest.raises(ConfigError, match="mixed_precision: no precision named 'bf61' is installed; there are: bf16"):
        Accelerator(mixed_precision="bf61")
    with pytest.raises(ConfigError, match="gradient_accumulation_steps: must be at least 1, got 0"):
        Accelerator(gradient_accumulation_steps=0)
    with pytest.raises(ConfigError, match=r"strategies\.single: fills the data axis, as strategies\.ddp does"):
        Accelerator(strategies=["ddp", "single"])


def alone_among_two():
    with pytest.raises(ConfigError, match=r"strategies\.single\.size: trains on one process, got 2"):
        Accelerator(strategies="single")


def test_single_refuses_two_processes():
    run(2, alone_among_two)


# -- checkpoints ----------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value, "at": (1, torch.tensor([self.value]))}

    def load_state_dict(self, state):
        assert state["at"] == (1, torch.tensor([state["value"]]))
        self.value = state["value"]


def session(folder, resume, stop_after):
    """Trains, and stops or resumes in the middle of the second epoch; returns losses and weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = MultiStepLR(optimizer, [3, 5], 0.5)
    dataset = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(1)))
    loader = DataLoader(dataset, batch_size=4 // accelerator.num_processes, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    if resume:
        accelerator.load_state(folder)
    losses = []
    while counter.value < 24:
        for (x,) in loader:
            loss = model(x).square().mean()
            accelerator.backward(loss)
            optimizer.step(), scheduler.step(), optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            counter.value += 1
            if counter.value == stop_after:
                accelerator.save_state(folder)
                return losses, None
    return losses, model[0].weight.detach()


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_stops_and_resumes_is_the_run_that_did_not(tmp_path, size):
    whole, weights = run(size, session, tmp_path / "a", False, None)[0]
    begun, _ = run(size, session, tmp_path / "b", False, 12)[0]
    resumed, same = run(size, session, tmp_path / "b", True, None)[0]
    assert begun + resumed == whole
    assert torch.equal(weights, same)


def test_a_checkpoint_replaces_an_older_one_whole(tmp_path):
    accelerator, model, _ = pair()
    accelerator.save_state(tmp_path / "c")
    nn.init.ones_(model.layer.weight)
    accelerator.save_state(tmp_path / "c")
    nn.init.zeros_(model.layer.weight)
    accelerator.load_state(tmp_path / "c")
    assert model.layer.weight.sum().item() == 16
    accelerator.end_training()  # which waits for the deletion of the first
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_checkpoint_of_other_objects_is_refused_unchanged(tmp_path):
    accelerator, _, _ = pair()
    accelerator.save_state(tmp_path / "c")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        accelerator.load_state(tmp_path / "d")
    other, _, _ = pair(nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="does not fit this Linear: missing: weight, bias; unexp"):
        other.load_state(tmp_path / "c")
    other.prepare(nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"holds 1 models \(here 2\)"):
        other.load_state(tmp_path / "c")


def test_state_dict_is_whole_plain_and_a_copy():
    accelerator, model, _ = pair()
    state = accelerator.get_state_dict(model)
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in state.values())
    before = state["layer.weight"].clone()
    nn.init.zeros_(model.layer.weight)
    assert torch.equal(state["layer.weight"], before)
    Net().load_state_dict(state, strict=True)


def test_tied_weights_stay_tied_in_a_state_dict():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    accelerator = Accelerator()
    state = accelerator.get_state_dict(accelerator.prepare(model))
    assert state["0.weight"] is state["1.weight"]
    assert model[1].weight is model[0].weight


# -- the end --------------------------------------------------------------------------------------------------------


def test_freeing_forgets_everything():
    accelerator, model, optimizer = pair()
    model, optimizer = accelerator.free_memory(model, optimizer)
    assert (model, optimizer) == (None, None)
    accelerator.end_training()


def test_trackers(tmp_path):
    accelerator = Accelerator(trackers=["jsonl"], project_dir=str(tmp_path))
    accelerator.init_trackers("run", {"lr": 0.1})
    accelerator.log({"loss": torch.tensor(0.5), "note": "x"}, step=3)
    accelerator.end_training()
    (file,) = tmp_path.rglob("*.jsonl")
    assert '"loss": 0.5' in file.read_text()
    with pytest.raises(ConfigError, match="trackers: 'jsonl' was not started; running are: none"):
        accelerator.get_tracker("jsonl")
