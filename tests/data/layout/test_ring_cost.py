"""The model of the ring: which keys each step brings, how far keys travel, and how long the steps take."""

import numpy as np
import pytest

from llmjax.data.layout import ring_cost


def random_work(n, seed=0):
    return np.random.default_rng(seed).integers(0, 9, (n, n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_step_s_adds_the_work_against_the_devices_s_before_and_s_after(n):
    work = random_work(n)
    steps = ring_cost.steps(work)
    for step, d in np.ndindex(steps.shape):
        assert steps[step, d] == sum(work[d, e] for e in {(d - step) % n, (d + step) % n})
    assert steps.sum() == work.sum()


def test_reach_is_how_far_keys_travel_up_and_down():
    work = np.zeros((8, 8), int)
    assert ring_cost.reach(work) == (0, 0)
    work[5, 5] = 1
    assert ring_cost.reach(work) == (0, 0)
    # The keys of device 3 travel up by two.
    work[5, 3] = 1
    assert ring_cost.reach(work) == (2, 0)
    # Five hops up are three hops down, around the end of the ring.
    work[6, 1] = 1
    assert ring_cost.reach(work) == (2, 3)
    # Half around the ring counts as upward.
    work[0, 4] = 1
    assert ring_cost.reach(work) == (4, 3)


def test_in_lockstep_each_step_takes_as_long_as_its_slowest_device():
    work = np.array([[4, 0, 0], [2, 1, 0], [0, 3, 2]])
    assert ring_cost.lockstep_time(ring_cost.steps(work)) == 4 + 3
    assert ring_cost.lockstep_time(ring_cost.by_distance(work)) == 4 + 3


def test_a_free_running_device_waits_for_nothing_but_its_keys():
    # Neighbours wait only for the beginning of a step, at which the keys are sent, and not for its end.
    assert ring_cost.free_running_time(np.array([[4, 0, 0], [2, 1, 0], [0, 3, 2]])) == 5
    # Device 2 has no other work, but the keys of device 0 pass through device 1, which sends them on at time 9.
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
