"""Every installed plugin keeps the contracts of its kind."""

from __future__ import annotations

import pytest

from accel.testing import contracts


@pytest.mark.parametrize("case", contracts.cases(), ids=str)
def test_contract(case: contracts.Case) -> None:
    contracts.check(case, skip=pytest.skip)
