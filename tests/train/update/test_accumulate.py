"""Micro-batches of any raggedness give the update of one big batch, whatever k, however it changes, by any engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from param_axes import BY_NAME
from sections import optimizer_of, optimizer_section

from llmjax.train.optim.optimizer import Hyperparameters, Optimizer
from llmjax.train.update.accumulate import UpdateInputs
from llmjax.train.update.engines import ENGINES
from llmjax.train.update.gradients import MAIN, TermSums, micro_gradients
from llmjax.types import LossSums

ROWS, LENGTH, WIDTH, UPDATES = 64, 12, 6, 3
RATE = 0.05
SUMMING = [name for name, engine in ENGINES.items() if hasattr(engine, "micro_step")]


@pytest.fixture(params=SUMMING)
def engine(request):
    """The name of an engine that sums over several calls."""
    return request.param


def make_data(seed=0):
    """Inputs [U, B, T, D], targets and weights [U, B, T]: sequences ragged, weights skewed, some all zero."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(UPDATES, ROWS, LENGTH, WIDTH))
    length = rng.integers(0, LENGTH + 1, size=(UPDATES, ROWS))
    length[:, :8] = 0  # with k = 8 and more the first micro-batch weighs nothing
    length[:, 16:24], length[:, 24:32] = LENGTH, 1
    w = (np.arange(LENGTH) < length[..., None]) * rng.uniform(0.1, 3.0, size=(UPDATES, ROWS, LENGTH))
    # short sequences are different ones
    y = np.tanh(x @ rng.normal(size=WIDTH)) + (length[..., None] < 3) * 5.0
    return x, y, w


def init_params():
    rng = np.random.default_rng(1)
    return {"w_DF": jnp.asarray(rng.normal(size=(WIDTH, 8)) * 0.3, jnp.float32), "bias": jnp.zeros(8)}


def loss_fn(params, batch, rng, np=jnp):
    """A squared error by token, and an auxiliary one that weighs sequences by the square of their length."""
    x, y, w = batch
    hidden = np.tanh(x @ params["w_DF"] + params["bias"][None, None])
    errors = (np.sum(hidden, axis=-1) - y) ** 2
    by_sequence = np.sum(w > 0, axis=-1) ** 2.0
    auxiliary = 0.1 * np.sum(by_sequence * np.sum(hidden, axis=(1, 2)) ** 2)
    return LossSums(np.sum(w * errors), np.sum(w), {}, {"balance": (auxiliary, np.sum(by_sequence))})


def without_auxiliary(params, batch, rng):
    return dataclasses.replace(loss_fn(params, batch, rng), auxiliary={})


def gradient_descent():
    sgd = lambda hyper: optax.sgd(hyper.learning_rate)  # noqa: E731
    return Optimizer(
        sgd(Hyperparameters(0.0, 0.0, {})).init,
        lambda grads, state, params, hyper: sgd(hyper).update(grads, state, params),
        lambda state, params: params,
        lambda done, size: Hyperparameters(RATE, 0.0, {}),
    )


def adamw(**changes):
    """With an eps that keeps the first update from magnifying rounding to the size of the learning rate."""
    return optimizer_of(optimizer_section(**{"warmup_updates": 2, **changes}), UPDATES, BY_NAME, eps=1e-3)


LION = optimizer_of(optimizer_section("lion", warmup_updates=2), UPDATES, BY_NAME)


def make_inputs(optimizer, k, update=0, loss_limit=np.inf, norm_limit=np.inf):
    hyper = optimizer.hyperparameters(float(update), 1.0)
    return jax.tree.map(jnp.float32, UpdateInputs(0.0, hyper, loss_limit, norm_limit)), jnp.int32(k)


