"""Micro-batches of any raggedness give the update of one big batch; the optimizer runs once per update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmjax.errors import UserError
from llmjax.train.accumulate import Accumulator, resolve_batch
from llmjax.train.optimizer import Optimizer, OptimizerConfig, make_optimizer

ROWS, LENGTH, WIDTH, UPDATES = 16, 12, 6, 3


def make_data(seed=0):
    """Inputs [U, B, T, D], targets and weights [U, B, T]: sequences ragged, weights skewed, some all zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(UPDATES, ROWS, LENGTH, WIDTH))
    length = rng.integers(0, LENGTH + 1, size=(UPDATES, ROWS))
    length[:, :2], length[:, 4:6], length[:, 6:8] = (
        0,
        LENGTH,
        1,
    )  # with k = 8 the first micro-batch weighs nothing
    w = (np.arange(LENGTH) < length[..., None]) * rng.uniform(0.1, 3.0, size=(UPDATES, ROWS, LENGTH))
    y = (
        np.tanh(x @ rng.normal(size=WIDTH)) + (length[..., None] < 3) * 5.0
    )  # short sequences are different ones
    return x, y, w


def init_params():
    rng = np.random.default_rng(1)
    return {"w_DF": jnp.asarray(rng.normal(size=(WIDTH, 8)) * 0.3, jnp.float32), "bias": jnp.zeros(8)}


def loss_sum(params, x, y, w):
    hidden = jnp.tanh(x @ params["w_DF"] + params["bias"][None, None])
    return jnp.sum(w * (jnp.sum(hidden, axis=-1) - y) ** 2)


def gradient_descent(learning_rate=0.05):
    sgd = optax.sgd(learning_rate)
    return Optimizer(sgd.init, sgd.update, lambda state, params: params, lambda update: learning_rate)


def adamw(**changes):
    """With an eps that keeps the first update from magnifying rounding to the size of the learning rate."""
    return make_optimizer(OptimizerConfig(**{"warmup_updates": 2, "eps": 1e-3, **changes}), UPDATES)


def train(optimizer, k, data=None):
    """Parameters after three updates of k micro-steps, and the gradient norm of each micro-step."""
    accumulator, norms = Accumulator(optimizer, k), []

    @jax.jit
    def step(params, state, x, y, w):
        grads = jax.grad(loss_sum)(params, x, y, w)
        params, state, _, norm = accumulator.micro_step(params, state, grads, jnp.sum(w))
        return params, state, norm

    params = init_params()
    state = accumulator.init(params)
    for x, y, w in zip(*(data or make_data())):
        for micro in range(k):
            rows = slice(micro * ROWS // k, (micro + 1) * ROWS // k)
            batch = (jnp.asarray(a[rows], jnp.float32) for a in (x, y, w))
            params, state, norm = step(params, state, *batch)
            norms.append(float(norm))
    return params, norms


def relative_error(a, b):
    difference = jax.tree.map(lambda p, q: np.asarray(p, np.float64) - q, a, b)
    return float(optax.tree.norm(difference) / optax.tree.norm(b))


def double_precision_descent(mean_of_means=0, learning_rate=0.05):
    """Gradient descent on the whole batch in float64 numpy; or on the mean of so many micro-batch means."""
    params = {name: np.asarray(p, np.float64) for name, p in init_params().items()}

    def gradient(x, y, w):
        hidden = np.tanh(x @ params["w_DF"] + params["bias"])
        back = (2 * w * (hidden.sum(-1) - y))[..., None] * (1 - hidden**2)
        grads = {"w_DF": np.einsum("btd,btf->df", x, back), "bias": back.sum((0, 1))}
        return {name: g / max(w.sum(), 1e-9) for name, g in grads.items()}

    for x, y, w in zip(*make_data()):
        parts = [
            gradient(*(np.split(a, mean_of_means or 1)[i] for a in (x, y, w)))
            for i in range(mean_of_means or 1)
        ]
        for name in params:
            params[name] = params[name] - learning_rate * sum(part[name] for part in parts) / len(parts)
    return params


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_ragged_micro_batches_give_the_parameters_of_the_whole_batch(k):
    whole = double_precision_descent()
    error = relative_error(train(gradient_descent(), k)[0], whole)
    naive = relative_error(double_precision_descent(mean_of_means=k), whole)
    print(f"k={k}: relative error {error:.1e}, of the mean of micro-batch means {naive:.1e}")
    assert error <= 1e-6
    assert k == 1 or naive > 1e-2  # the data can tell the two apart


@pytest.mark.parametrize("k", [2, 4, 8])
def test_adamw_with_decay_and_clipping_does_not_depend_on_k(k):
    assert relative_error(train(adamw(), k)[0], train(adamw(), 1)[0]) <= 1e-6


@pytest.mark.parametrize("k", [1, 4])
def test_clipping_comes_after_the_division(k):
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    optimizer = Optimizer(clip.init, clip.update, lambda state, params: params, lambda update: 1.0)
    x, y, w = make_data()
    first = (x[:1], y[:1], w[:1])
    after, norms = train(optimizer, k, first)
    step = optax.tree.norm(jax.tree.map(jnp.subtract, init_params(), after))
    np.testing.assert_allclose(step, 0.5, rtol=1e-5)
    grads = jax.grad(loss_sum)(init_params(), *(jnp.asarray(a[0], jnp.float32) for a in first))
    np.testing.assert_allclose(norms, [0.0] * (k - 1) + [optax.tree.norm(grads) / w[0].sum()], rtol=1e-5)
    # and so the scale of the weights means nothing, though the sums grow with it
    heavy, _ = train(optimizer, k, (x[:1], y[:1], 1024 * w[:1]))
    assert relative_error(heavy, after) <= 1e-6


@pytest.mark.parametrize("k", [1, 2])
def test_an_update_of_no_weight_has_gradient_zero(k):
    x, y, w = make_data()
    params, norms = train(gradient_descent(), k, (x[:1], y[:1], 0 * w[:1]))
    jax.tree.map(np.testing.assert_array_equal, params, init_params())
    assert norms == [0.0] * k


def test_sums_are_kept_in_float32_whatever_the_gradient_dtype():
    accumulator, params = Accumulator(gradient_descent(1.0), 8), {"w_DF": jnp.zeros((2, 2))}
    state = accumulator.init(params)
    for value in [256.0] + [1.0] * 7:  # 256 + 1 = 256 in bfloat16
        grads = {"w_DF": jnp.full((2, 2), value, jnp.bfloat16)}
        params, state, _, _ = accumulator.micro_step(params, state, grads, jnp.float32(1.0))
    np.testing.assert_array_equal(params["w_DF"], -263.0 / 8)


def test_the_optimizer_runs_once_per_update():
    calls, plain = [], gradient_descent()

    def update(grads, state, params):
        jax.debug.callback(lambda: calls.append(1))
        return plain.update(grads, state, params)

    train(dataclasses.replace(plain, update=update), 4)
    jax.effects_barrier()
    assert len(calls) == UPDATES


def test_a_micro_step_between_updates_moves_nothing_but_the_sums():
    accumulator, params = Accumulator(adamw(), 3), init_params()
    state = accumulator.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    after, held, is_update, _ = accumulator.micro_step(params, state, grads, jnp.float32(2.0))
    assert not is_update
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, accumulator.canonical(held), accumulator.canonical(state))
    assert held.acc_grads["weight"] == 2.0 and held.mini_step == 1


