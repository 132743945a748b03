"""Tensor parallelism: the matrices of a layer divided among processes that see the same batch."""
