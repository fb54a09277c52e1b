"""The noise scale is measured without bias, and the decisions that rest on it are steady, bounded and replayable."""

import dataclasses
import functools
import itertools
import json
import math

import numpy as np
import pytest
from sections import section

from llmjax.errors import UserError
from llmjax.train.steering.controller import Observation, estimate, initial_state, observe

MICRO = 1000  # positions of a micro-step
CONFIG = section("controller", name="noise_scale", k_min=1, k_max=64, half_life=20 * MICRO, hysteresis=0.25)


def parts(sums_PD, weights_P, tokens):
    """The observation of an update whose part gradients are the rows of `sums_PD`."""
    return Observation(
        float(tokens),
        float(weights_P.sum()),
        float((weights_P**2).sum()),
        float((sums_PD**2).sum()),
        float((sums_PD.sum(0) ** 2).sum()),
        len(weights_P),
    )


def exact(k, noise_scale, gradient_square=1.0, parts_per_micro_step=2, scale=1.0):
    """An update of k full micro-steps whose squares are what they are expected to be; `scale` blows gradients up."""
    n, W = k * parts_per_micro_step, k * MICRO
    noise = W * noise_scale * abs(gradient_square)
    squares, total = n * (W / n) ** 2 * gradient_square + noise, W**2 * gradient_square + noise
    return Observation(W, W, n * (W / n) ** 2, scale**2 * squares, scale**2 * total, n)


def run(config, k, observations_of, updates):
    """States after each update, where `observations_of(k)` is what an update of k micro-steps measures."""
    states = [initial_state(config, k)]
    for _ in range(updates):
        states.append(observe(config, states[-1], observations_of(states[-1].k), MICRO))
    return states


# --- the estimator ---


@functools.cache
def quadratic(updates=6000, num_parts=6, length=24, seed=0):
    """Updates on the quadratic loss (theta - x)^T H (theta - x) / 2, each token an x; |G|^2, S and the observations.

    Dimensions are correlated, tokens far from normal, and parts hold from no token at all to `length` of them.
    """
    rng = np.random.default_rng(seed)
    hessian, mixing = rng.normal(size=(2, 5, 5)) / np.sqrt(5)
    hessian = hessian @ hessian.T + 0.3 * np.eye(5)
    gap = rng.normal(size=5)
    tokens = rng.exponential(size=(updates, num_parts, length, 5)) - 1.0  # mean 0, covariance I, skewed
    grads = (gap - 3.0 * tokens @ mixing.T) @ hessian
    G, S = hessian @ gap, 9.0 * np.trace(hessian @ mixing @ mixing.T @ hessian)
    sizes = rng.choice([0, 1, 2, 4, length], p=[0.15, 0.25, 0.2, 0.2, 0.2], size=(updates, num_parts))
    mask = np.arange(length) < sizes[..., None]
    sums = np.einsum("uptd,upt->upd", grads, mask)
    observations = [parts(s, w.astype(float), num_parts * length) for s, w in zip(sums, sizes)]
    means = sums / np.maximum(sizes, 1)[..., None]
    return G @ G, S, observations, means


def amounts(observations):
    return np.array([o.weight - o.weight_square_parts / o.weight for o in observations])


def test_signal_noise_and_noise_scale_are_within_5_percent_of_the_truth():
    signal, noise, observations, _ = quadratic()
    config = section("controller", name="none", half_life=10**12)
    state = initial_state(config, 6)
    for observation in observations:
        state = observe(config, state, observation, 24)
    np.testing.assert_allclose(state.gradient_square, signal, rtol=0.05)
    np.testing.assert_allclose(state.variance, noise, rtol=0.05)
    np.testing.assert_allclose(state.noise_scale, noise / signal, rtol=0.05)


def test_one_estimate_is_unbiased_whatever_the_weights_and_the_unweighted_formula_is_not():
    signal, noise, observations, means = quadratic()
    found = [(estimate(o), mean, o) for o, mean in zip(observations, means) if estimate(o) is not None]
    ours = np.array([pair for pair, _, _ in found])
    error = (ours.mean(0) - (signal, noise)) / (ours.std(0) / math.sqrt(len(ours)))
    assert np.abs(error).max() < 3, error
    # Appendix A of the paper with all parts taken for equal: small batch W / n, large batch W.
    naive = []
    for _, mean, o in found:
        n, small, large = len(mean), o.weight / len(mean), o.weight
        square_small, square_large = (mean**2).sum() / n, o.square_total / large**2
        naive.append(
            (
                (large * square_large - small * square_small) / (large - small),
                (square_small - square_large) / (1 / small - 1 / large),
            )
        )
    naive = np.array(naive)
    error = (naive.mean(0) - (signal, noise)) / (naive.std(0) / math.sqrt(len(naive)))
    assert np.abs(error).min() > 8, error
    assert naive[:, 1].mean() / naive[:, 0].mean() > 1.5 * noise / signal


