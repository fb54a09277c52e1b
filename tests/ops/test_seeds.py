"""Every seed from 0 to 2^63 - 1 is another run: on the devices and in the order of the data."""

import itertools
import pathlib
import re

import jax
import numpy as np
import pytest

import llmjax
from llmjax.config.reading import read_config
from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.packing.order import permute
from llmjax.errors import UserError
from llmjax.ops.seeds import make_key

SEEDS = (0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**40 + 5, 2**62, 2**63 - 2, 2**63 - 1)


def plan_order(seed):
    plan = plan_packing(np.full(200, 9), np.arange(200), 16, seed)
    return plan.docs.tobytes()


WHAT_SEEDS_DECIDE = {
    "keys": lambda seed: np.asarray(jax.random.key_data(make_key(seed))).tobytes(),
    "order of sequences": lambda seed: permute(np.arange(500), 500, seed, 0).tobytes(),
    "packing": plan_order,
}


@pytest.mark.parametrize("name", WHAT_SEEDS_DECIDE)
def test_no_two_seeds_give_the_same(name):
    results = {seed: WHAT_SEEDS_DECIDE[name](seed) for seed in SEEDS}
    for a, b in itertools.combinations(SEEDS, 2):
        assert results[a] != results[b], f"seeds {a} and {b}"


def test_a_seed_of_one_word_has_the_key_that_it_always_had():
    for seed in (0, 1, 1234, 2**31, 2**32 - 1):
        np.testing.assert_array_equal(
            jax.random.key_data(make_key(seed)), jax.random.key_data(jax.random.key(seed))
        )


@pytest.mark.parametrize("key", ["seed", "generate.seed"])
@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_a_seed_beyond_the_words_is_a_sentence(key, seed):
    from configs.base import get_config

    raw = get_config().to_dict()
    section, _, name = key.rpartition(".")
    (raw[section] if section else raw)[name] = seed
    with pytest.raises(UserError, match=rf"^{key}={seed} must .*; use a value from 0 to {2**63 - 1}"):
        read_config(raw)


def test_every_key_of_a_seed_is_made_in_one_place():
    package = pathlib.Path(llmjax.__file__).parent
    made = {
        str(path.relative_to(package)): re.findall(
            r"random\.(?:key|PRNGKey)\((?!0\))", path.read_text(encoding="utf-8")
        )
        for path in package.rglob("*.py")
    }
    assert {path for path, found in made.items() if found} == {"ops/seeds.py"}
