"""What each kind of plugin promises, as tests that run on every installed one, from pytest and from `accel test`.

@pytest.mark.parametrize("case", contracts.cases("strategy", "mine"), ids=str)
def test_contract(case):
    contracts.check(case, skip=pytest.skip)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ... import registry
from . import checkpoint, device, launcher, precision, strategy, tracker
from .case import Case, Skip

CONTRACTS: dict[str, tuple[Callable[[Case], None], ...]] = {
    "strategy": strategy.CONTRACTS,
    "precision": precision.CONTRACTS,
    "device": device.CONTRACTS,
    "launcher": launcher.CONTRACTS,
    "checkpoint": checkpoint.CONTRACTS,
    "tracker": tracker.CONTRACTS,
}
"""By kind. A contract's name is what it promises; it raises AssertionError where a plugin breaks the promise."""


def cases(
    kind: str | None = None,
    name: str | None = None,
    *,
    processes: int = 2,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Every contract with every installed plugin; of one kind, or one plugin of that name, if given."""
    return [
        Case(known, plugin, contract, processes, plugin if known == "device" else device, options or {})
        for known in registry.KINDS
        if kind in (None, known)
        for plugin in registry.names(known)
        if name in (None, plugin)
        for contract in CONTRACTS[known]
    ]


def check(case: Case, skip: Callable[[str], object]) -> None:
    """Check one case, and call `skip` with the reason if the contract does not apply or cannot be tried here."""
    try:
        case.check()
    except Skip as reason:
        skip(str(reason))


__all__ = ["CONTRACTS", "Case", "Skip", "cases", "check"]
