"""Parameters from tensors in files: none missing, left over or of another shape, one at a time, on any mesh."""

import dataclasses
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import random_models
from jax.sharding import NamedSharding
from random_models import VARIANTS, one_text, read, write

from llmjax.convert.architectures import forms
from llmjax.convert.certificate import source_tensors
from llmjax.convert.files.safetensors_folder import open_tensors
from llmjax.convert.files.tensor_files import StoredTensor
from llmjax.convert.hf_folder import open_model
from llmjax.convert.params import write_params
from llmjax.errors import UserError
from llmjax.parallel.mesh import MeshConfig, make_mesh
from llmjax.parallel.rules import is_axes, partition_spec


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_comes_back(tmp_path, variant):
    imported = read(write(tmp_path, variant))
    back = random_models.tensors_of(imported.source, imported.params)
    there = open_tensors(tmp_path)
    assert back.keys() == there.keys()
    for name, tensor in there.items():
        # 1 is added to the scales of Gemma's norms and taken off again, which rounds.
        adds = imported.source.architecture.model_type.startswith("gemma") and name.endswith("norm.weight")
        np.testing.assert_allclose(back[name], tensor.read(), rtol=0, atol=3e-7 * adds, err_msg=name)


FORMS = {name: form for name, form in vars(forms).items() if isinstance(form, forms.Form)}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_form_undoes_itself(form):
    ours = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    ours = ours[:, 0] if form in (forms.TRANSPOSED, forms.SAME, forms.PLUS_ONE) else ours
    theirs = form.theirs(ours)
    assert theirs.shape == form.shape(ours.shape)
    np.testing.assert_allclose(form.ours(theirs, ours.shape), ours, atol=1e-6)


def test_interleaved_heads_bring_neighbouring_pairs_to_the_halves():
    # Two heads of width 4 over a single input; each row says which dimension it is.
    theirs = np.arange(8, dtype=np.float32).reshape(8, 1)
    ours = forms.INTERLEAVED_HEADS.ours(theirs, (1, 2, 4))
    assert ours.tolist() == [[[0, 2, 1, 3], [4, 6, 5, 7]]]


def change(folder, edit):
    """Writes the tensors of a folder again, after `edit` has changed the dict of their arrays."""
    from safetensors.numpy import load_file, save_file

    arrays = load_file(folder / "model.safetensors")
    edit(arrays)
    save_file(arrays, folder / "model.safetensors")


def replace(name, array):
    return lambda arrays: arrays.update({name: array})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda arrays: arrays.pop(Q), f"lacks the tensor {Q}, which its config.json asks for"),
        (lambda arrays: [arrays.pop(name) for name in list(arrays)[:3]], "and 2 more, which its config.json asks for"),
        (replace("model.layers.1.extra", np.zeros(2, np.float32)), "has the tensor 'model.layers.1.extra', which"),
        (replace("model.layers.3.mlp.up_proj.weight", np.zeros((2, 2), np.float32)), "has the tensor"),
        (replace(Q, np.zeros((16, 32), np.float32)), r"of shape \[16, 32\], and its .* asks for \[32, 16\]"),
        (replace(Q, np.full((32, 16), np.nan, np.float32)), "q_proj.weight is not finite"),
        (replace(Q, np.zeros((32, 16), np.float64)), "stores .* as F64, which is not read here"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_cost_one_sentence(tmp_path, edit, said):
    write(tmp_path, "LlamaForCausalLM")
    change(tmp_path, edit)
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


def test_buffers_are_skipped_and_a_first_name_may_be_missing(tmp_path):
    expected = read(write(tmp_path, "GPT2LMHeadModel"))

    def as_on_the_hub(arrays):
        for name in list(arrays):
            arrays[name.removeprefix("transformer.")] = arrays.pop(name)
        arrays["h.0.attn.bias"] = np.ones((1, 1, 32, 32), np.float32)

    change(tmp_path, as_on_the_hub)
    found = read(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def as_first_published(arrays):
    """The names of the first BERT, with what our model has no use for."""
    for name in list(arrays):
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        arrays[old] = arrays.pop(name)
    arrays |= {
        "bert.pooler.dense.weight": np.ones((16, 16), np.float32),
        "bert.pooler.dense.bias": np.ones(16, np.float32),
        "cls.seq_relationship.weight": np.ones((2, 16), np.float32),
        "cls.predictions.decoder.bias": arrays["cls.predictions.bias"],
        "bert.embeddings.position_ids": np.arange(32)[None],
    }


def without_prefix(arrays):
    for name in list(arrays):
        arrays[name.removeprefix("bert.")] = arrays.pop(name)


def with_prefix(arrays):
    for name in list(arrays):
        arrays[f"bert.{name}"] = arrays.pop(name)


@pytest.mark.parametrize(
    "variant, edits",
    [
        ("BertForMaskedLM", [as_first_published]),
        ("BertForMaskedLM", [as_first_published, without_prefix]),
        ("BertModel", [with_prefix]),
    ],
)
def test_names_of_other_versions_of_bert_say_the_same(tmp_path, variant, edits):
    expected = read(write(tmp_path, variant))
    for edit in edits:
        change(tmp_path, edit)
    found = read(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_tensors_that_have_no_place_are_counted_and_named(tmp_path):
    write(tmp_path, "BertForMaskedLM")
    change(tmp_path, as_first_published)
    imported = read(tmp_path)
    places = imported.source.places(imported.params)
    matched = imported.source.match(places)
    assert matched.remark == (
        "3 tensors are left out for want of a place in llmjax: the pooler and the head for the next sentence"
    )
    listed = source_tensors(imported.source, places, {})["tensors"]
    assert listed["bert.pooler.dense.bias"]["became"] == "nothing: the pooler has no place in llmjax"
    assert listed["cls.predictions.decoder.bias"]["became"] == "nothing: it repeats cls.predictions.bias"
    change(tmp_path, replace("cls.predictions.decoder.bias", np.full(30, 5, np.float32)))
    with pytest.raises(UserError, match=r"decoder.bias differs from cls.predictions.bias, although"):
        read(tmp_path)


def test_a_tied_output_matrix_may_be_there_twice_only_if_it_is_the_same(tmp_path):
    write(tmp_path, "Qwen3ForCausalLM")
    embedding = open_tensors(tmp_path)["model.embed_tokens.weight"].read()
    change(tmp_path, replace("lm_head.weight", embedding))
    read(tmp_path)
    change(tmp_path, replace("lm_head.weight", embedding + 1))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight, although"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    expected = read(write(tmp_path, "LlamaForCausalLM"))
    change(tmp_path, lambda arrays: arrays.update({name: a.astype(dtype) for name, a in arrays.items()}))
    found = read(tmp_path)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}


def test_an_overflow_in_half_precision_is_named(tmp_path):
    imported = read(write(tmp_path, "LlamaForCausalLM"))
    params = jax.tree.map(lambda x: x * 1e6, imported.params)
    with pytest.raises(UserError, match="is not finite as float16; write it as float32"):
        list(write_params(imported.source.places(params), params, "float16"))


@pytest.mark.parametrize(
    "variant, sizes",
    [
        ("Qwen2ForCausalLM", (2, 2, 2, 1)),
        ("Qwen2ForCausalLM", (1, 2, 1, 2)),
        ("MixtralForCausalLM", (1, 2, 1, 2)),
    ],
)
def test_parameters_lie_on_a_mesh_as_training_wants_them(tmp_path, variant, sizes):
    imported = read(write(tmp_path, variant))
    mesh = make_mesh(
        MeshConfig(*sizes, "auto", ulysses=0, layout="auto"), jax.devices()[: int(np.prod(sizes))]
    )
    specs = jax.tree.map(partition_spec, imported.model.axes(), is_leaf=is_axes)
    abstract = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        imported.params,
        specs,
    )
    found = imported.source.read(abstract)
    jax.tree.map(np.testing.assert_array_equal, found, imported.params)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, abstract)


