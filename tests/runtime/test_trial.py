"""Whether an optimizer treats every number by itself is found from what it does to samples."""

import copy
import re

import pytest
import torch
from torch import nn

from accel.runtime.trial import objection, objection_apart


class Plain(torch.optim.Optimizer):
    """Gradient descent; `change` is what is made of each gradient."""

    def __init__(self, parameters, change, lr=0.0):
        super().__init__(parameters, {"lr": lr})
        self.change = change

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(self.change(p, p.grad), alpha=-group["lr"])


class Lookahead(torch.optim.Optimizer):
    """Has the groups of another optimizer, which it lets step."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base, self.param_groups = base, base.param_groups

    def step(self):
        self.base.step()


class Subclass(torch.optim.AdamW):
    pass


def keeping(parameters):
    """An optimizer that looks for its parameters elsewhere than in its groups."""
    optimizer = Plain(parameters, lambda p, gradient: gradient)
    optimizer.step = None
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": []}]
    return optimizer


RIGHT = {
    "sign": lambda p: Plain(p, lambda p, gradient: gradient.clamp(-0.1, 0.1) + 0.01 * p),
    "subclass": lambda p: Subclass(p, lr=torch.tensor(0.0)),
    "wrapper": lambda p: Lookahead(torch.optim.SGD(p, momentum=0.9)),
}
WRONG = {
    "norm": (lambda p: Plain(p, lambda p, gradient: gradient / gradient.norm().item()), "depends on the others"),
    "mean": (
        lambda p: Plain(p, lambda p, gradient: gradient - gradient.mean(0, True)),
        "depends on the others",
    ),
    "largest": (lambda p: Plain(p, lambda p, gradient: gradient * (gradient >= gradient.max() / 2)), "on the others"),
    "noise": (lambda p: Plain(p, lambda p, gradient: gradient + torch.randn_like(gradient)), "or on chance"),
    "factored": (lambda p: torch.optim.Adafactor(p), "depends on the others"),
    "nothing": (keeping, "it changes none of the parameters"),
    "closure": (lambda p: torch.optim.LBFGS(p), "could not be tried on samples .TypeError: .* 'closure'"),
}


def layers():
    return list(nn.Sequential(nn.Linear(300, 7), nn.Conv2d(3, 4, 3)).parameters())


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_held_against_optimizers_of_single_numbers(name):
    """Whatever its learning rate, 0 while it warms up. Neither it nor torch's generator is changed."""
    parameters = layers()
    optimizer = RIGHT[name](parameters)
    before, state = copy.deepcopy(parameters), torch.random.get_rng_state()
    assert objection(optimizer, parts=True) is None
    assert not optimizer.state and all(map(torch.equal, parameters, before))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", WRONG)
def test_optimizers_that_look_further_are_found(name):
    make, message = WRONG[name]
    assert re.search(message, objection(make(layers()), parts=True) or "")


def test_optimizers_may_look_at_whole_parameters_but_not_draw_numbers():
    for name in ("norm", "mean", "largest", "factored"):
        assert objection(WRONG[name][0](layers()), parts=False) is None
    assert "depends on chance" in objection(WRONG["noise"][0](layers()), parts=False)


class Together(torch.optim.Optimizer):
    """Steps by the norm of all gradients."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = sum(p.grad.square().sum() for p in used).sqrt()
        for p in used:
            p.sub_(p.grad / norm)


def test_optimizers_that_look_at_other_parameters_are_found():
    """In one group of them, or in a group for each."""
    parameters = [p for _ in range(2) for p in layers()]
    for groups in (parameters, [{"params": [p]} for p in parameters]):
        assert objection_apart(torch.optim.Adafactor(groups)) is None
        assert "depends on others" in objection_apart(Together(groups))
    assert "could not be tried" in objection_apart(WRONG["norm"][0](parameters))  # where there is no gradient
