"""Spikes are caught, ordinary noise and steep descents are not, and device and host never disagree."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from sections import section

from llmjax.errors import UserError
from llmjax.train.steering.spikes import (
    OFF,
    Level,
    Limits,
    StabilityState,
    device_limits,
    is_spike,
    limits,
    observe,
    stop_reason,
)

CONFIG = section(
    "stability", on_spike="skip", threshold=6.0, half_life=200_000, warmup_updates=50, max_skips=20
)
TOKENS = 8192


def curves(seed, updates):
    """Mean losses and gradient norms of an ordinary run, float32: steep at first, then slow, a hump in the norm."""
    rng, u = np.random.default_rng(seed), np.arange(updates)
    loss = 1.5 + 6.0 * np.exp(-u / 30) + 3.0 * (1.0 + u) ** -0.3
    norm = 0.4 + 3.0 * np.exp(-u / 15) + 2.0 * np.exp(-(((u - 60) / 25) ** 2))
    loss, norm = (x * np.exp(noise * rng.normal(size=updates)) for x, noise in ((loss, 0.02), (norm, 0.15)))
    return loss.astype(np.float32).tolist(), norm.astype(np.float32).tolist()


def follow(config, losses, norms, tokens=TOKENS):
    """The spikes by update, and the states, where the limits of update n come from updates up to n - 2."""
    states, spikes = [StabilityState()], {}
    for n, (loss, norm) in enumerate(zip(losses, norms)):
        bound = limits(config, states[max(n - 1, 0)])
        applied = not is_spike(device_limits(config, bound), loss, norm)
        state, spike = observe(config, states[-1], bound, tokens, loss, norm, applied)
        states.append(state)
        if spike:
            spikes[n] = spike
    return spikes, states


@pytest.mark.parametrize("warmup_updates", [10, 50])
def test_no_update_of_30_000_ordinary_ones_is_a_spike(warmup_updates):
    config = dataclasses.replace(CONFIG, warmup_updates=warmup_updates)
    assert [follow(config, *curves(seed, 1500))[0] for seed in range(20)] == [{}] * 20


def test_an_update_longer_than_the_half_life_still_has_a_level():
    assert follow(CONFIG, *curves(0, 3000), tokens=10 * CONFIG.half_life)[0] == {}


@pytest.mark.parametrize(
    ("loss_factor", "norm_factor", "kind"),
    [(1.25, 1.0, "loss"), (1.0, 4.0, "gradient norm"), (10.0, 100.0, "loss"), (math.inf, 1.0, "loss")],
)
def test_a_spike_is_caught_and_only_that(loss_factor, norm_factor, kind):
    losses, norms = curves(1, 500)
    losses[400], norms[400] = losses[400] * loss_factor, norms[400] * norm_factor
    spikes, _ = follow(CONFIG, losses, norms)
    assert list(spikes) == [400]
    spike = spikes[400]
    assert (
        spike.kind == kind
        and spike.value == {"loss": losses, "gradient norm": norms}[kind][400] > spike.limit
    )
    assert spike.sentence.startswith(f"{kind} {spike.value:.4g} is a spike: its limit was {spike.limit:.4g}")


def test_a_spike_does_not_hide_the_next_one():
    losses, norms = curves(1, 500)
    for n in (400, 401, 405):
        norms[n] *= 1e6
    spikes, states = follow(CONFIG, losses, norms)
    assert list(spikes) == [400, 401, 405]
    before, after = (limits(CONFIG, state).grad_norm for state in states[400:402])
    assert before < after < 1.3 * before


@pytest.mark.parametrize("factor", [1.15, 1.5, 3.0, 100.0, 1e9])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_lasting_shift_is_accepted_within_two_half_lives(factor, noise):
    rng = np.random.default_rng(2)
    losses = 3.0 * np.exp(noise * rng.normal(size=500)) * np.where(np.arange(500) < 300, 1.0, factor)
    spikes, _ = follow(CONFIG, losses.tolist(), [1.0] * 500)
    assert all(300 <= n < 350 for n in spikes)
    assert len(spikes) > 0 or factor < 1.2


def test_what_scatters_by_nothing_is_no_spike_until_it_rises_by_some_percent():
    for factor, count in ((1.05, 0), (1.07, 1)):
        losses = [2.0] * 100 + [2.0 * factor] + [2.0] * 10
        assert len(follow(CONFIG, losses, [1.0] * 111)[0]) == count


def test_nothing_counts_while_warming_up():
    losses, norms = curves(3, 80)
    for n in (49, 50):
        early = losses[:n] + [1e4]
        bound = limits(CONFIG, follow(CONFIG, early[:n], norms[:n])[1][-1])
        assert bool(is_spike(bound, 1e4, 1.0)) == (n == 50)


def test_dropped_updates_leave_the_levels_alone():
    _, states = follow(CONFIG, *curves(4, 100))
    for loss, norm in ((math.nan, math.nan), (0.0, 0.0), (math.inf, math.inf), (-1.0, 1.0)):
        state, _ = observe(CONFIG, states[-1], OFF, TOKENS, loss, norm, applied=False)
        assert state.loss == states[-1].loss and state.skipped == 1
        assert limits(CONFIG, state).loss == limits(CONFIG, states[-1]).loss
    assert not is_spike(Limits(1.0, 1.0), math.nan, math.nan)


def test_device_and_host_agree_to_the_last_bit():
    on_device = jax.jit(is_spike)
    rng, seen = np.random.default_rng(5), []
    for log in rng.normal(scale=3.0, size=40):
        level = Level(log, 0.1, 1.0, 99)
        bound = limits(CONFIG, StabilityState(level, level))
        assert bound.loss == np.float32(bound.loss)
        edge = np.float32(bound.loss)
        for loss in (np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))):
            spike = observe(CONFIG, StabilityState(level, level), bound, TOKENS, float(loss), 0.0, True)[1]
            assert bool(on_device(bound, loss, np.float32(0))) == (spike is not None)
            seen.append(spike is not None)
    assert seen == [False, False, True] * 40


def test_only_skip_gives_the_device_limits_and_none_gives_nobody_any():
    _, states = follow(CONFIG, *curves(6, 100))
    for on_spike in ("none", "warn", "skip", "rewind"):
        config = dataclasses.replace(CONFIG, on_spike=on_spike)
        bound = limits(config, states[-1])
        assert (bound == OFF) == (on_spike == "none")
        assert (device_limits(config, bound) == OFF) == (on_spike != "skip")


def test_limits_stay_float32_however_high_the_level():
    for log in (85.0, 88.5, 700.0, 1e5):
        assert Level(log, 1.0, 1.0, 99).limit(CONFIG) == math.inf
    assert Level(-1e5, 0.0, 1.0, 99).limit(CONFIG) == 0.0


def test_max_skips_in_a_row_stop_the_run():
    state = StabilityState()
    for _ in range(2):
        for _ in range(19):
            state, _ = observe(CONFIG, state, OFF, TOKENS, math.nan, math.nan, applied=False)
            assert stop_reason(CONFIG, state) is None
        stopped, _ = observe(CONFIG, state, OFF, TOKENS, math.nan, math.nan, applied=False)
        assert "the last 20 updates were all skipped or dropped" in stop_reason(CONFIG, stopped)
        state, _ = observe(CONFIG, state, OFF, TOKENS, 3.0, 1.0, applied=True)


def test_verdicts_replay_from_any_saved_state():
    losses, norms = curves(7, 300)
    for n in (120, 121, 250):
        losses[n] *= 2.0
    _, states = follow(CONFIG, losses, norms)
    for start in range(2, 300, 41):
        saved = json.loads(json.dumps([s.to_dict() for s in states[start - 1 : start + 1]], allow_nan=False))
        lagging, state = map(StabilityState.from_dict, saved)
        for n in range(start, 300):
            bound = limits(CONFIG, lagging)
            applied = not is_spike(bound, losses[n], norms[n])
            lagging, (state, _) = state, observe(CONFIG, state, bound, TOKENS, losses[n], norms[n], applied)
            assert state == states[n + 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"on_spike": "stop"}, "stability.on_spike='stop' is not known; use one of none, warn, skip, rewind"),
        ({"threshold": 0.0}, "stability.threshold=0.0 must be greater than 0"),
        ({"threshold": math.nan}, "stability.threshold=nan"),
        ({"half_life": -1}, "stability.half_life=-1"),
        ({"warmup_updates": 9}, "stability.warmup_updates=9 must be at least 10"),
        ({"max_skips": 0}, "stability.max_skips=0 must be at least 1"),
    ],
)
def test_a_config_out_of_range_is_one_sentence_that_names_the_key(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **changes)
