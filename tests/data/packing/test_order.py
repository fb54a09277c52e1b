"""The order of rows is a permutation of them in every epoch, looks random, and never changes."""

import numpy as np
import pytest

from llmjax.data.packing.order import hash_integers, permute, stable_argsort


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4099])
def test_the_order_of_rows_is_a_permutation_in_every_epoch(size):
    for epoch in range(4):
        assert sorted(permute(np.arange(size), size, 0, epoch).tolist()) == list(range(size))


def test_the_order_differs_between_epochs_and_seeds_and_looks_random():
    size = 2000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in range(3) for epoch in range(3)]
    for number, order in enumerate(orders):
        for other in [np.arange(size), *orders[:number]]:
            # Two random orders agree in 1 place on average.
            assert (order == other).sum() < 10
            # 4.5 standard deviations of the correlation of random orders.
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.1
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1


def test_any_part_of_the_order_can_be_computed_alone():
    whole = permute(np.arange(1000), 1000, 7, 3)
    assert [int(permute(np.array([i]), 1000, 7, 3)[0]) for i in range(100)] == whole[:100].tolist()


def test_orders_and_hashes_never_change():
    """The values are written down because a run that a later version resumes must see the same data."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [3, 2, 7, 8, 5, 0, 4, 9, 6, 1]
    assert permute(np.array([0, 999_999]), 10**6, 1, 2).tolist() == [561086, 85829]
    # The first output of splitmix64 from state 0.
    assert hash_integers(np.array([0]), 0).tolist() == [0xE220A8397B1DCDAF]


@pytest.mark.parametrize("bits", [1, 16, 17, 40])
def test_the_stable_sort_gives_the_order_of_numpy(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, 2000)
    np.testing.assert_array_equal(stable_argsort(values), np.argsort(values, kind="stable"))
