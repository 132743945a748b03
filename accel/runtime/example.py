"""Small inputs on which a model's forward runs: for trying out at `prepare` what a strategy does to a model."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..config.example import TensorSpec, parse_example
from ..errors import PrepareError
from .nested import tensors

BATCH, LENGTH = 2, 8
"""Samples, and positions in a sequence, of inputs that are made up; shorter sequences are tried after these."""

_TRIES = 200
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, NameError)
"""What a forward raises on inputs that are not for it."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the named arguments of a forward call."""

_trials: list[nn.Module] = []
"""Models that are being tried out."""

_known: WeakKeyDictionary[nn.Module, Inputs] = WeakKeyDictionary()
"""What was found or said before: the first strategy may leave a model that takes no wrong inputs any more."""


def example_inputs(model: nn.Module, given: Mapping[str, Any], setting: str) -> Inputs:
    """Arguments with which `model(*args, **kwargs)` runs: on its device, alike on all ranks, and small.

    `given` describes them by argument of `forward`, as the option named `setting` says (`int64[2, 8] < 100`). Without
    it, they are a Hugging Face model's own `dummy_inputs`, or made up from the signature and the first layers. The
    model is left as it was. Called by each rank on its own. Raises PrepareError if the model runs on none of them.
    """
    if not given and model in _known:
        return _known[model]
    said = {name: _make(spec, _device(model)) for name, spec in parse_example(given, setting).items()}
    failures: dict[str, str] = {}
    for args, kwargs in [((), said)] if said else itertools.islice(_candidates(model), _TRIES):
        failure = _try(model, args, kwargs)
        if failure is None:
            _known[model] = args, kwargs
            return args, kwargs
        failures[_describe(args, kwargs)] = failure
    tried = "; ".join(f"{inputs}: {failure}" for inputs, failure in itertools.islice(failures.items(), 4))
    raise PrepareError(
        f"prepare: found no inputs on which {type(model).__name__} runs, to try it out; say some, as in "
        f"`{setting}: {{x: 'float32[2, 3, 32, 32]', tokens: 'int64[2, 8] < 100'}}`. "
        f"Tried {len(failures)}, the first were {tried or 'none, for want of a layer that says what it takes'}"
    )


@contextlib.contextmanager
def tried_out(model: nn.Module) -> Iterator[None]:
    """Inside, a model may be run in any mode; after it, modes, buffers, and numbers that its modules keep and that are
    drawn are as they were.

    What is compiled runs as it is written: watched by a mode, torch would give it up for good.
    """
    numbers = {module: numbers_of(module) for module in model.modules()}
    buffers = [(owner._buffers, name, value) for owner in numbers for name, value in owner._buffers.items()]
    copies = [None if value is None else value.clone() for _, _, value in buffers]
    device = _device(model)
    _trials.append(model)
    devices = [] if device.type in ("cpu", "meta") else [device]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), _uncompiled():
            yield
    finally:
        _trials.remove(model)
        for module, held in numbers.items():
            vars(module).update(held)
        for (place, name, value), copy in zip(buffers, copies, strict=True):
            place[name] = value
            if value is not None and copy is not None:
                value.detach().copy_(copy)


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """What a module counts or remembers as Python numbers; `training` is one."""
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float))}


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and asking would cost its import
        return contextlib.nullcontext()
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def is_tried_out(model: nn.Module) -> bool:
    """Whether this is inside `tried_out`: whoever runs the model wants to see all of its outputs."""
    return any(trial is model for trial in _trials)


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the model does not run on these inputs; None if it does."""
    with tried_out(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        try:
            output = model(*args, **kwargs)
        except _REFUSALS as error:
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
    if any(tensor.is_floating_point() for _, tensor in tensors(output)):
        return None
    return "no floating-point tensor in its output"


def _candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first."""
    device = _device(model)
    own = getattr(model, "dummy_inputs", None)
    if isinstance(own, Mapping):
        yield (), {name: value.to(device) if isinstance(value, Tensor) else value for name, value in own.items()}
    names = _needed(model)
    made = [_make(spec, device) for spec in dict.fromkeys(_specs(model))]
    for value in made:  # likeliest: the same for all arguments
        yield _bind(names, [value] * len(names))
    for more in _OPTIONAL:
        if more in inspect.signature(model.forward).parameters and more not in names:
            fitting = [[value for value in made if _fits(value, name)] for name in (*names, more)]
            yield from (_bind([*names, more], list(values)) for values in itertools.product(*fitting))
    if len(names) > 1:
        flags = [_make(TensorSpec(dtype, (BATCH,)), device) for dtype in ("float32", "bool", "int64")]
        yield from (_bind(names, list(values)) for values in itertools.product([*made, *flags], repeat=len(names)))