def test_equal_parts_give_the_formula_of_the_paper():
    rng = np.random.default_rng(0)
    sums, W = rng.normal(size=(4, 7)), 40.0
    square_small, square_large = ((sums / 10) ** 2).sum(1).mean(), ((sums.sum(0) / W) ** 2).sum()
    expected = (
        (W * square_large - 10 * square_small) / (W - 10),
        (square_small - square_large) / (1 / 10 - 1 / W),
    )
    np.testing.assert_allclose(estimate(parts(sums, np.full(4, 10.0), 40)), expected, rtol=1e-12)


def test_the_ratio_of_averages_beats_the_average_of_ratios():
    signal, noise, observations, _ = quadratic()
    known = [o for o in observations if estimate(o) is not None]
    pairs, weights = np.array([estimate(o) for o in known]), amounts(known)
    groups = np.array_split(np.arange(len(known)), 40)
    ours, theirs = [], []
    for group in groups:
        w, (g, s) = weights[group], pairs[group].T
        ours.append(abs((w @ s) / (w @ g) - noise / signal))
        theirs.append(abs((s / g).mean() - noise / signal))
    assert np.mean(np.less(ours, theirs)) > 0.9
    assert np.median(ours) < 0.25 * np.median(theirs)


def test_an_observation_counts_half_after_a_half_life():
    states = run(CONFIG, 20, lambda k: exact(20, 4000.0, 1.0), 1)
    state = observe(CONFIG, states[-1], exact(20, 500.0, 4.0), MICRO)
    np.testing.assert_allclose(states[-1].gradient_square, 1.0, rtol=1e-12)
    np.testing.assert_allclose(state.gradient_square, (0.5 * 1.0 + 4.0) / 1.5, rtol=1e-12)
    np.testing.assert_allclose(state.variance, (0.5 * 4000.0 + 2000.0) / 1.5, rtol=1e-12)


def test_k_does_not_depend_on_the_units_of_loss_weight_nor_on_padding():
    observation = exact(4, 6300.0)
    scaled = dataclasses.replace(
        observation,
        weight=0.5 * observation.weight,
        **{
            key: 0.25 * getattr(observation, key)
            for key in ("weight_square_parts", "square_parts", "square_total")
        },
    )
    padded = dataclasses.replace(observation, tokens=2 * observation.tokens)
    config = dataclasses.replace(CONFIG, half_life=10**9)
    plain = observe(config, initial_state(config, 4), observation, MICRO)
    assert plain.k == 6
    assert observe(config, initial_state(config, 4), scaled, MICRO).k == 6
    assert observe(config, initial_state(config, 4), padded, 2 * MICRO).k == 6


def test_what_shows_nothing_leaves_the_averages_and_k_as_they_are():
    state = run(CONFIG, 6, lambda k: exact(k, 6000.0), 3)[-1]
    good = exact(6, 6000.0)
    for change in (
        {"weight": 0.0, "weight_square_parts": 0.0, "square_parts": 0.0, "square_total": 0.0},
        {"weight_square_parts": good.weight**2},  # all weight in one part
        {"square_parts": math.inf},
        {"square_total": math.nan},
        {"square_parts": 0.0, "square_total": 0.0},
        {"tokens": 0.0},
    ):
        after = observe(CONFIG, state, dataclasses.replace(good, **change), MICRO)
        assert after == dataclasses.replace(state, reason="nothing to measure: k = 6 stays"), change


# --- decisions ---


@pytest.mark.parametrize("start", [2, 64])
def test_k_finds_the_noise_scale_from_below_and_from_above_and_stays(start):
    rng = np.random.default_rng(1)
    G, spread = rng.normal(size=100), np.exp(0.5 * rng.normal(size=100))
    G, spread = G / np.linalg.norm(G), spread * math.sqrt(10 * 0.8 * MICRO) / np.linalg.norm(spread)

    def noisy(k):  # on average 80 % of positions have weight: a noise scale of 10 micro-steps
        weights = rng.uniform(0.6, 1.0, size=k) * MICRO
        noise = rng.normal(size=(k, 100)) * spread
        return parts(weights[:, None] * G + np.sqrt(weights)[:, None] * noise, weights, k * MICRO)

    config = dataclasses.replace(CONFIG, half_life=200 * MICRO)
    ks = np.array([state.k for state in run(config, start, noisy, 300)])
    assert all(max(a, b) <= 2 * min(a, b) for a, b in itertools.pairwise(ks))
    assert np.all(np.abs(ks[20:] - 10) <= 0.25 * ks[20:] + 0.5), ks  # as near as the hysteresis asks for
    assert np.count_nonzero(np.diff(ks[20:])) <= 3


