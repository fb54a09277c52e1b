"""Small random models of every architecture against transformers: equal logits and gradients, imported and exported.

The tolerance is 1e-4 of the largest logit, in float32. Conversions with one mistake each must fail it.
"""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
from random_models import VARIANTS, T, V, batch_of, one_text, read

from llmjax.convert.config_keys import architecture_of
from llmjax.convert.files.safetensors_folder import open_tensors
from llmjax.convert.hf_folder import Export
from llmjax.convert.verify import compare, logits_of

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TOLERANCE = 1e-4
EACH = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def transformers():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def opening(transformers, config):
    """The class of transformers for a config.json, and its arguments: a pooler would have no part in the logits."""
    opened_as = architecture_of(config).opened_as
    pooler = {"add_pooling_layer": False} if opened_as == "AutoModel" else {}
    return getattr(transformers, opened_as), {"attn_implementation": "eager", **pooler}


def theirs_in(transformers, folder):
    import torch

    cls, arguments = opening(transformers, json.loads((folder / "config.json").read_text()))
    return cls.from_pretrained(folder, dtype=torch.float32, **arguments).eval()


@pytest.fixture(scope="module")
def folders(transformers, tmp_path_factory):
    """The folder of each variant, as transformers itself saves it with random weights."""
    import torch

    found = {}
    for number, variant in enumerate(VARIANTS):
        folder = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(random_models.config_json(variant)))
        torch.manual_seed(number)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.initializer_range = 0.2
        cls, arguments = opening(transformers, random_models.config_json(variant))
        model = cls.from_config(config, **arguments)
        random_models.with_random_numbers(model, random_models.config_json(variant), torch)
        model.save_pretrained(folder)
        found[variant] = folder
    return found


@pytest.fixture(scope="module")
def imports(folders):
    """The model of ours of each variant."""
    return {variant: read(folder) for variant, folder in folders.items()}


def tokens(rows=2, length=T, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length))


def their_logits(model, tokens_BT, **arguments):
    import torch

    with torch.no_grad():
        return logits_of(model, torch.as_tensor(tokens_BT), **arguments).numpy()


def difference(ours, theirs):
    return compare(np.asarray(ours), theirs)["largest difference / largest logit"]


def of_each_expert(tensors, names):
    """The tensors of a model of transformers by their names in a file, which has those of every expert by itself."""
    found = {}
    for name, tensor in tensors.items():
        if ".mlp.gate." in name and name not in names:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if not name.endswith(("gate_up_proj", "down_proj")):
            found[name] = tensor
            continue
        layer = name.split(".mlp.")[0]
        for expert, matrix in enumerate(tensor):
            if name.endswith("gate_up_proj"):
                parts = dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2)))
            else:
                parts = {"down_proj": matrix}
            for kind, part in parts.items():
                full = f"{layer}.mlp.experts.{expert}.{kind}.weight"
                if full not in names:
                    mixtral = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[kind]
                    full = f"{layer}.block_sparse_moe.experts.{expert}.{mixtral}.weight"
                found[full] = part
    return found


@EACH
def test_logits_and_gradients_of_an_imported_model_are_those_of_transformers(
    transformers, folders, imports, variant
):
    import torch

    imported, model = imports[variant], theirs_in(transformers, folders[variant])
    tokens_BT = tokens()
    seed_BTV = np.random.default_rng(1).normal(size=(*tokens_BT.shape, V)).astype(np.float32)

    def score(params):
        logits = imported.score(params, one_text(tokens_BT))
        return jnp.sum(logits * seed_BTV), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(score, has_aux=True))(imported.params)
    theirs = logits_of(model, torch.as_tensor(tokens_BT))
    (theirs * torch.as_tensor(seed_BTV)).sum().backward()
    assert difference(logits, theirs.detach().numpy()) <= TOLERANCE

    ours = random_models.gradients_of(imported.source, gradients)
    if "final_logits_bias" in ours:
        # transformers does not train it.
        np.testing.assert_allclose(ours.pop("final_logits_bias")[0], seed_BTV.sum((0, 1)), rtol=1e-4)
    learned = [
        (name, x) for name, x in model.named_parameters() if not imported.source.architecture.skips(name)
    ]
    expected = of_each_expert({name: x.grad.numpy() for name, x in learned}, ours)
    assert ours.keys() == expected.keys()
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = np.abs(gradient).max()
        if name.endswith(("key.bias", "k_proj.bias")) and imported.model.config.position != "rope":
            # Without rotary positions, a bias of all keys moves all scores of a query alike, and softmax undoes it.
            assert max(scale, np.abs(ours[name]).max()) <= 1e-6 * largest, name
            continue
        assert scale > 0 and np.abs(ours[name] - gradient).max() <= TOLERANCE * scale, name


