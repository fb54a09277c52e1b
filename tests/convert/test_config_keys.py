"""config.json and our keys: each says the same as the other, and what we cannot do costs one sentence."""

import pytest
import random_models
from random_models import VARIANTS

from configs.base import get_config
from llmjax.convert.architectures.table import ARCHITECTURES
from llmjax.convert.config_keys import (
    accounted,
    architecture_of,
    choose_architecture,
    read_settings,
    vocab_size_of,
    write_config,
)
from llmjax.errors import UserError
from llmjax.models.table import FAMILIES

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
LLAMA = random_models.config_json("LlamaForCausalLM")


def settings_of(config):
    return read_settings(architecture_of(config), config)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_table_says_something_about_every_key_of_a_model(architecture):
    """A key that is new in configs/base.py must be added to `PLAIN`, to a table, or to the keys that are free."""
    base = get_config()
    own = FAMILIES[architecture.fixed["model.family"]].sections.keys()
    keys = {f"{section}.{key}" for section in ("model", *own) for key in base[section]}
    assert keys <= accounted(architecture)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_json_comes_back_from_our_keys(variant):
    config = random_models.config_json(variant)
    settings = settings_of(config)
    architecture = choose_architecture(settings)
    # A Mistral without a window is a Llama, and so on: the first table that fits is taken.
    assert architecture.name == config["architectures"][0]
    again = write_config(architecture, settings, vocab_size_of(config), IDS, "float32")
    assert settings_of(again) == settings
    for key, value in config.items():
        if key not in ("rope_scaling", "rope_theta") and key in architecture.keys:
            assert again[key] == value, key


@pytest.mark.parametrize(
    "change, said",
    [
        ({"architectures": ["MambaForCausalLM"]}, "['MambaForCausalLM'], which is not known; use a model of Llama"),
        ({"architectures": [], "model_type": "mamba"}, "model_type='mamba', which is not known"),
        ({"architectures": [5]}, "architectures=[5], which is not known"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read here"),
        ({"hidden_act": "relu"}, "hidden_act='relu', which llmjax cannot do in LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=True, which llmjax cannot do"),
        ({"hidden_size": "16"}, "hidden_size='16', which is no int"),
        ({"hidden_size": True}, "hidden_size=True, which is no int"),
        ({"hidden_size": -16}, "hidden_size=-16, which is no int that a model can have"),
        ({"hidden_size": 2**40}, "which is no int that a model can have"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small', which is no float"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1, which is no bool"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"rope_theta": "big"}, "rope_theta='big', which is no float"),
        ({"rope_scaling": [1]}, "rope_scaling=[1], which is no dict"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type='longrope', which is not known here; use a model"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "which is no str"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "odd": 3}}, "'odd': 3 for its rotary positions"),
        ({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 2}}, "low_freq_factor=2 for rope_type="),
    ],
)  # fmt: skip
def test_what_we_cannot_do_costs_one_sentence(change, said):
    with pytest.raises(UserError) as error:
        config = LLAMA | change
        settings_of(config), vocab_size_of(config)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_layers_without_a_window_are_every_nth():
    config = random_models.config_json("Gemma3ForCausalLM")
    sliding, full = "sliding_attention", "full_attention"

    def period(**change):
        return settings_of({**config, "layer_types": None, **change})["transformer.global_every"]

    assert (period(), period(sliding_window_pattern=4), period(layer_types=[full] * 3)) == (6, 4, 1)
    assert period(layer_types=[sliding, sliding, full, sliding]) == 3
    # No layer of these is without a window.
    assert period(layer_types=[sliding] * 9) == 10
    with pytest.raises(UserError, match="the layers without a window are not every n-th"):
        period(layer_types=[sliding, full, full])
    with pytest.raises(UserError, match="layer_types='full', which is no list"):
        period(layer_types="full")


def test_older_and_newer_spellings_of_rotary_positions_say_the_same():
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2}}
    bare = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert settings_of(bare | old) == settings_of(bare | new)
    assert settings_of(bare)["transformer.rope_theta"] == 10000.0


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"transformer.attention_sinks": True},
            "transformer.attention_sinks=True is not what models of transformers",
        ),
        ({"model.family": "lstm"}, "model.family='lstm' is not what"),
        ({"transformer.activation": "relu2"}, "transformer.activation='relu2' is not"),
    ],
)
def test_a_model_that_transformers_lacks_is_named(change, said):
    with pytest.raises(UserError) as error:
        choose_architecture(settings_of(LLAMA) | change)
    assert said in str(error.value)


def test_a_scaling_that_transformers_lacks_is_named():
    settings = settings_of(LLAMA) | {"transformer.rope_scaling": "ntk", "transformer.rope_factor": 2.0}
    with pytest.raises(UserError, match="transformer.rope_scaling='ntk' has no equal in transformers"):
        write_config(ARCHITECTURES["LlamaForCausalLM"], settings, 5, IDS, "float32")


def test_the_default_model_can_be_exported():
    base = get_config().to_dict()
    keys = {
        f"{section}.{key}": base[section][key]
        for section in ("model", "transformer", "experts")
        for key in base[section]
    }
    assert choose_architecture(keys).name == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "MixtralForCausalLM"),
        ({"experts.normalize_gates": False}, "experts.normalize_gates=False is not what models of transformers have"),
        ({"transformer.qk_norm": True}, "Qwen3MoeForCausalLM"),
        ({"transformer.qk_norm": True, "transformer.qk_norm_over": "all"}, "OlmoeForCausalLM"),
        ({"experts.shared_experts": 1}, "experts.shared_experts=1 is not what models of transformers have"),
        ({"experts.num_experts": 0, "transformer.qk_norm": True, "transformer.qk_norm_over": "all"},
         "transformer.qk_norm_over='all' is not what"),
    ],
)  # fmt: skip
def test_a_mixture_of_experts_is_written_as_the_one_that_has_its_keys(changes, name):
    settings = settings_of(random_models.config_json("MixtralForCausalLM")) | changes
    settings |= {"transformer.window": 0} if "Mixtral" not in name else {}
    try:
        found = choose_architecture(settings).name
    except UserError as error:
        found = str(error)[: len(name)]
    assert found == name
