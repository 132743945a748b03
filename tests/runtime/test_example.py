"""Inputs are found for ordinary models, alike each time, and the model stays what it was."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from accel.errors import ConfigError, PrepareError
from accel.runtime.example import example_inputs, tried_out
from accel.testing.models import TASKS


class Noisy(nn.Module):
    """Has all that a try could change: batch statistics, dropout, a counter that each call makes anew, a cache."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm, self.dropout = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls = self.calls + 1
        return self.dropout(self.norm(self.convolution(images))).mean((2, 3))


class Positions(nn.Module):
    """Tokens [b, at most 4] and, beside them, one number for each sample."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Embedding(4, 6)

    def forward(self, tokens, scale):
        return (self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))) * scale[:, None, None]


class Fixed(nn.Module):
    """Takes what no layer tells."""

    def forward(self, values):
        return values.reshape(7, 11).exp()


def small_transformer():
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


MAKES = [*(task.make for task in TASKS.values()), Noisy, Positions, small_transformer]


@pytest.mark.parametrize("make", MAKES)
def test_models_run_on_what_is_found(make):
    model = make()
    args, kwargs = example_inputs(model, {}, "example")
    again = example_inputs(make(), {}, "example")[1]
    model(*args, **kwargs)
    assert all(torch.equal(value, again[name]) for name, value in kwargs.items())


def test_hugging_face_models_run_on_what_is_found():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for config in (
        transformers.BertConfig(**small),
        transformers.LlamaConfig(vocab_size=5, **small),  # smaller than the tokens of its own dummy inputs
        transformers.ViTConfig(image_size=12, patch_size=4, **small),
        transformers.T5Config(d_model=16, d_ff=32, num_layers=1, num_heads=2, d_kv=8, vocab_size=20),
        transformers.PegasusConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=20, pad_token_id=0),
        transformers.CLIPConfig(
            text_config={"vocab_size": 20, **small}, vision_config={"image_size": 12, "patch_size": 4, **small}
        ),
    ):
        model = transformers.AutoModel.from_config(config)
        args, kwargs = example_inputs(model, {}, "example")
        model(*args, **kwargs)


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model = Noisy()
    model.dropout.eval()
    before, calls, state = {n: b.clone() for n, b in model.named_buffers()}, model.calls, torch.get_rng_state()
    example_inputs(model, {}, "example")
    with tried_out(model):
        model.eval(), model(torch.randn(2, 3, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.calls is calls and torch.equal(torch.get_rng_state(), state)
    assert model.training and model.norm.training and not model.dropout.training
    assert all(p.grad is None for p in model.parameters())


def test_inputs_as_an_option_says():
    given = {"values": "float32[7, 11]"}
    args, kwargs = example_inputs(Fixed(), given, "example")
    assert not args and kwargs["values"].shape == (7, 11)
    [tokens] = example_inputs(nn.Embedding(9, 2), {"input": "int64[40] < 9"}, "example")[1].values()
    assert tokens.dtype is torch.int64 and set(tokens.tolist()) <= set(range(9))


def test_refusals_name_the_model_and_the_option():
    with pytest.raises(PrepareError, match=r"on which Fixed runs.*strategies\.tensor\.example: \{x: .*no"):
        example_inputs(Fixed(), {}, "strategies.tensor.example")
    with pytest.raises(PrepareError, match=r"Tried 1, .*values float32\[7, 12\]: RuntimeError: shape '\[7, 11\]'"):
        example_inputs(Fixed(), {"values": "float32[7, 12]"}, "example")


@pytest.mark.parametrize("wrong", ["int65[2]", "float32", "float32[2, 0]", "float32[a]", "int64[2 8]", 7])
def test_what_describes_no_tensor_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"^example\.x: expected a tensor as in"):
        example_inputs(Fixed(), {"x": wrong}, "example")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_compiled_block_runs_as_written_in_a_trial_and_compiled_after_it():
    model, compiled = nn.Sequential(Fixed()), []
    model[0].compile(backend=lambda module, inputs: compiled.append(module) or module.forward)
    with tried_out(model), Watching():
        model(torch.zeros(7, 11))
    assert not compiled
    model(torch.zeros(7, 11))
    assert len(compiled) == 1
