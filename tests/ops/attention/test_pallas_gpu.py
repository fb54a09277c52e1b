"""The GPU kernels equal attention written out, gradients included: in interpret mode, and on a GPU where there is one.

They lower to Triton without a GPU; only one can tell that they are right there (`pytest -m gpu`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from quick import AS_FOR_USERS

from llmjax.ops.attention import blockwise, full, gpu_schedule, kernel, pallas_gpu, ring
from llmjax.ops.attention.mask import Mask, block_spans, cross_mask, self_mask
from llmjax.ops.attention.pairs import list_rows
from llmjax.ops.attention.pallas_gpu import PallasGPU
from tests.ops.attention.test_blockwise import (
    MASKS,
    PACKED,
    assert_equal,
    assert_moves_alone,
    make_inputs,
    packed,
    run,
    without_sinks,
)

# by jax 0.12, which still has it
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

interpreted = functools.partial(pallas_gpu.attend, interpret=True)


def case(kind, **sizes):
    make, arrays, settings = MASKS[kind]
    return make_inputs(T=arrays[0].shape[1], **sizes), make(*arrays, **settings)


@pytest.mark.parametrize("kind, K", list(zip(MASKS, [1, 2, 4, 2, 1, 4, 1])))
def test_every_mask_equals_full_attention(kind, K):
    inputs, mask = case(kind, K=K)
    got = run(interpreted, without_sinks(inputs), mask, block=16)
    assert_equal(got, run(full.attend, without_sinks(inputs), mask))


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_equals_full_attention_for_every_grouping_with_sinks(kind, K, softcap):
    inputs, mask = case(kind, K=K)
    got = run(interpreted, inputs, mask, softcap=softcap, block=16)
    assert_equal(got, run(full.attend, inputs, mask, softcap=softcap))


def test_soft_cap_and_sinks_equal_full_attention():
    inputs, mask = case("packed")
    got = run(interpreted, inputs, mask, softcap=1.5, block=16)
    assert_equal(got, run(full.attend, inputs, mask, softcap=1.5))


def test_one_document_does_not_move_with_another():
    mask = self_mask(*PACKED)
    assert_moves_alone(slice(14, 34), lambda x: run(interpreted, x, mask, block=16), make_inputs())


@pytest.mark.parametrize(
    "block, N, K, H", [(128, 3, 1, 20), pytest.param(32, 6, 2, 16, marks=pytest.mark.slow)]
)
def test_sizes_need_be_no_powers_of_two(block, N, K, H):
    inputs, mask = make_inputs(N=N, K=K, H=H), self_mask(*PACKED)
    assert_equal(run(interpreted, inputs, mask, block=block), run(full.attend, inputs, mask))


@pytest.mark.slow
def test_tokens_may_lie_in_any_order():
    order = jax.random.permutation(jax.random.key(3), 40)
    mask = self_mask(*(x[:, order] for x in PACKED))
    q, k, v, sinks, dout = make_inputs()
    inputs = [*(x[:, order] for x in (q, k, v)), sinks, dout[:, order]]
    assert_equal(run(interpreted, inputs, mask, block=16), run(full.attend, inputs, mask))


def test_lists_in_parts_change_nothing(monkeypatch):
    """Where a list for all blocks would be too long, the kernel is called for some of them after the other."""
    inputs, mask = make_inputs(), self_mask(*PACKED, window=7)
    ours = functools.partial(interpreted, block=16)
    whole = jax.jit(functools.partial(run.__wrapped__, ours)).lower(inputs, mask)
    monkeypatch.setattr(gpu_schedule, "MAX_LISTED_BLOCKS", 8)
    parts = jax.jit(functools.partial(run.__wrapped__, ours)).lower(inputs, mask)
    assert parts.as_text().count("stablehlo.while") > whole.as_text().count("stablehlo.while")
    parts, whole = (program.compile(compiler_options=AS_FOR_USERS) for program in (parts, whole))
    assert_equal(parts(inputs, mask), whole(inputs, mask), error=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_keys_may_come_in_parts(dtype):
    """The contract that a ring uses: softmax and gradients start from what is there, and each is optional."""
    (q, k, v, sinks, dout), mask = make_inputs(), self_mask(*PACKED)
    ours, sizes = PallasGPU(block=16, interpret=True), kernel.sizes_of(q, k)
    cut, softmax = ours.cut_queries(q, sizes.K), kernel.initial_softmax(ours, sizes, q, sinks, dtype)
    forward, backward = jax.jit(ours.forward), jax.jit(ours.backward)
    parts = [(at, ours.cut_keys(k[:, at : at + 20], v[:, at : at + 20])) for at in (20, 0)]
    for at, kv in parts:
        softmax = forward(cut, kv, mask.part(0, 40, at, 20), softmax)
    out, lse = softmax
    assert out.dtype == dtype and lse.dtype == jnp.float32
    out = ours.join_queries(out, 40).astype(jnp.float32)
    wanted, dq_wanted, *dkv_wanted, _ = run(full.attend, (q, k, v, sinks, dout), mask)
    assert_equal(out, wanted, error=1e-5 if dtype == jnp.float32 else 2.0**-7)

    dcut, delta = kernel.output_gradients(ours, sizes, wanted, dout)
    dq, dkv = jnp.ones(cut.shape, dtype), {}
    for at, kv in parts:
        arrays = cut, kv, mask.part(0, 40, at, 20), dcut, lse, delta
        dq, nothing = backward(*arrays, dq, None)
        assert nothing is None
        nothing, dkv[at] = backward(*arrays, None, jnp.ones(kv.shape, dtype))
        assert nothing is None and dkv[at].dtype == dq.dtype == dtype
    grads = [ours.join_keys(dkv[at], 20) for at in (0, 20)]
    got = dq[:, :40], *(jnp.concatenate(x, 1) for x in zip(*grads))
    error = 1e-5 if dtype == jnp.float32 else 2.0**-7
    assert_equal(
        [x.astype(jnp.float32) for x in got], [x + 1.0 for x in (dq_wanted, *dkv_wanted)], error=error
    )


def test_rows_that_need_nothing_keep_what_they_have():
    q, k, v, *_ = make_inputs(B=1)
    segments, positions = packed([[16, 24]], 40)
    mask = Mask(segments, jnp.where(segments == 1, 9, segments), positions, positions)
    ours = PallasGPU(block=16, interpret=True)
    before = [jax.random.normal(jax.random.key(1), shape) for shape in ((1, 48, 4, 8), (1, 48, 4))]
    after = jax.jit(ours.forward)(ours.cut_queries(q, 2), ours.cut_keys(k, v), mask, tuple(before))
    for x, y in zip(after, before):
        np.testing.assert_array_equal(x[:, :16], y[:, :16])
        assert not np.array_equal(x[:, 16:40], y[:, 16:40])


def test_what_no_query_sees_is_never_touched():
    """Weights of 0 times a value that is not a number would show."""
    (q, k, v, _, dout), (segments, positions) = make_inputs(B=1, T=48, S=48), packed([[16, 32]], 48)
    mask = Mask(segments[:, 32:], segments, positions[:, 32:], positions, window=17)
    bad = [x.at[:, :16].set(jnp.nan) for x in (k, v)]
    out, dq, dk, dv, _ = run(interpreted, (q[:, 32:], *bad, None, dout[:, 32:]), mask, block=16)
    for x in (out, dq, dk, dv):
        assert np.isfinite(x).all()
    assert not np.asarray(dk[:, :16]).any() and not np.asarray(dv[:, :16]).any()


def test_bfloat16_stays_close_to_float32():
    inputs, mask = without_sinks(make_inputs(dtype=jnp.bfloat16)), self_mask(*PACKED)
    assert_close(run(interpreted, inputs, mask, block=16), exact(inputs, mask))


def exact(inputs, mask):
    return run(full.attend, jax.tree.map(lambda x: x.astype(jnp.float32), inputs), mask)


def assert_close(got, wanted):
    for x, y in zip(got[:4], wanted[:4]):
        assert x.dtype == jnp.bfloat16
        largest = float(jnp.max(jnp.abs(y)))
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=2.0**-6 * largest, rtol=0)


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_the_lists_are_the_blocks_with_anything_visible(kind, by_keys):
    mask = case(kind)[1]
    q = block_spans(mask.q_segments_BT, mask.q_positions_BT, 4)
    k = block_spans(mask.k_segments_BS, mask.k_positions_BS, 8)
    visible = np.asarray(mask.dense_BTS())
    visible = visible.reshape(2, q[0].shape[1], 4, k[0].shape[1], 8).swapaxes(2, 3)
    if by_keys:
        visible = visible.swapaxes(1, 2)
    seen, whole = visible.any((3, 4)), visible.all((3, 4))
    blocks, counts = list_rows(mask, q, k, by_keys=by_keys)
    for row in np.ndindex(*seen.shape[:2]):
        masked, needed = np.asarray(counts[row])
        listed = np.asarray(blocks[row])
        assert set(listed[:masked]) == set(np.flatnonzero(seen[row] & ~whole[row])) and masked <= needed
        assert set(listed[masked:needed]) == set(np.flatnonzero(whole[row])) and needed == seen[row].sum()


def in_a_ring(ours, devices):
    """`attend` of the queries and keys that `devices` share."""
    n = len(devices)
    mesh = jax.make_mesh((n,), ("seq",), devices=devices, axis_types=(AxisType.Auto,))
    shared, whole = PartitionSpec(None, "seq"), PartitionSpec()

    def attend(q, k, v, mask, *, softcap, sinks_N):
        return jax.shard_map(
            lambda *arrays: ring.attend(ours(softcap), ring.Ring("seq", n), *arrays),
            mesh=mesh,
            in_specs=(shared, shared, shared, whole, whole),
            out_specs=shared,
            check_vma=False,
        )(q, k, v, mask, sinks_N)

    return attend


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"causal": False, "window": 9}, marks=pytest.mark.slow)]
)
def test_a_ring_of_devices_equals_full_attention(n, settings):
    inputs, mask = make_inputs(), self_mask(*PACKED, **settings)
    ours = functools.partial(PallasGPU, block=16, interpret=True)
    got = run(in_a_ring(ours, jax.devices()[:n]), inputs, mask)
    assert_equal(got, run(full.attend, inputs, mask))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("kind", ["packed", "window to both sides", "cross"])
def test_the_kernels_lower_to_triton(kind, H, dtype):
    """What Triton has no rule for, or no shape, fails here; the compiler proper needs a GPU or its plugin."""
    inputs, mask = case(kind, H=H, dtype=jnp.dtype(dtype))
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=h100)):
        text = run.trace(pallas_gpu.attend, inputs, mask, softcap=1.5).lower(lowering_platforms=("cuda",))
    calls = text.as_text().count("__gpu$xla.gpu.triton") + text.as_text().count("triton_kernel_call")
    assert calls == 3


# On a GPU. Products of float32 are as exact there as float32 is only when asked for.


@pytest.fixture
def gpus():
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"no GPU that jax sees, with JAX_PLATFORMS={jax.config.jax_platforms!r}: {error}")
    with jax.default_device(devices[0]), jax.default_matmul_precision("highest"):
        yield devices


LENGTHS = [[130, 1, 300, 60], [520]]
LONG = {
    "causal": self_mask(*packed([[520], [520]], 520)),
    "bidirectional": self_mask(*packed(LENGTHS, 520), causal=False),
    "window": self_mask(*packed(LENGTHS, 520), window=100),
    "window to both sides": self_mask(*packed(LENGTHS, 520), causal=False, window=100),
    "packed": self_mask(*packed(LENGTHS, 520)),
    "cross": cross_mask(packed(LENGTHS, 520)[0], packed([[70, 10, 200], [290]], 300)[0]),
}


def long_case(kind, gpu, **sizes):
    mask = LONG[kind]
    inputs = make_inputs(T=520, S=mask.k_segments_BS.shape[1], N=8, **sizes)
    return jax.device_put((inputs, mask), gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("K, H", [(8, 64), (2, 128), (1, 80)])
@pytest.mark.parametrize("kind", LONG)
def test_on_a_gpu_every_mask_equals_full_attention(kind, K, H, softcap, gpus):
    inputs, mask = long_case(kind, gpus[0], K=K, H=H)
    got = run(pallas_gpu.attend, inputs, mask, softcap=softcap)
    assert_equal(got, run(full.attend, inputs, mask, softcap=softcap))


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("kind", LONG)
def test_on_a_gpu_bfloat16_stays_close_to_float32(kind, H, gpus):
    inputs, mask = long_case(kind, gpus[0], K=2, H=H, dtype=jnp.bfloat16)
    assert_close(run(pallas_gpu.attend, without_sinks(inputs), mask), exact(without_sinks(inputs), mask))


@pytest.mark.gpu
def test_on_a_gpu_lists_in_parts_change_nothing(gpus, monkeypatch):
    inputs, mask = long_case("packed", gpus[0], K=2, H=64)
    whole = run(pallas_gpu.attend, inputs, mask)
    monkeypatch.setattr(gpu_schedule, "MAX_LISTED_BLOCKS", 20)
    run.clear_cache()
    assert_equal(run(pallas_gpu.attend, inputs, mask), whole, error=0.0)
    run.clear_cache()


@pytest.mark.gpu
def test_on_a_gpu_a_long_sequence_equals_attention_by_blocks(gpus):
    lengths = [[5000, 3, 1300, 8000, 1500]]
    mask = self_mask(*packed(lengths, 16384))
    inputs, mask = jax.device_put((make_inputs(B=1, T=16384, S=16384, H=64), mask), gpus[0])
    assert_equal(run(pallas_gpu.attend, inputs, mask), run(blockwise.attend, inputs, mask))


@pytest.mark.gpu
def test_a_ring_of_gpus_equals_full_attention(gpus):
    n = next(n for n in (8, 4, 2, 1) if n <= len(gpus))
    if n == 1:
        pytest.skip("one GPU is no ring")
    inputs, mask = make_inputs(T=520, S=520, N=8, K=2, H=64), LONG["packed"]
    wanted = run(full.attend, *jax.device_put((inputs, mask), gpus[0]))
    assert_equal(run(in_a_ring(PallasGPU, gpus[:n]), inputs, mask), wanted)
