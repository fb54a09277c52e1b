"""The loss terms of a mixture of experts are exact sums: their gradients do not depend on how a batch is cut."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.tasks.contract import Setting
from llmjax.tasks.language_model import LanguageModel
from tests.models.test_gpt import packed_batch

ROWS = [[7, 11, 4], [24], [3, 3, 3], [20], [9, 9], [1, 2], [24], [12, 5]]


@pytest.fixture(scope="module")
def model():
    # Coefficients so large that the terms decide the gradient.
    return families.make("gpt experts", experts__balance_loss=10.0, experts__router_z_loss=1.0)


@pytest.fixture(scope="module")
def gradient(model):
    """(batch) -> the gradient of the sum of the penalties, and of the whole objective."""
    params = jax.jit(model.init)(jax.random.key(0))
    loss = LanguageModel().make_loss(model, Setting())

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(batch, term):
        return jax.grad(lambda p: loss(p, batch, None).metrics[term] if term else loss(p, batch, None).main)(
            params
        )

    return gradients


@pytest.mark.parametrize("term", ["balance_loss", "router_z_loss", ""])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_gradient_of_every_term_is_the_sum_over_micro_steps(gradient, term, steps):
    batch = packed_batch(ROWS)
    whole, size = gradient(batch, term), len(ROWS) // steps
    parts = [
        gradient(jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch), term) for i in range(steps)
    ]
    summed = jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(whole))
    assert largest > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest), whole, summed)


def test_evaluation_has_none_of_these_terms(model):
    params = jax.jit(model.init)(jax.random.key(0))
    batch = packed_batch(ROWS)
    trained, evaluated = (
        LanguageModel().make_loss(model, Setting(training=training))(params, batch, None)
        for training in (True, False)
    )
    assert {"balance_loss", "router_z_loss"} <= trained.metrics.keys()
    assert evaluated.metrics.keys() == {"accuracy"} and evaluated.objective is None
    np.testing.assert_allclose(trained.loss, evaluated.loss, rtol=1e-6)
    added = trained.metrics["balance_loss"] + trained.metrics["router_z_loss"]
    np.testing.assert_allclose(trained.main, trained.loss + added, rtol=1e-6)


def test_padding_adds_to_no_term_whatever_it_holds(model):
    params = jax.jit(model.init)(jax.random.key(0))
    batch = packed_batch(ROWS)
    other = dataclasses.replace(batch, tokens=np.where(batch.segments > 0, batch.tokens, 9))
    for a, b in zip(*(model.apply(params, x).penalties.values() for x in (batch, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert (np.asarray(a)[batch.segments == 0] == 0).all() and (
            np.asarray(a)[batch.segments > 0] > 0
        ).all()


def test_experts_are_not_computed_in_tiles_and_not_more_than_there_are():
    for changes, message in (
        (
            {"compute__tile": 8},
            "compute.tile=8 computes feed-forward layers in tiles, and experts.num_experts=4",
        ),
        ({"experts__experts_per_token": 5}, "experts.experts_per_token=5 is more than experts.num_experts=4"),
        ({"experts__num_experts": 0}, "experts.expert_dim=16 is without effect for experts.num_experts=0"),
    ):
        with pytest.raises(Exception, match=message):
            families.make("gpt experts", **changes)
