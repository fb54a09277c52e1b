"""The two forms of Muon's momentum."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from param_axes import BY_NAME

from llmjax.train.optim.optimizers.muon import MUON_FORMS, scale_by_muon


def jordan(momentum, grad):
    """One update of Keller Jordan's code, in float64, for a square matrix: the momentum, and the direction."""
    momentum = momentum + (1 - 0.95) * (grad - momentum)
    return momentum, grad + 0.95 * (momentum - grad)


def dozat(momentum, grad, update):
    """The same with the bias of the momentum and of the gradient corrected."""
    momentum = momentum + (1 - 0.95) * (grad - momentum)
    older, newest = momentum / (1 - 0.95 ** (update + 1)), grad / (1 - 0.95**update)
    return momentum, 0.95 * older + (1 - 0.95) * newest


def orthogonal(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize("form", MUON_FORMS)
def test_each_form_is_its_papers_and_only_that(form):
    rng, shape, updates = np.random.default_rng(1), (16, 16), 12
    transformation = scale_by_muon(0.95, 0.95, form, BY_NAME)
    state, update = transformation.init({"w_DF": jnp.zeros(shape)}), jax.jit(transformation.update)
    momenta = {name: np.zeros(shape) for name in ("debiased", "reference")}
    for number in range(1, updates + 1):
        grad, theirs = rng.normal(size=shape), {}
        momenta["reference"], theirs["reference"] = jordan(momenta["reference"], grad)
        momenta["debiased"], theirs["debiased"] = dozat(momenta["debiased"], grad, number)
        step, state = update({"w_DF": jnp.asarray(grad, jnp.float32)}, state)
        steps = {name: 0.2 * math.sqrt(16) * orthogonal(x) for name, x in theirs.items()}
        np.testing.assert_allclose(step["w_DF"], steps[form], atol=2e-4, err_msg=f"update {number}")
        apart = np.linalg.norm(steps["debiased"] - steps["reference"]) / np.linalg.norm(steps["reference"])
        if number == 2:
            assert 0.1 < apart < 0.25, apart
