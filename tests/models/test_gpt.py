"""The GPT: documents do not leak, packing changes nothing, the cache equals the full pass, scan equals unrolled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sections import block_section

from llmjax.models.gpt import GPT
from llmjax.nn.config import resolve
from llmjax.nn.layer_compute import LayerCompute
from llmjax.ops.logits import head_logits
from llmjax.ops.rope import SCALINGS
from llmjax.types import Batch

V, T = 61, 24
TINY = block_section(num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, init_std=0.2)
VARIANTS = {
    "llama": TINY,
    "gpt2": dataclasses.replace(
        TINY,
        num_kv_heads=0,
        activation="gelu",
        norm="layernorm",
        position="learned",
        qk_norm=False,
        use_bias=True,
    ),
    "multi_query_relu2": dataclasses.replace(
        TINY,
        num_kv_heads=1,
        activation="relu2",
        position="sinusoidal",
        tie_embeddings=False,
        logit_softcap=5.0,
    ),
    "scan": TINY,
    "local_and_global": dataclasses.replace(
        TINY,
        num_layers=3,
        window=4,
        global_every=2,
        attention_softcap=2.0,
        attention_sinks=True,
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_len=8,
    ),
}


SCAN = LayerCompute(scan_layers=True)


def make_gpt(config, compute=LayerCompute()):  # noqa: B008
    return GPT(resolve(config), V, T, compute=compute)


def make_variant(name):
    return make_gpt(VARIANTS[name], SCAN if name == "scan" else LayerCompute())


@functools.partial(jax.jit, static_argnums=0)
def logits_of(gpt, params, batch, rng=None):
    return head_logits(gpt.apply(params, batch, rng=rng).hidden_BTD, gpt.head(params))


init = jax.jit(lambda gpt: every_bias(gpt.init(jax.random.key(0))), static_argnums=0)
decode = jax.jit(GPT.decode, static_argnums=0)


def packed_batch(lengths_by_row, seed=0):
    rng = np.random.default_rng(seed)
    B = len(lengths_by_row)
    arrays = {k: np.zeros((B, T), np.int32) for k in ("tokens", "targets", "segments", "positions")}
    for b, lengths in enumerate(lengths_by_row):
        start = 0
        for s, n in enumerate(lengths, 1):
            arrays["tokens"][b, start : start + n] = rng.integers(1, V, n)
            arrays["targets"][b, start : start + n] = rng.integers(1, V, n)
            arrays["segments"][b, start : start + n] = s
            arrays["positions"][b, start : start + n] = np.arange(n)
            start += n
    return Batch(
        weights=(arrays["segments"] > 0).astype(np.float32), index=np.arange(B, dtype=np.int32), **arrays
    )


def every_bias(params, seed=1):
    """Parameters with biases and scales moved off their initial constants, so that they matter."""
    leaves, treedef = jax.tree.flatten(params)
    rngs = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        [x + 0.1 * jax.random.normal(r, x.shape) for x, r in zip(leaves, rngs, strict=True)]
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_axes_name_every_dimension(variant):
    gpt = make_variant(variant)
    params = jax.eval_shape(gpt.init, jax.random.key(0))
    jax.tree.map(
        lambda x, axes: (x.ndim == len(axes)) or pytest.fail(f"{x.shape} {axes}"),
        params,
        gpt.axes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_logits_equal_each_document_alone(variant):
    gpt = make_variant(variant)
    params = init(gpt)
    batch = packed_batch([[7, 11, 4], [24]])
    packed = logits_of(gpt, params, batch)
    start = 0
    for n in (7, 11, 4):
        alone = np.zeros((1, T), np.int32)
        alone[0, :n] = batch.tokens[0, start : start + n]
        segments = (np.arange(T)[None] < n).astype(np.int32)
        one = Batch(
            alone,
            alone,
            segments.astype(np.float32),
            segments,
            np.arange(T, dtype=np.int32)[None] * segments,
            np.zeros(1, np.int32),
        )
        logits = logits_of(gpt, params, one)
        np.testing.assert_allclose(logits[0, :n], packed[0, start : start + n], rtol=2e-5, atol=2e-5)
        start += n


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decode_equals_the_full_pass(variant):
    gpt = make_variant(variant)
    params = init(gpt)
    batch = packed_batch([[20], [13]])
    expected = logits_of(gpt, params, batch)
    prompt = np.array([5, 3])  # different prompt lengths share a prefill
    valid = np.arange(5)[None] < prompt[:, None]
    cache = gpt.make_cache(2, 5 + 10)
    logits, cache = decode(gpt, params, jnp.where(valid, batch.tokens[:, :5], 0), cache, valid)
    for b, n in enumerate(prompt):
        np.testing.assert_allclose(logits[b, :n], expected[b, :n], rtol=2e-5, atol=2e-5)
    for step in range(10):
        at = prompt + step
        tokens = batch.tokens[np.arange(2), at][:, None]
        logits, cache = decode(gpt, params, tokens, cache)
        np.testing.assert_allclose(logits[:, 0], expected[np.arange(2), at], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_logits_depend_on_distances_and_not_on_where_the_text_begins(scaling):
    """Training, prefill and decoding at 131 thousand, a million, ... positions, up to the last that int32 has."""
    length = {"rope_original_len": 8} if SCALINGS[scaling].reads_length else {}
    factor = {"rope_factor": 4.0} if scaling != "none" else {}
    gpt = make_gpt(dataclasses.replace(TINY, rope_scaling=scaling, window=9, **length, **factor))
    params, batch = init(gpt), packed_batch([[T]])
    tokens = jnp.asarray(batch.tokens)

    def at(start):
        trained = logits_of(
            gpt, params, dataclasses.replace(batch, positions=batch.positions + np.int32(start))
        )
        cache = gpt.make_cache(1, T)
        cache = dataclasses.replace(cache, next_position_B=cache.next_position_B + np.int32(start))
        prefilled, cache = decode(gpt, params, tokens[:, :-1], cache)
        decoded, _ = decode(gpt, params, tokens[:, -1:], cache)
        return trained, prefilled, decoded

    near = at(0)
    for start in (131_072, 2**20, 2**22, 2**24, 2**31 - T):
        for here, there in zip(near, at(start), strict=True):
            np.testing.assert_allclose(there, here, rtol=2e-5, atol=2e-5)


def test_no_gradient_crosses_documents():
    gpt = make_gpt(TINY)
    params = init(gpt)
    batch = packed_batch([[7, 11, 4]])

    def second_document(noise_TD):
        table = params["embedding"]["embedding_VD"]
        # each position looks up a table row of its own, so that its gradient is separate
        rows = jnp.concatenate([table, table[batch.tokens[0]] + noise_TD])
        moved = dataclasses.replace(batch, tokens=V + jnp.arange(T, dtype=jnp.int32)[None])
        hidden = gpt.apply(params | {"embedding": {"embedding_VD": rows}}, moved).hidden_BTD
        return jnp.sum(jnp.sin(hidden[0, 7:18]))

    gradient = np.abs(jax.jit(jax.grad(second_document))(jnp.zeros((T, 16)))).sum(axis=1)
    assert (gradient[7:18] > 0).all()
    assert (np.delete(gradient, slice(7, 18)) == 0).all()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scan_equals_unrolled_with_gradients(remat):
    batch = packed_batch([[7, 11, 4], [24]])

    def loss(gpt, params):
        return jnp.sum(
            jnp.square(head_logits(gpt.apply(params, batch).hidden_BTD, gpt.head(params)))
            * batch.weights[..., None]
        )

    unrolled = make_gpt(TINY)
    params = init(unrolled)
    expected = jax.jit(jax.value_and_grad(lambda p: loss(unrolled, p)))(params)
    scanned = make_gpt(TINY, LayerCompute(scan_layers=True, remat=remat))
    got = jax.jit(jax.value_and_grad(lambda p: loss(scanned, p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), expected, got)


def test_training_computes_no_statistics_of_layers():
    gpt = make_variant("scan")
    params, batch = jax.eval_shape(gpt.init, jax.random.key(0)), packed_batch([[24]])

    def scanned_outputs(function):
        # A loop over cosine and sine of the positions, and one over the layers.
        _, scan = [e for e in jax.make_jaxpr(function)(params, batch).eqns if e.primitive.name == "scan"]
        return len(scan.outvars)

    assert scanned_outputs(gpt.apply) == 1
    assert scanned_outputs(gpt.activations) == 1 + 3


def test_dropout_follows_the_sequence_not_its_place_in_the_batch():
    gpt = make_gpt(dataclasses.replace(TINY, dropout=0.3))
    params = init(gpt)
    batch = packed_batch([[24], [24], [24], [24]])
    rng = jax.random.key(5)
    whole = logits_of(gpt, params, batch, rng)
    half = logits_of(gpt, params, jax.tree.map(lambda x: x[2:], batch), rng)
    np.testing.assert_allclose(whole[2:], half, rtol=1e-5, atol=1e-5)
    assert not np.allclose(whole, logits_of(gpt, params, batch))
    assert not np.allclose(whole, logits_of(gpt, params, batch, jax.random.key(6)))


def flops(gpt, attended):
    return gpt.cost(attended, 1.0, T).flops_per_token


def test_flops_count_weights_and_attended_keys():
    config = dataclasses.replace(TINY, num_kv_heads=0, activation="gelu")
    gpt = make_gpt(config)
    params = jax.eval_shape(gpt.init, jax.random.key(0))
    matrices = sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(params) if "scale" not in str(path)
    )
    assert flops(gpt, 0.0) == 6 * matrices
    assert flops(gpt, 10.0) - flops(gpt, 0.0) == 12 * 2 * 16 * 10
    local = make_gpt(dataclasses.replace(config, window=4, global_every=2))
    assert flops(local, 10.0) - flops(local, 0.0) == 12 * 16 * (4 + 10)