def test_the_host_holds_one_tensor_of_a_model_and_not_the_model(tmp_path):
    """A sparse file of 24 layers, of which numpy never holds more than a few tensors at a time."""
    rows, layers = 2048, 24
    config = random_models.config_json("LlamaForCausalLM") | {
        "num_hidden_layers": layers, "hidden_size": 64, "head_dim": 16, "intermediate_size": rows,
    }  # fmt: skip
    source = sparse_model(tmp_path, config)
    abstract = jax.eval_shape(random_models.model_of(source).init, jax.random.key(0))
    largest = max(np.prod(tensor.shape) * 4 for tensor in source.tensors.values())
    whole = sum(np.prod(tensor.shape) * 4 for tensor in source.tensors.values())
    assert whole > 60 * largest
    tracemalloc.start()
    params = source.read(abstract)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * largest + 4 * 2**20
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_a_tensor_is_read_from_a_file_that_is_larger_than_all_memory(tmp_path):
    """A sparse file of 4 TB: its header is checked and a tensor near its end is read, by its byte range alone."""
    huge = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    small = {"dtype": "F32", "shape": [3], "data_offsets": [2**42, 2**42 + 12]}
    header = json.dumps({"huge": huge, "small": small}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.seek(2**42, 1)
            file.write(np.float32([1, 2, 3]).tobytes())
        except OSError:
            pytest.skip("this file system has no sparse files of 4 TB")
    assert open_tensors(tmp_path)["small"].read().tolist() == [1, 2, 3]


def sparse_model(folder, config):
    """A model whose tensors are all 0, in a file that takes no space."""
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import save_file

    save_file({}, folder / "model.safetensors")
    source = open_model(folder)
    places = source.places(jax.eval_shape(random_models.model_of(source).init, jax.random.key(0)))
    at, tensors = 0, {}
    for name, place in places.items():
        tensors[name] = StoredTensor(folder / "zeros", "F32", place.shape, at)
        at += 4 * int(np.prod(place.shape))
    with open(folder / "zeros", "wb") as file:
        file.truncate(at)
    return dataclasses.replace(source, tensors=tensors)


def test_a_model_that_was_read_writes_sensible_logits(tmp_path):
    imported = read(write(tmp_path, "MistralForCausalLM"))
    logits = imported.logits(one_text(np.zeros((1, 8), int)))
    assert np.isfinite(logits).all() and np.ptp(logits) > 0.1
