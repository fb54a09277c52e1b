"""The time of a ring, against what its steps are said to be."""

import numpy as np
import pytest

from llmjax.data.layout import ring_cost


def random_work(n, seed=0):
    return np.random.default_rng(seed).integers(0, 9, (n, n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_a_step_meets_the_devices_before_and_after_once_each(n):
    work = random_work(n)
    steps = ring_cost.steps(work)
    for step, d in np.ndindex(steps.shape):
        assert steps[step, d] == sum(work[d, e] for e in {(d - step) % n, (d + step) % n})
    assert steps.sum() == work.sum()


def test_reach_is_how_far_keys_go_up_and_down():
    work = np.zeros((8, 8), int)
    assert ring_cost.reach(work) == (0, 0)
    work[5, 5] = 1
    assert ring_cost.reach(work) == (0, 0)
    work[5, 3] = 1  # the keys of 3 go up by two
    assert ring_cost.reach(work) == (2, 0)
    work[6, 1] = 1  # five up is three down, around the end
    assert ring_cost.reach(work) == (2, 3)
    work[0, 4] = 1  # half around counts as up
    assert ring_cost.reach(work) == (4, 3)


def test_in_lockstep_each_step_takes_as_long_as_its_slowest_device():
    work = np.array([[4, 0, 0], [2, 1, 0], [0, 3, 2]])
    assert ring_cost.lockstep_time(ring_cost.steps(work)) == 4 + 3
    assert ring_cost.lockstep_time(ring_cost.by_distance(work)) == 4 + 3


def test_running_free_a_device_waits_for_its_keys_alone():
    # Of a step before the last only its beginning holds up others.
    assert ring_cost.free_running_time(np.array([[4, 0, 0], [2, 1, 0], [0, 3, 2]])) == 5
    # Device 2 of 4 is free at once, but the keys of device 0 pass through device 1, which sends them on at 9.
    work = np.zeros((4, 4), int)
    work[1, 1], work[1, 0], work[2, 0] = 9, 1, 1
    assert ring_cost.free_running_time(work) == 9 + 1
    work[1, 1] = 0
    assert ring_cost.free_running_time(work) == 1


@pytest.mark.parametrize("n", [2, 3, 8])
def test_no_model_is_faster_than_the_busiest_device_or_slower_than_lockstep(n):
    for seed in range(20):
        work = random_work(n, seed)
        free = ring_cost.free_running_time(work)
        assert work.sum(axis=1).max() <= free <= ring_cost.lockstep_time(ring_cost.steps(work))
