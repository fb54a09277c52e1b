"""Routing and experts equal a loop over tokens, gradients included, and the balance of a row is what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.experts import balance, route, run_experts

X, D, F, E = 13, 6, 5, 4


def one_by_one(x_XD, experts_XJ, gates_XJ, w_up, w_gate, w_down, activation):
    """Every token by itself through its experts."""
    rows = []
    for x_D, experts_J, gates_J in zip(x_XD, experts_XJ, gates_XJ):
        out_D = jnp.zeros(D)
        for expert, gate in zip(experts_J, gates_J):
            h_F = x_D @ w_up[expert]
            h_F = activation(h_F) if w_gate is None else activation(x_D @ w_gate[expert]) * h_F
            out_D += gate * (w_down[expert] @ h_F)
        rows.append(out_D)
    return jnp.stack(rows)


@pytest.mark.parametrize("per_token, gated", [(1, False), (2, True), (E, True)])
def test_experts_equal_a_loop_over_tokens_with_gradients(per_token, gated):
    rng = np.random.default_rng(0)

    def new(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, weights = new(X, D), [new(E, D, F), new(E, D, F) if gated else None, new(E, D, F)]
    logits = new(1, X, E)
    # Expert 3 is chosen by nobody unless every expert is.
    logits = logits.at[..., 3].set(-9.0)

    def score(function, x, logits, weights):
        experts, gates, _ = route(logits, per_token, normalize=True)
        return jnp.sum(jnp.sin(function(x, experts[0], gates[0], *weights, jax.nn.silu)))

    for got, expected in zip(
        *(
            jax.tree.leaves(jax.value_and_grad(lambda *a, f=f: score(f, *a), (0, 1, 2))(x, logits, weights))
            for f in (run_experts, one_by_one)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_token_that_is_not_finite_spoils_no_other():
    rng = np.random.default_rng(0)
    x, logits = rng.normal(size=(X, D)).astype(np.float32), rng.normal(size=(1, X, E)).astype(np.float32)
    weights = [jnp.asarray(rng.normal(size=(E, D, F)), jnp.float32) for _ in range(3)]
    experts, gates, _ = route(jnp.asarray(logits), 2, normalize=True)
    clean = run_experts(jnp.asarray(x), experts[0], gates[0], *weights, jax.nn.silu)
    x[4] = np.nan
    spoiled = run_experts(jnp.asarray(x), experts[0], gates[0], *weights, jax.nn.silu)
    others = np.delete(np.arange(X), 4)
    np.testing.assert_array_equal(spoiled[others], clean[others])
    assert np.isnan(spoiled[4]).all()


def test_gates_are_the_largest_probabilities():
    logits = jnp.log(jnp.array([[[0.1, 0.4, 0.2, 0.3]]]))
    experts, gates, probabilities = route(logits, 2, normalize=False)
    assert experts.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(gates[0, 0], [0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(route(logits, 2, normalize=True)[1][0, 0], [4 / 7, 3 / 7], rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)


def test_the_balance_is_one_when_all_experts_are_used_alike_and_the_number_of_experts_when_one_is():
    even = jnp.full((1, E, E), 1 / E)
    each = jnp.arange(E)[None, :, None]
    np.testing.assert_allclose(balance(each, even, jnp.ones((1, E), bool)), 1.0, rtol=1e-6)
    only = jnp.zeros((1, E, E)).at[..., 2].set(1.0)
    np.testing.assert_allclose(balance(jnp.full((1, E, 1), 2), only, jnp.ones((1, E), bool)), E, rtol=1e-6)


def test_padding_does_not_count_in_the_balance_whatever_it_holds():
    rng = np.random.default_rng(0)
    probabilities = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 7, E)), jnp.float32))
    experts = jax.lax.top_k(probabilities, 2)[1]
    real = jnp.arange(7)[None] < jnp.array([[5], [7]])
    got = balance(experts, probabilities.at[0, 5:].set(jnp.nan), real)
    alone = balance(experts[:1, :5], probabilities[:1, :5], jnp.ones((1, 5), bool))
    np.testing.assert_allclose(got[0], alone[0], rtol=1e-6)
    # A row without a token has none.
    assert balance(experts[:1], probabilities[:1], jnp.zeros((1, 7), bool)).tolist() == [0.0]
