"""The chunked loss equals the one written out with all logits, gradients included, for any walk and mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.ops.losses.cross_entropy import OTHERS, TPU, softmax_cross_entropy, token_cross_entropy
from llmjax.types import Head

B, T, D, V = 4, 16, 8, 24


def walk(chunk, block=V, base=OTHERS):
    """One of `chunk` tokens and `block` ids at most."""
    sizes = {"chunk_tokens": chunk, "chunk_bytes": 2**28, "block_bytes": 4 * chunk * block}
    return dataclasses.replace(base, **sizes)


WALKS = {
    "tokens_first": walk(8),
    "ids_first": walk(8, base=TPU),
    "tokens_first_in_blocks": walk(8, 10),
    "ids_first_in_blocks": walk(8, 6, TPU),
    "ids_first_in_uneven_blocks": walk(8, 7, TPU),
}
ALL = {"softcap": 3.0, "z_loss": 0.01}
each_walk = pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS.keys())


def entropy(hidden_BTD, w_VD, targets_BT, weights_BT, *, softcap=0.0, bias_V=None, **settings):
    """`softmax_cross_entropy` as a function of arrays."""
    return softmax_cross_entropy(hidden_BTD, Head(w_VD, bias_V, softcap), targets_BT, weights_BT, **settings)


def make_inputs(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden_BTD = jax.random.normal(keys[0], (B, T, D)).astype(dtype)
    w_VD = jax.random.normal(keys[1], (V, D)).astype(dtype)
    targets_BT = jax.random.randint(keys[2], (B, T), 0, V)
    weights_BT = jax.random.uniform(keys[3], (B, T)).at[1, 5:].set(0.0)
    return hidden_BTD, w_VD, targets_BT, weights_BT


def written_out(hidden_BTD, w_VD, targets_BT, weights_BT, softcap=0.0, z_loss=0.0, bias_V=None):
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD.astype(jnp.float32), w_VD.astype(jnp.float32))
    logits_BTV = logits_BTV if bias_V is None else logits_BTV + bias_V[None, None]
    logits_BTV = softcap * jnp.tanh(logits_BTV / softcap) if softcap else logits_BTV
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    loss_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    loss_BT = loss_BT + z_loss * jax.nn.logsumexp(logits_BTV, axis=-1) ** 2
    correct_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
    return jnp.sum(weights_BT * loss_BT), jnp.sum(weights_BT), jnp.sum(weights_BT * correct_BT)


def sums_and_gradients(inputs, **settings):
    def loss(hidden_BTD, w_VD):
        sums = entropy(hidden_BTD, w_VD, *inputs[2:], **settings)
        return 3.0 * sums.main, sums

    (_, sums), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs[:2])
    return (sums.main, sums.weight, sums.metrics["accuracy"]), gradients


def expected(inputs, **settings):
    def loss(hidden_BTD, w_VD):
        sums = written_out(hidden_BTD, w_VD, *inputs[2:], **settings)
        return 3.0 * sums[0], sums

    (_, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*inputs[:2])
    return sums, gradients


def assert_equal(got, wanted, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("base", [OTHERS, TPU], ids=["others", "tpu"])
@pytest.mark.parametrize("chunk", [1, 8, 12, 64, 1000])
def test_any_chunk_gives_the_sums_and_gradients_of_all_logits_at_once(chunk, base):
    inputs = make_inputs()
    assert_equal(sums_and_gradients(inputs, chunking=walk(chunk, base=base)), expected(inputs))


@pytest.mark.parametrize("base", [OTHERS, TPU], ids=["others", "tpu"])
@pytest.mark.parametrize("block", [1, 5, 12, 23, 24])
def test_any_block_gives_the_sums_and_gradients_of_all_logits_at_once(block, base):
    inputs = make_inputs()
    assert_equal(sums_and_gradients(inputs, chunking=walk(16, block, base)), expected(inputs))


@each_walk
@pytest.mark.parametrize("settings", [{"softcap": 2.0}, {"z_loss": 0.1}, {"softcap": 3.0, "z_loss": 0.01}])
def test_softcap_and_z_loss_and_their_gradients_are_exact(settings, walk):
    inputs = make_inputs()
    assert_equal(sums_and_gradients(inputs, chunking=walk, **settings), expected(inputs, **settings))


@each_walk
def test_the_loss_is_the_cross_entropy_and_z_loss_has_its_own_name(walk):
    inputs = make_inputs()
    sums, plain = (jax.jit(functools.partial(entropy, chunking=walk, z_loss=z))(*inputs) for z in (0.1, 0.0))
    assert (float(sums.loss), sums.metrics["accuracy"]) == (float(plain.loss), plain.metrics["accuracy"])
    both = written_out(*inputs, z_loss=0.1)[0]
    np.testing.assert_allclose(sums.metrics["z_loss"], both - written_out(*inputs)[0], rtol=1e-5)
    np.testing.assert_allclose(sums.objective, both, rtol=1e-5)
    assert plain.objective is None and set(plain.metrics) == {"accuracy"}


@each_walk
def test_sums_without_gradients_equal_those_with(walk):
    inputs = make_inputs()
    sums = jax.jit(lambda *x: entropy(*x, chunking=walk))(*inputs)
    assert_equal(
        (sums.loss, sums.weight, sums.metrics["accuracy"]), sums_and_gradients(inputs, chunking=walk)[0]
    )


@each_walk
def test_logits_too_large_for_exp_give_finite_sums_and_gradients(walk):
    inputs = make_inputs()
    inputs = (inputs[0] * 1e3, *inputs[1:])
    got = sums_and_gradients(inputs, chunking=walk)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(got))
    assert_equal(got, expected(inputs))


@pytest.mark.parametrize("descending", [False, True])
def test_blocks_whose_logits_lie_far_apart_are_brought_together(descending):
    """By more than float32's exp can tell apart, in either order."""
    hidden_BTD, w_VD, *rest = make_inputs()
    steps_V = jnp.arange(V)[::-1] if descending else jnp.arange(V)
    w_VD = w_VD.at[:, 0].set(100.0 * (steps_V // 8))
    inputs = (hidden_BTD.at[..., 0].set(1.0), w_VD, *rest)
    got = sums_and_gradients(inputs, chunking=walk(8, 8, TPU))
    assert_equal(got, expected(inputs))


@each_walk
def test_targets_of_weight_zero_get_no_gradient(walk):
    inputs = make_inputs()
    _, (dh_BTD, _) = sums_and_gradients(inputs, chunking=walk)
    assert float(jnp.max(jnp.abs(dh_BTD[1, 5:]))) == 0.0
    assert float(jnp.max(jnp.abs(dh_BTD[1, :5]))) > 0.0


@pytest.mark.parametrize("cotangent", [0.0, 1.0, -2.5])
def test_gradients_are_in_proportion_to_the_cotangent(cotangent):
    inputs = make_inputs()

    def pulled(loss):
        _, pull = jax.vjp(lambda h, w: loss(h, w, *inputs[2:]), *inputs[:2])
        return jax.jit(pull)(jnp.float32(cotangent))

    got = pulled(lambda *x: entropy(*x, chunking=WALKS["ids_first_in_blocks"]).loss)
    assert_equal(got, pulled(lambda *x: written_out(*x)[0]))


@each_walk
def test_bfloat16_inputs_keep_float32_sums_and_their_own_gradient_dtype(walk):
    inputs = make_inputs(dtype=jnp.bfloat16)
    (loss, _, _), gradients = sums_and_gradients(inputs, chunking=walk)
    assert loss.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]
    wanted_sums, wanted = expected(inputs)
    assert_equal(loss, wanted_sums[0])
    assert_equal(
        jax.tree.map(lambda x: x.astype(jnp.float32), gradients),
        jax.tree.map(lambda x: x.astype(jnp.float32), wanted),
        2.0**-6,
    )


@each_walk
def test_float32_weights_are_cast_and_their_gradient_is_not_rounded(walk):
    hidden_BTD, w_VD, *rest = make_inputs()

    def value_and_gradients(w_VD):
        return jax.jit(jax.value_and_grad(lambda h, w: entropy(h, w, *rest, chunking=walk).loss, (0, 1)))(
            hidden_BTD.astype(jnp.bfloat16), w_VD
        )

    (loss, (dh_BTD, dw_VD)), (wanted_loss, (wanted_dh_BTD, wanted_dw_VD)) = (
        value_and_gradients(w) for w in (w_VD, w_VD.astype(jnp.bfloat16))
    )
    assert (dh_BTD.dtype, dw_VD.dtype, wanted_dw_VD.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    assert float(loss) == float(wanted_loss)
    np.testing.assert_array_equal(dh_BTD, wanted_dh_BTD)
    np.testing.assert_array_equal(dw_VD.astype(jnp.bfloat16), wanted_dw_VD)
    assert bool(jnp.any(dw_VD != wanted_dw_VD.astype(jnp.float32)))


@each_walk
@pytest.mark.parametrize("shape", [(8, 1, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (2, 2, 2, 1), (2, 1, 2, 2)])
def test_sums_and_gradients_do_not_depend_on_the_mesh(shape, walk):
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
    assert_equal(
        sums_and_gradients(sharded, chunking=walk, shards=shards, vocab_shards=shape[3], **ALL),
        expected(inputs, **ALL),
    )
    assert_equal(sums_and_gradients(sharded, chunking=walk), expected(inputs))


@pytest.mark.parametrize("name", ["tokens_first", "ids_first_in_blocks"])
def test_a_sharded_walk_communicates_outside_the_loop_only(name):
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
        return entropy(h, w, targets, weights, chunking=WALKS[name], shards=(4, 2)).loss

    text = jax.jit(jax.grad(loss, (0, 1))).lower(*inputs).compile().as_text()
    computations = text.split("\n\n")
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert "while(" in text
    for body in computations:
        if any(f" {name}" in body for name in names):
            assert body.lstrip().startswith("ENTRY"), body[:2000]


def largest_arrays(function, *shapes):
    """The most elements of a float32 and of a bfloat16 array in the program of hidden, w, targets, weights."""
    dtypes = (jnp.bfloat16, jnp.float32, jnp.int32, jnp.float32)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    text = jax.jit(jax.grad(lambda *x: function(*x).loss, (0, 1))).lower(*inputs).as_text()
    found = {kind: re.findall(rf"tensor<([0-9x]+)x{kind}>", text) for kind in ("f32", "bf16")}
    return [max(np.prod([int(n) for n in shape.split("x")]) for shape in shapes) for shapes in found.values()]


def test_logits_of_all_tokens_never_exist():
    shapes = ((4, 128, 8), (512, 8), (4, 128), (4, 128))
    run = functools.partial(entropy, chunking=walk(32, 512))
    assert largest_arrays(run, *shapes) == [32 * 512, 32 * 512]


def test_logits_of_a_chunk_exist_in_float32_for_a_block_of_ids_only():
    shapes = ((4, 128, 8), (512, 8), (4, 128), (4, 128))
    run = functools.partial(entropy, chunking=walk(64, 128, TPU))
    assert largest_arrays(run, *shapes) == [64 * 128, 64 * 512]


def test_a_large_vocabulary_makes_chunks_smaller():
    shapes = ((4, 128, 8), (512, 8), (4, 128), (4, 128))
    small = dataclasses.replace(TPU, chunk_bytes=2 * 48 * 512, block_bytes=4 * 32 * 100)
    assert largest_arrays(functools.partial(entropy, chunking=small), *shapes) == [
        8 * 512,
        32 * 512,
    ]


@each_walk
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocab_shards", [1, 4])
def test_a_bias_of_the_head_counts_and_has_its_gradient(walk, softcap, vocab_shards):
    inputs = make_inputs()
    bias_V = 3.0 * jax.random.normal(jax.random.key(9), (V,))

    def by(function, **settings):
        def loss(hidden_BTD, w_VD, bias_V):
            return function(
                hidden_BTD, w_VD, *inputs[2:], softcap=softcap, z_loss=0.01, bias_V=bias_V, **settings
            )

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs[:2], bias_V)

    got = by(lambda *x, **s: entropy(*x, **s).main, chunking=walk, vocab_shards=vocab_shards)
    assert_equal(got, by(lambda *x, **s: written_out(*x, **s)[0]))


@each_walk
@pytest.mark.parametrize("shards, vocab_shards", [((1, 1), 1), ((2, 4), 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_losses_of_tokens_are_those_of_all_logits_and_greedy_decoding_takes_the_first_of_equals(
    walk, shards, vocab_shards, biased
):
    hidden_BTD, w_VD, targets_BT, _ = make_inputs()
    w_VD = w_VD.at[20].set(w_VD[3])  # their logits are equal
    bias_V = jax.random.normal(jax.random.key(9), (V,)).at[20].set(0.5).at[3].set(0.5) if biased else None
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, w_VD)
    logits_BTV = logits_BTV + bias_V[None, None] if biased else logits_BTV
    logits_BTV = 3.0 * jnp.tanh(logits_BTV / 3.0)
    greedy_BT = jnp.argmax(logits_BTV, axis=-1)
    assert bool((greedy_BT == 3).any())
    targets_BT = targets_BT.at[:, ::2].set(greedy_BT[:, ::2])
    targets_BT = jnp.where(targets_BT == 3, jnp.where(jnp.arange(T)[None] % 4 == 0, 20, 3), targets_BT)
    run = functools.partial(token_cross_entropy, shards=shards, vocab_shards=vocab_shards, chunking=walk)
    loss_BT, correct_BT = jax.jit(run)(hidden_BTD, Head(w_VD, bias_V, 3.0), targets_BT)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    assert_equal(loss_BT, -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0])
    np.testing.assert_array_equal(correct_BT, targets_BT == greedy_BT)