class Trainer:
    """Parameters and state, a micro-step at a time; counts its compilations."""

    def __init__(self, engine, optimizer, max_steps, loss_fn=without_auxiliary):
        terms = ("balance",) if loss_fn is not without_auxiliary else ()
        self.optimizer, self.accumulator = optimizer, ENGINES[engine](optimizer, max_steps, terms)
        self.params, self.outcomes, self.sums, self.traces = init_params(), [], [], 0
        self.state = self.accumulator.init(self.params)

        @jax.jit
        def step(params, state, batch, inputs, k):
            self.traces += 1
            terms, sums = micro_gradients(loss_fn, params, batch, None)
            inputs = dataclasses.replace(inputs, steps=k)
            return *self.accumulator.micro_step(params, state, terms, sums["loss"], inputs), sums

        self._step = step

    def step(self, batch, k, **limits):
        inputs, steps = make_inputs(self.optimizer, k, self.updates, **limits)
        batch = tuple(jnp.asarray(a, jnp.float32) for a in batch)
        self.params, self.state, outcome, sums = self._step(self.params, self.state, batch, inputs, steps)
        self.outcomes.append(jax.device_get(outcome))
        self.sums.append(jax.device_get(sums))
        return self

    @property
    def updates(self):
        return sum(bool(outcome.is_update) for outcome in self.outcomes)

    def window(self, data, k, **limits):
        for micro in range(k):
            self.step(cut(data, k, micro), k, **limits)
        return self


def cut(data, k, micro):
    return [a[micro * ROWS // k : (micro + 1) * ROWS // k] for a in data]


def train(engine, optimizer, k, loss_fn=without_auxiliary):
    trainer = Trainer(engine, optimizer, k, loss_fn)
    for update in zip(*make_data()):
        trainer.window(update, k)
    return trainer


def relative_error(a, b):
    difference = jax.tree.map(lambda p, q: np.asarray(p, np.float64) - q, a, b)
    return float(optax.tree.norm(difference) / optax.tree.norm(jax.tree.map(jnp.asarray, b)))


def double_precision_descent(mean_of_means=1, auxiliary=False):
    """Gradient descent on the whole batch in float64; or on the mean of so many micro-batch means."""
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(p, np.float64)) for name, p in init_params().items()}

        def mean(params, batch):
            sums = loss_fn(params, batch, None)
            extra = sum(loss / jnp.maximum(weight, 1e-9) for loss, weight in sums.auxiliary.values())
            return sums.loss / jnp.maximum(sums.weight, 1e-9) + (extra if auxiliary else 0.0)

        for data in zip(*make_data()):
            grads = [
                jax.grad(mean)(params, [jnp.asarray(a) for a in cut(data, mean_of_means, i)])
                for i in range(mean_of_means)
            ]
            params = jax.tree.map(lambda p, *g: p - RATE * sum(g) / len(g), params, *grads)
        return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_ragged_micro_batches_give_the_parameters_of_the_whole_batch(engine, auxiliary):
    whole, loss = double_precision_descent(auxiliary=auxiliary), loss_fn if auxiliary else without_auxiliary
    for k in (1, 2, 4, 8, 16, 64):
        error = relative_error(train(engine, gradient_descent(), k, loss_fn=loss).params, whole)
        naive = relative_error(double_precision_descent(k, auxiliary), whole)
        print(f"k={k}: relative error {error:.1e}, of the mean of micro-batch means {naive:.1e}")
        assert error <= 1e-6
        assert k == 1 or naive > 1e-3  # the data can tell the two apart


@pytest.mark.parametrize("k", [2, 16])
def test_adamw_with_decay_and_clipping_does_not_depend_on_k(engine, k):
    assert relative_error(train(engine, adamw(), k).params, train(engine, adamw(), 1).params) <= 1e-6


def test_k_changes_from_update_to_update_without_compiling_anew(engine):
    whole, trainer, steps = (
        Trainer(engine, gradient_descent(), 1),
        Trainer(engine, gradient_descent(), 64),
        (1, 64, 4),
    )
    for k, update in zip(steps, zip(*make_data())):
        rows = [a[-k:] for a in update]  # one to a micro-step
        whole.step(rows, 1)
        for row in range(k):
            trainer.step([a[row : row + 1] for a in rows], k)
    assert relative_error(trainer.params, whole.params) <= 1e-6
    assert trainer.traces == 1
    assert [bool(c.is_update) for c in trainer.outcomes] == [i in (0, 64, 68) for i in range(69)]


def test_k_within_a_window_is_that_of_its_first_micro_step(engine):
    data = [a[0] for a in make_data()]
    plain, overridden = Trainer(engine, gradient_descent(), 8), Trainer(engine, gradient_descent(), 8)
    plain.window(data, 4)
    for micro, k in enumerate((4, 1, 8, 2)):
        overridden.step(cut(data, 4, micro), k)
    jax.tree.map(np.testing.assert_array_equal, overridden.params, plain.params)
    assert [bool(c.is_update) for c in overridden.outcomes] == [False] * 3 + [True]


