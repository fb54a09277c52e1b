"""However an update is cut into micro-steps and parts of a mesh, its sums are those of one big batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from param_axes import BY_NAME
from quick import AS_FOR_USERS
from sections import block_section, mesh_section

from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ops.attention import blockwise, full
from llmjax.ops.attention.sequence_attention import Sharing, make_attend
from llmjax.parallel.mesh import make_mesh
from llmjax.parallel.rules import Layout, partition_spec
from llmjax.plan.hlo.parse import loops, parse
from llmjax.plan.hlo.traffic import collectives
from llmjax.tasks.contract import Setting
from llmjax.tasks.language_model import LanguageModel
from llmjax.train.update.fused import MANUAL, make_update_sums
from llmjax.train.update.gradients import MAIN, micro_gradients
from llmjax.types import Batch, LossSums

K, M, T, D, F, V = 8, 8, 6, 8, 16, 32
CUTS = [
    *(
        ("update", sizes)
        for sizes in [(1, 1, 1, 1), (8, 1, 1, 1), (2, 4, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (2, 2, 2, 1)]
    ),
    *(("micro_step", sizes) for sizes in [(2, 4, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2), (2, 2, 2, 1)]),
]
AXES = {
    "embedding": {"embedding_VD": ("vocab", "embed")},
    "mlp": {"w_up_DF": ("embed", "mlp"), "up_bias": ("mlp",), "scale": (None,)},
}


def make_batch(length=T, vocab=V):
    """K micro-batches: sequences ragged, weights skewed, some micro-batches and some sequences without any."""
    rng = np.random.default_rng(0)
    shape = (K, M, length)
    weights = rng.uniform(0.1, 3.0, shape) * (np.arange(length) < rng.integers(0, length + 1, (K, M, 1)))
    weights[1] = 0.0
    weights[2, 3:] = 0.0
    weights[3] *= 100.0
    tokens = rng.integers(0, vocab, shape)
    # Packed documents of 4 tokens.
    segments = np.broadcast_to(np.arange(length) // 4 + 1, shape)
    positions = np.broadcast_to(np.arange(length) % 4, shape)
    index = np.arange(K * M).reshape(K, M)
    ints = (x.astype(np.int32) for x in (tokens, np.roll(tokens, -1, -1), segments, positions, index))
    tokens, targets, segments, positions, index = ints
    return Batch(tokens, targets, weights.astype(np.float32), segments, positions, index)


def make_params():
    rng = np.random.default_rng(1)
    shapes = {"embedding_VD": (V, D), "w_up_DF": (D, F), "up_bias": (F,), "scale": (D,)}
    normal = lambda name: rng.normal(size=shapes[name]).astype(np.float32)  # noqa: E731
    return {group: {name: normal(name) for name in names} for group, names in AXES.items()}


def loss_fn(params, batch, rng):
    """A loss by token, and an auxiliary one that weighs sequences by their number, in the dtype of `params`."""
    table, mlp = params["embedding"]["embedding_VD"], params["mlp"]
    x_BTD = jnp.take(table, batch.tokens, axis=0, mode="clip") * mlp["scale"][None, None]
    h_BTF = jnp.tanh(x_BTD @ mlp["w_up_DF"] + mlp["up_bias"][None, None])
    weights = batch.weights.astype(h_BTF.dtype)
    errors = (jnp.sum(h_BTF, -1) - batch.targets) ** 2
    auxiliary = jnp.sum(batch.index * jnp.sum(h_BTF, (1, 2)) ** 2)
    metrics = {"error": jnp.sum(weights * jnp.abs(errors))}
    balance = (0.1 * auxiliary, jnp.sum(batch.index).astype(h_BTF.dtype))
    return LossSums(jnp.sum(weights * errors), jnp.sum(weights), metrics, {"balance": balance})


def specs_of(axes):
    return jax.tree.map(partition_spec, axes, is_leaf=lambda x: isinstance(x, tuple))


def place(mesh, specs, params, batch):
    """`params` and `batch` on `mesh` as a window wants them."""
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    names = lambda x: (None, ("data", "fsdp"), "seq")[: x.ndim]  # noqa: E731
    return jax.tree.map(put, params, specs), jax.tree.map(lambda x: put(x, PartitionSpec(*names(x))), batch)


def mesh_of(sizes):
    return make_mesh(mesh_section(*sizes), jax.devices()[: np.prod(sizes)])


def toy_window(sizes, gather, batch, loss=loss_fn, dtype="float32"):
    """`run(steps) -> (terms, sums)`, and the jitted window behind it."""
    mesh, specs = mesh_of(sizes), specs_of(AXES)
    window = jax.jit(make_update_sums(loss, mesh, specs, BY_NAME, gather=gather, compute_dtype=dtype))
    arguments = place(mesh, specs, make_params(), batch)
    return (lambda steps: window(*arguments, np.int32(steps), None)), window


def exact(batch, keep=np.True_):
    """Gradient sums of the sequences `keep` [K, M] of `batch` as one batch, in float64: term -> (gradients, weight)."""
    keep = np.broadcast_to(keep, batch.index.shape)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), make_params())
        weights = np.where(keep[..., None], batch.weights, 0.0)
        batch = dataclasses.replace(batch, weights=weights, index=batch.index * keep)
        batch = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:]), batch)
        return jax.tree.map(np.asarray, _exact(params, batch))


@jax.jit
def _exact(params, batch):
    terms = {MAIN: lambda s: (s.loss, s.weight), "balance": lambda s: s.auxiliary["balance"]}
    grad = lambda term: jax.grad(lambda p: term(loss_fn(p, batch, None)), has_aux=True)(params)  # noqa: E731
    return {name: grad(term) for name, term in terms.items()}


def relative_error(grads, reference):
    return {
        jax.tree_util.keystr(path): np.linalg.norm(np.float64(x) - y) / np.linalg.norm(y)
        for (path, y), x in zip(
            jax.tree_util.tree_flatten_with_path(reference)[0], jax.tree.leaves(grads), strict=True
        )
    }


@pytest.mark.parametrize("gather, sizes", CUTS)
def test_sums_are_those_of_one_big_batch_for_every_k_of_one_compile(gather, sizes):
    batch = make_batch()
    run, window = toy_window(sizes, gather, batch)
    for steps in (1, 2, 3, 8):
        terms, sums = run(steps)
        for name, (grads, weight) in exact(batch, np.arange(K)[:, None] < steps).items():
            assert max(relative_error(terms[name].grads, grads).values()) < 1e-6
            np.testing.assert_allclose(terms[name].weight, weight, rtol=1e-6)
        np.testing.assert_allclose(np.sum(sums["weight"]), terms[MAIN].weight, rtol=1e-6)
        np.testing.assert_array_equal(sums["dropped"], 0.0)
    assert window._cache_size() == 1
    specs = jax.tree.leaves(specs_of(AXES))
    for x, spec in zip(jax.tree.leaves(terms[MAIN].grads), specs, strict=True):
        assert x.dtype == jnp.float32
        assert x.sharding.is_equivalent_to(NamedSharding(mesh_of(sizes), spec), x.ndim)


@pytest.mark.parametrize("gather, parts", [("update", 4), ("micro_step", 2)])
def test_a_part_has_a_norm_and_a_weight_of_its_own(gather, parts):
    batch, steps = make_batch(), 5
    sums = toy_window((2, 2, 1, 1), gather, batch)[0](steps)[1]
    expected = {name: np.zeros(K) for name in ("square_norm", "weight", "weight_square", "parts")}
    for i in range(steps):
        for part in range(parts):
            keep = np.outer(np.arange(K) == i, np.arange(M) // (M // parts) == part)
            grads, weight = exact(batch, keep)[MAIN]
            expected["square_norm"][i] += sum(np.sum(g**2) for g in jax.tree.leaves(grads))
            expected["weight"][i] += weight
            expected["weight_square"][i] += weight**2
            expected["parts"][i] += weight > 0
    assert expected["parts"][1] == 0 < expected["parts"][2] < parts == expected["parts"][0]
    for name, values in expected.items():
        np.testing.assert_allclose(sums[name], values, rtol=1e-6, err_msg=name)
    assert {*sums} == {*expected, "loss", "error", "balance", "balance_weight", "dropped"}
    assert all(np.all(values[steps:] == 0) for values in sums.values())


@pytest.mark.parametrize("bad, sizes, gather, part", [
    (np.inf, (8, 1, 1, 1), "update", slice(5, 6)),
    (np.nan, (2, 4, 1, 1), "update", slice(5, 6)),
    (np.nan, (2, 2, 1, 2), "update", slice(4, 6)),
    (np.inf, (2, 4, 1, 1), "micro_step", slice(4, 8)),
])  # fmt: skip
def test_what_is_not_finite_is_dropped_with_its_part_of_its_micro_step_alone(bad, sizes, gather, part):
    batch = make_batch()
    broken = dataclasses.replace(batch, weights=batch.weights.copy())
    broken.weights[4, 5, 0] = bad
    keep = np.ones((K, M), bool)
    keep[4, part] = False
    terms, sums = toy_window(sizes, gather, broken)[0](K)
    np.testing.assert_array_equal(sums["dropped"], np.eye(K)[4])
    for name, (grads, weight) in exact(batch, keep).items():
        assert max(relative_error(terms[name].grads, grads).values()) < 1e-6
        np.testing.assert_allclose(terms[name].weight, weight, rtol=1e-6)


@pytest.mark.parametrize("gather", MANUAL)
@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 4, 1, 1), (2, 2, 1, 2)], ids=str)
def test_an_embedding_gathers_the_gradients_of_repeated_tokens_exactly(sizes, gather):
    """XLA once moved all-reduces out of such a loop and lost contributions (openxla/xla 49143)."""
    rng = np.random.default_rng(2)
    batch = make_batch()
    tokens = rng.integers(0, 5, batch.tokens.shape).astype(np.int32) * 7  # few, so that all of them repeat
    weights = rng.integers(-8, 9, batch.weights.shape).astype(np.float32)  # whole numbers: sums are exact
    batch = dataclasses.replace(batch, tokens=tokens, weights=weights)

    def linear(params, batch, rng):
        x_BTD = jnp.take(params["embedding"]["embedding_VD"], batch.tokens, axis=0, mode="clip")
        by_token = jnp.sum(x_BTD * jnp.arange(1.0, D + 1)[None, None], -1)
        return LossSums(jnp.sum(batch.weights * by_token), jnp.sum(jnp.abs(batch.weights)), {})

    terms, _ = toy_window(sizes, gather, batch, linear)[0](K)
    expected = np.zeros((V, D))
    np.add.at(expected, tokens.ravel(), weights.ravel()[:, None] * np.arange(1, D + 1)[None])
    np.testing.assert_array_equal(terms[MAIN].grads["embedding"]["embedding_VD"], expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 4, 1, 1), (1, 8, 1, 1)], ids=str)
def test_nothing_is_communicated_within_the_loop(sizes):
    batch = make_batch()
    mesh, specs = mesh_of(sizes), specs_of(AXES)
    window = jax.jit(
        make_update_sums(loss_fn, mesh, specs, BY_NAME, gather="update", compute_dtype="float32")
    )
    lowered = window.lower(*place(mesh, specs, make_params(), batch), np.int32(1), None)
    program = parse(lowered.compile(compiler_options=AS_FOR_USERS).as_text())
    assert [loop.trips for loop in loops(program)] == [None]
    found = collectives(program)
    assert found and all(collective.within == () for collective in found)
    assert "reduce-scatter" in {c.kind for c in found} or sizes[1] == 1


LENGTH, VOCAB = 16, 32
SHAPE = {"num_layers": 1, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 32}


@functools.cache
def fresh_params(config):
    return jax.jit(GPT(config, VOCAB, LENGTH).init)(jax.random.key(0))


def model_loss(sizes, gather, compute=LayerCompute(), **shape):  # noqa: B008
    """The loss of a decoder, its parameters' specs, and fresh parameters."""
    layout = Layout(mesh_of(sizes), MANUAL[gather]) if gather else Layout()
    config = resolve(block_section(**{**SHAPE, **shape}))
    attend = full.attend if compute.kernel == "full" else functools.partial(blockwise.attend, block=8)
    if sizes[2] > 1:
        others = tuple(axis for axis, size in zip(("data", "fsdp"), sizes) if size > 1)
        attend = make_attend(compute.kernel, Sharing("gather", "seq", sizes[2], 1, others))
    model = GPT(config, VOCAB, LENGTH, layout, attend, compute=compute)
    shards = (layout.axis_size("data") * layout.axis_size("fsdp"), layout.axis_size("seq"))
    loss = LanguageModel().make_loss(model, Setting(z_loss=1e-3, shards=shards))
    return loss, specs_of(model.axes()), fresh_params(config)


