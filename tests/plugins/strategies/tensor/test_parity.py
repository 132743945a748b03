"""Losses, gathered gradients and weights after five AdamW steps are those of plain torch on one process."""

import pytest
import torch

from accel.testing import run

from . import models
from .training import accelerator_for, deviations, make_of_seed

LIMIT = {"loss": 1e-6, "gradient": 1e-5, "norm": 1e-5, "weight": 1e-5}

ATTENTION = {"attention.q": "column", "attention.o": "row"}
FUSED = {"attention.qkv": "column over 2, in 3 pieces", "attention.o": "row"}
FEED = {"up": "column", "down": "row"}
VOCABULARY = {"embedding": "vocabulary", "head": "column"}
TORCHS = {"linear1": "column", "linear2": "row", "out_proj": "row over", "self_attn": "heads over", **VOCABULARY}

OWN = [
    (models.GPT, {**ATTENTION, **FEED, **VOCABULARY, "norm1": "replicated"}),
    (models.tied_gpt, {**ATTENTION, **FEED, **VOCABULARY}),
    (models.shared_gpt, {**ATTENTION, **FEED, **VOCABULARY}),
    (models.fused_gpt, {**FUSED, **FEED, **VOCABULARY}),
    (models.stacked_gpt, {**FUSED, **FEED, **VOCABULARY}),
    (models.rotated_gpt, {**ATTENTION, **FEED, **VOCABULARY}),
    (models.writing_gpt, {"attention.q": "replicated (", **FEED, **VOCABULARY}),
    (models.Choosy, {**ATTENTION, **FEED, **VOCABULARY}),
    (models.Encoder, TORCHS),
    (models.Seq2Seq, TORCHS),
    (models.Recurrent, {"layers.0": "column", "layers.2": "row", "layers.4": "column", "lstm": "replicated"}),
    (models.FunctionalHead, {**ATTENTION, **FEED, "embedding": "replicated (its weight is read by other code"}),
]

HUGGING_FACE = {
    "Bert": {"query": "column", "attention.output.dense": "row", "intermediate.dense": "column", "decoder": "column"},
    "GPT2": {"c_fc": "column", "mlp.c_proj": "row", "wte": "vocabulary", "c_attn": "column over 2, in 3"},
    "Llama": {"k_proj": "column over 2 (its own plan", "o_proj": "row", "gate_proj": "column", "embed_tokens": "vocab"},
    "Mixtral": {"k_proj": "column", "o_proj": "row", "experts": "experts over 2 (derived: 4"},
    "T5": {"EncDecAttention.k": "column", "SelfAttention.o": "row", "wi": "column", "lm_head": "column"},
    "ViT": {"q_proj": "column", "o_proj": "row", "fc1": "column", "fc2": "row"},
}


def check(found, said):
    """Within the limits, and each layer whose name ends so is held so."""
    worst, described = found
    assert all(worst[what] <= limit for what, limit in LIMIT.items()), worst
    for ending, held in said.items():
        lines = {name: line for name, line in described.items() if f".{name}".endswith(f".{ending}")}
        assert lines and all(line.startswith(held) for line in lines.values()), (ending, held, described)


def tensor(n, **options):
    return {"tensor": {"size": n, **options}}


SEQUENCE, BOTH = {"sequence_parallel": True}, {"sequence_parallel": True, "loss_parallel": True}

DIVIDED = [
    (models.GPT, SEQUENCE, {"norm1": "replicated, on 1/2 of the positions", "down": "row"}),
    (models.short_gpt, BOTH, {"norm1": "replicated, on 1/2 of the positions", **VOCABULARY}),
    (models.tied_gpt, BOTH, {**ATTENTION, **FEED, **VOCABULARY}),
    (models.Encoder, BOTH, {"norm1": "replicated, on 1/2 of the positions", **TORCHS}),
    (models.Recurrent, BOTH, {"lstm": "replicated; puts the whole sequence together: it meets lstm"}),
]
"""With activations divided too."""


def all_of(cases, n, steps=5):
    """Several models in one call: each worker has to import what they need, and to meet the others, but once."""
    return [deviations(make, args, n, tensor(n, **options), steps=steps) for make, options, *args in cases]


def test_own_models_on_two_processes():
    cases = [*((make, {}, said) for make, said in OWN), *DIVIDED]
    for results in run(2, all_of, [case[:2] for case in cases], 2, timeout=110):
        for found, (*_, said) in zip(results, cases, strict=True):
            check(found, said)


