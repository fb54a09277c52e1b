"""Generation: greedy equals the full pass, a sample does not depend on its neighbours, and it ends where told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sections import block_section, section

from llmjax.errors import UserError
from llmjax.generate.generate import make_generator, sample_key
from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.ops.attention.mask import self_mask
from llmjax.ops.logits import head_logits
from llmjax.types import Batch

V = 37
MODEL = GPT(resolve(block_section(num_layers=2, model_dim=16, num_heads=2, init_std=0.5)), V, 128)
GREEDY = section("generate", max_tokens=12, temperature=0.0, top_k=0, top_p=1.0, seed=0)
PROMPTS = [[1, 5, 9, 3], [2], [7] * 70]


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(1))


@functools.cache
def generate(config, eos_id=V, banned=()):
    return make_generator(MODEL, config, eos_id=eos_id, banned_ids=banned)


def greedy_by_full_pass(params, prompt, n):
    @jax.jit
    def next_token(tokens, length):
        index = jnp.arange(96, dtype=jnp.int32)[None]
        segments = (index < length).astype(jnp.int32)
        batch = Batch(tokens, tokens, segments.astype(jnp.float32), segments, index, jnp.zeros(1, jnp.int32))
        return jnp.argmax(
            head_logits(MODEL.apply(params, batch).hidden_BTD, MODEL.head(params))[0, length - 1]
        )

    ids = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, 96), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(next_token(padded, len(ids))))
    return ids[len(prompt) :]


def test_greedy_decoding_of_several_prompts_equals_the_full_pass(params):
    columns = zip(*generate(GREEDY)(params, PROMPTS), strict=True)
    for prompt, column in zip(PROMPTS, columns, strict=True):
        assert list(column) == greedy_by_full_pass(params, prompt, 12)


def test_a_sample_depends_on_seed_and_number_only(params):
    config = section("generate", max_tokens=10, temperature=1.0, top_k=0, top_p=0.9, seed=3)
    together = [list(c) for c in zip(*generate(config)(params, PROMPTS[:2]), strict=True)]
    assert [row[0] for row in generate(config)(params, PROMPTS[:1])] == together[0]
    other = section("generate", max_tokens=10, temperature=1.0, top_k=0, top_p=0.9, seed=4)
    assert [row[0] for row in generate(other)(params, PROMPTS[:1])] != together[0]


@pytest.mark.parametrize("count", [2, 5])
def test_several_samples_of_a_prompt_differ_and_the_first_are_those_of_fewer(count, params):
    config = section("generate", max_tokens=10, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    one = rows_of(generate(config)(params, PROMPTS), len(PROMPTS))
    more = dataclasses.replace(config, num_samples=count)
    rows = rows_of(generate(more)(params, PROMPTS), len(PROMPTS) * count)
    assert rows[::count] == one
    assert len({tuple(row) for row in rows}) == len(rows)
    fewer = rows_of(generate(dataclasses.replace(config, num_samples=2))(params, PROMPTS), len(PROMPTS) * 2)
    assert rows[1::count] == fewer[1::2]


def test_a_further_sample_shares_no_draw_with_the_steps_of_the_first(params):
    """Of 10 steps and 10 samples, none may be drawn with the key of another."""
    numbers = jnp.arange(10, dtype=jnp.uint32)
    keys = jax.vmap(lambda number: sample_key(3, jnp.int32(0), number))(numbers)
    draws = jax.vmap(lambda key: jax.vmap(lambda step: jax.random.fold_in(key, step))(numbers))(keys)
    used = jax.random.key_data(draws).reshape(-1, 2).tolist() + jax.random.key_data(keys).tolist()
    assert len({tuple(key) for key in used}) == 110


def test_it_ends_at_the_end_of_the_document(params):
    free = [row[0] for row in generate(GREEDY)(params, PROMPTS[:1])]
    stopped = [row[0] for row in generate(GREEDY, free[4])(params, PROMPTS[:1])]
    first = free.index(free[4])
    assert stopped == [*free[:first], None]


def test_banned_ids_are_never_drawn(params):
    free = [row[0] for row in generate(GREEDY)(params, PROMPTS[:1])]
    kept = [row[0] for row in generate(GREEDY, V, tuple(set(free)))(params, PROMPTS[:1])]
    assert not set(kept) & set(free)


def test_positions_bound_the_length():
    learned, params = generate_learned(GREEDY), jax.jit(LEARNED.init)(jax.random.key(2))
    # The last token is predicted, and not read.
    assert len(list(learned(params, [[1, 2, 3]]))) == 12
    assert len(list(learned(params, [[1] * 20]))) == 5 and len(list(learned(params, [[1] * 24]))) == 1
    with pytest.raises(UserError, match="prompt has 70 tokens but the model holds 24"):
        list(learned(params, PROMPTS))


def test_an_empty_prompt_is_refused(params):
    with pytest.raises(UserError, match="empty prompt"):
        list(generate(GREEDY)(params, [[]]))


def test_self_mask_is_causal_by_default():
    index = jnp.arange(3, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(
        self_mask(index * 0 + 1, index).dense_BTS()[0], np.tril(np.ones((3, 3), bool))
    )


def rows_of(columns, count):
    """What each of `count` prompts is given, without what comes after its end."""
    columns = list(columns)
    return [[column[row] for column in columns if column[row] is not None] for row in range(count)]


LEARNED = GPT(
    resolve(block_section(num_layers=2, model_dim=16, num_heads=2, init_std=0.5, position="learned")),
    V,
    24,
)


@functools.cache
def generate_learned(config, eos_id=V):
    return make_generator(LEARNED, config, eos_id=eos_id)


@pytest.mark.parametrize("max_tokens", [1, 5, 24, 40])
def test_each_prompt_has_the_limit_that_it_has_alone(max_tokens):
    params = jax.jit(LEARNED.init)(jax.random.key(2))
    config = section("generate", max_tokens=max_tokens, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    prompts = [[1, 5, 9, 3, 8], [2], [7] * 24, [4] * 23, [6, 5] * 6]
    together = rows_of(generate_learned(config)(params, prompts), len(prompts))
    alone = [rows_of(generate_learned(config)(params, [prompt]), 1)[0] for prompt in prompts]
    assert together == alone
    assert [len(row) for row in together] == [min(max_tokens, 24 - len(p) + 1) for p in prompts]


def test_an_end_counts_for_its_own_prompt_beside_limits_of_others():
    params = jax.jit(LEARNED.init)(jax.random.key(2))
    prompts = [[1, 5, 9, 3, 8], [7] * 24, [2, 3]]
    free = rows_of(generate_learned(GREEDY)(params, prompts), 3)
    stopped = rows_of(generate_learned(GREEDY, free[0][2])(params, prompts), 3)
    for row, whole in zip(stopped, free, strict=True):
        end = whole.index(free[0][2]) if free[0][2] in whole else len(whole)
        assert row == whole[:end]


def test_no_prompts_give_nothing(params):
    assert list(generate(GREEDY)(params, [])) == []