def test_the_first_update_already_decides():
    first = run(CONFIG, 4, lambda k: exact(k, 6300.0), 1)[-1]
    assert (first.k, first.reason) == (6, "noise scale 6,300 tokens wants k = 6.3: 4 -> 6")


def test_k_changes_only_beyond_the_hysteresis():
    for wanted, k in ((10.0, 8), (10.4, 8), (10.6, 11), (6.0, 8), (5.6, 8), (5.4, 5)):
        state = run(CONFIG, 8, lambda k, wanted=wanted: exact(k, wanted * MICRO), 1)[-1]
        assert state.k == k, wanted
        assert ("within hysteresis" in state.reason) == (k == 8)


def test_k_at_most_doubles_or_halves_and_keeps_its_limits():
    config = dataclasses.replace(CONFIG, k_min=3, k_max=20)
    up = run(config, 3, lambda k: exact(k, 1e9), 5)
    assert [state.k for state in up] == [3, 6, 12, 20, 20, 20]
    assert up[1].reason.endswith(": 3 -> 6, at most doubled")
    assert up[3].reason.endswith(": 12 -> 20, held by k_max = 20")
    assert up[4].reason.endswith("k = 20 stays, held by k_max = 20")
    down = run(config, 20, lambda k: exact(k, 1.0), 4)
    assert [state.k for state in down] == [20, 10, 5, 3, 3]
    assert down[1].reason.endswith(": 20 -> 10, at most halved")
    assert down[3].reason.endswith(": 5 -> 3, held by k >= 3")
    narrowed = observe(dataclasses.replace(config, k_max=4), up[-1], exact(20, 1e9), MICRO)
    assert narrowed.k == 4
    assert initial_state(config, 1).k == 3 and initial_state(config, 99).k == 20


def test_batch_per_noise_scales_what_is_wanted():
    config = dataclasses.replace(CONFIG, batch_per_noise=0.5)
    assert run(config, 4, lambda k: exact(k, 12_000.0), 1)[-1].k == 6


def test_one_device_never_falls_to_the_blind_k_of_one():
    single = functools.partial(exact, noise_scale=100.0, parts_per_micro_step=1)
    states = run(CONFIG, 1, single, 3)
    assert [state.k for state in states] == [1, 2, 2, 2]
    assert states[1].reason == "one part shows no noise: 1 -> 2"
    assert states[2].reason.endswith("held by k >= 2")
    assert run(CONFIG, 1, lambda k: exact(k, 100.0), 3)[-1].k == 1
    assert run(dataclasses.replace(CONFIG, k_max=1), 1, single, 3)[-1].k == 1
    assert run(dataclasses.replace(CONFIG, name="none"), 1, single, 3)[-1].k == 1


def test_a_gradient_that_drowns_in_noise_doubles_k_up_to_its_maximum():
    states = run(dataclasses.replace(CONFIG, k_max=12), 2, lambda k: exact(k, 1e5, gradient_square=-1e-5), 4)
    assert [state.k for state in states] == [2, 4, 8, 12, 12]
    assert states[1].reason == "gradient drowns in its noise (|G|^2 = -1e-05): 2 -> 4, at most doubled"
    assert states[1].noise_scale == math.inf


def test_spikes_neither_move_k_nor_enter_the_averages():
    plain = run(CONFIG, 6, lambda k: exact(k, 6000.0), 10)[-1]
    spiked = observe(CONFIG, plain, exact(6, 10.0, scale=100.0), MICRO)  # an explosion: all parts agree
    assert spiked == dataclasses.replace(plain, rejected=6 * MICRO, reason=spiked.reason)
    assert "spikes over the expected" in spiked.reason and spiked.reason.endswith("k = 6 stays")
    assert observe(CONFIG, plain, exact(6, 10.0, scale=1.5), MICRO).k < 6  # what believing it would do
    after = observe(CONFIG, spiked, exact(6, 6000.0), MICRO)
    assert after == observe(CONFIG, plain, exact(6, 6000.0), MICRO)


def test_a_half_life_of_spikes_is_a_new_level():
    plain = run(CONFIG, 6, lambda k: exact(k, 6000.0), 10)[-1]
    states = [plain]
    for _ in range(8):
        states.append(observe(CONFIG, states[-1], exact(6, 20_000.0, scale=100.0), MICRO))
    assert [state.k for state in states[:5]] == [6] * 5  # 4 x 6 micro-steps: more than a half-life of 20
    assert states[-1].k == 20 and states[-1].rejected == 0


def test_a_change_of_k_is_no_spike_although_the_norm_follows_it():
    states = run(dataclasses.replace(CONFIG, name="none"), 64, lambda k: exact(64, 1e6), 10)
    after = observe(CONFIG, states[-1], exact(1, 1e6), MICRO)  # the norm is 8 times what it was
    assert "spikes" not in after.reason


