"""The layer of long short-term memory equals a plain loop over tokens that is differentiated as it stands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops import lstm

T, B, M = 12, 3, 5


def plain(inputs_TB4M, w_R4M, reset_TB, start, truncation=0):
    """The same layer, written as in a textbook: no scan, and gradients by jax."""
    hidden, cell = start
    hiddens = []
    for t in range(T):
        if truncation and t and t % truncation == 0:
            hidden, cell = jax.lax.stop_gradient((hidden, cell))
        hidden, cell = (jnp.where(reset_TB[t][:, None], 0.0, x) for x in (hidden, cell))
        sums = inputs_TB4M[t] + jnp.einsum("br,rgm->bgm", hidden, w_R4M)
        i, f, g, o = (sums[:, n] for n in range(4))
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        hiddens.append(hidden)
    return jnp.stack(hiddens), lstm.State(hidden, cell)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)

    def new(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    reset_TB = jnp.asarray(rng.random((T, B)) < 0.2)
    return new(T, B, 4, M), new(M, 4, M), reset_TB, lstm.State(new(B, M), new(B, M))


@pytest.mark.parametrize("truncation", [0, 1, 4, T])
def test_it_equals_a_plain_loop_with_all_gradients(arrays, truncation):
    inputs, w, reset, start = arrays

    def score(function, inputs, w, start):
        hidden_TBM, end = function(inputs, w, reset, start, truncation)
        return sum(
            jnp.sum(jnp.sin(x + n)) for n, x in enumerate((hidden_TBM, end.hidden_BM, 3 * end.cell_BM))
        )

    got, expected = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: score(f, *x), argnums=(0, 1, 2)))(inputs, w, start)
        for f in (lstm.run, plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, expected)


def test_truncation_cuts_gradients_and_no_values(arrays):
    inputs, w, _, start = arrays
    reset = jnp.zeros((T, B), bool)

    def last(inputs, truncation):
        hidden_TBM, _ = lstm.run(inputs, w, reset, start, truncation)
        return jnp.sum(hidden_TBM[-1]), hidden_TBM

    (whole, cut), (all_hidden, hidden) = zip(
        *(jax.grad(lambda x, t=t: last(x, t), has_aux=True)(inputs) for t in (0, 5)), strict=True
    )
    np.testing.assert_array_equal(hidden, all_hidden)
    # Tokens 10 and 11 are those since the last multiple of 5.
    assert (np.abs(whole).sum((1, 2, 3)) > 0).all()
    assert np.flatnonzero(np.abs(cut).sum((1, 2, 3))).tolist() == [10, 11]
    np.testing.assert_allclose(cut[10:], whole[10:], rtol=1e-6)


def test_what_is_not_finite_stays_in_its_document(arrays):
    inputs, w, _, start = arrays
    reset = jnp.zeros((T, B), bool).at[4].set(True).at[8].set(True)
    spoiled = inputs.at[5].set(jnp.nan)

    def other_documents(inputs):
        hidden_TBM, _ = lstm.run(inputs, w, reset, start)
        return jnp.sum(jnp.sin(jnp.concatenate([hidden_TBM[:4], hidden_TBM[8:]])))

    for function in (other_documents, lambda x: jax.grad(other_documents)(x)[np.r_[:4, 8:T]]):
        np.testing.assert_array_equal(function(spoiled), function(inputs))
        assert np.isfinite(function(spoiled)).all()


def test_further_tokens_one_by_one_equal_a_run_and_padding_changes_nothing(arrays):
    inputs, w, _, start = arrays
    reset = jnp.zeros((T, B), bool)
    expected, end = lstm.run(inputs, w, reset, start)
    state, at = start, 0
    for count in (5, 1, 6):
        # One token of padding behind them.
        valid = jnp.arange(count + 1)[:, None] < jnp.full((1, B), count)
        padded = jnp.concatenate([inputs[at : at + count], jnp.full((1, B, 4, M), 9.0)])
        hidden, state = lstm.extend(padded, w, valid, state)
        np.testing.assert_allclose(hidden[:count], expected[at : at + count], rtol=1e-5, atol=1e-6)
        at += count
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), state, end)


def test_bfloat16_products_add_up_in_float32(arrays):
    inputs, w, reset, start = arrays
    hidden, _ = lstm.run(inputs.astype(jnp.bfloat16), w.astype(jnp.bfloat16), reset, start)
    expected, _ = lstm.run(inputs, w, reset, start)
    assert hidden.dtype == jnp.float32
    np.testing.assert_allclose(hidden, expected, atol=0.05)
    gradients = jax.grad(lambda x, w: jnp.sum(lstm.run(x, w, reset, start)[0]), argnums=(0, 1))(
        inputs.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    )
    assert [x.dtype for x in gradients] == [jnp.bfloat16, jnp.bfloat16]
