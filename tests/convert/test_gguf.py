"""GGUF files that are written as llama.cpp writes them: the same model as the folder of transformers."""

import json
import sys
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from gguf_models import ARCHITECTURES, write_gguf
from random_models import VARIANTS, Imported, V, config_json, model_of, one_text, read, write
from safetensors.numpy import save_file

from llmjax.build.model import make_model
from llmjax.config.imported import imported_config
from llmjax.config.resolve import resolve_config
from llmjax.convert.architectures.gguf import FAMILIES
from llmjax.convert.gguf.export import Export
from llmjax.convert.gguf.model import open_model
from llmjax.convert.gguf.rope_factors import make_factors, read_factors
from llmjax.convert.gguf.writing import header_bytes, size_of, type_of
from llmjax.convert.hf_folder import open_model as open_folder
from llmjax.errors import UserError
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout

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


def written(tmp_path, imported, dtype="float32"):
    folder = tmp_path / dtype
    folder.mkdir()
    Export(dict(imported.source.settings), V, dtype, {}).write(folder, imported.params)
    return folder / "model.gguf"


@EACH
def test_an_exported_file_is_the_one_that_llama_cpp_would_write(tmp_path, variant):
    folder = folder_of(tmp_path, variant)
    theirs = gguf.GGUFReader(write_gguf(tmp_path / "a.gguf", folder))
    imported = read(folder)
    ours = gguf.GGUFReader(written(tmp_path, imported))
    expected = {tensor.name: tensor.data for tensor in theirs.tensors}
    found = {tensor.name: tensor.data for tensor in ours.tensors}
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        # Gemma: 1 is added and taken off in float32.
        np.testing.assert_allclose(found[name], data, rtol=1e-6 if "norm" in name or "freqs" in name else 0)
    facts = {name: field.contents() for name, field in ours.fields.items()}
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert facts[name] == field.contents(), name
    again = read_gguf(tmp_path / "float32" / "model.gguf")
    jax.tree.map(np.testing.assert_array_equal, again.params, imported.params)


@pytest.mark.parametrize(
    "dtype, kinds", [("float16", {"F16"}), ("bfloat16", {"BF16"}), ("q8_0", {"Q8_0", "F16"})]
)
def test_matrices_are_written_in_the_type_that_was_asked_for(tmp_path, dtype, kinds):
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 8}
    imported = read(folder_of(tmp_path, "LlamaForCausalLM", **sizes))
    path = written(tmp_path, imported, dtype)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {kind for name, kind in types.items() if "norm" not in name} == kinds
    assert {kind for name, kind in types.items() if "norm" in name} == {"F32"}
    # 40 columns are no multiple of a block of 32.
    assert (types["blk.0.ffn_down.weight"] == "F16") == (dtype != "bfloat16")

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=0.005 * np.abs(theirs).max())

    jax.tree.map(close, read_gguf(path).params, imported.params)


@pytest.mark.parametrize(
    "variant, changes, message",
    [
        ("MistralForCausalLM", {}, "transformer.window=5 is not what GGUF files have"),
        ("Olmo2ForCausalLM", {}, "is not what GGUF files have"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 12}, "score_dim=12 cannot be said in a GGUF file of gemma2"),
        ("Gemma3ForCausalLM", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
         "global_every=1 cannot be said"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_say_is_one_sentence_and_writes_nothing(tmp_path, variant, changes, message):
    imported = read(folder_of(tmp_path, variant, **changes))
    with pytest.raises(UserError, match=message):
        written(tmp_path, imported)
    assert not list((tmp_path / "float32").iterdir())


def test_the_host_holds_one_tensor_of_a_file_and_not_the_file(tmp_path):
    """A sparse file of 24 layers of zeros in Q8_0, of which numpy holds a few tensors at a time as float32."""
    sizes = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 2048, "head_dim": 16}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config_json("LlamaForCausalLM") | sizes))
    save_file({}, tmp_path / "folder" / "model.safetensors")
    settings = dict(open_folder(tmp_path / "folder").settings)
    export = Export(settings, V, "q8_0", {})
    config, derived = resolve_config(imported_config(settings), 1)
    model = make_model(config, derived, V, Layout(make_mesh(config.mesh, jax.devices()[:1])))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {name: place.shape for name, place in export.places(abstract).items()}
    header = header_bytes(export.facts(), shapes, export.types(abstract))
    size = sum(-(-size_of(shape, type_of(shape, "q8_0")) // 32) * 32 for shape in shapes.values())
    with open(tmp_path / "a.gguf", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    source = open_model(tmp_path / "a.gguf")
    largest, whole = max(map(np.prod, shapes.values())) * 4, sum(map(np.prod, shapes.values())) * 4
    assert whole > 60 * largest and source.tensors["blk.7.ffn_up.weight"].dtype == "Q8_0"
    tracemalloc.start()
    params = source.read(abstract)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * largest + 4 * 2**20
    assert all(not leaf.any() for leaf in jax.tree.leaves(params))


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
        ({"llama__block_count": 2**30}, "should have 1073741824 layers and has 30 tensors"),
        ({"llama__block_count": 2}, "has the tensor 'blk.2.attn_k.weight' and 8 more"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, facts, message):
    path = write_gguf(tmp_path / "a.gguf", folder_of(tmp_path, "LlamaForCausalLM"), **facts)
    with pytest.raises(UserError, match=message):
        source = open_model(path)
        source.match(source.places(jax.eval_shape(model_of(source).init, jax.random.key(0))))


def test_without_the_package_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "a.gguf", folder_of(tmp_path, "LlamaForCausalLM"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"need the package gguf; pip install llmjax\[convert\]"):
        open_model(path)


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
