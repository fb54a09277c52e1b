"""Statistics of layers: equal to a plain recomputation, however the program is compiled or split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from param_axes import BY_NAME
from sections import block_section, mesh_section

from llmjax.models.gpt import GPT
from llmjax.nn.attention import Attention
from llmjax.nn.config import resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.layers import MLP, Norm
from llmjax.ops.attention import full
from llmjax.ops.attention.mask import self_mask
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.tasks.contract import Setting
from llmjax.tasks.language_model import LanguageModel
from llmjax.train.update.statistics import make_statistics
from llmjax.types import Batch

V, T, L = 64, 24, 4
TINY = block_section(num_layers=L, model_dim=16, num_heads=4, init_std=0.2, dropout=0.1)
BATCH = 4


def make_batch(padding):
    """Two documents a row, the last `padding` positions of each row empty."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(1, V, (2, BATCH, T)).astype(np.int32)
    column = np.tile(np.arange(T, dtype=np.int32), (BATCH, 1))
    real = column < T - padding
    return Batch(
        tokens=tokens,
        targets=targets,
        weights=np.where(real, rng.uniform(size=(BATCH, T)), 0).astype(np.float32),
        segments=np.where(real, 1 + (column >= 9), 0).astype(np.int32),
        positions=np.where(column < 9, column, column - 9),
        index=np.arange(BATCH, dtype=np.int32),
    )


def make_model(layout=None, **compute):
    return GPT(resolve(TINY), V, T, layout or Layout(), compute=LayerCompute(**compute))


def loss_of(model):
    return LanguageModel().make_loss(model, Setting())


@functools.partial(jax.jit, static_argnums=0)
def statistics(model, params, batch):
    return make_statistics(model.activations, loss_of(model), BY_NAME)(params, batch)


def measure(model, params, batch):
    return jax.device_get(statistics(model, params, batch))


@pytest.fixture(scope="module")
def params():
    return jax.jit(make_model().init)(jax.random.key(0))


def assert_close(a, b, rtol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


def norms(tree):
    return np.sqrt(sum(np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)))


def test_activations_are_those_of_the_layers_taken_one_by_one(params):
    model, batch = make_model(), make_batch(padding=5)
    c, real = model.config, batch.segments > 0
    norm = Norm(c.norm, c.norm_eps)

    def attention(layer, x, turn, mask):
        call = functools.partial(Attention(c, Layout()).apply, {"params": layer["attention"]})
        out = full.attend(*call(x, turn, method="project"), mask, softcap=c.attention_softcap)
        return call(out, method="output")

    @jax.jit
    def branches(layer, x):
        mask, turn = self_mask(batch.segments, batch.positions), model._rotations(batch.positions).everywhere
        read = lambda name: norm.apply({"params": layer[f"{name}_norm"]}, x)  # noqa: E731
        return (
            attention(layer, read("attention"), turn, mask),
            MLP(c, Layout()).apply({"params": layer["mlp"]}, read("mlp")),
        )

    rms = lambda y: np.sqrt(np.mean(np.square(np.float64(y)[real])))  # noqa: E731
    x = params["embedding"]["embedding_VD"][batch.tokens]
    expected = {"residual_rms": [], "attention_rms": [], "mlp_rms": []}
    for i in range(L):
        layer = jax.tree.map(lambda p, i=i: p[i], params["layers"])
        for name, branch in (("attention_rms", 0), ("mlp_rms", 1)):
            y = branches(layer, x)[branch]
            x = x + y
            expected[name].append(rms(y))
        expected["residual_rms"].append(rms(x))
    got = jax.device_get(jax.jit(model.activations)(params, batch))
    assert_close(got, {name: np.array(values) for name, values in expected.items()}, rtol=1e-5)


