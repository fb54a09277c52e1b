"""The chunked loss equals the one written out with all logits, gradients included, for any chunk and mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.ops.loss import softmax_cross_entropy

B, T, D, V = 4, 16, 8, 24


def make_inputs(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    w_VD = jax.random.normal(keys[1], (V, D)).astype(dtype)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.uniform(keys[3], (B, T)).at[1, 5:].set(0.0)
    return hidden_BTD, w_VD, targets_BT, weights_BT


def written_out(hidden_BTD, w_VD, targets_BT, weights_BT, softcap=0.0, z_loss=0.0):
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD.astype(jnp.float32), w_VD.astype(jnp.float32))
    logits_BTV = softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    loss_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = loss_BT + z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return jnp.sum(weights_BT * loss_BT), jnp.sum(weights_BT), jnp.sum(weights_BT * correct_BT)


def sums_and_gradients(inputs, **settings):
    def loss(hidden_BTD, w_VD):
        sums = softmax_cross_entropy(hidden_BTD, w_VD, *inputs[2:], **settings)
        return 3.0 * sums.loss, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs[:2])
    return (sums.loss, sums.weight, sums.metrics["accuracy"]), gradients


def expected(inputs, **settings):
    def loss(hidden_BTD, w_VD):
        sums = written_out(hidden_BTD, w_VD, *inputs[2:], **settings)
        return 3.0 * sums[0], sums

    (_, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*inputs[:2])
    return sums, gradients


def assert_equal(got, wanted, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("chunk", [0, 1, 8, 12, 64, 1000])
def test_any_chunk_gives_the_sums_and_gradients_of_all_logits_at_once(chunk):
    inputs = make_inputs()
    assert_equal(sums_and_gradients(inputs, chunk=chunk), expected(inputs))


@pytest.mark.parametrize("settings", [{"softcap": 2.0}, {"z_loss": 0.1}, {"softcap": 3.0, "z_loss": 0.01}])
def test_softcap_and_z_loss_and_their_gradients_are_exact(settings):
    inputs = make_inputs()
    assert_equal(sums_and_gradients(inputs, chunk=8, **settings), expected(inputs, **settings))


def test_sums_without_gradients_equal_those_with():
    inputs = make_inputs()
    sums = jax.jit(lambda *x: softmax_cross_entropy(*x, chunk=8))(*inputs)
    assert_equal((sums.loss, sums.weight, sums.metrics["accuracy"]), sums_and_gradients(inputs, chunk=8)[0])


def test_logits_too_large_for_exp_give_finite_sums_and_gradients():
    inputs = make_inputs()
    inputs = (inputs[0] * 1e3, *inputs[1:])
    got = sums_and_gradients(inputs, chunk=8)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(got))
    assert_equal(got, expected(inputs))


def test_targets_of_weight_zero_get_no_gradient():
    inputs = make_inputs()
    _, (dh_BTD, _) = sums_and_gradients(inputs, chunk=8)
    assert float(jnp.max(jnp.abs(dh_BTD[1, 5:]))) == 0.0
    assert float(jnp.max(jnp.abs(dh_BTD[1, :5]))) > 0.0


def test_bfloat16_inputs_keep_float32_sums_and_their_own_gradient_dtype():
    inputs = make_inputs(dtype=jnp.bfloat16)
    (loss, _, _), gradients = sums_and_gradients(inputs, chunk=8)
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]
    wanted_sums, wanted = expected(inputs)
    assert_equal(loss, wanted_sums[0])
    assert_equal(
        jax.tree.map(lambda x: x.astype(jnp.float32), gradients),
        jax.tree.map(lambda x: x.astype(jnp.float32), wanted),
        2.0**-6,
    )


@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (2, 1, 2, 2)])
def test_sums_and_gradients_do_not_depend_on_the_mesh(shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "seq", "tensor"), axis_types=(AxisType.Auto,) * 4)
    keys = jax.random.split(jax.random.key(1), 4)
    inputs = (
        jax.random.normal(keys[0], (8, T, D)),
        jax.random.normal(keys[1], (V, D)),
        jax.random.randint(keys[2], (8, T), 0, V),
        jax.random.uniform(keys[3], (8, T)),
    )
    rows = ("data", "fsdp")
    specs = (P(rows, "seq", None), P("tensor", "fsdp"), P(rows, "seq"), P(rows, "seq"))
    sharded = tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs, strict=True))
    shards = (shape[0] * shape[1], shape[2])
    assert_equal(sums_and_gradients(sharded, chunk=2, shards=shards), expected(inputs))
    assert_equal(sums_and_gradients(sharded, chunk=8), expected(inputs))


def test_a_sharded_walk_communicates_outside_the_loop_only():
    mesh = jax.make_mesh((2, 2, 2, 1), ("data", "fsdp", "seq", "tensor"), axis_types=(AxisType.Auto,) * 4)
    rows = ("data", "fsdp")
    specs = (P(rows, "seq", None), P(), P(rows, "seq"), P(rows, "seq"))
    shapes = ((8, 16, D), (V, D), (8, 16), (8, 16))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    inputs = [
        jax.ShapeDtypeStruct(s, d, sharding=NamedSharding(mesh, p))
        for s, d, p in zip(shapes, dtypes, specs, strict=True)
    ]

    def loss(h, w, targets, weights):
        return softmax_cross_entropy(h, w, targets, weights, chunk=4, shards=(4, 2)).loss

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile().as_text()
    computations = text.split("\n\n")
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert "while(" in text
    for body in computations:
        if any(f" {name}" in body for name in names):
            assert body.lstrip().startswith("ENTRY"), body[:2000]


def test_logits_of_all_tokens_never_exist():
    shapes = ((4, 128, 8), (512, 8), (4, 128), (4, 128))
    dtypes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    gradients = jax.jit(jax.grad(lambda *x: softmax_cross_entropy(*x, chunk=32).loss, (0, 1)))
    shapes = re.findall(r"tensor<([0-9x]+)xf32>", gradients.lower(*inputs).as_text())
    assert max(np.prod([int(n) for n in shape.split("x")]) for shape in shapes) == 32 * 512
