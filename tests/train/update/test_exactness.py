"""The promise of accumulation: three updates, cut in any way, equal three of one big batch in float64.

A small language model with ragged, skewed and empty rows, with and without an auxiliary loss that has weights of
its own; every engine; one, two and eight devices; k from 1 to 64. What the usual mean of micro-batch means makes
of the same data is printed beside it.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from param_axes import BY_NAME
from sections import mesh_section, optimizer_of, optimizer_section
from some_slow import often

from llmjax.parallel.mesh import make_mesh
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.fused import make_update_sums
from llmjax.train.update.state import TrainState
from llmjax.train.update.step import make_fused_step, make_train_step
from llmjax.types import Batch, LossSums

ROWS, LENGTH, VOCAB, WIDTH, UPDATES = 1536, 5, 13, 6, 3
CUTS = (1, 2, 3, 4, 8, 16, 64)
TERMS = {"lm": (), "lm and auxiliary": ("balance",)}
# The terms that are tried in every run of the tests.
FURTHER = "lm and auxiliary"
# An eps that keeps the first update from magnifying rounding to the size of the learning rate.
OPTIMIZER = optimizer_of(
    optimizer_section("adamw", learning_rate=0.05, warmup_updates=2), UPDATES, BY_NAME, eps=1e-3
)


def init_params():
    rng = np.random.default_rng(0)
    shapes = {"embedding_VD": (VOCAB, WIDTH), "w_DF": (WIDTH, WIDTH), "unembedding_VD": (VOCAB, WIDTH)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_batches():
    """One Batch for each update: ragged rows, skewed weights, and a first eighth that has none."""
    rng = np.random.default_rng(1)
    for update in range(UPDATES):
        tokens = rng.integers(0, VOCAB, size=(ROWS, LENGTH), dtype=np.int32)
        length = rng.integers(0, LENGTH + 1, size=(ROWS, 1))
        length[: ROWS // 8] = 0
        weights = (np.arange(LENGTH) < length) * rng.uniform(0.1, 3.0, size=(ROWS, LENGTH))
        weights[: ROWS // 2] *= 0.01  # and a half that hardly counts
        targets = np.where(length < 2, 0, (tokens * 3 + 1) % VOCAB).astype(np.int32)
        index = np.arange(ROWS, dtype=np.int32) + update * ROWS
        zeros = np.zeros_like(tokens)
        yield Batch(tokens, targets, weights.astype(np.float32), zeros + 1, zeros, index)


def loss_fn(params, batch, rng, terms=()):
    hidden_BTD = jnp.tanh(params["embedding_VD"][batch.tokens] @ params["w_DF"])
    log_probs = jax.nn.log_softmax(hidden_BTD @ params["unembedding_VD"].T)
    losses = -jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    by_row = jnp.sum(batch.weights > 0, axis=1).astype(losses.dtype) ** 2
    balance = (jnp.sum(by_row * jnp.sum(hidden_BTD, (1, 2)) ** 2) * 0.1, jnp.sum(by_row))
    auxiliary = {name: balance for name in terms}
    return LossSums(jnp.sum(batch.weights * losses), jnp.sum(batch.weights), {}, auxiliary)


@functools.cache
def in_float64(terms, parts=1):
    """The parameters after three updates of one whole batch; or of the mean of so many micro-batch means."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), init_params())
        state = OPTIMIZER.init(params)

        @jax.jit
        def mean_gradient(params, batch):
            def mean(params):
                sums = loss_fn(params, batch, None, terms)
                extra = sum(loss / jnp.maximum(weight, 1e-9) for loss, weight in sums.auxiliary.values())
                return sums.loss / jnp.maximum(sums.weight, 1e-9) + extra

            return jax.grad(mean)(params)

        for update, batch in enumerate(make_batches()):
            batch = dataclasses.replace(batch, weights=batch.weights.astype(np.float64))
            pieces = [mean_gradient(params, piece) for piece in cut(batch, parts)]
            grads = jax.tree.map(lambda *g: sum(g) / parts, *pieces)
            changes, state = OPTIMIZER.update(grads, state, params, OPTIMIZER.hyperparameters(update, 1.0))
            params = jax.tree.map(jnp.add, params, changes)
        return jax.tree.map(np.asarray, params)


def cut(batch, k):
    size = ROWS // k
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], batch) for i in range(k)]


def relative_error(params, expected):
    squares = [
        (np.sum((np.asarray(params[name], np.float64) - x) ** 2), np.sum(x**2))
        for name, x in expected.items()
    ]
    return float(np.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares)))


def train(engine, devices, k, terms):
    mesh = make_mesh(mesh_section(data=devices), jax.devices()[:devices])
    loss = functools.partial(loss_fn, terms=terms)
    specs = {name: P() for name in init_params()}
    accumulator = ENGINES[engine](OPTIMIZER, k, terms)
    if engine == "fused":
        window = make_update_sums(loss, mesh, specs, BY_NAME, gather="micro_step", compute_dtype="float32")
        step = make_fused_step(window, OPTIMIZER)
    else:
        step = make_train_step(loss, accumulator.micro_step)
    replicated = NamedSharding(mesh, P())
    params = jax.device_put(init_params(), replicated)
    state = TrainState(params, accumulator.init(params), jnp.int32(0), jax.random.key(0))
    state = jax.device_put(state, replicated)
    step = jax.jit(step, donate_argnums=0, out_shardings=(replicated, None))
    for update, batch in enumerate(make_batches()):
        hyper = jax.tree.map(np.float32, OPTIMIZER.hyperparameters(update, 1.0))
        inputs = UpdateInputs(np.int32(k), hyper, np.float32(np.inf), np.float32(np.inf))
        parts, spec = cut(batch, k), P("data")
        if engine == "fused":
            parts, spec = [jax.tree.map(lambda *x: np.stack(x), *parts)], P(None, "data")
        for part in parts:
            state, metrics = step(state, jax.device_put(part, NamedSharding(mesh, spec)), inputs)
        assert np.sum(metrics["applied"]) == 1
    assert int(state.update) == UPDATES
    return jax.device_get(state.params)


@pytest.mark.parametrize(
    "engine, devices, terms",
    often(itertools.product(ENGINES, [1, 2, 8], TERMS), lambda case: case[1] != 2 and case[2] == FURTHER),
)
def test_three_updates_equal_those_of_one_big_batch_in_float64(engine, devices, terms):
    terms = TERMS[terms]
    expected = in_float64(terms)
    for k in CUTS:
        error, naive = (
            relative_error(params, expected)
            for params in (train(engine, devices, k, terms), in_float64(terms, k))
        )
        print(f"{engine} on {devices}, k={k}: {error:.1e}; the mean of micro-batch means: {naive:.1e}")
        assert error <= 1e-6
        assert k == 1 or naive > 1e-3  # the data can tell the two apart
