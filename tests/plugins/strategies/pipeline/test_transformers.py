"""Models of Hugging Face in stages: losses, gradients and weights are those of one plain process."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.distributed.tensor import DTensor

from accel.errors import PrepareError
from accel.runtime.shards import Elsewhere
from accel.testing import run

from .models import Case, accelerator_for, adamw, loss_of, make, train_plainly

transformers = pytest.importorskip("transformers")

VOCABULARY = 37
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
DEEP = {**SMALL, "num_hidden_layers": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _tokens(step, size):
    """Padded tokens; the labels leave out most of the first samples, so that micro-batches count differently."""
    tokens = torch.randint(3, VOCABULARY, (size, 6), generator=torch.Generator().manual_seed(step))
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[:3, 2:], mask[1, 4:] = -100, 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _images(step, size):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return {"pixel_values": images, "labels": torch.randint(4, (size,), generator=generator)}


def _gpt2():
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 4, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **still, **TOKENS))


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DEEP, num_key_value_heads=1, **TOKENS))


def _mixtral():
    config = transformers.MixtralConfig(**DEEP, num_key_value_heads=1, num_local_experts=4, **TOKENS)
    return transformers.MixtralForCausalLM(config)


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**DEEP, **STILL))


def _albert():
    return transformers.AlbertForMaskedLM(transformers.AlbertConfig(**DEEP, **STILL, embedding_size=8))


def _t5():
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens, dropout_rate=0.0))


def _vit():
    sizes = {name: value for name, value in DEEP.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, **STILL, image_size=8, patch_size=4, num_labels=4)
    return transformers.ViTForImageClassification(config)


CASES = {make.__name__[1:]: Case(make, _tokens, None) for make in (_gpt2, _llama, _mixtral, _bert, _albert, _t5)}
CASES["vit"] = Case(_vit, _images, None)


def train(name, options, steps=5, size=8):
    """The largest distance from one plain process, of losses, and of gradients and weights that are held here."""
    warnings.filterwarnings("ignore", "pipeline: .* asks about its data")  # masks that hide nothing are left out
    case, reference = CASES[name], train_plainly(name, CASES, steps, size)
    accelerator = accelerator_for(case, options, num_processes=2)
    model = make(case)
    model, optimizer = accelerator.prepare(model, adamw(model))
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(case, model, case.batch(step, size))
        accelerator.backward(loss)
        optimizer.step()
        found.append(abs(loss.item() - reference.losses[step]) / abs(reference.losses[step]))
    for key, parameter in model.named_parameters():
        vanishes = key.endswith(("key.bias", "k_proj.bias"))  # attention does not depend on it: its gradient is noise
        if isinstance(parameter, Elsewhere) or vanishes:
            continue
        assert not isinstance(parameter, DTensor)
        for mine, theirs in (
            (parameter.grad, reference.gradients.get(key)),
            (parameter.detach(), reference.weights[key]),
        ):
            if theirs is not None:
                found.append((mine - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-3))
    return max(found)


def train_all(names, options):
    return {name: train(name, options) for name in names}


def assert_close(results):
    for rank, found in enumerate(results):
        for name, distance in found.items():
            assert distance < 1e-5, f"{name} on rank {rank}"


def test_a_language_model_and_an_encoder_decoder():
    assert_close(run(2, train_all, ["gpt2", "t5"], {"micro_batches": 3}, timeout=110))


@pytest.mark.slow
def test_all_models():
    assert_close(run(2, train_all, list(CASES), {"micro_batches": 3, "schedule": "1f1b"}, timeout=110))


def generate(name):
    """Greedily and by beams; an encoder is called on its own then, and on each process."""
    case = CASES[name]
    plain, tokens = make(case).eval(), case.batch(0, 5)["input_ids"]
    model = accelerator_for(case, {"micro_batches": 2}, num_processes=2).prepare(make(case)).eval()
    settings = {"max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        for options in (settings, {**settings, "num_beams": 2}):
            assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))
        for refused in ({"use_cache": True}, {"output_attentions": True}):
            with pytest.raises(PrepareError, match=r"use_cache=False|inside blocks"):
                model.generate(tokens, **settings, **refused)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate(name):
    assert run(2, generate, name, timeout=110) == [True, True]
