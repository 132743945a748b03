"""A process's place comes from torch's own variables, whole or not at all."""

import pytest

from accel.errors import LaunchError
from accel.runtime.world import World

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def test_no_variables_are_a_world_of_one():
    assert World.from_environment({}) == World(0, 1, 0, 1)


def test_torchrun_variables():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **MEETING}
    assert World.from_environment(environ) == World(5, 8, 1, 4)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE=None is not a number"),
        ({"WORLD_SIZE": "2", **MEETING}, "RANK=None is not a number"),
        ({"RANK": "x", "WORLD_SIZE": "2", **MEETING}, "RANK=x is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK=2 is not one of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_two_processes_that_cannot_form_a_world_are_stopped(environ, message):
    with pytest.raises(LaunchError, match=message):
        World.from_environment(environ)