@EACH
def test_padding_at_the_end_changes_nothing(transformers, folders, imports, variant):
    import torch

    imported, model = imports[variant], theirs_in(transformers, folders[variant])
    tokens_BT, real_BT = tokens(), np.ones((2, T), np.int32)
    real_BT[0, 17:] = 0
    theirs = their_logits(model, tokens_BT, attention_mask=torch.as_tensor(real_BT))
    ours = imported.logits(batch_of(tokens_BT, real_BT))
    assert difference(ours[real_BT > 0], theirs[real_BT > 0]) <= TOLERANCE


@EACH
def test_each_text_of_a_packed_row_is_as_by_itself(transformers, folders, imports, variant):
    imported, model = imports[variant], theirs_in(transformers, folders[variant])
    tokens_BT, segments_BT = tokens(1), np.zeros((1, T), np.int32)
    for segment, (begin, end) in enumerate([(0, 9), (9, 10), (10, 21)], 1):
        segments_BT[:, begin:end] = segment
    ours = imported.logits(batch_of(tokens_BT, segments_BT))
    for segment in (1, 2, 3):
        own = segments_BT[0] == segment
        assert difference(ours[:, own], their_logits(model, tokens_BT[:, own])) <= TOLERANCE


@EACH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_what_is_exported_and_gives_the_same_logits(
    transformers, folders, imports, variant, dtype, tmp_path
):
    imported = imports[variant]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    settings = dict(imported.source.settings)
    Export(settings, V, ids, dtype).write(tmp_path, imported.params)
    again = read(tmp_path)
    theirs = their_logits(theirs_in(transformers, tmp_path), tokens())
    assert difference(again.logits(one_text(tokens())), theirs) <= TOLERANCE
    if dtype == "float32":
        assert difference(imported.logits(one_text(tokens())), theirs) <= TOLERANCE
        there, here = open_tensors(folders[variant]), open_tensors(tmp_path)
        assert there.keys() == here.keys()
        for name, tensor in there.items():
            np.testing.assert_allclose(here[name].read(), tensor.read(), rtol=0, atol=1e-6, err_msg=name)
    assert {**again.source.settings} == {**imported.source.settings}


def swap(names, first, second):
    """The tensors of a file with the names of two exchanged in every layer."""
    other = {name: name.replace(first, second) for name in names if first in name}
    return {**{name: name for name in names}, **other, **{b: a for a, b in other.items()}}


