"""Long documents are split over a group of shards in patterns of chunks that are more even than a zigzag."""

import numpy as np
import pytest

from llmjax.data.layout import ring_cost
from llmjax.data.layout.split_documents import PATTERNS


@pytest.mark.parametrize("size", PATTERNS)
def test_patterns_wait_less_than_a_zigzag(size):
    def lockstep_time(pattern):
        # The chunks of each device. A later chunk attends to an earlier one; the diagonal is half a square.
        places = [[at for at, device in enumerate(pattern) if device == d] for d in range(size)]
        # The group lies in a ring of three times its size.
        work = np.zeros((3 * size, 3 * size))
        for d, e in np.ndindex(size, size):
            work[d, e] = np.mean([[q > k for k in places[e]] for q in places[d]]) if d != e else 0.5
        return ring_cost.lockstep_time(ring_cost.steps(work))

    assert sorted(PATTERNS[size]) == sorted([*range(size)] * 2)
    assert lockstep_time(PATTERNS[size]) < lockstep_time([*range(size), *reversed(range(size))])
