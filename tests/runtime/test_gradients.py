"""Windows of micro-batches, against a plain list of what each window should hold."""

from dataclasses import dataclass

import pytest

from accel.runtime.gradients import ExplicitWindow, Window


@dataclass
class Loader:
    remaining: int


def windows(length: int, batches: int) -> list[list[int]]:
    return [list(range(batches))[start : start + length] for start in range(0, batches, length)]


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [1, 2, 4, 7])
def test_calls_are_grouped_and_the_loaders_end_closes(length, batches):
    loader = Loader(0)
    window = Window(length, [loader])
    found, current = [], []
    for _ in range(2):
        for batch in range(batches):
            loader.remaining = min(batches - batch, length)
            assert window.planned == len(windows(length, batches)[batch // length])
            current.append(batch)
            if window.closes_with(window.held + 1):
                found.append(current)
                current = []
                window.restart()
            else:
                window.add()
    assert found == windows(length, batches) * 2


@pytest.mark.parametrize("length", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [1, 2, 4, 7])
def test_explicit_windows_are_the_same(length, batches):
    loader = Loader(0)
    window = ExplicitWindow(length, [loader])
    found, current = [], []
    for _ in range(2):
        for batch in range(batches):
            loader.remaining = min(batches - batch, length)
            begins = window.enter()
            assert begins == (not current)
            assert window.planned == len(windows(length, batches)[batch // length])
            current.append(batch)
            if window.closing:
                found.append(current)
                current = []
            window.leave()
    assert found == windows(length, batches) * 2


def test_without_a_loader_windows_are_full():
    window = Window(3, [])
    assert (window.planned, window.closes_with(2), window.closes_with(3)) == (3, False, True)