def test_on_four_processes():
    cases = [
        (models.GPT, {}, ATTENTION),
        (models.Encoder, {}, TORCHS),
        (models.fused_gpt, {}, {"attention.qkv": "column over 4"}),
        (models.short_gpt, BOTH, {"norm2": "replicated, on 1/4 of the positions"}),
    ]
    for results in run(4, all_of, [case[:2] for case in cases], 4, timeout=110):
        for found, (*_, said) in zip(results, cases, strict=True):
            check(found, said)


def all_of_hugging_face():
    """Parity, and whether what a model writes, greedily and by beams, is what one process writes."""
    plain = [(models.hugging_face, {}, kind) for kind in HUGGING_FACE]
    found = all_of([*plain, *((models.hugging_face, BOTH, kind) for kind in ("Llama", "Mixtral", "T5"))], 2, 3)
    written = []
    for kind in ("Llama", "T5"):
        reference, model = (make_of_seed(models.hugging_face, 0, kind) for _ in range(2))
        accelerator_for(2, tensor(2)).prepare(model)
        for options in ({}, {"num_beams": 2}):
            options |= {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, models.LENGTH)}
            expected, got = (m.eval().generate(models.tokens(1, 2), **options) for m in (reference, model))
            written.append(torch.equal(got, expected))
    return found, written


def test_hugging_face_models():
    pytest.importorskip("transformers")
    for results, written in run(2, all_of_hugging_face, timeout=110):
        assert all(written)
        for found, said in zip(results, [*HUGGING_FACE.values(), {}, {}, {}], strict=True):
            check(found, said)


def test_accumulation_and_clipping():
    for found in run(2, deviations, models.GPT, (), 2, tensor(2, **BOTH), 3, 0.1):
        check(found, {})


def test_accumulation_of_single_samples():
    """Gradients that autograd gives to several parameters at once do not add up in one another's memory."""
    for found in run(2, deviations, models.Marked, (), 2, tensor(2), 3, None, "fp32", 2, 1):
        check(found, {})


def test_bf16():
    """Within some units of bf16: sums over the processes are rounded to it once more."""
    for worst, _ in run(2, deviations, models.GPT, (), 2, tensor(2, **BOTH), 1, None, "bf16"):
        assert worst["loss"] < 2**-8 and worst["gradient"] < 2**-6 and worst["weight"] < 2**-6, worst


RECOMPUTED = {"activation_checkpointing": "selective", "minimum_size": 0}
PARTED = {"minimum_size": 0, "blocks": ["blocks.*.up", "blocks.*.down", "blocks.*.attention.q"]}
"""A column is gathered apart from its row, and hands it what is divided."""


@pytest.mark.parametrize(
    ("make", "data", "options"),
    [
        (models.GPT, {"zero3": PARTED}, {}),
        (models.tied_gpt, {"zero3": {}}, BOTH),
        (models.GPT, {"zero3": RECOMPUTED}, SEQUENCE),
    ],
)
def test_beside_a_data_axis(make, data, options):
    for found in run(4, deviations, make, (), 4, {**tensor(2, **options), **data}, 2, 0.1, "fp32", 3):
        check(found, {**ATTENTION, **FEED, **VOCABULARY})


PIPELINE = {"pipeline": {"size": 2, "micro_batches": 2}}


def test_beside_a_pipeline():
    """Each stage divides its own layers, and all stages agree on how; tied weights are on the first and the last."""
    for found in run(4, deviations, models.tied_gpt, (), 4, {**PIPELINE, **tensor(2, **BOTH)}, 2, 0.1, "fp32", 3):
        check(found, {**ATTENTION, **FEED, **VOCABULARY})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ViT", "Llama"])
def test_hugging_face_models_beside_a_pipeline(kind):
    pipeline = {"pipeline": {"size": 2, "micro_batches": 4}}
    two_layers = {"num_hidden_layers": 2}
    cases = (models.hugging_face, (kind, two_layers), 4, {**pipeline, **tensor(2)}, 1, None, "fp32", 3)
    for found in run(4, deviations, *cases, timeout=110):
        check(found, {})


@pytest.mark.slow
@pytest.mark.parametrize("data", ["ddp", "zero3"])
def test_in_three_dimensions(data):
    strategies = {"pipeline": {"size": 2, "micro_batches": 2, "schedule": "1f1b"}, **tensor(2), data: {}}
    for found in run(8, deviations, models.GPT, (), 8, strategies, 2, 0.1, "fp32", 3, timeout=110):
        check(found, {**ATTENTION, **FEED, **VOCABULARY})
