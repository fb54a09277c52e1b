"""Adafactor's factors: over which axes they are means, what they make of a gradient, and how little they hold."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from param_axes import BY_NAME
from sections import mesh_section, optimizer_of, optimizer_section

from configs.gpt2_124m import get_config
from llmjax.config.reading import read_config
from llmjax.models.gpt import GPT
from llmjax.nn.config import block_config, resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ops.attention.sequence_attention import make_attend
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.train.optim.optimizers.adafactor import scale_by_adafactor
from llmjax.train.optim.param_roles import Roles

# The rank of a leaf's layers, then its rows and columns as whoever reads its name would write them down.
MATRICES = {
    "wq_DNH": ((200, 16, 2, 4), 16, 8),  # more layers than any side is long
    "wo_NHD": ((3, 2, 4, 16), 8, 16),
    "wo_DNH": ((3, 16, 2, 4), 16, 8),
    "w_up_DF": ((130, 16, 160), 16, 160),
    "embedding_VD": ((20, 16), 20, 16),
    "positions_TD": ((8, 16), 8, 16),
}
VECTORS = {"scale": (3, 16), "q_bias": (3, 2, 4)}


def plain_adafactor(gradients, largest_decay):
    """The direction after each of the gradients [R, C] of one matrix; of a vector, R values in one column."""
    rows = columns = 0.0
    for update, g in enumerate(gradients, 1):
        decay = min(1 - update**-0.8, largest_decay)
        rows = decay * rows + (1 - decay) * (g * g + 1e-30).mean(1)
        columns = decay * columns + (1 - decay) * (g * g + 1e-30).mean(0)
        yield g / np.sqrt(np.outer(rows, columns) / rows.mean())


def gradients_of(name, shape, updates=3):
    """They differ in scale from row to row and from column to column."""
    rng = np.random.default_rng(len(name))
    return rng.normal(size=(updates, *shape)) * rng.lognormal(size=shape)


def directions(gradients):
    """What the transformation makes of each, float32; `gradients` by name, updates first."""
    transformation = scale_by_adafactor(0.95, BY_NAME)
    state = transformation.init(jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), gradients))
    update, out = jax.jit(transformation.update), []
    for i in range(len(next(iter(gradients.values())))):
        changes, state = update(jax.tree.map(lambda g, i=i: jnp.asarray(g[i], jnp.float32), gradients), state)
        out.append(changes)
    return out, state


def test_every_layer_of_a_matrix_is_that_of_a_plain_adafactor_over_its_two_sides():
    gradients = {name: gradients_of(name, shape) for name, (shape, _, _) in MATRICES.items()}
    found, _ = directions(gradients)
    for name, (_, rows, columns) in MATRICES.items():
        layers = gradients[name].reshape(3, -1, rows, columns)
        for layer in (0, layers.shape[1] - 1):
            for step, expected in zip(found, plain_adafactor(layers[:, layer], 0.95), strict=True):
                ours = np.asarray(step[name]).reshape(-1, rows, columns)[layer]
                np.testing.assert_allclose(ours, expected, rtol=2e-5, err_msg=f"{name}, layer {layer}")


def test_vectors_keep_their_whole_second_moment():
    gradients = {name: gradients_of(name, shape) for name, shape in VECTORS.items()}
    found, _ = directions(gradients)
    for name in VECTORS:
        whole = 0.0
        for update, (g, step) in enumerate(zip(gradients[name], found, strict=True), 1):
            decay = min(1 - update**-0.8, 0.95)
            whole = decay * whole + (1 - decay) * g * g
            np.testing.assert_allclose(step[name], g / np.sqrt(whole), rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_second_moments_of_gpt2_hold_less_than_a_hundredth_of_its_parameters(scan_layers):
    config = read_config(get_config().to_dict())
    model = resolve(block_config(config.model, *map(config.families.get, ("transformer", "experts"))))
    layout = Layout(make_mesh(mesh_section(data=1), jax.devices()[:1]))
    gpt = GPT(
        model,
        50304,
        config.data.seq_len,
        layout,
        make_attend("full", None),
        compute=LayerCompute(scan_layers),
    )
    params = jax.eval_shape(gpt.init, jax.random.key(0))
    optimizer = optimizer_of(optimizer_section("adafactor"), 1, Roles(gpt.axes()), momentum=0.0)
    state = jax.eval_shape(optimizer.init, params)
    parameters, held = (sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (params, state))
    assert 1.2e8 < parameters < 1.3e8
    assert held < 0.01 * parameters, held / parameters