def test_an_stopped_within_goes_on_where_its_state_was_saved(engine):
    data = [a[0] for a in make_data()]
    plain = Trainer(engine, adamw(), 4).window(data, 4)
    for stop in (1, 2, 3):
        first, second = Trainer(engine, adamw(), 4), Trainer(engine, adamw(), 4)
        for micro in range(stop):
            first.step(cut(data, 4, micro), 4)
        second.params, second.state = jax.device_get((first.params, first.state))
        for micro in range(stop, 4):
            second.step(cut(data, 4, micro), 2)  # an override, to be heeded by the next window
        jax.tree.map(
            np.testing.assert_array_equal, (second.params, second.state), (plain.params, plain.state)
        )


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("micro", range(4))
def test_a_micro_batch_that_is_not_finite_is_dropped_and_the_rest_stays_exact(engine, micro, value):
    data = [a[0].copy() for a in make_data()]
    faulty, without = [a.copy() for a in data], [a.copy() for a in data]
    rows = slice(micro * ROWS // 4, (micro + 1) * ROWS // 4)
    faulty[0][rows][:1, 0] = value
    faulty[2][rows] += 0.1  # it would have had a weight
    without[2][rows] = 0.0
    optimizer = gradient_descent()
    dropped = Trainer(engine, optimizer, 4).window(faulty, 4)
    left_out = Trainer(engine, optimizer, 4).window(without, 4)
    jax.tree.map(np.testing.assert_array_equal, dropped.params, left_out.params)
    assert [s["dropped"] for s in dropped.sums] == [float(i == micro) for i in range(4)]
    assert dropped.sums[micro]["weight"] == dropped.sums[micro]["loss"] == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dropped.params, dropped.state)))


@pytest.mark.parametrize("k", [1, 4])
def test_an_update_of_which_nothing_is_left_moves_nothing(engine, k):
    data = [a[0] for a in make_data()]
    before = Trainer(engine, adamw(), k).window(data, k)
    after = Trainer(engine, adamw(), k).window(data, k)
    after.window([np.full_like(data[0], np.nan), data[1], data[2]], k)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    a, b = (t.accumulator.canonical(t.state) for t in (after, before))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert after.outcomes[-1].is_update and not after.outcomes[-1].applied
    after.window([data[0], data[1], 0 * data[2]], k)  # nor does one in which nothing has a weight
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


@pytest.mark.parametrize("k", [1, 4])
def test_an_update_beyond_a_limit_is_not_applied(engine, k):
    data = [a[0] for a in make_data()]
    trainer = Trainer(engine, gradient_descent(), k).window(data, k)
    loss = sum(s["loss"] for s in trainer.sums) / sum(s["weight"] for s in trainer.sums)
    norm = trainer.outcomes[-1].grad_norm
    for limits, applied in (
        ({"loss_limit": loss * 1.01, "norm_limit": norm * 1.01}, True),
        ({"loss_limit": loss * 0.99}, False),
        ({"norm_limit": norm * 0.99}, False),
    ):
        again = Trainer(engine, gradient_descent(), k).window(data, k, **limits)
        assert again.outcomes[-1].applied == applied
        expected = trainer.params if applied else init_params()
        jax.tree.map(np.testing.assert_array_equal, again.params, expected)
        # and the window that follows starts from nothing
        after = again.window(data, k).params
        fresh = Trainer(engine, gradient_descent(), k).window(data, k)
        expected = fresh.window(data, k).params if applied else fresh.params
        jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.parametrize("k", [1, 4])
def test_clipping_comes_after_the_division(engine, k):
    optimizer = adamw(clip_norm=0.5, weight_decay=0.0)
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
    optimizer = dataclasses.replace(
        optimizer,
        init=clip.init,
        update=lambda grads, state, params, hyper: clip.update(grads, state, params),
    )
    x, y, w = (a[0] for a in make_data())
    trainer = Trainer(engine, optimizer, k).window((x, y, w), k)
    step = optax.tree.norm(jax.tree.map(jnp.subtract, init_params(), trainer.params))
    np.testing.assert_allclose(step, 0.5, rtol=1e-5)
    grads = jax.grad(lambda p: without_auxiliary(p, (x, y, w), None).loss)(init_params())
    norms = [c.grad_norm for c in trainer.outcomes]
    np.testing.assert_allclose(norms, [0.0] * (k - 1) + [optax.tree.norm(grads) / w.sum()], rtol=1e-5)
    # and so the scale of the weights means nothing, though the sums grow with it
    heavy = Trainer(engine, optimizer, k).window((x, y, 1024 * w), k)
    assert relative_error(heavy.params, trainer.params) <= 1e-6


