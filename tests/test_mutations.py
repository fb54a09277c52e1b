"""Whatever one key of a config is set to, what follows is a run or one sentence."""

import functools

import jax
import pytest

from configs.base import get_config
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.errors import UserError
from llmjax.escapes import one_line
from tools import mutations


@functools.cache
def base():
    raw = get_config().to_dict()
    raw["model"]["num_layers"] = 1
    return raw


def check_outcomes(seed, count, outcome):
    accepted = 0
    for mutation in mutations.mutations(base(), seed=seed, count=count):
        try:
            said = outcome(mutation)
        except Exception as error:
            raise AssertionError(f"{mutation.name} ends in a traceback") from error
        accepted += said == mutations.ACCEPTED
        if said != mutations.ACCEPTED:
            sentence = one_line(said)
            assert "\n" not in sentence and 20 < len(sentence) < 1200, mutation.name
    assert accepted, "where all is refused, nothing is tried"


def read_and_check(mutation):
    try:
        resolve_config(read_config(mutation.make()), 1)
    except UserError as error:
        return str(error)
    return mutations.ACCEPTED


def test_odd_values_are_read_or_named():
    check_outcomes(0, 1500, read_and_check)


def test_odd_values_make_a_program_or_a_sentence():
    check_outcomes(1, 40, mutations.outcome)


@pytest.mark.slow
def test_two_thousand_odd_values_make_a_program_or_a_sentence():
    check_outcomes(2, 2000, mutations.outcome)


def test_mutations_follow_the_seed():
    names = [[m.name for m in mutations.mutations(base(), seed=seed, count=50)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


PROBES = {
    "vocabulary": ("tokenizer", "vocab_size", 2**40),
    "dimensions": ("model", "model_dim", 2**63),
    "hidden": ("transformer", "mlp_dim", 2**63),
    "probe lengths": ("evaluate", "probe_lengths", 1e20),
    "probe lengths in text": ("evaluate", "probe_lengths", "100000000000000000000"),
    "signs": ("evaluate", "probe_lengths", "--5"),
    "workers": ("data", "num_workers", 2**31),
    "prefetch": ("data", "prefetch", 2**31),
    "eps": ("adamw", "eps", 0.0),
    "rate": ("optimizer", "learning_rate", float("inf")),
    "tokens": ("generate", "max_tokens", 2**31),
}


@pytest.mark.parametrize("name", PROBES)
def test_a_value_that_was_once_a_traceback_or_nonsense_is_named(name):
    section, key, value = PROBES[name]
    raw = get_config().to_dict()
    raw[section][key] = value
    with pytest.raises(UserError, match=rf"^{section}.{key}=.*; "):
        resolve_config(read_config(raw), 1)


@pytest.mark.parametrize("changes, key", [
    ({"rope_scaling": "ntk", "rope_factor": 4.0, "head_dim": 2}, "transformer.head_dim=2"),
    ({"rope_scaling": "ntk", "rope_factor": 4.0, "model_dim": 8}, "transformer.head_dim=2"),
    ({"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 64, "rope_theta": 1.0},
    "transformer.rope_theta=1.0"),
    ({"rope_scaling": "yarn", "rope_factor": float("inf"), "rope_original_len": 64}, "transformer.rope_factor=inf"),
])  # fmt: skip
def test_scalings_of_positions_that_divide_by_nothing_are_named(changes, key):
    raw = get_config().to_dict()
    for name, value in changes.items():
        raw["model" if name in raw["model"] else "transformer"][name] = value
    with pytest.raises(UserError, match=rf"^{key} "):
        resolve_config(read_config(raw), 1)


def test_the_smallest_scalings_that_are_allowed_are_finite():
    from llmjax.ops.rope import SCALINGS, rotation

    for scaling in SCALINGS:
        for theta in (1.0000001, 10000.0, 1e15):
            for original_len in (0, 1, 2, 64):
                cos, sin = rotation(jax.numpy.arange(4)[None], 4, theta, scaling, 2.0, original_len or 1)
                assert jax.numpy.isfinite(cos).all() and jax.numpy.isfinite(sin).all(), (scaling, theta)