def test_a_negative_estimate_of_the_signal_does_not_make_ordinary_noise_a_spike():
    drowned = run(CONFIG, 2, lambda k: exact(2, 2100.0, gradient_square=-1.0), 1)[-1]
    after = observe(CONFIG, drowned, exact(2, 2.1e9, gradient_square=1e-6), MICRO)
    assert "spikes" not in after.reason


def test_the_norm_test_only_grows_and_only_to_the_smallest_batch_that_passes():
    config = dataclasses.replace(CONFIG, name="norm_test", norm_test_theta=0.5, hysteresis=0.0)
    states = run(config, 4, lambda k: exact(k, 1_600.0), 2)
    assert [state.k for state in states] == [4, 7, 7]  # 1.6 / 0.25 = 6.4
    W, S = 7 * MICRO, 1600.0
    assert S / W <= 0.25 * 1.0 < S / (W - MICRO)
    assert (
        states[2].reason == "noise scale 1,600 tokens wants k = 6.4: k = 7 stays, which passes the norm test"
    )
    assert run(config, 32, lambda k: exact(k, 1_600.0), 3)[-1].k == 32
    assert run(config, 2, lambda k: exact(k, 1e9), 2)[-1].k == 8


def test_none_measures_and_leaves_k_to_others():
    config = dataclasses.replace(CONFIG, name="none", k_max=4)
    state = run(config, 9, lambda k: exact(k, 1e5), 3)[-1]
    assert (state.k, state.reason) == (9, "controller.name=none: k = 9 stays")
    np.testing.assert_allclose(state.noise_scale, 1e5, rtol=1e-9)


def random_observations(count, seed=0):
    """Of all sizes, from underflow to float32's largest, with zeros, infinities and NaN among them."""
    rng = np.random.default_rng(seed)
    values = 10.0 ** rng.uniform(-38, 38, size=(count, 4))
    values[rng.random(values.shape) < 0.05] = 0.0
    values[rng.random(values.shape) < 0.05] = math.nan
    values[rng.random(values.shape) < 0.05] = math.inf
    for row in values.tolist():
        n = int(rng.integers(1, 20))
        weight, share = row[0], rng.uniform(1 / n, 1)
        yield Observation(n * MICRO, weight, share * weight * weight, row[1], row[2], n)


@pytest.mark.parametrize("name", ["noise_scale", "norm_test", "none"])
def test_nothing_observed_makes_a_number_that_is_none_or_k_leave_its_limits(name):
    config = dataclasses.replace(CONFIG, name=name, k_min=2, k_max=16)
    state = initial_state(config, 4)
    for observation in random_observations(2000):
        state = observe(config, state, observation, MICRO)
        assert all(math.isfinite(x) for x in (state.signal, state.noise, state.amount, state.rejected)), state
        assert 2 <= state.k <= 16 and "nan" not in state.reason


@pytest.mark.parametrize("name", ["noise_scale", "norm_test"])
def test_decisions_replay_from_any_saved_state(name):
    rng = np.random.default_rng(3)
    config = dataclasses.replace(CONFIG, name=name, norm_test_theta=0.9)
    observations = [
        exact(
            int(rng.integers(1, 5)), 10 ** rng.uniform(3.7, 5), rng.normal() + 1, 2, 10 ** rng.uniform(0, 1)
        )
        for _ in range(60)
    ]
    states = [initial_state(config, 4)]
    for observation in observations:
        states.append(observe(config, states[-1], observation, MICRO))
    assert len({state.k for state in states}) > 3
    for start in range(0, 60, 7):
        state = type(states[0]).from_dict(json.loads(json.dumps(states[start].to_dict(), allow_nan=False)))
        assert state == states[start]
        for observation, expected in zip(observations[start:], states[start + 1 :]):
            state = observe(config, state, observation, MICRO)
            assert state == expected


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "noise"}, "controller.name='noise' is not known; use one of none, noise_scale, norm_test"),
        ({"k_min": 0}, "controller.k_min=0 must be at least 1"),
        ({"k_min": 9, "k_max": 8}, "controller.k_min=9 is greater than controller.k_max=8"),
        ({"half_life": 0}, "controller.half_life=0 must be at least 1"),
        ({"hysteresis": 1.0}, r"controller.hysteresis=1.0 must lie in .0, 1\)"),
        ({"hysteresis": -0.1}, "controller.hysteresis=-0.1"),
        ({"batch_per_noise": 0.0}, "controller.batch_per_noise=0.0"),
        ({"batch_per_noise": math.nan}, "controller.batch_per_noise=nan"),
        ({"norm_test_theta": -1.0}, "controller.norm_test_theta=-1.0"),
    ],
)
def test_a_config_out_of_range_is_one_sentence_that_names_the_key(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **changes)
