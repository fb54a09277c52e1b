"""A number that is not finite in one document moves no bit of what the others of its row make and are taught."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.ops.attention import blockwise, full, kernel, pallas_gpu, sequence_attention
from llmjax.ops.attention.mask import self_mask
from llmjax.ops.attention.pallas_tpu import PallasTPU
from llmjax.ops.dropout import dropout
from llmjax.ops.losses.cross_entropy import OTHERS, TPU
from tests.ops.attention import test_sequence_attention
from tests.ops.attention.test_blockwise import packed
from tests.ops.losses.test_cross_entropy import entropy, walk

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
T, GUILTY = 32, slice(10, 24)
MASKS = {
    "causal": self_mask(*packed([[9, 1, 14], [32]], T)),
    "bidirectional": self_mask(*packed([[9, 1, 14], [32]], T), causal=False),
}
KERNELS = {
    **{name: sequence_attention.make_attend(name) for name in sequence_attention.KERNELS},
    "full": full.attend,
    "blockwise": functools.partial(blockwise.attend, block=8),
    "pallas_gpu": functools.partial(pallas_gpu.attend, block=16, interpret=True),
    "pallas_tpu": lambda *args, softcap=0.0, sinks_N=None: kernel.attend(
        PallasTPU(softcap, rows=256, keys=128, interpret=True), *args, sinks_N
    ),
}
SHARED = {
    algorithm: functools.partial(test_sequence_attention.over_devices, algorithm, 4, degree)
    for algorithm, degree in test_sequence_attention.WAYS
}
POISONS = [(name, value) for name in ("q", "k", "v", "dout") for value in (jnp.nan, -jnp.inf)]


def run(attend, mask):
    """`attention(q, k, v, dout) -> (out, dq, dk, dv)`, compiled once."""

    @jax.jit
    def attention(q, k, v, dout):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask, softcap=0.0, sinks_N=None), q, k, v)
        return out, *pull(dout)

    return attention


def check_that_others_stay(attend, mask, K=2):
    inputs = dict(zip(("q", "k", "v", "sinks", "dout"), test_sequence_attention.make_inputs(K), strict=True))
    del inputs["sinks"]
    attention = run(attend, mask)
    clean = attention(**inputs)
    assert all(np.isfinite(x).all() for x in clean)
    for name, value in POISONS:
        poisoned = inputs | {name: inputs[name].at[0, GUILTY.start + 3, -1, -1].set(value)}
        got = attention(**poisoned)
        for x, y in zip(got, clean, strict=True):
            np.testing.assert_array_equal(
                np.delete(x[0], GUILTY, 0), np.delete(y[0], GUILTY, 0), err_msg=name
            )
            np.testing.assert_array_equal(x[1], y[1], err_msg=name)
        out, dq = (np.asarray(x[0, GUILTY]) for x in got[:2])
        assert not np.isfinite(dq).all(), f"{value} in {name} went by in silence"
        assert np.isfinite(out).all() == (name == "dout")


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_finite_stays_in_its_document(name, kind):
    if name == "pallas_tpu" and kind == "bidirectional":
        pytest.skip("slow in interpret mode")
    check_that_others_stay(KERNELS[name], MASKS[kind])


@pytest.mark.parametrize("algorithm", SHARED)
def test_what_is_not_finite_stays_in_its_document_however_devices_share_it(algorithm, monkeypatch):
    kernels = sequence_attention.KERNELS
    monkeypatch.setitem(kernels, "blockwise", functools.partial(kernels["blockwise"], block=4))
    check_that_others_stay(SHARED[algorithm](), MASKS["causal"])


def test_every_kernel_and_algorithm_is_tried():
    assert {*KERNELS} == {"full", *sequence_attention.KERNELS} and {*SHARED} == {
        *sequence_attention.ALGORITHMS
    }


@pytest.mark.parametrize("base", [OTHERS, TPU], ids=["others", "tpu"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_has_no_loss_and_no_gradient_where_its_weight_is_0(value, base):
    keys = jax.random.split(jax.random.key(0), 3)
    h_BTD, w_VD = jax.random.normal(keys[0], (2, 8, 4)), jax.random.normal(keys[1], (11, 4))
    targets_BT = jax.random.randint(keys[2], (2, 8), 0, 11)
    weights_BT = jnp.ones((2, 8)).at[0, 3].set(0.0)

    @jax.jit
    def loss(h_BTD, w_VD):
        return jax.value_and_grad(
            lambda h, w: entropy(h, w, targets_BT, weights_BT, chunking=walk(4, 5, base)).loss,
            (0, 1),
        )(h_BTD, w_VD)

    clean, poisoned = loss(h_BTD, w_VD), loss(h_BTD.at[0, 3, 1].set(value), w_VD)
    for x, y in zip(jax.tree.leaves(poisoned), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not np.isfinite(loss(h_BTD.at[0, 4, 1].set(value), w_VD)[0])


def test_dropped_activations_are_selected():
    keys_BT = jax.random.split(jax.random.key(0), (1, 64))
    x_BTD = jnp.full((1, 64, 4), jnp.nan)
    assert (dropout(x_BTD, keys_BT, 0.5, 0) == 0).sum() > 64
