"""Orders follow from tokens and history alone."""

import dataclasses
import json

import numpy as np
import pytest
from param_axes import BY_NAME
from sections import optimizer_of, optimizer_section, section

from llmjax.train.loop.run_position import PartialUpdateRecord, Position
from llmjax.train.steering.batch_schedule import BatchArithmetic, make_batch_schedule
from llmjax.train.steering.length_schedule import make_length_schedule
from llmjax.train.steering.steering import History, Measured, Steering

BATCH = BatchArithmetic(seq_len=16, micro_batch_size=4, accumulation_steps=4)  # 64 tokens a micro-step


def make_steering(points=(), name="none", on_spike="warn", num_updates=10, lengths=(), **optimizer):
    config = optimizer_section(
        **{"learning_rate": 1.0, "warmup_updates": 4, "schedule": "linear", **optimizer}
    )
    return Steering(
        schedule=make_batch_schedule("piecewise" if points else "constant", points, BATCH),
        lengths=make_length_schedule(lengths, BATCH.seq_len),
        optimizer=optimizer_of(config, num_updates, BY_NAME),
        controller=section("controller", name=name, k_min=2, k_max=32, half_life=1000),
        stability=section("stability", on_spike=on_spike, warmup_updates=10),
        tokens_per_update=BATCH.tokens_per_update,
        num_tokens=num_updates * BATCH.tokens_per_update,
    )


def measured(steps=4, loss=2.0, noise=9.0, applied=True):
    """An update of unit weights a micro-step, with |G|^2 = 1 and a noise scale of `noise` micro-steps."""
    return Measured(
        steps=steps,
        weight=float(steps),
        weight_square=float(steps),
        square_norm=steps * (1.0 + noise),
        mean_loss=loss,
        grad_norm=float(np.sqrt(1 + noise / steps)),
        square_total=steps**2 + steps * noise,
        applied=applied,
    )


def test_a_constant_batch_has_the_learning_rates_of_its_updates():
    steering = make_steering()
    rates = [steering.decide(steering.start(), u * 256).learning_rate for u in range(10)]
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, *np.linspace(1.0, 0.1, 7)], rtol=1e-6)
    order = steering.decide(steering.start(), 256).inputs
    assert order.steps == 4 and order.steps.dtype == np.int32
    assert order.hyper.learning_rate == np.float32(0.5) and order.loss_limit == np.inf


def test_schedules_of_batch_and_learning_rate_meet_in_tokens():
    steering = make_steering(points=("0:128", "512:1024"))
    tokens, steps, rates = 0, [], []
    while tokens < steering.num_tokens:
        decision = steering.decide(steering.start(), tokens)
        tokens += decision.steps * 64
        steps.append(decision.steps)
        rates.append(decision.learning_rate)
    assert steps == [2, 2, 2, 2, 16, 16] and tokens == 2560 and steering.max_steps == 16
    middles = [0.75, 1.25, 1.75, 2.25, 4.5, 8.5]  # in updates of 256 tokens, which end at 1, 2, ...
    expected = [u / 4 if u <= 4 else 1 - 0.9 * (u - 4) / 6 for u in middles]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_the_length_of_rows_follows_the_tokens_like_the_batch():
    steering = make_steering(points=("0:256", "600:512"), lengths=("0:4", "600:16", "1500:8"))
    decisions = [steering.decide(steering.start(), tokens) for tokens in (0, 512, 768, 1280, 1792)]
    assert [(d.steps, d.length) for d in decisions] == [(4, 4), (4, 4), (8, 16), (8, 16), (8, 8)]
    assert steering.decide(steering.start(), 512, steps=2).length == 4  # of an update under way


def test_the_last_update_is_cut_at_the_end_of_the_run():
    steering = make_steering(points=("0:768",))
    assert [steering.decide(steering.start(), t).steps for t in (0, 1792, 2304, 2496)] == [12, 12, 4, 1]


def test_an_update_under_way_keeps_its_size():
    steering = make_steering()
    assert steering.decide(steering.start(), 0, steps=7).inputs.steps == 7


def test_the_controller_sets_k_and_says_why():
    steering = make_steering(name="noise_scale")
    history = steering.start()
    assert steering.decide(history, 0).steps == 4 and steering.max_steps == 32
    for update in range(6):
        decision = steering.decide(history, update * 256)
        history, spike = steering.observe(history, decision, measured(decision.steps))
        assert spike is None
    decision = steering.decide(history, 256)
    assert decision.steps == 8 and "noise scale" in decision.reason  # within a quarter of 9
    assert "the run ends" in steering.decide(history, 2560 - 64).reason


@pytest.mark.parametrize("on_spike", ["none", "warn", "skip", "rewind"])
def test_the_device_gets_limits_only_where_it_is_to_skip(on_spike):
    steering, history, spikes = make_steering(on_spike=on_spike), None, []
    history = steering.start()
    for update in range(30):
        decision = steering.decide(history, update * 64)
        loss = 20.0 if update == 25 else 2.0 + 0.01 * (-1) ** update
        history, spike = steering.observe(history, decision, measured(loss=loss))
        spikes.append(spike)
        on_device = decision.inputs.loss_limit
        assert np.isfinite(on_device) == (on_spike == "skip" and update >= 10)
        assert on_spike != "skip" or on_device == np.float32(decision.limits.loss)
    assert [i for i, spike in enumerate(spikes) if spike] == ([] if on_spike == "none" else [25])


def test_a_position_survives_json():
    steering = make_steering(name="noise_scale")
    history, _ = steering.observe(steering.start(), steering.decide(steering.start(), 0), measured())
    position = Position(
        update=3,
        cursor=7,
        tokens=11,
        histories=(steering.start(), history),
        partial_update=PartialUpdateRecord(4, 2, ({"loss": float(np.float32(0.1))},)),
    )
    again = Position.from_meta(json.loads(json.dumps({**position.to_meta(), "config": {}})))
    assert again == position
    assert History.from_dict(json.loads(json.dumps(dataclasses.asdict(history)))) == history