def model_sums(sizes, gather, batch, steps, dtype="float32", **shape):
    """What a window gives for `steps` micro-steps of a decoder."""
    loss, specs, params = model_loss(sizes, gather, dtype=dtype, **shape)
    mesh = mesh_of(sizes)
    window = make_update_sums(loss, mesh, specs, BY_NAME, gather=gather, compute_dtype=dtype)
    return jax.jit(window, compiler_options=AS_FOR_USERS)(
        *place(mesh, specs, params, batch), np.int32(steps), jax.random.key(7)
    )


@functools.cache
def big_batch_sums(steps):
    """Of one micro-step on one device."""
    loss, _, params = model_loss((1, 1, 1, 1), None, dropout=0.1)
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[:steps]).reshape(-1, *x.shape[2:]), make_batch(LENGTH, VOCAB)
    )
    return jax.jit(functools.partial(micro_gradients, loss))(params, batch, jax.random.key(7))


@pytest.mark.parametrize("sizes, gather, compute", [
    ((8, 1, 1, 1), "update", LayerCompute(scan_layers=True, remat="full")),
    ((2, 2, 1, 2), "update", LayerCompute(remat="dots")),
    ((2, 2, 2, 1), "update", LayerCompute(kernel="full")),
    ((2, 4, 1, 1), "micro_step", LayerCompute(scan_layers=True, remat="full")),
])  # fmt: skip
def test_a_decoder_with_dropout_does_not_see_how_the_update_is_cut(sizes, gather, compute):
    batch = make_batch(LENGTH, VOCAB)
    terms, sums = model_sums(sizes, gather, batch, 4, dropout=0.1, compute=compute)
    expected, values = big_batch_sums(4)
    assert max(relative_error(terms[MAIN].grads, expected[MAIN].grads).values()) < 2e-6
    for name in ("loss", "weight", "accuracy"):
        np.testing.assert_allclose(np.sum(sums[name]), values[name], rtol=1e-6)


