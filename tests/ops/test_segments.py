"""Sums over the documents of a row are those of a plain loop, wherever the tokens of a document lie."""

import jax
import numpy as np
import pytest

from llmjax.ops.segments import segment_sums


@pytest.mark.parametrize("shuffled", [False, True])
def test_each_token_gets_the_sum_of_its_own_segment(shuffled):
    rng = np.random.default_rng(0)
    segments_BT = np.sort(rng.integers(0, 4, (3, 9)), axis=1)
    # Every token may be a document of its own, and a row may be all padding.
    segments_BT = np.concatenate([segments_BT, [np.arange(1, 10)], [np.zeros(9, int)]])
    if shuffled:
        segments_BT = rng.permuted(segments_BT, axis=1)
    x_BTC = rng.standard_normal((5, 9, 2)).astype(np.float32)
    expected = np.zeros_like(x_BTC)
    for b in range(5):
        for t in range(9):
            expected[b, t] = x_BTC[b, segments_BT[b] == segments_BT[b, t]].sum(0)
    found = jax.jit(segment_sums)(x_BTC, segments_BT.astype(np.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
