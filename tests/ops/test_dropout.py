"""Dropout that belongs to a token, wherever it lies."""

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.ops.dropout import dropout, token_keys

T, D, RATE = 50, 40, 0.3
RNG = jax.random.key(0)


def keys_of(index, columns=None, rng=RNG):
    columns = np.arange(T) if columns is None else columns
    return token_keys(rng, jnp.asarray(index), jnp.broadcast_to(columns, (len(index), T)))


def dropped(index, columns=None, salt=0, rng=RNG):
    return dropout(jnp.ones((len(index), T, D)), keys_of(index, columns, rng), RATE, salt)


def test_the_share_of_zeros_and_the_mean_are_right():
    y = np.asarray(dropped(np.arange(20)))
    share, noise = (y == 0).mean(), 4 * (RATE * (1 - RATE) / y.size) ** 0.5
    assert abs(share - RATE) < noise
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - RATE)], rtol=1e-6)


def test_a_sequence_keeps_its_mask_in_any_batch():
    whole = dropped([4, 5, 6, 7])
    np.testing.assert_array_equal(dropped([6]), whole[2:3])
    np.testing.assert_array_equal(dropped([7, 4]), whole[jnp.array([3, 0])])


def test_a_token_keeps_its_mask_in_any_order():
    columns = np.random.default_rng(0).permutation(T)
    np.testing.assert_array_equal(dropped([4, 5], columns), np.asarray(dropped([4, 5]))[:, columns])


def test_sequences_places_and_updates_have_masks_of_their_own():
    y = dropped([1, 2])
    assert not np.array_equal(y[0], y[1]) and not np.array_equal(y[0, 0], y[0, 1])
    assert not np.array_equal(y, dropped([1, 2], salt=1))
    assert not np.array_equal(y, dropped([1, 2], rng=jax.random.fold_in(RNG, 1)))


def test_without_keys_or_rate_it_is_the_identity():
    x = jnp.ones((2, T, D))
    assert dropout(x, None, RATE, 0) is x
    assert dropout(x, keys_of([0, 1]), 0.0, 0) is x


def test_the_gradient_passes_where_the_value_does():
    keys = keys_of([0, 1])
    x = jnp.full((2, T, D), 2.0)
    gradient = jax.grad(lambda x: dropout(x, keys, RATE, 0).sum())(x)
    np.testing.assert_array_equal(gradient, dropout(jnp.ones_like(x), keys, RATE, 0))


def test_the_dtype_stays():
    assert dropout(jnp.ones((1, T, D), jnp.bfloat16), keys_of([0]), RATE, 0).dtype == jnp.bfloat16
