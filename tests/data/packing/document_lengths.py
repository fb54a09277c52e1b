"""Lengths of documents, in tokens, with which the packing tests are run: one array for each kind of corpus."""

import numpy as np
import pytest

LENGTHS = {
    "heavy_tailed": np.random.default_rng(0).lognormal(4, 1.5, 400).astype(np.int64) + 2,
    "short": np.random.default_rng(1).integers(2, 40, 500),
    "all_equal": np.full(50, 24),
    "one_long": np.array([1000]),
    "awkward_halves": np.random.default_rng(2).integers(30, 38, 300),
    "with_empty_ones": np.array([0, 1, 2, 65, 66, 1, 129, 130, 0]),
}
# The positions in a row. Some documents above fill one or two rows exactly, or need one position more.
T = 64

EVERY_CORPUS = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