def test_weights_cast_once_are_those_that_the_model_casts_itself():
    """On one device in bfloat16: the gradients of such weights are rounded once more, and nothing else differs."""
    batch = make_batch(LENGTH, VOCAB)
    shape = {
        "compute": LayerCompute(kernel="full"),
        "dtype": "bfloat16",
        "position": "learned",
        "use_bias": True,
    }
    terms, sums = model_sums((1, 1, 1, 1), "update", batch, 1, **shape)
    loss, _, params = model_loss((1, 1, 1, 1), None, **shape)
    step = jax.jit(functools.partial(micro_gradients, loss), compiler_options=AS_FOR_USERS)
    expected, values = step(params, jax.tree.map(lambda x: x[0], batch), jax.random.key(7))
    np.testing.assert_array_equal(sums["loss"][0], values["loss"])

    def check(path, gradient, expected):
        is_matrix = path[-1].key.startswith("w")
        expected = np.asarray(expected, jnp.bfloat16 if is_matrix else np.float32)
        np.testing.assert_array_equal(gradient, expected.astype(np.float32))

    jax.tree_util.tree_map_with_path(check, terms[MAIN].grads, expected[MAIN].grads)


@pytest.mark.parametrize("gather", MANUAL)
def test_gradients_in_bfloat16_are_summed_in_float32(gather):
    """Three times the same micro-batch is three times its gradient, which has too many digits for bfloat16."""
    same = jax.tree.map(lambda x: np.repeat(x[:1], K, 0), make_batch())
    run, _ = toy_window((2, 4, 1, 1), gather, same, dtype="bfloat16")
    one, three = (run(steps)[0][MAIN].grads for steps in (1, 3))
    assert max(relative_error(three, jax.tree.map(lambda g: 3 * np.float64(g), one)).values()) < 1e-6
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(one))
    exactly = exact(same, np.arange(K)[:, None] < 1)[MAIN][0]
    errors = relative_error(one, exactly)
    assert 1e-4 < errors["['mlp']['w_up_DF']"] < 1e-2  # it was bfloat16 indeed