_OPTIONAL = ("decoder_input_ids", "pixel_values", "input_ids")
"""What a Hugging Face model may need beside its first argument, though its signature does not say so."""


def _fits(value: Tensor, name: str) -> bool:
    """Whether an argument of this name may be such a tensor, by the names that Hugging Face models give."""
    images = name != "pixel_values" or value.dim() == 4
    return value.is_floating_point() != name.endswith("_ids") and images


def _needed(model: nn.Module) -> list[str]:
    """The arguments of forward that must be given; the first, if none must. An empty name is positional."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    plain = [p for p in parameters if p.kind in (*positional, inspect.Parameter.KEYWORD_ONLY)]
    needed = [p.name for p in plain if p.default is inspect.Parameter.empty]
    if needed:
        return needed
    main = getattr(model, "main_input_name", None)
    return [p.name for p in plain if p.name == main] or [p.name for p in plain[:1]] or [""]


def _bind(names: list[str], values: list[Tensor]) -> Inputs:
    named = dict(zip(names, values, strict=True))
    args = (named.pop(""),) if "" in named else ()
    return args, named


def _specs(model: nn.Module) -> Iterator[TensorSpec]:
    """What the layers of a model take, first layers first: any of them may be the one that takes the input."""
    for module in model.modules():
        dtype = next((str(p.dtype).removeprefix("torch.") for p in module.parameters(recurse=False)), "float32")
        if isinstance(module, nn.Embedding):
            for shape in ((BATCH, LENGTH), (BATCH, LENGTH // 2), (BATCH,)):
                yield TensorSpec("int64", shape, module.num_embeddings)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield from _images(model, module, dtype)
        elif width := _width(module):
            for floats in ((BATCH, LENGTH, width), (BATCH, width)):
                yield TensorSpec(dtype, floats)


def _images(model: nn.Module, layer: Any, dtype: str) -> Iterator[TensorSpec]:
    dims = layer.weight.dim() - 2
    config = getattr(model, "config", None)
    holders = (model, config, getattr(config, "vision_config", None))
    own = next(filter(None, (getattr(holder, "image_size", None) for holder in holders)), None)
    known = [own] if isinstance(own, int) else [own[-1]] if isinstance(own, (list, tuple)) and own else []
    for size in (*known, 8, 16, 28, 32, 64, 224):
        yield TensorSpec(dtype, (BATCH, layer.in_channels, *[size] * dims))


def _width(module: nn.Module) -> int | None:
    """The size of the last dim of what a layer takes; None if the layer does not tell."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if next(module.parameters(recurse=False), None) is None:
        return None
    sizes = (getattr(module, name, None) for name in ("in_features", "embed_dim", "input_size", "num_features"))
    return next((size for size in sizes if isinstance(size, int)), None)


def _make(spec: TensorSpec, device: torch.device) -> Tensor:
    """Values that depend on nothing but the description, so that all ranks make the same."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator).to(device, dtype)
    return torch.randint(spec.below, spec.shape, generator=generator).to(device, dtype)


def _device(model: nn.Module) -> torch.device:
    held = next(itertools.chain(model.parameters(), model.buffers()), None)
    return held.device if held is not None else torch.device("cpu")


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [("", value) for value in args] + list(kwargs.items())
    shown = [
        f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}".strip()
        for name, value in named
        if isinstance(value, Tensor)
    ]
    return ", ".join(shown) or "nothing"
