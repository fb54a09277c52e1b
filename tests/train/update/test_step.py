"""The micro-step: one compilation, honest metrics, one random key per update, no word to the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from param_axes import BY_NAME
from sections import mesh_section, optimizer_of, optimizer_section

from llmjax.parallel.mesh import make_mesh
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.in_place import InPlace
from llmjax.train.update.state import abstract_state, init_state, state_shardings
from llmjax.train.update.step import make_eval_step, make_train_step
from llmjax.types import Batch, LossSums

VOCAB, WIDTH = 11, 8
SPECS = {"embedding_VD": P(None, "fsdp"), "w_down_FD": P(), "bias": P()}


def init_params(rng):
    a, b = jax.random.split(rng)
    return {
        "embedding_VD": jax.random.normal(a, (VOCAB, WIDTH)),
        "w_down_FD": jax.random.normal(b, (WIDTH, VOCAB)) * 0.3,
        "bias": jnp.zeros(VOCAB),
    }


def loss_fn(params, batch, rng):
    """A bigram model; `draw` shows the random key."""
    logits = params["embedding_VD"][batch.tokens] @ params["w_down_FD"] + params["bias"][None, None]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)[..., 0]
    correct = jnp.sum(batch.weights * (logits.argmax(-1) == batch.targets))
    draw = jnp.float32(-1.0) if rng is None else jax.random.uniform(rng)
    return LossSums(
        -jnp.sum(batch.weights * log_probs), jnp.sum(batch.weights), {"accuracy": correct, "draw": draw}
    )


def make_batch(seed, rows=8, length=6):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, size=(rows, length), dtype=np.int32)
    zeros = np.zeros((rows, length), np.int32)
    weights = (np.arange(length) < rng.integers(0, length + 1, size=(rows, 1))).astype(np.float32)
    return Batch(tokens, (tokens * 3 + 1) % VOCAB, weights, zeros + 1, zeros, np.arange(rows, dtype=np.int32))


class Setup:
    """A jitted step over a mesh, its state, and how often it was traced."""

    def __init__(self, k, mesh_config=None, loss_fn=loss_fn, **optimizer):
        devices = jax.devices() if mesh_config else jax.devices()[:1]
        self.mesh = make_mesh(mesh_config or mesh_section(), devices)
        config = optimizer_section(**{"warmup_updates": 4, "learning_rate": 0.05, **optimizer})
        self.optimizer, self.k, self.traces = optimizer_of(config, 40, BY_NAME), k, 0
        self.engine = InPlace(self.optimizer, k)

        def counted(*args):
            self.traces += 1
            return loss_fn(*args)

        self.state = init_state(
            init_params,
            self.engine,
            jax.random.key(0),
            abstract_state(init_params, self.engine, SPECS, self.mesh),
        )
        shardings = state_shardings(self.state, SPECS, self.mesh)
        step = make_train_step(counted, self.engine.micro_step)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self.batch_sharding = NamedSharding(self.mesh, P(("data", "fsdp")))

    def put(self, batch):
        return jax.device_put(batch, self.batch_sharding)

    def inputs(self, number=0):
        hyper = jax.tree.map(np.float32, self.optimizer.hyperparameters(number // self.k, 1.0))
        return UpdateInputs(np.int32(self.k), hyper, np.float32(np.inf), np.float32(np.inf))

    def run(self, batches):
        metrics = []
        for number, batch in enumerate(batches):
            self.state, m = self.step(self.state, self.put(batch), self.inputs(number))
            metrics.append(m)
        return jax.tree.map(float, metrics)


@pytest.mark.parametrize("mesh_config", [None, mesh_section(data=2, fsdp=4)])
@pytest.mark.parametrize("k", [1, 3])
def test_one_compiled_step_serves_all_updates_and_learns(k, mesh_config):
    setup = Setup(k, mesh_config)
    setup.step = setup.step.lower(
        setup.state, setup.put(make_batch(0)), setup.inputs()
    ).compile()  # takes these types only
    metrics = setup.run(make_batch(i) for i in range(36))
    assert int(setup.state.update) == 36 // k
    mean = [m["loss"] / m["weight"] for m in metrics]
    assert np.mean(mean[-6:]) < 0.8 * np.mean(mean[:6])


def test_metrics_are_sums_and_say_when_an_update_ends():
    setup, batches = Setup(2, schedule="constant"), [make_batch(i) for i in range(4)]
    first = loss_fn(setup.state.params, batches[0], None)
    metrics = setup.run(batches)
    assert set(metrics[0]) == {
        "loss", "weight", "accuracy", "draw", "square_norm", "weight_square", "dropped",
        "is_update", "applied", "mean_loss", "grad_norm", "square_total",
    }  # fmt: skip
    np.testing.assert_allclose(metrics[0]["loss"], first.loss, rtol=1e-6)
    assert metrics[0]["accuracy"] == first.metrics["accuracy"]
    assert [m["weight"] for m in metrics] == [batch.weights.sum() for batch in batches]
    assert [m["is_update"] for m in metrics] == [0, 1, 0, 1]
    assert [m["grad_norm"] > 0 for m in metrics] == [False, True, False, True]
    means = [sum(m[name] for m in metrics[:2]) for name in ("loss", "weight")]
    np.testing.assert_allclose(metrics[1]["mean_loss"], means[0] / means[1], rtol=1e-6)


def test_the_gradient_norm_is_that_of_the_mean_loss_over_all_micro_steps():
    batches = [make_batch(i) for i in range(3)]
    setup = Setup(3, clip_norm=0.01)

    def mean_loss(params):
        sums = [loss_fn(params, batch, None) for batch in batches]
        return sum(s.loss for s in sums) / sum(s.weight for s in sums)

    grads = jax.grad(mean_loss)(setup.state.params)
    expected = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(setup.run(batches)[-1]["grad_norm"], expected, rtol=1e-5)


def test_the_micro_steps_of_an_update_share_one_random_key_and_updates_do_not():
    draws = [m["draw"] for m in Setup(2).run(make_batch(0) for _ in range(6))]
    assert draws[0::2] == draws[1::2] and len(set(draws)) == 3
    assert draws[0::2] == [m["draw"] for m in Setup(1).run(make_batch(0) for _ in range(3))]


def test_a_step_is_traced_once():
    setup = Setup(2)
    setup.run(make_batch(i) for i in range(8))
    assert setup.traces == 1


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_says_nothing_to_the_host(k):
    setup = Setup(k, mesh_section(data=8))
    batches, inputs = (
        [setup.put(make_batch(i)) for i in range(4)],
        jax.device_put(setup.inputs(), NamedSharding(setup.mesh, P())),
    )
    with jax.transfer_guard("disallow"):
        for batch in batches:
            setup.state, _ = setup.step(setup.state, batch, inputs)


def test_a_loss_that_is_not_finite_is_dropped():
    def faulty(params, batch, rng):
        sums = loss_fn(params, batch, rng)
        return LossSums(jnp.where(batch.index[0] == 7, jnp.nan, sums.loss), sums.weight, {})

    good = make_batch(0)
    bad = Batch(good.tokens, good.targets, good.weights, good.segments, good.positions, good.index + 7)
    metrics = Setup(3, loss_fn=faulty).run([good, bad])
    assert [m["dropped"] for m in metrics] == [0, 1]
    assert metrics[0]["weight"] > 0 and metrics[1]["weight"] == metrics[1]["loss"] == 0


def test_evaluation_is_deterministic_and_gives_sums():
    setup, batch = Setup(1), make_batch(0)
    sums = jax.jit(make_eval_step(loss_fn))(setup.state.params, batch)
    assert sums.metrics["draw"] == -1.0
    np.testing.assert_allclose(sums.loss, loss_fn(setup.state.params, batch, None).loss, rtol=1e-6)
