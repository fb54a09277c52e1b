"""Layout invariance of every family but the GPT, which `test_program.py` looks at more closely."""

import functools

import families
import jax
import numpy as np
import pytest
from some_slow import often

from configs import base
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.layout.layout import RowLayout
from llmjax.data.tokenizer.vocabulary import Vocabulary
from llmjax.errors import UserError
from llmjax.models.table import FAMILIES
from tests.build.test_program import SIZES, V, trace

# What the runs of `test_program.py` have, apart from the keys of Transformers.
COMMON = {
    key: value
    for key, value in SIZES.items()
    if not key.startswith("transformer.") and key != "compute.scan_layers"
}
# Matrices so large that the states say something from the beginning.
TRAINED = {"model.dropout": 0.1, "model.init_std": 0.5, "optimizer.learning_rate": 0.03}
# With norms of sums, or scores that are not divided, gradients in matrices so large are too rough to be the same in
# float32.
GENTLE = {
    name: {"model.init_std": 0.1}
    for name in ("encoder_decoder original", "encoder_decoder t5", "bert original")
}
# Ids of which every third one goes on with a word.
VOCABULARY = Vocabulary(63, np.arange(V) % 63 > 0, np.arange(V) % 3 > 0)
OTHERS = [variant for variant in families.VARIANTS if variant not in ("gpt", "gpt learned")]
# Ways to cut the work -> whether they are tried in every run of the tests.
CUTS = {
    "accumulation": ({"compute.accumulation_steps": 8}, True),
    "one micro-step": ({"compute.accumulation_steps": 1}, False),
    "remat": ({"compute.remat": "full"}, False),
    "multisteps": ({"compute.engine": "multisteps"}, False),
    "mesh": ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, False),
    "data": ({"mesh.data": 8}, False),
    "fsdp": ({"mesh.fsdp": 8}, False),
    "tensor": ({"mesh.data": 4, "mesh.tensor": 2}, False),
    "fused on a mesh": (
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "compute.engine": "fused"}, True,
    ),
    "sequences": ({"mesh.data": 2, "mesh.seq": 2, "mesh.tensor": 2}, True),
    "fused, gathered once": (
        {"mesh.data": 2, "mesh.fsdp": 4, "compute.engine": "fused", "compute.gather": "update"}, False,
    ),
}  # fmt: skip


def family_sections():
    return read_config(base.get_config().to_dict()).families


def program_for(variant, changes):
    raw = base.get_config()
    raw.update_from_flattened_dict(
        families.settings(variant) | COMMON | TRAINED | GENTLE.get(variant, {}) | changes
    )
    many = any(key.startswith("mesh.") for key in changes)
    devices = jax.devices() if many else jax.devices()[:1]
    config, derived = resolve_config(read_config(raw.to_dict()), len(devices))
    return make_program(config, derived, V, devices, vocabulary=lambda: VOCABULARY)


# One variant of each family, and the experts, are tried in every run of the tests.
OFTEN = ("gpt experts", "bert local", "encoder_decoder original", "lstm projected")


@functools.cache
def losses_of(variant):
    return trace(program_for(variant, {}))


def variants_and_cuts():
    """Every family with every cut, the cuts dealt out among the variants of the family, and those of every run."""
    pairs = {(variant, cut) for variant in (*OFTEN, "encoder_decoder t5") for cut in CUTS if CUTS[cut][1]}
    for family in FAMILIES:
        variants = [variant for variant in OTHERS if families.family_of(variant) == family]
        pairs |= {(variants[i % len(variants)], cut) for i, cut in enumerate(CUTS)}
    return sorted(pairs)


@pytest.mark.parametrize("variant", often(OTHERS, lambda variant: variant in OFTEN))
def test_the_loss_falls(variant):
    losses = losses_of(variant)
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize(
    "variant, cut", often(variants_and_cuts(), lambda pair: pair[0] in OFTEN and CUTS[pair[1]][1])
)
def test_every_cut_of_the_work_gives_the_same_losses(variant, cut):
    family = FAMILIES[families.family_of(variant)]
    if "mesh.seq" in CUTS[cut][0] and family.heads(family_sections()) is None:
        pytest.skip("a family without attention, whose sequences are not split")
    np.testing.assert_allclose(trace(program_for(variant, CUTS[cut][0])), losses_of(variant), rtol=1e-5)