def test_an_infinite_gradient_does_not_stay_in_the_sums():
    accumulator, params = Accumulator(gradient_descent(), 2), init_params()
    state = accumulator.init(params)
    for value in (jnp.inf, 1.0):
        grads = jax.tree.map(lambda p, value=value: jnp.full(p.shape, value), params)
        _, state, _, norm = accumulator.micro_step(params, state, grads, jnp.float32(1.0))
    assert not jnp.isfinite(norm)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0.0), state.acc_grads)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_state_between_updates_does_not_show_k(name):
    optimizer, params = make_optimizer(OptimizerConfig(name=name), 9), init_params()
    states = [Accumulator(optimizer, k).canonical(Accumulator(optimizer, k).init(params)) for k in (1, 2, 8)]
    assert len({jax.tree.structure(state) for state in states}) == 1
    assert jax.tree.structure(states[0]) == jax.tree.structure(optimizer.init(params))


def test_micro_steps_between_updates_copy_no_state():
    """On the CPU's compiled program: everything outside the closing loop works in place."""
    accumulator, params = Accumulator(adamw(), 2), {"w_DF": jnp.zeros((64, 64))}
    state = accumulator.init(params)
    step = jax.jit(accumulator.micro_step, donate_argnums=(0, 1))
    text = step.lower(params, state, params, jnp.float32(1.0)).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert " while(" in entry
    assert "f32[64,64]{1,0} copy(" not in entry


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation_steps", "expected"),
    [(8, 2, (8, 2)), (0, 2, (8, 2)), (4, 0, (4, 4)), (0, 0, (16, 1)), (16, 0, (16, 1))],
)
def test_what_is_not_given_of_the_batch_follows(micro_batch_size, accumulation_steps, expected):
    batch = resolve_batch(8192, 512, micro_batch_size, accumulation_steps, data_shards=4)
    assert (batch.micro_batch_size, batch.accumulation_steps) == expected
    assert batch.sequences_per_update == 16 and batch.tokens_per_update == 8192


def test_the_batch_describes_its_arithmetic():
    assert resolve_batch(8192, 512, 0, 2).describe() == (
        "8 sequences x 512 tokens x 2 micro-steps = 8,192 tokens per update"
    )
    assert (
        resolve_batch(512, 512, 0, 0).describe()
        == "1 sequence x 512 tokens x 1 micro-step = 512 tokens per update"
    )


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ((8000, 512, 0, 0), ("train.tokens_per_update=8000", "data.seq_len=512", "7680")),
        ((100, 512, 0, 0), ("train.tokens_per_update=100", "data.seq_len=512", "use for example 512")),
        (
            (8192, 512, 4, 2),
            ("train.micro_batch_size=4", "train.accumulation_steps=2", "tokens_per_update=4096"),
        ),
        ((8192, 512, 3, 0), ("train.micro_batch_size=3", "16 sequences")),
        ((8192, 512, 0, 5), ("train.accumulation_steps=5", "16 sequences")),
        ((8192, 512, 0, 32), ("train.accumulation_steps=32", "16 sequences")),
        ((8192, 512, 4, 0, 8), ("train.micro_batch_size=4", "8 shards", "mesh.data x mesh.fsdp")),
        ((8192, 512, 0, 4, 8), ("train.micro_batch_size=4", "8 shards", "train.accumulation_steps=4")),
        ((0, 512, 0, 0), ("train.tokens_per_update=0",)),
        ((8192, 0, 0, 0), ("data.seq_len=0",)),
        ((8192, 512, -1, 0), ("train.micro_batch_size=-1",)),
        ((8192, 512, 0, -2), ("train.accumulation_steps=-2",)),
    ],
)
def test_batch_arithmetic_that_does_not_close_is_one_sentence_that_names_the_keys(arguments, keys):
    with pytest.raises(UserError) as error:
        resolve_batch(*arguments)
    assert all(key in str(error.value) for key in keys), str(error.value)
    assert "\n" not in str(error.value)
