"""Learning rates that fall from layer to layer, against optax with a learning rate of its own for each layer."""

import jax
import numpy as np
import optax
import pytest
from param_axes import BY_NAME
from sections import optimizer_of, optimizer_section
from test_optimizer import apply, config, run

from llmjax.errors import UserError
from llmjax.train.optim.layer_decay import deepest

L, DECAY, UPDATES = 3, 0.5, 3
SHAPES = {
    "layers": {"w_up_DF": (L, 4, 6), "w_down_DF": (L, 4, 6), "scale": (L, 4)},
    "embedding_VD": (8, 4),
    "scale": (4,),
}
# The whole rate above the layers, and the embedding below them all.
FACTORS = {"layers": [DECAY**3, DECAY**2, DECAY], "embedding_VD": DECAY**4, "scale": 1.0}


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def grads_of(params):
    return jax.tree.map(lambda x: x**3 + 0.1, params)


def decayed(name):
    """The parameters after some updates with layer_decay."""
    settings = config(name, layer_decay=DECAY, weight_decay=0.1)
    optimizer = optimizer_of(settings, UPDATES, BY_NAME, num_layers=L)
    return run(optimizer, params_of(), grads_of, UPDATES)[0]


def layer(tree, i):
    return jax.tree.map(lambda x: x[i : i + 1], tree["layers"])


def close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected)


def test_adamw_is_that_of_optax_with_a_rate_for_each_layer():
    found, params = decayed("adamw"), params_of()

    def expected(part, factor):
        masked = lambda tree: BY_NAME.map(lambda role, _: not role.is_vector, tree)  # noqa: E731
        adamw = optax.adamw(0.01 * factor, b1=0.9, b2=0.95, weight_decay=0.1, mask=masked)
        return apply(adamw, part, grads_of, UPDATES)[0]

    for i in range(L):
        close(layer(found, i), expected(layer(params, i), FACTORS["layers"][i]))
    for name in ("embedding_VD", "scale"):
        close(found[name], expected({name: params[name]}, FACTORS[name])[name])


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_others_are_as_with_a_rate_for_each_layer(name):
    found, params = decayed(name), params_of()

    def expected(part, factor):
        settings = config(name, learning_rate=0.01 * factor, weight_decay=0.1)
        return run(optimizer_of(settings, UPDATES, BY_NAME), part, grads_of, UPDATES)[0]

    for i in range(L):
        close(layer(found, i), expected(layer(params, i), FACTORS["layers"][i]))
    close(found["embedding_VD"], expected({"embedding_VD": params["embedding_VD"]}, DECAY**4)["embedding_VD"])


def test_a_stack_without_its_first_layers_keeps_the_rates_of_the_others():
    whole, params = decayed("adamw"), params_of()
    upper = params | {"layers": jax.tree.map(lambda x: x[1:], params["layers"])}
    optimizer = optimizer_of(config(layer_decay=DECAY, weight_decay=0.1), UPDATES, BY_NAME, num_layers=L)
    found = run(optimizer, upper, grads_of, UPDATES)[0]
    close(found, whole | {"layers": jax.tree.map(lambda x: x[1:], whole["layers"])})
    assert deepest(BY_NAME, params) == L and deepest(BY_NAME, {"scale": params["scale"]}) == 0


def test_what_cannot_decay_is_refused():
    with pytest.raises(UserError, match="optimizer.layer_decay=0.5 changes what is averaged"):
        optimizer_section("schedule_free_adamw", schedule="constant", layer_decay=0.5)
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match="optimizer.layer_decay="):
            optimizer_section(layer_decay=wrong)