def test_the_sums_of_a_micro_step_are_those_of_the_noise_scale():
    x, y, w = (a[0] for a in make_data())
    _, sums = micro_gradients(loss_fn, init_params(), (x, y, w), None)
    grads = jax.grad(lambda p: loss_fn(p, (x, y, w), None).loss)(init_params())
    np.testing.assert_allclose(sums["square_norm"], optax.tree.norm(grads, squared=True), rtol=1e-5)
    np.testing.assert_allclose(sums["weight_square"], w.sum() ** 2, rtol=1e-6)
    auxiliary = loss_fn(init_params(), (x, y, w), None).auxiliary["balance"]
    np.testing.assert_allclose([sums["balance"], sums["balance_weight"]], auxiliary, rtol=1e-6)


def test_sums_are_kept_in_float32_whatever_the_gradient_dtype(engine):
    def loss(params, batch, rng):
        return LossSums(jnp.sum(params["w_DF"] * batch).astype(jnp.float32), jnp.float32(1.0), {})

    accumulator, params = ENGINES[engine](gradient_descent(), 8), {"w_DF": jnp.zeros((2, 2), jnp.bfloat16)}
    state = accumulator.init(params)
    for value in [256.0] + [1.0] * 7:  # 256 + 1 = 256 in bfloat16
        terms, sums = micro_gradients(loss, params, jnp.full((2, 2), value, jnp.bfloat16), None)
        assert terms[MAIN].grads["w_DF"].dtype == jnp.float32
        inputs, k = make_inputs(gradient_descent(), 9)
        inputs = dataclasses.replace(inputs, steps=k)
        _, state, _ = accumulator.micro_step(params, state, terms, sums["loss"], inputs)
    np.testing.assert_array_equal(state.multi.acc_grads["terms"][MAIN].grads["w_DF"], 263.0)


@pytest.mark.parametrize(("engine", "runs"), [("in_place", UPDATES), ("multisteps", 4 * UPDATES)])
def test_the_optimizer_in_place_runs_once_per_update(engine, runs):
    calls, plain = [], gradient_descent()

    def update(grads, state, params, hyper):
        jax.debug.callback(lambda: calls.append(1))
        return plain.update(grads, state, params, hyper)

    train(engine, dataclasses.replace(plain, update=update), 4)
    jax.effects_barrier()
    assert len(calls) == runs


