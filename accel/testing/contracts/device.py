"""What a device promises: facts, told without touching the hardware, and numbers that are right."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...interfaces import Device, Support
from .case import Case, Skip

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Facts:
    """What one process found: the device it was given, and how it computes."""

    device: str
    support: dict[torch.dtype, Support]
    errors: dict[torch.dtype, float]
    used: int
    peak: int
    total: int


def counts_without_initialising(case: Case) -> None:
    """The count is a number, and asking for it leaves the hardware untouched, so that workers may be forked later."""
    [(count, initialised)] = case.run(1, _count, case.plugin)
    assert count >= 0
    assert not initialised, "count() initialised CUDA"


def drives_its_device(case: Case) -> None:
    """`select` gives a device of the type that the plugin names, which then computes."""
    facts = _find(case)
    assert torch.device(facts.device).type == case.plugin.type
    assert facts.errors[torch.float32] <= 1e-4, f"float32 differs by {facts.errors[torch.float32]:.1e}"


def computes_in_the_dtypes_it_supports(case: Case) -> None:
    """float32 is native, and a product of matrices in each supported dtype is right to its precision."""
    facts = _find(case)
    assert facts.support[torch.float32] is Support.NATIVE
    for dtype, error in facts.errors.items():
        assert error <= max(4 * torch.finfo(dtype).eps, 1e-4), f"{dtype} differs by {error:.1e}"


def measures_memory(case: Case) -> None:
    """Memory in use is at most its peak, which is at most what the device has."""
    facts = _find(case)
    assert 0 < facts.used <= facts.peak <= facts.total, f"used {facts.used}, peak {facts.peak}, total {facts.total}"


CONTRACTS = (counts_without_initialising, drives_its_device, computes_in_the_dtypes_it_supports, measures_memory)


def _find(case: Case) -> _Facts:
    facts = case.run(1, _facts, case.plugin())[0]
    if facts is None:
        raise Skip("this machine has none")
    return facts


def _count(plugin: type[Device]) -> tuple[int, bool]:
    return plugin.count(), bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _facts(device: Device) -> _Facts | None:
    if device.count() < 1:
        return None
    selected = device.select(0)
    support = {dtype: device.support(dtype) for dtype in DTYPES}
    errors = {dtype: _error(selected, dtype) for dtype in DTYPES if support[dtype] is not Support.NONE}
    device.reset_peak()
    held = torch.ones(1 << 20, device=selected)
    device.synchronize()
    memory = device.memory()
    del held
    return _Facts(str(selected), support, errors, memory.used, memory.peak, memory.total)


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """The relative error of a product of two [32, 32] matrices, against float64 on the CPU."""
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    expected = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu().double()
    return float((found - expected).norm() / expected.norm())
