"""Clipping: stacked layers are clipped like separate ones, on any mesh, whatever the scale of the loss weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from param_axes import BY_NAME
from sections import block_section, mesh_section

from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout
from llmjax.train.optim.clip import CLIPS, make_clip
from llmjax.train.update.gradients import mean_gradient, micro_gradients
from llmjax.types import LossSums

MODELS = {
    "llama": block_section(num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, tie_embeddings=False),
    "gpt2": block_section(
        num_layers=3, model_dim=16, num_heads=4, activation="gelu", norm="layernorm", position="learned",
        use_bias=True,
    ),
}  # fmt: skip
# The axes that one output unit's weights fill, of one layer, written out by hand.
UNITS = {
    "wq_DNH": (0,), "wk_DKH": (0,), "wv_DKH": (0,), "wo_DNH": (1, 2),
    "w_up_DF": (0,), "w_gate_DF": (0,), "w_down_DF": (1,),
    "embedding_VD": (1,), "unembedding_VD": (1,), "positions_TD": (1,),
}  # fmt: skip


def gpt(model):
    return GPT(resolve(MODELS[model]), 64, 24)


def random_tree(model, seed, size):
    """A tree like the model's parameters, each layer `size` times larger than the one before."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(gpt(model).init, jax.random.key(0))
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    grow = lambda x: x * (size ** np.arange(3)).reshape(3, *[1] * (x.ndim - 1)).astype(np.float32)  # noqa: E731
    return tree | {"layers": jax.tree.map(grow, tree["layers"])}


def blocks(tree):
    """The tree taken apart by hand: {block: {path: float64 array}}, each layer a block of its own."""
    apart = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        top, rest = path[0].key, tuple(key.key for key in path[1:])
        if top == "layers":
            for i in range(3):
                apart.setdefault((top, i), {})[rest] = np.float64(x[i])
        else:
            apart.setdefault((top, 0), {})[rest] = np.float64(x)
    return apart


def norm(leaves):
    return np.sqrt(sum(np.sum(np.square(x)) for x in leaves.values()))


def by_hand(kind, threshold, grads, params):
    """Clips separate blocks in float64."""
    grads, params, clipped = blocks(grads), blocks(params), {}
    total = np.sqrt(sum(norm(block) ** 2 for block in grads.values()))
    for key, block in grads.items():
        if kind in ("global", "block"):
            size = total if kind == "global" else norm(block)
            clipped[key] = {path: g * min(1.0, threshold / size) for path, g in block.items()}
            continue
        clipped[key] = {}
        for path, g in block.items():
            axes = UNITS.get(path[-1])  # None: a vector is one unit
            g_norm = np.sqrt(np.sum(g**2, axis=axes, keepdims=True))
            limit = threshold * np.maximum(
                np.sqrt(np.sum(params[key][path] ** 2, axis=axes, keepdims=True)), 1e-3
            )
            clipped[key][path] = np.where(g_norm > limit, g * limit / g_norm, g)
    return clipped


def clip(kind, threshold, grads, params):
    transform = make_clip(kind, threshold, BY_NAME)
    return jax.jit(lambda g, p: transform.update(g, transform.init(p), p)[0])(grads, params)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("kind", "threshold"), [("global", 5.0), ("block", 60.0), ("adaptive", 0.9), ("adaptive", 1e-3)]
)
def test_stacked_layers_are_clipped_like_separate_ones(model, kind, threshold):
    grads, params = random_tree(model, 0, 0.5), random_tree(model, 1, 1.0)
    got, expected = blocks(clip(kind, threshold, grads, params)), by_hand(kind, threshold, grads, params)
    for key in expected:
        assert got[key].keys() == expected[key].keys()
        for path, x in expected[key].items():
            np.testing.assert_allclose(got[key][path], x, rtol=2e-6, err_msg=f"{key} {path}")


