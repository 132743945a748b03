"""The mesh of processes is arithmetic on ranks."""

import itertools

import pytest

from accel.errors import ConfigError
from accel.interfaces import Axis
from accel.plan import resolve_sizes
from accel.runtime.mesh import Mesh
from accel.runtime.world import World


def mesh(sizes: dict[Axis, int], rank: int, size: int) -> Mesh:
    def connect() -> None:
        raise AssertionError("arithmetic must not need a process group")

    return Mesh(sizes, World(rank, size, rank, size), "cpu", connect)


def test_places_are_row_major_with_the_first_axis_outermost():
    sizes = {Axis.PIPELINE: 2, Axis.DATA: 3, Axis.TENSOR: 2}
    places = [tuple(mesh(sizes, rank, 12).axis(axis).index for axis in sizes) for rank in range(12)]
    assert places == list(itertools.product(range(2), range(3), range(2)))


def test_an_axis_that_no_strategy_fills_has_size_one():
    axis = mesh({Axis.DATA: 4}, 3, 4).axis(Axis.TENSOR)
    assert (axis.size, axis.index) == (1, 0)


@pytest.mark.parametrize(
    ("wanted", "processes", "sizes"),
    [
        ({Axis.DATA: None}, 4, {Axis.DATA: 4}),
        ({Axis.DATA: None, Axis.TENSOR: 2}, 8, {Axis.DATA: 4, Axis.TENSOR: 2}),
        ({Axis.TENSOR: None, Axis.DATA: 2}, 8, {Axis.DATA: 2, Axis.TENSOR: 4}),
        ({Axis.TENSOR: None}, 8, {Axis.DATA: 1, Axis.TENSOR: 8}),
        ({}, 1, {Axis.DATA: 1}),
    ],
)
def test_an_axis_without_a_size_takes_what_the_others_leave(wanted, processes, sizes):
    assert resolve_sizes(wanted, processes) == sizes


def test_sizes_that_do_not_multiply_to_the_world_are_refused():
    with pytest.raises(ConfigError, match=r"data 1 x tensor 3 is 3 processes, but num_processes is 4"):
        resolve_sizes({Axis.DATA: None, Axis.TENSOR: 3}, 4)


def test_two_axes_without_a_size_are_refused():
    with pytest.raises(ConfigError, match="all but one of data, tensor"):
        resolve_sizes({Axis.DATA: None, Axis.TENSOR: None}, 4)