@pytest.mark.parametrize(
    "variant, name, seq",
    often(
        [("bert local", "zigzag", 2), ("bert local", "striped", 4), ("encoder_decoder original", "documents", 2),
         ("encoder_decoder original", "documents", 4), ("encoder_decoder", "striped", 4)],
        lambda case: case[2] == 2,
    ),
)  # fmt: skip
def test_masks_follow_the_tokens_into_every_layout(variant, name, seq):
    changes = {"mesh.data": 2, "mesh.seq": seq, "mesh.tensor": 4 // seq, "mesh.seq_attention": "ring"}
    moved = trace(program_for(variant, changes | {"mesh.layout": name}), layout=RowLayout(name, seq, block=4))
    np.testing.assert_allclose(moved, losses_of(variant), rtol=1e-5)


@pytest.mark.parametrize("variant, changes, message", [
    ("bert", {"task.name": "language_model"}, "task.name='language_model' needs a family that sees only what comes "
     "before a token, not model.family='bert'; set model.family=gpt or lstm or encoder_decoder, or task.name=masked_l"),
    ("lstm", {"task.name": "masked_language_model"}, "needs a family that sees both sides of a token"),
    ("bert", {"evaluate.probes": ("copy",)}, "evaluate.probes=.* predict the next token, which model.family='bert'"),
    ("lstm", {"masked_language_model.rate": 0.3}, "masked_language_model.rate=0.3 is without effect for "
     "task.name='language_model'; set task.name=masked_language_model"),
    ("bert", {"masked_language_model.rate": 0.0}, "masked_language_model.rate=0.0 must lie in"),
    ("lstm", {"mesh.seq": 2}, "mesh.seq=2 splits sequences, which this model.family reads from the first token"),
    ("lstm", {"transformer.num_heads": 8}, "transformer.num_heads=8 is without effect for model.family='lstm'; set "
     "model.family=gpt or bert or encoder_decoder, or leave transformer.num_heads at 4"),
    ("gpt", {"translation.source_field": "en"}, "translation.source_field='en' is without effect for task.name='la"),
    ("encoder_decoder", {"task.name": "language_model"}, "model.family='encoder_decoder' reads a second text, which "
     "task.name='language_model' does not have; set task.name=translation or span_corruption, or another model.family"),
    ("encoder_decoder", {"compute.tile": 8}, "compute.tile=8 is without effect for model.family='encoder_decoder'"),
    ("encoder_decoder", {"experts.num_experts": 2}, "experts.num_experts=2 is without effect for model.family='enc"),
    ("encoder_decoder", {"data.source_len": 30, "mesh.seq": 4}, "data.source_len=30 is not divisible by mesh.seq=4"),
    ("encoder_decoder", {"data.source_len": 64, "transformer.position": "learned"}, "data.source_len=64 is more than "
     "data.seq_len=32, for which transformer.position='learned' has positions; lower it, or raise data.seq_len"),
    ("gpt", {"task.name": "conversation", "data.split_on": "x"}, "data.split_on='x' cuts documents of one text, and "
     "those of task.name='conversation' have messages that belong together; set it to ''"),
    ("encoder_decoder t5", {"transformer.relative_distance": 4}, "transformer.relative_buckets=8 must be even and less "
     "than twice transformer.relative_distance=4; change one of them"),
    ("bert", {"transformer.relative_buckets": 8}, "transformer.relative_buckets=8 is without effect for transformer"),
    ("encoder_decoder t5", {"mesh.seq": 2, "mesh.seq_attention": "ring"}, "mesh.seq_attention='ring' cannot add the b"),
    ("encoder_decoder", {"translation.source_field": ""}, "translation.source_field='' names no field"),
    ("encoder_decoder", {"translation.label_smoothing": 0.1, "model.logit_softcap": 5.0}, "translation.label_smoothing="
     "0.1 needs logits without a soft-cap; set model.logit_softcap=0, or translation.label_smoothing=0"),
    ("gpt", {"lstm.hidden_dim": 8}, "lstm.hidden_dim=8 is without effect for model.family='gpt'; set model.f"),
    ("lstm", {"compute.tile": 8}, "compute.tile=8 is without effect for model.family='lstm'; leave it at 0"),
    ("lstm", {"compute.scan_layers": True}, "compute.scan_layers=True is without effect for model.family='lstm'"),
    ("lstm", {"lstm.hidden_dim": 12, "mesh.tensor": 8, "mesh.data": 1}, "lstm.hidden_dim=12 is not divisible by mesh"),
    ("lstm", {"lstm.truncation": 99}, "lstm.truncation=99 is longer than data.seq_len=32"),
    ("lstm", {"lstm.truncation": -1}, "lstm.truncation=-1 must not be negative"),
    ("lstm", {"lstm.hidden_dim": 12, "mesh.fsdp": 8, "mesh.data": 1}, "lstm.hidden_dim=12 is not divisible by mesh.f"),
])  # fmt: skip
def test_what_a_family_cannot_do_is_one_sentence(variant, changes, message):
    with pytest.raises(UserError, match=message) as error:
        program_for(variant, changes)
    assert "\n" not in str(error.value)
