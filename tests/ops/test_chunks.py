"""Any length costs what a round one costs, and equals the whole, gradients included, wherever tokens are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.evaluate.scoring import make_token_losses
from llmjax.nn.token_tiles import by_tiles
from llmjax.ops import chunks
from llmjax.ops.attention import blockwise, full, gpu_schedule, kernel, pallas_gpu, ring, tpu_schedule
from llmjax.ops.attention.mask import self_mask
from llmjax.ops.attention.pallas_tpu import PallasTPU
from llmjax.ops.losses.cross_entropy import OTHERS, TPU
from llmjax.parallel.rules import Layout
from llmjax.types import Batch
from tests.evaluate.fake_models import Copier
from tests.ops.attention.test_blockwise import assert_equal, make_inputs, packed, run
from tests.ops.losses.test_cross_entropy import entropy, expected, sums_and_gradients, walk

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
PRIMES = [n for n in range(2, 1100) if all(n % d for d in range(2, n))]
KERNELS = {
    "blockwise": functools.partial(blockwise.attend, block=16),
    "pallas_gpu": functools.partial(pallas_gpu.attend, block=16, interpret=True),
    "pallas_tpu": lambda *args, softcap, sinks_N: kernel.attend(
        PallasTPU(softcap, rows=256, keys=128, interpret=True), *args, sinks_N
    ),
}


@pytest.mark.parametrize("limit", [1, 2, 3, 16, 100, 256, 512, 1024])
def test_no_length_makes_many_chunks_or_much_filling(limit):
    for tokens in (*range(1, 300), *PRIMES, 2**16 + 1, 2**20 - 3):
        cut = chunks.cut(tokens, limit)
        fewest = -(-tokens // limit)
        assert cut.size <= limit and tokens <= cut.padded
        assert cut.count <= 2 * fewest and cut.padded - tokens < cut.count
        if (tokens, limit) != (3, 2):
            assert cut.padded <= 1.3 * tokens


@pytest.mark.parametrize("tokens, limit", [(4, 8), (512, 128), (1536, 1024), (1100, 512), (4096, 262)])
def test_a_length_with_a_good_divisor_is_cut_by_it(tokens, limit):
    size = max(d for d in range(1, limit + 1) if tokens % d == 0)
    assert chunks.cut(tokens, limit) == chunks.Chunks(tokens, size)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_split_is_joined_without_its_filling(axis):
    x = jnp.arange(7 * 7 * 7).reshape(7, 7, 7) + 1
    cut = chunks.cut(7, 3)
    parts = cut.split(x, axis)
    assert parts.shape == (*x.shape[:axis], 3, 3, *x.shape[axis + 1 :])
    assert np.count_nonzero(parts == 0) == 2 * 7 * 7
    np.testing.assert_array_equal(cut.join(parts, axis), x)
    keys = jax.random.split(jax.random.key(0), (7, 7, 7))
    assert jnp.array_equal(cut.join(cut.split(keys, axis), axis), keys)


def work(kernel, length):
    """Scores that a kernel makes of one causal document, in whole blocks."""
    queries, keys = kernel.sizes(length)
    return sum(
        queries * keys * -(-min(start + queries, length) // keys) for start in range(0, length, queries)
    )


class OfTPU(PallasTPU):
    def sizes(self, length):
        return self._q_size(length, 1), self._k_size(length)


class OfBlockwise(blockwise.Blockwise):
    def sizes(self, length):
        cut = jax.eval_shape(lambda: self.cut_queries(jnp.zeros((1, length, 1, 1)), 1))
        return (cut.shape[3],) * 2


@pytest.mark.parametrize("kernel", [OfBlockwise(), OfTPU()], ids=["blockwise", "pallas_tpu"])
@pytest.mark.parametrize("length", [1031, 2053, 4099, 8209])
def test_attention_of_a_prime_length_does_the_work_of_a_round_one(length, kernel):
    assert work(kernel, length) <= 1.3 * work(kernel, 2 ** (length.bit_length() - 1))


@pytest.mark.parametrize("length", [37, 131])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_a_prime_length_equal_full_attention(name, length):
    if name != "pallas_tpu" and length > 100:
        pytest.skip("enough blocks already")
    mask = self_mask(*packed([[length - 20, 17]], length))
    inputs = make_inputs(B=1, T=length, S=length)
    assert_equal(run(KERNELS[name], inputs, mask), run(full.attend, inputs, mask))


@pytest.mark.parametrize("name, most", [("pallas_tpu", "MAX_PAIRS"), ("pallas_gpu", "MAX_LISTED_BLOCKS")])
def test_lists_of_a_prime_number_of_blocks_are_cut_into_few(name, most, monkeypatch):
    """Seven blocks of the TPU kernel's 128 tokens, or of the GPU kernel's 16."""
    length = {"pallas_tpu": 7 * 128, "pallas_gpu": 7 * 16}[name]
    mask = self_mask(*packed([[length // 3, length // 2]], length))
    inputs = make_inputs(B=1, T=length, S=length, N=2, K=1)
    attend = functools.partial(KERNELS[name])
    whole = run(attend, inputs, mask)
    monkeypatch.setattr({"pallas_tpu": tpu_schedule, "pallas_gpu": gpu_schedule}[name], most, 28)
    calls = []
    count = chunks.cut
    monkeypatch.setattr(chunks, "cut", lambda n, limit: calls.append(count(n, limit)) or calls[-1])
    assert_equal(run(functools.partial(KERNELS[name]), inputs, mask), whole, error=1e-6)
    assert any(cut.tokens == 7 and 1 < cut.count <= 4 for cut in calls)


@pytest.mark.parametrize("T", [31])
@pytest.mark.parametrize("base", [OTHERS, TPU], ids=["others", "tpu"])
def test_the_loss_of_a_prime_length_equals_all_logits_at_once(base, T):
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = (
        jax.random.normal(keys[0], (1, T, 8)),
        jax.random.normal(keys[1], (23, 8)),
        jax.random.randint(keys[2], (1, T), 0, 23),
        jax.random.uniform(keys[3], (1, T)),
    )
    settings = {"softcap": 3.0, "z_loss": 0.01}
    got = sums_and_gradients(inputs, chunking=walk(8, 7, base), **settings)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected(inputs, **settings)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(y))))


def test_the_loss_of_a_prime_length_makes_few_chunks():
    of_tokens = [jax.ShapeDtypeStruct((1, 1031), dtype) for dtype in (jnp.int32, jnp.float32)]
    inputs = jax.ShapeDtypeStruct((1, 1031, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
    loss = lambda *x: entropy(*x, chunking=OTHERS).loss  # noqa: E731
    text = jax.jit(loss).lower(*inputs, *of_tokens).as_text()
    assert "3x344x8xf32" in text.replace("1x1x", "")


@pytest.mark.parametrize("T, count", [(61, 4)])
def test_tiles_of_a_prime_length_equal_the_whole_with_gradients_and_random_keys(T, count):
    keys_BT = jax.random.split(jax.random.key(1), (2, T))
    x_BTD = jax.random.normal(jax.random.key(0), (2, T, 4))
    w = {"w": jax.random.normal(jax.random.key(2), (4, 3))}
    seen = []

    def fn(params, arrays):
        x_BTD, keys_BT = arrays
        seen.append(x_BTD.shape[1])
        noise_BT = jax.vmap(jax.vmap(jax.random.normal))(keys_BT)
        x_BTD = x_BTD * jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), -1, keepdims=True) + 1e-6)
        return jnp.tanh(x_BTD @ params["w"]) * noise_BT[..., None]

    def loss(tile, w, x):
        specs = {"w": jax.sharding.PartitionSpec()}
        return jnp.sum(
            jnp.sin(by_tiles(fn, w, specs, (x, keys_BT), layout=Layout(), tile=tile, dtype="float32"))
        )

    got = jax.value_and_grad(functools.partial(loss, 2 * 16), (0, 1))(w, x_BTD)
    assert -(-T // min(seen)) == count
    assert_equal(
        got, jax.value_and_grad(lambda w, x: jnp.sum(jnp.sin(fn(w, (x, keys_BT)))), (0, 1))(w, x_BTD)
    )


def test_token_losses_of_a_prime_length_are_those_of_one_chunk():
    T, model = 61, Copier(5)
    tokens = jax.random.randint(jax.random.key(0), (2, T), 0, model.vocab_size)
    ones = jnp.ones((2, T), jnp.int32)
    batch = Batch(
        tokens, tokens, ones.astype(jnp.float32), ones, jnp.arange(2 * T).reshape(2, T) % T, jnp.arange(2)
    )
    few, one = (make_token_losses(model, chunking=walk(chunk))({}, batch) for chunk in (32, 2 * T))
    assert few[0].shape == (2, T)
    assert_equal(few, one, error=1e-6)


@pytest.mark.parametrize("length", [61, 64, 67])
def test_a_ring_of_prime_parts_makes_no_hop_for_documents_that_lie_on_one_device(length):
    """Two documents on each of four devices, in the order of a zigzag: together they span those of all others."""
    half = {61: 30, 64: 32, 67: 33}[length]
    segments = np.concatenate([np.repeat([1 + i, 8 - i], [half, length - half]) for i in range(4)])
    positions = np.concatenate([np.r_[:half, : length - half] for _ in range(4)])
    mask = self_mask(jnp.asarray(segments)[None], jnp.asarray(positions)[None])
    devices = ring.Ring("seq", 4)
    number = jax.jit(lambda: ring.needed_reach(devices, ring.Sizes(length, length, 1), mask))()
    assert devices.reaches[number] == (0, 0)
