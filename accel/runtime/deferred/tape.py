"""What a program did to make some tensors, so that each can be made again later, on its own.

A model can be too large to be made whole before it is divided. Inside a `Tape` the program runs as it would without
one: random numbers are drawn, buffers get their values. But a parameter loses its memory as soon as a module has it,
and is on the meta device from then on. What the program does is written down, and done again for one parameter when
`value_of` asks for it, in the same order and with the random generator as it was: bit for bit what would have been.

The idea of recording a model's initialisation is torchdistx's `deferred_init`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ..references import ReplacedView, refuse_view, views_of_parameters
from .operations import (
    RESERVES,
    SMALL,
    Memory,
    Operation,
    View,
    blank,
    name_of,
    only_looks,
    pages,
    reader,
    tensors_in,
    written_to,
)
from .parameters import replace_parameters

_OVERWRITES = {"normal_", "uniform_", "zero_", "fill_", "copy_", "exponential_", "random_", "log_normal_", "cauchy_"}
"""Operations whose result does not depend on what was there before."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which parameters have no memory, and what gives them their values is written down."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memories: dict[StorageWeakRef, Memory] = {}
        self._modules: dict[int, nn.Module] = {}
        self._waiting: list[nn.Parameter] = []
        self._length = 0

    def __enter__(self) -> Tape:
        self._hooks = (
            register_module_parameter_registration_hook(self._registered),
            register_module_module_registration_hook(lambda module, name, child: self._built(module, child)),
        )
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        modules = {id(inner): inner for module in self._modules.values() for inner in module.modules()}
        for view in views_of_parameters(list(modules.values())):
            refuse_view(view)
        for module in modules.values():
            for tensors in (module._buffers, module.__dict__):
                self._fill(tensors)
        replace_parameters(modules.values(), self._on_meta)
        self._modules.clear()
        self._waiting.clear()

    def find(self, parameter: nn.Parameter) -> View | None:
        """How the value of a parameter without memory is made; None if nothing was ever written to it."""
        memory = self._memory_of(parameter) if parameter.is_meta else None
        return self._view(parameter) if memory is not None and memory.last is not None else None  # type: ignore[return-value]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        state = _generator_state(function, kwargs)
        given = tree_map_only(Tensor, self._view, (args, kwargs))
        if name_of(function) in RESERVES and _stays_here(args, kwargs):
            results = self._reserved(function(*args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False}))
        elif any(self._is_hollow(tensor) for tensor in tensors_in((args, kwargs))):
            results = self._call_hollow(function, args, kwargs, draws=state is not None)
        else:
            results = function(*args, **kwargs)
        self._write_down(function, (args, kwargs), given, results, state)
        return results

    def _call_hollow(self, function: Any, args: Any, kwargs: Any, draws: bool) -> Any:
        """Run an operation on tensors without memory: for its result's shape, unless somebody asks for its value."""
        mutated = written_to(function, args, kwargs)
        if only_looks(function, mutated):
            return function(*args, **kwargs)
        asks = any("Tensor" not in str(value.type) for value in function._schema.returns)
        asks = asks or not all(map(self._is_hollow, mutated))
        if asks or draws:
            value = blank if draws and name_of(function) in _OVERWRITES else self._value_of
            args_, kwargs_ = tree_map_only(Tensor, lambda t: value(t) if self._is_hollow(t) else t, (args, kwargs))
            results = function(*args_, **kwargs_)
            if asks:
                return results
        return self._shape_only(function, args, kwargs)

    def _shape_only(self, function: Any, args: Any, kwargs: Any) -> Any:
        """The results of an operation, with no memory; tensors that it writes to are themselves."""
        own: dict[int, Tensor] = {}

        def without(tensor: Tensor) -> Tensor:
            shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            own[id(shape)] = tensor
            return shape

        def within(result: Tensor) -> Tensor:
            return own[id(result)] if id(result) in own else self._hollow(result, Memory(_bytes(result)))

        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        shapes = tree_map_only(Tensor, without, (args, kwargs))
        return tree_map_only(Tensor, within, function(*shapes[0], **shapes[1]))

    def _write_down(self, function: Any, tensors: Any, given: Any, results: Any, state: Tensor | None) -> None:
        """Remember which memory this operation has made, and which it has written to."""
        made = tuple(self._made(result) for result in tree_leaves(results))
        mutated = [self._view(tensor) for tensor in written_to(function, *tensors)]
        written = [view.memory for view in (*mutated, *made) if isinstance(view, View)]
        if not written or name_of(function) in RESERVES:
            return
        views = [value for value in tree_leaves(given) if isinstance(value, View)]
        if name_of(function) in _OVERWRITES and views[0].covers:
            views = views[1:]  # what was there before does not matter
        needs = dict.fromkeys(view.written for view in views if view.written)
        args, kwargs = given
        self._add(Operation(self._length, function, args, kwargs, tuple(needs), made, state), written)

    def _add(self, operation: Operation, written: Iterable[Memory]) -> None:
        self._length += 1
        for memory in written:
            memory.last, memory.made = operation, True

    def _value_of(self, tensor: Tensor) -> Tensor:
        view = self._view(tensor)
        assert isinstance(view, View)
        return view.make()

    def _view(self, tensor: Tensor) -> View | Tensor:
        """A tensor as the tape keeps it; one that comes from elsewhere is as if it had just been made."""
        memory = self._memory_of(tensor)
        if memory is None and not _is_plain(tensor):
            return tensor
        memory = memory or self._adopt(tensor)
        size, stride = tuple(tensor.shape), tensor.stride()
        return View(memory, memory.last, tensor.dtype, size, stride, int(tensor.storage_offset()))

    def _adopt(self, tensor: Tensor) -> Memory:
        size = tensor.untyped_storage().nbytes()
        memory = self._memories[_key(tensor)] = Memory(size)
        view = View(memory, None, torch.uint8, (size,), (1,), 0)
        self._add(Operation(self._length, reader(tensor, size), (), {}, (), (view,), None), [memory])
        return memory

    def _made(self, result: Any) -> View | None:
        """Where a tensor lies whose memory the tape did not know, or only by its size."""
        if not isinstance(result, Tensor) or not _is_plain(result):
            return None
        memory = self._memories.setdefault(_key(result), Memory(_bytes(result)))
        if memory.made:
            return None
        memory.made = True
        view = self._view(result)
        return view if isinstance(view, View) else None

    def _memory_of(self, tensor: Tensor) -> Memory | None:
        if tensor.layout is not torch.strided or is_lazy(tensor):
            return None
        return self._memories.get(_key(tensor))

    def _is_hollow(self, tensor: Tensor) -> bool:
        memory = self._memory_of(tensor)
        return memory is not None and memory.hollow

    def _built(self, *modules: nn.Module) -> None:
        self._modules.update({id(module): module for module in modules})

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Take the memory of parameters, once nothing else refers to it."""
        self._built(module)
        with _disable_current_modes():
            self._waiting = [p for p in (*self._waiting, parameter) if not self._emptied(p)]

    def _emptied(self, parameter: nn.Parameter) -> bool:
        memory = self._memory_of(parameter)
        if memory is None or memory.hollow or memory.size < SMALL or not _is_plain(parameter):
            return True  # or not to be emptied
        storage = parameter.untyped_storage()
        if torch._C._storage_Use_Count(storage._cdata) > 2:  # the parameter, and `storage`
            return False
        memory.hollow = True
        parameter.data = self._hollow(parameter, memory)
        return True

    def _reserved(self, shape: Tensor) -> Tensor:
        """Memory that nothing was written to yet."""
        if _bytes(shape) < SMALL:
            return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
        return blank(shape)

    def _hollow(self, like: Tensor, memory: Memory) -> Tensor:
        """A tensor on the CPU whose memory nobody touches, so that the system does not give it any."""
        memory.hollow = True
        view = View(memory, None, like.dtype, tuple(like.shape), like.stride(), int(like.storage_offset()))
        tensor = view.within(pages(memory.size))
        self._memories[_key(tensor)] = memory
        return tensor

    def _fill(self, tensors: dict[str, Any]) -> None:
        """Give those without memory, which were computed from parameters, their values."""
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and not isinstance(tensor, ReplacedView) and self._is_hollow(tensor):
                tensors[name] = self._value_of(tensor)

    def _on_meta(self, parameter: nn.Parameter) -> nn.Parameter | None:
        """A parameter without memory for one whose value the tape can make."""
        memory = self._memory_of(parameter)
        if memory is None or not _is_plain(parameter) or type(parameter) is not nn.Parameter:
            return None
        data = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        blank = nn.Parameter(data, requires_grad=parameter.requires_grad)
        self._memories[_key(blank)] = memory
        return blank


def _generator_state(function: Any, kwargs: Any) -> Tensor | None:
    """How the generator is that an operation draws from; None if it draws nothing."""
    if torch.Tag.nondeterministic_seeded not in function.tags:
        return None
    return (kwargs.get("generator") or torch.default_generator).get_state()


def _stays_here(args: Any, kwargs: Any) -> bool:
    """Whether an operation that gives memory gives main memory."""
    device = kwargs.get("device") or next((tensor.device for tensor in tensors_in(args)), torch.device("cpu"))
    return torch.device(device).type == "cpu" and kwargs.get("layout") in (None, torch.strided)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor lies in main memory, at a stride."""
    return tensor.layout is torch.strided and tensor.device.type == "cpu"


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _key(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
