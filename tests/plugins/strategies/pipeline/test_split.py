"""Where stages are cut: the costliest one is to cost least."""

import pytest
from accel_plugins.strategies.pipeline.split import balance
from accel_plugins.strategies.pipeline.trace import Call, Trace

BLOCKS = [f"block{number}" for number in range(6)]


def cuts(seconds, memory, stages=2):
    """The blocks that further stages begin with, of six alike, by what the embedding, a block and the head cost."""
    names = ["embedding", *BLOCKS, "head"]
    places = [0, *[1] * len(BLOCKS), 2]
    calls = [
        Call(name, 0, set(), shapes=[(place,)], memory=memory[place], seconds=seconds[place])
        for name, place in zip(names, places, strict=True)
    ]
    return [names[place] for place in balance(Trace(calls), set(BLOCKS), stages, {})]


@pytest.mark.parametrize(
    ("seconds", "memory", "begin"),
    [
        ((0, 1, 0), (0, 1, 0), ["block3"]),
        ((0, 1, 3), (0, 1, 0), ["block3"]),  # a head is computed while the first stage waits, wherever that ends
        ((0, 1, 0), (0, 1, 3), ["block4"]),
        ((6, 1, 0), (0, 1, 0), ["block2"]),
        ((0, 1, 0), (3, 1, 0), ["block2"]),
    ],
)
def test_what_is_before_the_blocks_and_after_them_counts(seconds, memory, begin):
    assert cuts(seconds, memory) == begin
    assert len(cuts(seconds, memory, stages=3)) == 2
