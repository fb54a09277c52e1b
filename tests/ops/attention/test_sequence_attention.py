"""However a sequence is shared by devices, attention is that of the whole, gradients included; and no document moves
with another."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from llmjax.ops.attention import full, ring, sequence_attention, ulysses
from llmjax.ops.attention.mask import cross_mask, self_mask
from llmjax.ops.attention.pallas_tpu import PallasTPU
from llmjax.ops.attention.sequence_attention import Sharing, make_attend
from tests.ops.attention.test_blockwise import assert_equal, assert_moves_alone, packed

B, T, N, H = 2, 32, 8, 4
DOCUMENTS = packed([[9, 1, 14], [32]], T)
MASKS = {
    "causal": self_mask(*packed([[32], [27]], T)),
    "bidirectional": self_mask(*DOCUMENTS, causal=False),
    "window": self_mask(*DOCUMENTS, window=5),
    "packed": self_mask(*DOCUMENTS),
    "cross": cross_mask(DOCUMENTS[0], packed([[5, 2, 20], [30]], T)[0]),
}
WAYS = [("gather", 1), ("ring", 1), ("ulysses", 0), ("hybrid", 2)]


@functools.cache
def make_inputs(K):
    keys = jax.random.split(jax.random.key(K), 5)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (N,), (B, T, N, H)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def over_devices(algorithm, n, degree, kernel="blockwise"):
    """The attention of `n` simulated devices, of which each is given its part."""
    mesh = jax.make_mesh((n,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    attend = make_attend(kernel, Sharing(algorithm, "seq", n, degree or n))
    tokens, whole = PartitionSpec(None, "seq"), PartitionSpec()

    def shared(q, k, v, mask, *, softcap, sinks_N):
        return jax.shard_map(
            lambda q, k, v, mask, sinks: attend(q, k, v, mask, softcap=softcap, sinks_N=sinks),
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, whole, whole),
            out_specs=tokens,
            check_vma=False,
        )(q, k, v, mask, sinks_N)

    return shared


@functools.partial(jax.jit, static_argnames=("attend", "softcap"))
def run(attend, inputs, mask, softcap=0.0):
    """The output, and the gradients of q, k, v and sinks."""
    q, k, v, sinks, dout = inputs
    attend = functools.partial(attend, softcap=softcap)
    out, pull = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, mask, sinks_N=sinks), q, k, v, sinks)
    return out, *pull(dout)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of 4 tokens, so that a device has several; of the TPU kernel the smallest that there are, interpreted."""
    kernels = sequence_attention.KERNELS
    monkeypatch.setitem(kernels, "blockwise", functools.partial(kernels["blockwise"], block=4))
    pallas = functools.partial(PallasTPU, rows=128, keys=128, interpret=True)
    monkeypatch.setitem(sequence_attention.KERNELS, "pallas_tpu", pallas)


def check(kind, K, algorithm, n, degree, softcap=0.0, kernel="blockwise"):
    inputs = make_inputs(K)
    expected = run(full.attend, inputs, MASKS[kind], softcap)
    assert_equal(run(over_devices(algorithm, n, degree, kernel), inputs, MASKS[kind], softcap), expected)


@pytest.mark.parametrize("kind, K", list(zip(MASKS, [8, 2, 1, 4, 2])))
@pytest.mark.parametrize("algorithm, degree", WAYS)
def test_four_devices_equal_one(algorithm, degree, kind, K):
    check(kind, K, algorithm, 4, degree, softcap=2.0 if kind == "packed" else 0.0)


# Those that run on any device.
PORTABLE = [name for name in sequence_attention.KERNELS if name in sequence_attention.ATTENTION]


