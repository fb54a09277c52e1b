"""Learning-rate schedules do what they say, and where they cannot, a sentence says so."""

import dataclasses
import math
import re

import numpy as np
import pytest
from sections import optimizer_section

from llmjax.train.optim.schedules import (
    SCHEDULES,
    describe_jump,
    describe_schedule,
    make_schedule,
    schedule_remarks,
)

DECAYING = [name for name in SCHEDULES if name != "constant"]


def config(schedule="cosine", **changes):
    plain = optimizer_section(learning_rate=1.0, schedule=schedule, warmup_updates=10)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # update -> fraction of the peak; 100 updates, 10 of them warmup, down to 0.1
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 50: 1.0, 99: 1.0}),
        ("linear", {0: 0.1, 9: 1.0, 54: 0.55, 99: 0.1, 150: 0.1}),
        (
            "cosine",
            {0: 0.1, 9: 1.0, 54: 0.55, 31: 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * 22 / 90)), 99: 0.1},
        ),
        ("wsd", {0: 0.1, 9: 1.0, 40: 1.0, 79: 1.0, 89: 0.55, 99: 0.1, 150: 0.1}),
    ],
)
def test_schedules_pass_through_their_key_points(schedule, expected):
    learning_rate = make_schedule(
        optimizer_section(learning_rate=2.0, schedule=schedule, warmup_updates=10, decay_fraction=0.2), 100
    )
    for update, fraction in expected.items():
        np.testing.assert_allclose(learning_rate(update + 1), 2.0 * fraction, rtol=1e-6)


def test_without_warmup_the_first_update_is_at_the_peak():
    for schedule in ("cosine", "linear", "constant", "wsd"):
        learning_rate = make_schedule(
            optimizer_section(learning_rate=0.5, schedule=schedule, warmup_updates=0), 50
        )
        assert learning_rate(1) == 0.5


def test_a_run_shorter_than_its_warmup_only_warms_up():
    learning_rate = make_schedule(
        optimizer_section(learning_rate=1.0, warmup_updates=40, schedule="cosine"), 4
    )
    np.testing.assert_allclose([learning_rate(u) for u in range(1, 5)], [0.025, 0.05, 0.075, 0.1], rtol=1e-6)


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("updates", [1, 2, 3, 7, 100])
def test_every_decay_ends_at_the_final_rate_however_short_the_run(schedule, updates):
    settings = config(schedule, warmup_updates=0, final_lr_fraction=0.25, decay_fraction=0.05)
    rate = make_schedule(settings, updates)
    assert rate(updates) == (0.25 if schedule == "wsd" or updates > 1 else 1.0)
    assert rate(1) == 1.0 or updates == 1


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("num_updates", [20, 50, 400])
def test_schedule_updates_is_the_length_of_the_schedule_whatever_the_run(schedule, num_updates):
    settings = config(schedule, schedule_updates=50)
    rate, whole = make_schedule(settings, num_updates), make_schedule(config(schedule), 50)
    for u in (1, 9.5, 10, 30, 49, 50, 300):
        assert rate(u) == whole(u)
    assert rate(50) == rate(300) == pytest.approx(0.1)
    assert not schedule_remarks(settings, num_updates)


@pytest.mark.parametrize(
    ("changes", "updates", "sentence"),
    [
        ({}, 5, r"warmup_updates=10 is more than train.num_updates=5, .* at 0.5 of .*schedule_updates"),
        ({"schedule": "linear"}, 10, r"warmup_updates=10 leaves none of train.num_updates=10 for the decay"),
        ({"schedule": "wsd"}, 9, r"decay_fraction=0.2 .* to 0.755 instead of .*=1;"),
        ({"schedule": "constant"}, 5, r"warmup_updates=10 .* at 0.5 of .*=1; lower it$"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, 100, r"decay_fraction=0 leaves the decay .* no update"),
        (
            {"schedule": "wsd", "decay_fraction": 0.95},
            100,
            r"decay_fraction=0.95 .* to 0.957 instead of .*=1;",
        ),
    ],
)
def test_a_schedule_that_cannot_do_what_it_says_is_one_sentence(changes, updates, sentence):
    settings = config(**changes)
    (remark,) = schedule_remarks(settings, updates)
    assert re.search(sentence, remark), remark
    rates = [make_schedule(settings, updates)(u) for u in np.linspace(0, updates, 4001)]
    assert max(rates) < 1.0 or rates[-1] == 1.0  # what the sentence says is true
    if "instead" in remark:
        assert float(re.search("comes to ([0-9.]+) instead", remark)[1]) == pytest.approx(
            max(rates), abs=2e-3
        )


def test_schedules_that_do_what_they_say_are_not_remarked_upon():
    for schedule in SCHEDULES:
        assert schedule_remarks(config(schedule), 100) == schedule_remarks(config(schedule), 0) == []
    assert schedule_remarks(config("constant"), 10) == []
    assert (
        schedule_remarks(config(schedule_updates=100), 5) == []
    )  # the beginning of a longer run, as was said


@pytest.mark.parametrize("schedule", DECAYING)
def test_a_run_that_goes_on_longer_says_how_its_rate_jumps_and_which_key_keeps_the_curve(schedule):
    settings = config(schedule)
    before, after = make_schedule(settings, 100)(101), make_schedule(settings, 200)(101)
    sentence = describe_jump(settings, 200, 100, 100.0)
    assert f"goes on at {after:.3g} and not at {before:.3g}" in sentence and after > 4 * before
    kept = dataclasses.replace(settings, schedule_updates=100)
    assert "optimizer.schedule_updates=100 to stay" in sentence
    assert make_schedule(kept, 200)(101) == before and describe_jump(kept, 200, 100, 100.0) == ""
    # A run interrupted at half its length and called longer from then on jumps, too, unless nothing decays yet.
    early = describe_jump(settings, 200, 100, 50.0)
    assert bool(early) == (schedule != "wsd")
    assert describe_jump(settings, 100, 100, 50.0) == describe_jump(settings, 200, 100, 5.0) == ""


def test_a_constant_rate_never_jumps():
    assert describe_jump(config("constant"), 200, 100, 100.0) == ""


@pytest.mark.parametrize(
    ("changes", "updates", "text"),
    [
        ({}, 400, "rises to 1 over 10 updates, falls along a cosine to 0.1 at update 400"),
        ({"schedule": "linear", "warmup_updates": 0}, 9, "1 from the first update on, falls to 0.1 at update 9"),
        ({"schedule": "constant"}, 400, "rises to 1 over 10 updates"),
        ({"schedule": "wsd"}, 400, "rises to 1 over 10 updates, falls from update 321 on to 0.1 at update 400"),
        ({"schedule_updates": 50}, 80, "rises to 1 over 10 updates, falls along a cosine to 0.1 at update 50 and stays "
         "there"),
        ({"schedule": "linear", "schedule_updates": 100}, 55, "rises to 1 over 10 updates, falls to 0.1 at update 100; "
         "the run ends at 0.55"),
        ({}, 5, "rises to 1 over 10 updates; the run ends at 0.5"),
    ],
)  # fmt: skip
def test_the_plan_says_what_the_learning_rate_does(changes, updates, text):
    assert describe_schedule(config(**changes), updates) == text
