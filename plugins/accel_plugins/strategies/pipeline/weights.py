"""Backward in two parts: at once the gradients that the stage before waits for, later those of the weights.

The idea is of Qi et al. 2023 ("Zero Bubble Pipeline Parallelism"). A node of the graph that multiplies by a weight
runs twice: for the gradient of its input, and later, from the same gradient of its output, for that of the weight.
Torch leaves out what nobody asks of a node, so that nothing is computed twice. All other leaves (norms, embeddings,
weights that are used twice or in a function of the user's) get their gradients with the first part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_MULTIPLIES = {"AddmmBackward0": "mat1", "MmBackward0": "self", "BmmBackward0": "self", "ConvolutionBackward0": "input"}
"""Nodes that may run twice, and what they have saved for the weight's gradient. They do not read the weight then,
which may have been freed in between, as where it is gathered for a while."""

_READS_NOTHING = {
    *("AccumulateGrad", "TBackward0", "ToCopyBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0")
}
"""Nodes between a weight and its use that may run after the weight has been freed."""

_RUNS_ONCE = {"CompiledFunctionBackward", "CheckpointFunctionBackward"}
"""Nodes that run once and for all gradients: a graph with one of them is not split."""


class Weights:
    """The second part of a backward pass; `together` are the leaves whose gradients came with the first."""

    def __init__(self, products: Sequence[_Product], together: Sequence[Tensor]) -> None:
        self.together = together
        self._products = products

    def backward(self) -> None:
        """Add the gradients of the weights up."""
        for product in self._products:
            product.backward()
        self._products = ()


def backward_to(ends: Sequence[Tensor], tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Weights | None:
    """Backward from `tensors` as far as `ends`, leaves; returns what is left to do.

    None if all has been done: there are no `ends`, so that nobody waits, or the graph cannot be split.
    """
    roots = [t.grad_fn for t in tensors if t.grad_fn is not None]
    graph = _Graph(roots, [_node_of(end) for end in ends]) if ends else None
    if graph is None or not graph.splits:
        torch.autograd.backward(tensors, gradients)
        return None
    products, together = graph.products()
    try:
        torch.autograd.backward(tensors, gradients, retain_graph=True, inputs=[*ends, *together])
    finally:
        for product in products:
            product.stop_listening()
    return Weights(products, together)


class _Product:
    """A node that multiplies by weights. It hears the gradient of its output in the first part."""

    def __init__(self, node: Node, weights: Sequence[Tensor]) -> None:
        self._node, self._weights = node, weights
        self._gradients: Sequence[Tensor | None] = ()
        self._listening = node.register_prehook(self._hear)

    def stop_listening(self) -> None:
        self._listening.remove()

    def backward(self) -> None:
        known = [(GradientEdge(self._node, place), g) for place, g in enumerate(self._gradients) if g is not None]
        if not known:
            return
        # Hooks of the output's run again: they have changed its gradient once, which is enough.
        handle = self._node.register_prehook(lambda _: tuple(self._gradients))
        try:
            torch.autograd.backward([edge for edge, _ in known], [g for _, g in known], inputs=self._weights)
        finally:
            handle.remove()

    def _hear(self, gradients: Sequence[Tensor | None]) -> None:
        self._gradients = gradients


class _Reached(NamedTuple):
    """The leaves that gradients of a node reach, and whether all nodes on their way read nothing."""

    leaves: frozenset[Any]
    reads_nothing: bool


class _Graph:
    """The graph behind some nodes. Those that lead to one of the ends are its trunk; the rest leads to leaves only."""

    def __init__(self, roots: Sequence[Node], ends: Collection[Node]) -> None:
        self.splits = True
        self._trunk = set(ends)
        self._reached: dict[Node, _Reached] = {}
        self._uses: dict[Any, list[tuple[Node | None, bool]]] = {}
        for node in _children_first(roots):
            self.splits = self.splits and type(node).__name__ not in _RUNS_ONCE
            if any(child in self._trunk for child in _children(node)):
                self._trunk.add(node)
            elif node not in self._trunk:
                self._reached[node] = self._reach(node)
        for node in self._trunk:
            self._note_uses(node, _children(node))
        self._note_uses(None, roots)

    def products(self) -> tuple[list[_Product], list[Tensor]]:
        """The nodes whose weights' gradients can wait, and the leaves whose gradients cannot."""
        found: dict[Node | None, list[Tensor]] = {}
        for leaf, uses in self._uses.items():
            node, reads_nothing = uses[0]
            found.setdefault(node if len(uses) == 1 and reads_nothing else None, []).append(leaf.variable)
        waiting = [node for node in found if node is not None and _runs_twice(node)]
        products = [_Product(node, found.pop(node)) for node in waiting]
        return products, [leaf for leaves in found.values() for leaf in leaves]

    def _reach(self, node: Node) -> _Reached:
        found = [self._reached[child] for child in _children(node)]
        leaves = frozenset([node]) if hasattr(node, "variable") else frozenset[Any]()
        plain = type(node).__name__ in _READS_NOTHING and all(each.reads_nothing for each in found)
        return _Reached(leaves.union(*(each.leaves for each in found)), plain)

    def _note_uses(self, node: Node | None, children: Sequence[Node]) -> None:
        for child in dict.fromkeys(children):
            reached = self._reached.get(child, _Reached(frozenset(), False))
            for leaf in reached.leaves:
                self._uses.setdefault(leaf, []).append((node, reached.reads_nothing))


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _children_first(roots: Sequence[Node]) -> Iterator[Node]:
    seen: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in _children(node) if child not in seen]


def _node_of(leaf: Tensor) -> Node:
    return get_gradient_edge(leaf).node


def _runs_twice(node: Any) -> bool:
    """Whether a node may run twice; not if what it has saved is made again each time it is asked for.

    Torch refuses hooks on what has hooks already, which is what activation checkpointing consists of.
    """
    saved = _MULTIPLIES.get(type(node).__name__)
    if saved is None:
        return False
    try:
        getattr(node, f"_raw_saved_{saved}").register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError:
        return False
    return True