def with_tensors(imported, change):
    """The same model, read from tensors of other contents."""
    source = dataclasses.replace(imported.source, tensors=change(dict(imported.source.tensors)))
    params = source.read(jax.eval_shape(imported.model.init, jax.random.key(0)))
    return dataclasses.replace(imported, source=source, params=params)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A square tensor, read the wrong way round."""

    tensor: object

    @property
    def shape(self):
        return self.tensor.shape

    def read(self):
        return np.ascontiguousarray(self.tensor.read().T)


def transposed(name):
    def change(tensors):
        found = {key: Transposed(tensor) if name in key else tensor for key, tensor in tensors.items()}
        assert any(isinstance(tensor, Transposed) for tensor in found.values())
        return found

    return change


def exchanged(first, second):
    def change(tensors):
        names = swap(tensors, first, second)
        assert any(a != b for a, b in names.items())
        return {name: tensors[names[name]] for name in tensors}

    return change


@dataclasses.dataclass(frozen=True)
class WithoutOne(Transposed):
    """The scale of a norm, read as if it were the whole factor."""

    def read(self):
        return self.tensor.read() - np.float32(1)


def without_one(name):
    return lambda tensors: tensors | {name: WithoutOne(tensors[name])}


@dataclasses.dataclass(frozen=True)
class Zero(Transposed):
    """A tensor that is forgotten."""

    def read(self):
        return np.zeros_like(self.tensor.read())


def zeroed(name):
    return lambda tensors: tensors | {name: Zero(tensors[name])}


@dataclasses.dataclass(frozen=True)
class OtherWay(Transposed):
    """A table of relative positions to both sides, whose halves are exchanged."""

    def read(self):
        return np.roll(self.tensor.read(), len(self.tensor.read()) // 2, axis=0)


def other_way(name):
    return lambda tensors: tensors | {name: OtherWay(tensors[name])}


def with_config(imported, changes):
    """The same parameters in a model with other settings."""
    config = dataclasses.replace(imported.model.config, **changes)
    return dataclasses.replace(imported, model=dataclasses.replace(imported.model, config=config))


# What is wrong -> (variant, changes to config.json, None or changes to the tensors, or to the settings of our model).
WRONG = {
    "rope base": ("LlamaForCausalLM", {"rope_theta": 20000.0}, None),
    "no rope scaling": ("LlamaForCausalLM llama3", {"rope_scaling": None, "rope_parameters": None}, None),
    "window": ("MistralForCausalLM", {"sliding_window": 6}, None),
    "no window": ("MistralForCausalLM", {"sliding_window": None}, None),
    "norm eps": ("Qwen3ForCausalLM", {"rms_norm_eps": 1e-2}, None),
    "base of the layers with a window": ("Gemma3ForCausalLM", {"local": 1e5}, None),
    "windows in other layers": ("Gemma2ForCausalLM", {"layer_types": ["sliding_attention"] * 3}, None),
    "no soft-capped scores": ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, None),
    "no soft-capped logits": ("Gemma2ForCausalLM", {"final_logit_softcapping": None}, None),
    "another divisor of scores": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 8}, None),
    "a norm without its 1": ("Gemma2ForCausalLM", {}, without_one("model.norm.weight")),
    "a norm before instead of after": (
        "Olmo2ForCausalLM",
        {},
        exchanged("post_attention", "post_feedforward"),
    ),
    "transposed projection": ("GPT2LMHeadModel", {}, transposed("attn.c_proj.weight")),
    "swapped gate": ("LlamaForCausalLM", {}, exchanged("gate_proj", "up_proj")),
    "swapped norms": ("LlamaForCausalLM", {}, exchanged("input_layernorm", "post_attention_layernorm")),
    "swapped keys and values": ("Qwen2ForCausalLM", {}, exchanged("k_proj", "v_proj")),
    "another eps of BERT": ("BertModel", {"layer_norm_eps": 1e-12}, None),
    "no norm after the embedding": ("BertForMaskedLM", {}, {"embedding_norm": False}),
    "no layer before the head": ("BertForMaskedLM", {}, {"transform": False}),
    "no bias of the logits": ("BertForMaskedLM", {}, zeroed("cls.predictions.bias")),
    "no token type": ("BertModel", {}, zeroed("embeddings.token_type_embeddings.weight")),
    "no division by the root of the width": (
        "T5ForConditionalGeneration",
        {"scale_decoder_outputs": False},
        None,
    ),
    "a division by the root of the width": (
        "T5ForConditionalGeneration gated",
        {},
        {"scale_output": True},
    ),
    "scores divided by the root of their width": ("T5ForConditionalGeneration", {}, {"score_dim": 8}),
    "fewer distances": ("T5ForConditionalGeneration", {"relative_attention_max_distance": 9}, None),
    "swapped tables of relative positions": (
        "T5ForConditionalGeneration",
        {},
        exchanged(
            "encoder.block.0.layer.0.SelfAttention.relative", "decoder.block.0.layer.0.SelfAttention.relative"
        ),
    ),
    "keys after a query taken for those before it": (
        "T5ForConditionalGeneration",
        {},
        other_way("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ),
    "a swapped gate of T5": ("T5ForConditionalGeneration gated", {}, exchanged("wi_0", "wi_1")),
    "another eps of T5": ("T5ForConditionalGeneration", {"layer_norm_epsilon": 1e-2}, None),
    "no bias of Marian's logits": ("MarianMTModel", {}, zeroed("final_logits_bias")),
    "another activation of Marian": ("MarianMTModel", {}, {"activation": "gelu"}),
    "swapped attentions of Marian": (
        "MarianMTModel",
        {},
        exchanged("decoder.layers.0.self_attn.k_proj", "decoder.layers.0.encoder_attn.k_proj"),
    ),
    "swapped QK-norms": ("Qwen3ForCausalLM", {}, exchanged("q_norm", "k_norm")),
}


def test_the_exact_gelu_is_told_from_its_form_by_tanh(transformers, folders, tmp_path):
    from safetensors.numpy import load_file, save_file

    # Both forms are nearest for small numbers. These feed-forward layers have larger ones inside.
    tensors = load_file(folders["BertForMaskedLM"] / "model.safetensors")
    larger = {name: x * (4 if "intermediate.dense" in name else 1) for name, x in tensors.items()}
    save_file(larger, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders["BertForMaskedLM"] / "config.json").read_bytes())
    theirs, imported = their_logits(theirs_in(transformers, tmp_path), tokens()), read(tmp_path)
    by_tanh = with_config(imported, {"activation": "gelu"})
    assert difference(by_tanh.logits(one_text(tokens())), theirs) > TOLERANCE
    assert difference(imported.logits(one_text(tokens())), theirs) < TOLERANCE / 20


@pytest.mark.parametrize("variant, config, change", WRONG.values(), ids=WRONG)
def test_a_conversion_with_one_mistake_fails(transformers, folders, tmp_path, variant, config, change):
    theirs = their_logits(theirs_in(transformers, folders[variant]), tokens())
    for file in folders[variant].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    right = json.loads((tmp_path / "config.json").read_text())
    if "rope_theta" in config:
        config = {"rope_parameters": {**right["rope_parameters"], **config}}
    if "local" in config:
        local = {"rope_type": "default", "rope_theta": config["local"]}
        config = {"rope_parameters": {**right["rope_parameters"], "sliding_attention": local}}
    (tmp_path / "config.json").write_text(json.dumps(right | config))
    imported = read(tmp_path)
    if change is not None:
        imported = (with_config if isinstance(change, dict) else with_tensors)(imported, change)
    assert difference(imported.logits(one_text(tokens())), theirs) > 10 * TOLERANCE
