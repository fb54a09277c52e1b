"""Label smoothing adds what makes the loss that of smoothed targets, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.losses.cross_entropy import softmax_cross_entropy
from llmjax.ops.losses.label_smoothing import smoothing_sum
from llmjax.types import Head

B, T, D, V, SMOOTHING = 2, 6, 8, 11, 0.1


@pytest.mark.parametrize("biased", [False, True])
def test_the_loss_is_that_of_smoothed_targets_with_gradients(biased):
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = (
        jax.random.normal(keys[0], (B, T, D)),
        jax.random.normal(keys[1], (V, D)),
        jax.random.normal(keys[2], (V,)),
    )
    targets_BT = jax.random.randint(keys[3], (B, T), 0, V)
    weights_BT = jax.random.uniform(keys[4], (B, T)).at[1, 4:].set(0.0)

    def ours(hidden_BTD, w_VD, bias_V):
        head = Head(w_VD, bias_V if biased else None)
        sums = softmax_cross_entropy(hidden_BTD, head, targets_BT, weights_BT)
        return sums.main + smoothing_sum(hidden_BTD, head, targets_BT, weights_BT, SMOOTHING)

    def written_out(hidden_BTD, w_VD, bias_V):
        logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, w_VD) + (bias_V[None, None] if biased else 0.0)
        smoothed_BTV = (1 - SMOOTHING) * jax.nn.one_hot(targets_BT, V) + SMOOTHING / V
        return -jnp.sum(weights_BT[..., None] * smoothed_BTV * jax.nn.log_softmax(logits_BTV))

    value, gradients = jax.value_and_grad(ours, argnums=(0, 1, 2))(*arrays)
    expected, expected_gradients = jax.value_and_grad(written_out, argnums=(0, 1, 2))(*arrays)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(gradients, expected_gradients):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_token_without_weight_may_be_infinite():
    hidden_BTD = jnp.ones((1, 2, D)).at[0, 1].set(jnp.inf)
    w_VD, targets_BT = jnp.arange(V * D, dtype=jnp.float32).reshape(V, D), jnp.array([[1, 2]])
    function = jax.value_and_grad(
        lambda h: smoothing_sum(h, Head(w_VD), targets_BT, jnp.array([[1.0, 0.0]]), SMOOTHING)
    )
    value, gradient = function(hidden_BTD)
    assert np.isfinite(value) and np.isfinite(gradient).all() and (gradient[0, 1] == 0).all()
