"""The TPU kernel equals attention written out, gradients included, in interpret mode; and compiles for TPUs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.ops.attention import full, kernel, ring, tpu_schedule
from llmjax.ops.attention.mask import block_spans, cross_mask, self_mask
from llmjax.ops.attention.pairs import FIRST, LAST, WHOLE, list_pairs
from llmjax.ops.attention.pallas_tpu import PallasTPU
from tests.ops.attention.test_blockwise import assert_equal, assert_moves_alone, packed

B, T, N, H = 2, 300, 4, 16
SEGMENTS, POSITIONS = packed([[140, 1, 139], [300]], T)
MASKS = {
    "causal": self_mask(*packed([[300], [280]], T)),
    "bidirectional": self_mask(SEGMENTS, POSITIONS, causal=False),
    "window": self_mask(SEGMENTS, POSITIONS, window=50),
    "packed": self_mask(SEGMENTS, POSITIONS),
    "cross": cross_mask(SEGMENTS, packed([[70, 10, 120], [290]], T)[0]),
}


def attend(softcap=0.0, rows=256):
    ours = PallasTPU(softcap, rows=rows, keys=128, interpret=True)
    return functools.partial(kernel.attend, ours)


@functools.cache
def make_inputs(K, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(K), 5)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (N,), (B, T, N, H)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def run(attend, inputs, mask):
    """The output, and the gradients of q, k, v and sinks."""

    @jax.jit
    def both(q, k, v, sinks, dout, mask):
        out, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, mask, sinks_N=sinks), q, k, v, sinks)
        return out, *pull(dout)

    return both(*inputs, mask)


@pytest.mark.parametrize("kind, K", list(zip(MASKS, [4, 2, 1, 2, 4])))
def test_every_mask_equals_full_attention(kind, K):
    inputs = make_inputs(K)
    assert_equal(run(attend(), inputs, MASKS[kind]), run(full.attend, inputs, MASKS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_equals_full_attention_for_every_grouping(kind, K):
    inputs, mask = make_inputs(K), MASKS[kind]
    expected = run(functools.partial(full.attend, softcap=2.0), inputs, mask)
    assert_equal(run(attend(2.0), inputs, mask), expected)


def test_one_document_does_not_move_with_another():
    assert_moves_alone(slice(141, 280), lambda x: run(attend(), x, MASKS["packed"]), make_inputs(2))


def test_long_lists_of_pairs_are_cut(monkeypatch):
    inputs, mask = make_inputs(2), MASKS["packed"]
    expected = run(attend(2.0), inputs, mask)
    monkeypatch.setattr(tpu_schedule, "MAX_PAIRS", 4)
    assert_equal(run(attend(2.0), inputs, mask), expected, error=1e-6)


def test_bfloat16_stays_close_to_float32():
    mask = MASKS["packed"]
    exact = run(full.attend, make_inputs(2), mask)
    for x, y in zip(run(attend(), make_inputs(2, jnp.bfloat16), mask)[:4], exact[:4]):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            x.astype(jnp.float32), y, atol=2.0**-5 * float(jnp.max(jnp.abs(y))), rtol=0
        )


def test_in_a_ring_of_two_with_one_key_head_it_equals_full_attention():
    mesh = jax.make_mesh((2,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    tokens, whole = PartitionSpec(None, "seq"), PartitionSpec()
    ours = PallasTPU(rows=512, keys=128, interpret=True)

    def shared(q, k, v, mask, *, sinks_N):
        return jax.shard_map(
            lambda q, k, v, m, s: ring.attend(ours, ring.Ring("seq", 2), q, k, v, m, s),
            mesh=mesh, in_specs=(tokens, tokens, tokens, whole, whole), out_specs=tokens, check_vma=False,
        )(q, k, v, mask, sinks_N)  # fmt: skip

    inputs, mask = make_inputs(1), MASKS["packed"]
    assert_equal(run(shared, inputs, mask), run(full.attend, inputs, mask))


def test_blocks_that_nobody_needs_are_never_touched():
    """Weights of 0 times a value that is not a number would show."""
    q, k, v, _, dout = (x if x.ndim == 1 else x[:1, :256] for x in make_inputs(2))
    segments, positions = packed([[128, 128]], 256)
    mask = self_mask(segments, positions)
    mask = dataclasses.replace(mask, q_segments_BT=segments[:, 128:], q_positions_BT=positions[:, 128:])
    bad = [x.at[:, :128].set(jnp.nan) for x in (k, v)]
    out, dq, dk, dv, _ = run(attend(), (q[:, 128:], *bad, None, dout[:, 128:]), mask)
    for x in (out, dq, dk, dv):
        assert np.isfinite(x).all()
    assert not np.asarray(dk[:, :128]).any() and not np.asarray(dv[:, :128]).any()


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_the_pairs_are_those_in_which_a_token_sees_another(kind, by_keys):
    mask, size = MASKS[kind], 20
    q = block_spans(mask.q_segments_BT, mask.q_positions_BT, size)
    k = block_spans(mask.k_segments_BS, mask.k_positions_BS, size)
    n = T // size
    pairs = list_pairs(mask, q, k, (n, n), by_keys=by_keys)
    count = int(pairs.count[0])
    codes, flags = np.asarray(pairs.codes[:count]), np.asarray(pairs.flags[:count])
    seen = np.asarray(mask.dense_BTS()).reshape(B, n, size, n, size)
    needed, whole = seen.any((2, 4)), seen.all((2, 4))
    if by_keys:
        needed, whole = needed.swapaxes(1, 2), whole.swapaxes(1, 2)
    np.testing.assert_array_equal(codes, np.flatnonzero(needed))
    np.testing.assert_array_equal(flags & WHOLE != 0, whole.reshape(-1)[codes])
    rows = codes // n
    np.testing.assert_array_equal(flags & FIRST != 0, np.r_[True, rows[1:] != rows[:-1]])
    np.testing.assert_array_equal(flags & LAST != 0, np.r_[rows[1:] != rows[:-1], True])


def test_a_list_is_never_empty():
    segments, positions = packed([[]], 40)
    mask = self_mask(segments, positions)
    span = block_spans(segments, positions, 20)
    pairs = list_pairs(mask, span, span, (2, 2), by_keys=False)
    assert (pairs.count[0], pairs.codes[0], pairs.flags[0]) == (1, 0, FIRST | LAST)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_it_compiles_for_a_tpu_and_hides_every_hop_of_a_ring(topology):
    from llmjax.plan.hlo import parse, traffic
    from llmjax.plan.topology import topology_devices

    mesh = Mesh(topology_devices(topology), "seq")
    tokens, whole = PartitionSpec(None, "seq"), PartitionSpec()

    def loss(q, k, v, mask):
        out = jax.shard_map(
            lambda q, k, v, mask: ring.attend(PallasTPU(), ring.Ring("seq", 8), q, k, v, mask),
            mesh=mesh, in_specs=(tokens, tokens, tokens, whole), out_specs=tokens, check_vma=False,
        )(q, k, v, mask)  # fmt: skip
        return jnp.sum(out.astype(jnp.float32))

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    q, k = (abstract((1, 16_384, heads, 128), jnp.bfloat16, tokens) for heads in (8, 2))
    mask = self_mask(*[abstract((1, 16_384), jnp.int32, whole)] * 2)
    module = parse.parse(jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, mask).compile().as_text())
    hops = traffic.collectives(module)
    assert {hop.kind for hop in hops} == {"collective-permute"}
    # Journeys of 1, 2, 4 and 7 hops: keys forwards, keys and gradients backwards.
    assert len(hops) == 3 * (1 + 2 + 4 + 7)

    def runs_a_kernel(ins):
        inner = [module.computations[name] for name in ins.called("calls", "body", "branch_computations")]
        return "tpu_custom_call" in ins.attributes or any(
            runs_a_kernel(x) for computation in inner for x in computation.instructions.values()
        )

    for hop in hops:
        assert hop.asynchronous and any(map(runs_a_kernel, hop.between)), hop.instruction.name
