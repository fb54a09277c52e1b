"""Derived sizes of a model, and the rules that its sizes must keep."""

import dataclasses

import pytest
from sections import block_section

from llmjax.errors import UserError
from llmjax.nn.config import resolve

SMALL = block_section(num_layers=2, model_dim=96, num_heads=4)


def resolved(**changes):
    return resolve(dataclasses.replace(SMALL, **changes))


def test_sizes_of_zero_are_derived():
    config = resolved()
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (4, 24, 256)
    assert resolved(activation="gelu").mlp_dim == resolved(activation="relu2").mlp_dim == 384
    assert resolved(model_dim=128).mlp_dim == 384  # 8/3 of 128, rounded up to a multiple of 64


def test_sizes_that_are_given_stay():
    config = resolved(num_kv_heads=2, head_dim=10, mlp_dim=100)
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (2, 10, 100)
    assert resolve(config) == config


@pytest.mark.parametrize("changes, message", [
    ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
    ({"model_dim": 0}, "model.model_dim=0 must be at least 1"),
    ({"num_heads": -4}, "transformer.num_heads=-4 must be at least 1"),
    ({"num_heads": 5}, "transformer.num_heads=5 does not divide model.model_dim=96"),
    ({"num_kv_heads": 3}, "transformer.num_heads=4 must be a multiple of transformer.num_kv_heads=3"),
    ({"num_kv_heads": 8}, "transformer.num_heads=4 must be a multiple of transformer.num_kv_heads=8"),
    ({"head_dim": -1}, "transformer.head_dim=-1 must not be negative"),
    ({"mlp_dim": -1}, "transformer.mlp_dim=-1 must not be negative"),
    ({"logit_softcap": -1.0}, "model.logit_softcap=-1.0 must not be negative"),
    ({"window": -1}, "transformer.window=-1 must not be negative; use 0 for none"),
    ({"global_every": -1}, "transformer.global_every=-1 must not be negative"),
    ({"global_every": 2}, "transformer.global_every=2 makes layers global that are so without a window"),
    ({"attention_softcap": -1.0}, "transformer.attention_softcap=-1.0 must not be negative"),
    ({"rope_scaling": "longrope"}, "transformer.rope_scaling='longrope' is not known; use one of none, linear"),
    ({"rope_scaling": "ntk", "position": "learned"},
    "transformer.rope_scaling='ntk' needs transformer.position='rope'"),
    ({"rope_scaling": "ntk", "rope_factor": 0.5}, "transformer.rope_factor=0.5 must be at least 1"),
    ({"rope_factor": 2.0}, "transformer.rope_factor=2.0 is without effect for transformer.rope_scaling='none'"),
    ({"rope_original_len": 8}, "transformer.rope_original_len=8 is without effect for transformer.rope_scaling='none'"),
    ({"rope_scaling": "yarn"}, "transformer.rope_scaling='yarn' needs transformer.rope_original_len, which is 0"),
    ({"rope_scaling": "ntk", "rope_original_len": 8},
    "transformer.rope_scaling='ntk' does not read transformer.rope_orig"),
    ({"dropout": 1.0}, "model.dropout=1.0 must lie in"),
    ({"head_dim": 7}, "transformer.head_dim=7 must be even for transformer.position='rope'"),
    ({"model_dim": 95, "head_dim": 8, "position": "sinusoidal"}, "model.model_dim=95 must be even"),
    ({"activation": "swish"}, "transformer.activation='swish' is not known; use one of swiglu, geglu, gelu, gelu_erf"),
    ({"norm": "none"}, "transformer.norm='none' is not known"),
    ({"position": "sines"}, "transformer.position='sines' is not known"),
    ({"dtype": "float16"}, "model.dtype='float16' is not known"),
    ({"norm_eps": -1.0}, "transformer.norm_eps=-1.0"),
    ({"init_std": -1.0}, "model.init_std=-1.0"),
    ({"rope_theta": 0.0}, "transformer.rope_theta=0.0"),
    ({"rope_theta": 500.0, "position": "alibi"}, "transformer.rope_theta=500.0 is without effect for .*'alibi'"),
    ({"norm_at": "middle"}, "transformer.norm_at='middle' is not known; use one of input, output, both"),
    ({"qk_norm_over": "layer"}, "transformer.qk_norm_over='layer' is not known; use one of head, all"),
    ({"qk_norm_over": "all", "qk_norm": False}, "is without effect for transformer.qk_norm=False"),
    ({"use_bias": True, "qkv_bias": True}, "transformer.qkv_bias=True is without effect for transformer.use_bias"),
    ({"local_rope_theta": 10.0}, "transformer.local_rope_theta=10 is for layers with a window"),
    ({"local_rope_theta": 10.0, "window": 4, "position": "learned"}, "is for layers with a window and rotary"),
    ({"local_rope_theta": 1.0}, "transformer.local_rope_theta=1.0 must be greater than 1"),
    ({"score_dim": -1}, "transformer.score_dim=-1 must not be negative"),
])  # fmt: skip
def test_a_rule_that_is_broken_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        resolved(**changes)
    assert "\n" not in str(error.value)


def test_odd_heads_are_fine_without_rotation():
    assert resolved(head_dim=7, position="learned").head_dim == 7