def test_norms_are_those_of_separate_trees_and_every_term_is_divided_by_its_weight(params):
    model, batch = make_model(), make_batch(padding=5)

    def loss_fn(params, batch, rng):
        sums = loss_of(model)(params, batch, rng)
        pull = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params["layers"]))
        return dataclasses.replace(sums, auxiliary={"decay": (7.0 * pull, jnp.float32(70.0))})

    def plain(params):
        sums = loss_fn(params, batch, None)
        return sums.loss / sums.weight + sums.auxiliary["decay"][0] / 70.0

    grads = jax.device_get(jax.jit(jax.grad(plain))(params))
    got = jax.device_get(jax.jit(make_statistics(model.activations, loss_fn, BY_NAME))(params, batch))
    of_layers = lambda tree: [norms(jax.tree.map(lambda x: x[i], tree["layers"])) for i in range(L)]  # noqa: B023, E731
    np.testing.assert_allclose(got["gradient_norm"], of_layers(grads), rtol=1e-5)
    np.testing.assert_allclose(got["parameter_norm"], of_layers(params), rtol=1e-5)
    np.testing.assert_allclose(got["gradient_ratio"], got["gradient_norm"] / got["parameter_norm"], rtol=1e-6)
    assert got["other"].keys() == {"embedding", "final_norm"}
    for block, values in got["other"].items():
        np.testing.assert_allclose(values["gradient_norm"], norms(grads[block]), rtol=1e-5)
        np.testing.assert_allclose(values["parameter_norm"], norms(params[block]), rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scanned_layers_have_the_statistics_of_unrolled_ones(params, remat):
    batch = make_batch(padding=0)
    expected = measure(make_model(), params, batch)
    assert_close(measure(make_model(scan_layers=True, remat=remat), params, batch), expected, rtol=1e-4)


def test_eight_devices_measure_what_one_does(params):
    batch, layout = make_batch(padding=5), Layout(make_mesh(mesh_section(data=2, fsdp=2, tensor=2)))
    model = make_model(layout)
    shardings = jax.tree.map(
        lambda names: layout.sharding(*names), model.axes(), is_leaf=lambda x: isinstance(x, tuple)
    )
    split_batch = jax.tree.map(
        lambda x: jax.device_put(x, layout.sharding(*("batch", "length")[: x.ndim])), batch
    )
    split = measure(model, jax.device_put(params, shardings), split_batch)
    assert_close(split, measure(make_model(), params, batch), rtol=1e-4)


def growing(params, factor):
    """The layers' matrices times 1, factor, factor ** 2 and so on."""

    def grow(path, x):
        powers = factor ** jnp.arange(L, dtype=jnp.float32)
        return x if path[-1].key == "scale" else x * powers.reshape(L, *[1] * (x.ndim - 1))

    return params | {"layers": jax.tree_util.tree_map_with_path(grow, params["layers"])}


def test_a_network_that_explodes_shows_it_from_layer_to_layer(params):
    got = measure(make_model(), growing(params, 4.0), make_batch(padding=0))
    for name in ("residual_rms", "attention_rms", "mlp_rms"):
        assert (got[name][1:] > 4 * got[name][:-1]).all(), name
    assert (got["gradient_norm"][:-1] > 2 * got["gradient_norm"][1:]).all()  # it explodes on its way back


def test_a_network_that_vanishes_shows_it_from_layer_to_layer(params):
    got = measure(make_model(), growing(params, 0.25), make_batch(padding=0))
    for name in ("attention_rms", "mlp_rms"):
        assert (got[name][1:] < got[name][:-1] / 4).all(), name
    assert (got["gradient_norm"][1:] < got["gradient_norm"][:-1] / 2).all()


def test_what_is_not_finite_comes_out_as_it_is_and_no_weight_is_no_gradient(params):
    batch = make_batch(padding=0)
    broken = jax.tree.map(lambda x: x.copy(), params)
    broken["layers"]["mlp"]["w_up_DF"] = broken["layers"]["mlp"]["w_up_DF"].at[2, 0, 0].set(jnp.nan)
    got = measure(make_model(), broken, batch)
    assert np.isfinite(got["residual_rms"]).tolist() == [True, True, False, False]
    assert not np.isfinite(got["gradient_norm"]).any()
    nothing = measure(make_model(), params, dataclasses.replace(batch, weights=0 * batch.weights))
    assert (nothing["gradient_norm"] == 0).all() and (nothing["gradient_ratio"] == 0).all()