def test_a_block_above_the_threshold_leaves_the_others_alone():
    grads = random_tree("llama", 0, 0.1)
    before = BY_NAME.block_norms(grads)
    threshold = float(before["layers"][0]) / 2
    assert float(max(before["layers"][1:])) < threshold < float(before["embedding"])
    clipped = clip("block", threshold, grads, grads)
    after = BY_NAME.block_norms(clipped)
    np.testing.assert_allclose(after["layers"][0], threshold, rtol=1e-6)
    np.testing.assert_allclose(after["embedding"], threshold, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1:], b[1:]), clipped["layers"], grads["layers"])
    jax.tree.map(np.testing.assert_array_equal, clipped["final_norm"], grads["final_norm"])


def test_on_plain_matrices_adaptive_is_that_of_optax():
    rng = np.random.default_rng(0)
    grads, params = ({"w_up_DF": rng.normal(size=(16, 24)).astype(np.float32)} for _ in range(2))
    got, expected = (
        t.update(grads, t.init(params), params)[0]
        for t in (make_clip("adaptive", 0.9, BY_NAME), optax.adaptive_grad_clip(0.9))
    )
    np.testing.assert_allclose(got["w_up_DF"], expected["w_up_DF"], rtol=1e-6)
    assert 0 < np.mean(got["w_up_DF"] != grads["w_up_DF"]) < 1  # some units are clipped, others not


@pytest.mark.parametrize("kind", CLIPS)
def test_a_unit_or_block_of_zeros_stays_finite(kind):
    zeros = jax.tree.map(np.zeros_like, random_tree("gpt2", 0, 1.0))
    grads = random_tree("gpt2", 0, 1.0) | {"final_norm": zeros["final_norm"]}
    clipped = clip(kind, 0.01, grads, zeros)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clipped))
    assert not any(x.any() for x in jax.tree.leaves(clipped["final_norm"]))


@pytest.mark.parametrize("kind", CLIPS)
def test_threshold_zero_changes_nothing(kind):
    grads = random_tree("llama", 0, 9.0)
    jax.tree.map(np.testing.assert_array_equal, clip(kind, 0.0, grads, grads), grads)


@pytest.mark.parametrize(("kind", "threshold"), [("global", 5.0), ("block", 60.0), ("adaptive", 0.9)])
def test_eight_devices_clip_like_one(kind, threshold):
    layout = Layout(make_mesh(mesh_section(data=2, fsdp=2, tensor=2)))
    shardings = jax.tree.map(
        lambda names: layout.sharding(*names), gpt("llama").axes(), is_leaf=lambda x: isinstance(x, tuple)
    )
    grads, params = random_tree("llama", 0, 0.5), random_tree("llama", 1, 1.0)
    split = clip(kind, threshold, *jax.device_put((grads, params), (shardings, shardings)))
    got, wanted = (tree["layers"]["mlp"]["w_up_DF"] for tree in (split, shardings))
    assert got.sharding.is_equivalent_to(wanted, got.ndim)
    one = clip(kind, threshold, grads, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), split, one)


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**12])  # exact in float32
def test_scaling_all_loss_weights_changes_nothing(kind, scale):
    rng = np.random.default_rng(0)
    params = {"layers": {"w_up_DF": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)}}
    x, y = rng.normal(size=(3, 8, 4)).astype(np.float32), rng.normal(size=(3, 8, 5)).astype(np.float32)

    def loss_fn(params, weights, rng):
        errors = jnp.sum(jnp.square(x @ params["layers"]["w_up_DF"] - y), axis=-1)
        return LossSums(jnp.sum(weights * errors), jnp.sum(weights), {})

    def clipped(weights):
        terms, _ = micro_gradients(loss_fn, params, weights, None)
        grads = mean_gradient(terms)
        return clip(kind, 0.5, grads, params), grads

    weights = rng.uniform(size=(3, 8)).astype(np.float32)
    plain, grads = clipped(weights)
    assert not np.allclose(plain["layers"]["w_up_DF"], grads["layers"]["w_up_DF"], rtol=0.1)
    scaled, _ = clipped(np.float32(scale) * weights)
    np.testing.assert_array_equal(scaled["layers"]["w_up_DF"], plain["layers"]["w_up_DF"])