@pytest.mark.parametrize("optimizer", [gradient_descent(), adamw(), LION], ids=["sgd", "adamw", "lion"])
def test_engines_that_sum_agree_to_the_last_bit_on_the_same_gradients(optimizer):
    """They add in the same inputs and divide once, so nothing may differ, neither in an update nor after it.

    Run operation by operation, since what the compiler fuses it rounds in its own way.
    """
    gradients = jax.jit(lambda params, batch: micro_gradients(loss_fn, params, batch, None))
    engines = [ENGINES[name](optimizer, 8, ("balance",)) for name in SUMMING]
    states = [(init_params(), engine.init(init_params())) for engine in engines]
    faulty = [a[1].copy() for a in make_data()]
    faulty[0][: ROWS // 8, 0] = np.nan
    first, third = ([a[update] for a in make_data()] for update in (0, 2))
    # A whole update, one beyond its limit, one with a dropped micro-step, and one that stays open.
    for k, done, data, limit in (
        (8, 8, first, np.inf),
        (2, 2, third, 0.0),
        (4, 4, faulty, np.inf),
        (4, 3, faulty, np.inf),
    ):
        inputs, steps_k = make_inputs(optimizer, k, norm_limit=limit)
        inputs = dataclasses.replace(inputs, steps=steps_k)
        for micro in range(done):
            batch = tuple(jnp.asarray(a, jnp.float32) for a in cut(data, k, micro))
            terms, sums = gradients(states[0][0], batch)
            with jax.disable_jit():
                results = [
                    engine.micro_step(*state, terms, sums["loss"], inputs)
                    for engine, state in zip(engines, states, strict=True)
                ]
            for other in results[1:]:
                jax.tree.map(np.testing.assert_array_equal, other, results[0])
            states = [result[:2] for result in results]


def test_one_engine_goes_on_with_an_update_that_another_began():
    data = [a[0] for a in make_data()]
    plain = Trainer("in_place", adamw(), 4).window(data, 4)
    for first, second in (SUMMING, SUMMING[::-1]):
        began = Trainer(first, adamw(), 4).step(cut(data, 4, 0), 4)
        ended = Trainer(second, adamw(), 4)
        ended.params, ended.state = jax.device_get((began.params, began.state))
        for micro in range(1, 4):
            ended.step(cut(data, 4, micro), 4)
        jax.tree.map(np.testing.assert_array_equal, ended.params, plain.params)


def test_optax_multisteps_does_the_accumulating(monkeypatch):
    """With an `optax.MultiSteps` that forgets what came before the last micro-step, the parameters are others."""
    data = [a[0] for a in make_data()]

    class Forgetful(optax.MultiSteps):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._acc_update = lambda grad, acc, *, n_acc: grad

    honest = Trainer("multisteps", gradient_descent(), 4).window(data, 4)
    monkeypatch.setattr(optax, "MultiSteps", Forgetful)
    forgetful = Trainer("multisteps", gradient_descent(), 4).window(data, 4)
    last = Trainer("multisteps", gradient_descent(), 1).step(cut(data, 4, 3), 1)
    assert relative_error(forgetful.params, honest.params) > 1e-3
    assert relative_error(forgetful.params, last.params) <= 1e-6


def test_sums_that_overflow_leave_nothing_behind(engine):
    """Finite micro-gradients may add up to infinity, which times 0 is not a number."""
    accumulator, params = ENGINES[engine](gradient_descent(), 2), {"w_DF": jnp.zeros((2, 2))}
    state, (inputs, k) = accumulator.init(params), make_inputs(gradient_descent(), 2, norm_limit=1e30)
    inputs = dataclasses.replace(inputs, steps=k)
    for value, applied in ((3e38, False), (1.0, True)):
        for _ in range(2):
            terms = {MAIN: TermSums({"w_DF": jnp.full((2, 2), value)}, jnp.float32(1.0))}
            params, state, outcome = accumulator.micro_step(params, state, terms, jnp.float32(0.0), inputs)
        assert outcome.is_update and outcome.applied == applied
    np.testing.assert_allclose(params["w_DF"], -RATE, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_state_between_updates_does_not_show_k(name):
    optimizer, params = optimizer_of(optimizer_section(name), 9, BY_NAME), init_params()
    engines = [engine(optimizer, k) for k in (1, 2, 8) for engine in ENGINES.values()]
    states = [engine.canonical(engine.init(params)) for engine in engines]
    assert len({jax.tree.structure(state) for state in states}) == 1
    assert jax.tree.structure(states[0]) == jax.tree.structure(optimizer.init(params))


def test_micro_steps_between_updates_copy_no_state():
    """On the CPU's compiled program: everything outside the outcome loop works in place."""
    accumulator, params = ENGINES["in_place"](adamw(), 2), {"w_DF": jnp.zeros((64, 64))}
    state, terms = accumulator.init(params), {MAIN: TermSums(params, jnp.float32(1.0))}
    inputs, k = make_inputs(adamw(), 2)
    step = jax.jit(accumulator.micro_step, donate_argnums=(0, 1))
    inputs = dataclasses.replace(inputs, steps=k)
    text = step.lower(params, state, terms, jnp.float32(1.0), inputs).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert " while(" in entry
    assert "f32[64,64]{1,0} copy(" not in entry


def test_an_update_whose_gradient_norm_overflows_moves_nothing(engine):
    trainer = Trainer(engine, adamw(), 4)
    huge = TermSums(jax.tree.map(lambda p: jnp.full_like(p, 1e25), trainer.params), jnp.float32(1))
    inputs, steps = make_inputs(trainer.optimizer, 1)
    inputs = dataclasses.replace(inputs, steps=steps)
    params, state, outcome = trainer.accumulator.micro_step(
        trainer.params, trainer.state, {MAIN: huge}, jnp.float32(1), inputs
    )
    assert outcome.is_update and outcome.grad_norm == np.inf and not outcome.applied
    jax.tree.map(np.testing.assert_array_equal, params, trainer.params)
    a, b = (trainer.accumulator.canonical(state) for state in (state, trainer.state))
    jax.tree.map(np.testing.assert_array_equal, a, b)