@pytest.mark.parametrize("kernel", PORTABLE)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_every_kernel_equals_the_reference_on_one_device_and_in_a_ring(kernel, softcap):
    inputs, mask = make_inputs(2), MASKS["packed"]
    expected = run(full.attend, inputs, mask, softcap)
    assert_equal(run(sequence_attention.make_attend(kernel), inputs, mask, softcap), expected)
    check("packed", 2, "ring", 4, 1, softcap, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(  # every pair of two of them
    "n, kind, K",
    [(n, kind, (1, 2, 8)[(i + j) % 3]) for i, n in enumerate([1, 2, 4, 8]) for j, kind in enumerate(MASKS)],
)
@pytest.mark.parametrize("algorithm, degree", [*WAYS, ("hybrid", 4)])
def test_any_number_of_devices_equals_one_for_every_mask_and_grouping(algorithm, degree, n, K, kind):
    if algorithm == "hybrid" and n % degree:
        pytest.skip("no such groups")
    check(kind, K, algorithm, n, degree)


@pytest.mark.slow
@pytest.mark.parametrize("kind, K", list(zip(MASKS, [8, 2, 1, 1, 2])))
@pytest.mark.parametrize("algorithm, n, degree", [("ring", 4, 1), ("ring", 8, 1), ("hybrid", 8, 2)])
def test_rings_of_the_tpu_kernel_equal_one_device(algorithm, n, degree, kind, K):
    # The kernel is interpreted, which takes most of a minute on eight devices.
    if (algorithm, n) == ("ring", 8) and kind != "packed":
        pytest.skip("a ring of eight devices is tried with one mask")
    check(kind, K, algorithm, n, degree, kernel="pallas_tpu")


@pytest.mark.parametrize("algorithm, degree", WAYS)
def test_one_document_does_not_move_with_another(algorithm, degree):
    attend = over_devices(algorithm, 4, degree)
    assert_moves_alone(slice(10, 24), lambda x: run(attend, x, MASKS["packed"]), make_inputs(2))


@pytest.mark.parametrize("order", ["zigzag", "striped", "random"])
def test_tokens_may_lie_in_any_order_around_the_ring(order):
    index = np.arange(T)
    columns = {
        "zigzag": np.concatenate([np.r_[i * 4 : i * 4 + 4, 28 - i * 4 : 32 - i * 4] for i in range(4)]),
        "striped": index.reshape(-1, 4).T.reshape(-1),
        "random": np.random.default_rng(0).permutation(T),
    }[order]
    q, k, v, sinks, dout = make_inputs(2)
    expected = run(full.attend, (q, k, v, sinks, dout), MASKS["packed"])
    moved = [*(x[:, columns] for x in (q, k, v)), sinks, dout[:, columns]]
    mask = self_mask(*(x[:, columns] for x in DOCUMENTS))
    got = run(over_devices("ring", 4, 1), moved, mask)
    assert_equal(got, [*(x[:, columns] for x in expected[:4]), expected[4]])


@pytest.mark.parametrize("lengths, window, hops", [
    ([8, 8, 8, 8], 0, (0, 0)),
    ([8, 12, 12], 0, (1, 0)),
    ([32], 5, (1, 0)),
    ([32], 9, (1, 0)),
    ([32], 10, (2, 1)),
    ([32], 0, (2, 1)),
])  # fmt: skip
def test_keys_travel_no_further_than_a_query_needs_them(lengths, window, hops):
    devices, mask = ring.Ring("seq", 4), self_mask(*packed([lengths], T), window=window)
    number = jax.jit(lambda: ring.needed_reach(devices, ring.Sizes(8, 8, 1), mask))()
    assert devices.reaches[number] == hops


@pytest.mark.parametrize("size", range(1, 70))
def test_the_longest_journey_passes_every_device_once(size):
    reaches = ring.Ring("seq", size).reaches
    assert sum(reaches[-1]) == size - 1
    assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(reaches))
    for reach in reaches:
        for at_once in (True, False):
            journey = ring.ring_steps(reach, at_once)
            met = [sign * step.distance % size for step in journey for sign in step.attend]
            assert sorted(met) == sorted({s % size for s in range(-reach[1], reach[0] + 1)} - {0})
            assert sum(len(step.send) for step in journey) == sum(reach)


def test_a_long_journey_is_a_loop_and_still_right(monkeypatch):
    monkeypatch.setattr(ring, "SHORT_KEYS", 0)  # one way after the other: four steps alike in each
    journey = ring.ring_steps((4, 3), at_once=False)
    assert [step.distance for step in journey] == [0, 1, 2, 3, 4, 1, 2, 3]
    check("packed", 2, "ring", 8, 1)


@pytest.mark.parametrize("N, K, size, copies", [
    (32, 8, 8, 1), (32, 8, 4, 1), (32, 8, 16, 2), (32, 8, 32, 4), (8, 1, 4, 4), (12, 4, 6, 3), (12, 12, 6, 1),
    (9, 3, 3, 1),
])  # fmt: skip
def test_key_heads_are_repeated_no_more_than_dealing_them_out_takes(N, K, size, copies):
    assert ulysses.repeats(N, K, size) == copies
    assert K * copies % size == 0 and N % (K * copies) == 0


def test_the_backward_pass_of_the_ring_keeps_its_inputs_output_and_log_sums_alone():
    attend, (q, k, v, sinks, _) = over_devices("ring", 4, 1), make_inputs(2)

    def pull(q, k, v, sinks):
        attention = functools.partial(attend, softcap=0.0)
        return jax.vjp(lambda *x: attention(*x[:3], MASKS["packed"], sinks_N=x[3]), q, k, v, sinks)[1]

    kept = [x for x in jax.tree.leaves(jax.eval_shape(pull, q, k, v, sinks)) if x.dtype == jnp.float32]
    assert sum(x.size for x in kept) == 2 * q.size + k.size + v.size + sinks.size + B * T * N
