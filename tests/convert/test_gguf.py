"""GGUF files that are written as llama.cpp writes them: the same model as the folder of transformers."""

import gguf
import jax
import numpy as np
import pytest
from gguf_models import ARCHITECTURES, write_gguf
from random_models import VARIANTS, Imported, model_of, one_text, read, write

from llmjax.convert.architectures.gguf import FAMILIES
from llmjax.convert.gguf.model import open_model
from llmjax.convert.gguf.rope_factors import make_factors, read_factors
from llmjax.errors import UserError

# Gemma: scores are divided by the root of a head's width, and every 6th layer of Gemma 3 has no window, with a base of
# 10000 in the others; a file says none of it.
CHANGES = {
    "Gemma2ForCausalLM": {"query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {
        "query_pre_attn_scalar": 8, "layer_types": None, "rope_local_base_freq": 10000.0, "num_hidden_layers": 7
    },
}  # fmt: skip
READ = [variant for variant in VARIANTS if variant.split()[0] in ARCHITECTURES]
EACH = pytest.mark.parametrize("variant", READ)


def folder_of(tmp_path, variant, **changes):
    return write(tmp_path / "folder", variant, **{**CHANGES.get(variant, {}), **changes})


def read_gguf(path):
    source = open_model(path)
    model = model_of(source)
    return Imported(source, model, source.read(jax.eval_shape(model.init, jax.random.key(0))))


def test_every_family_is_tried():
    assert {family.theirs.name for family in FAMILIES.values()} == {variant.split()[0] for variant in READ}


@EACH
def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path, variant):
    folder = folder_of(tmp_path, variant)
    theirs, ours = read(folder), read_gguf(write_gguf(tmp_path / "a.gguf", folder))
    # The spread of initial parameters is not in the file.
    expected = {**theirs.source.settings, "model.init_std": 0.02}
    assert {**ours.source.settings} == expected
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    tokens = one_text(np.random.default_rng(0).integers(0, 30, (2, 12)))
    np.testing.assert_array_equal(ours.logits(tokens), theirs.logits(tokens))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_numbers_of_any_type_are_read_as_what_they_mean(tmp_path, kind):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    folder = folder_of(tmp_path, "LlamaForCausalLM", **sizes)
    source = open_model(write_gguf(tmp_path / "a.gguf", folder, kind))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {kind, "F32"}
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(source.tensors[tensor.name].read().astype(np.float32), expected)


def test_an_unsupported_family_is_refused_with_a_list_of_those_there_are(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf", folder_of(tmp_path, "LlamaForCausalLM"), general__architecture="rwkv6"
    )
    with pytest.raises(
        UserError, match="general.architecture='rwkv6', which is not known; use a model of llama, qwen2"
    ):
        open_model(path)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"llama__block_count": 0.5}, "llama.block_count=0.5"),
        ({"llama__rope__dimension_count": 4}, "llama.rope.dimension_count=4"),
        ({"llama__attention__value_length": 4}, "llama.attention.value_length=4"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type='longrope'"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"split__count": 2}, "llama-gguf-split --merge"),
        ({"llama__attention__head_count": 0}, "llama.attention.head_count=0"),
        (
            {"llama__embedding_length": 24},
            r"token_embd.weight of shape \[30, 16\], and its header asks for \[30, 24\]",
        ),
        (
            {"llama__block_count": 4},
            "lacks the tensor blk.3.attn_norm.weight and 8 more, which its header asks for",
        ),
        ({"llama__block_count": 2}, "has the tensor 'blk.2.attn_k.weight' and 8 more"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, facts, message):
    path = write_gguf(tmp_path / "a.gguf", folder_of(tmp_path, "LlamaForCausalLM"), **facts)
    with pytest.raises(UserError, match=message):
        source = open_model(path)
        source.match(source.places(jax.eval_shape(model_of(source).init, jax.random.key(0))))


def test_other_rotary_factors_are_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", folder_of(tmp_path, "LlamaForCausalLM llama3"))
    found = open_model(path).settings
    assert (found["transformer.rope_factor"], found["transformer.rope_original_len"]) == (4.0, 16)
    for factor, length, head_dim, theta in [
        (8.0, 8192, 128, 500000.0),
        (32.0, 8192, 64, 500000.0),
        (2.0, 100, 8, 1e4),
    ]:
        scaling = read_factors(make_factors(head_dim, theta, factor, length), theta)
        assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (factor, length)
    assert read_factors(np.ones(8, np.float32), 1e4) == {}
    assert read_factors(np.linspace(1, 3, 8, dtype=np.float32), 1e4) is None
