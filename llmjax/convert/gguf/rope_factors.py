"""The scaling of rotary positions in Llama 3.1 and later, which GGUF files hold as a tensor of factors.

The tensor says by what the wavelength of each pair of dimensions is multiplied, and not by which rule. The rule of
Llama 3.1 has two numbers, which are found from the factors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmjax.ops.rope import frequencies

# The lengths that are tried where no factor lies between the least and the largest.
LENGTHS = [2**power for power in range(4, 25)]
# The largest relative difference of two factors that are equal in float32. A choice above its rounding.
ROUNDING = 1e-5


def make_factors(head_dim: int, theta: float, factor: float, original_len: int) -> np.ndarray:
    """The factors, float32 [H/2], for transformer.rope_scaling=llama3."""
    plain, _ = frequencies(head_dim, theta)
    scaled, _ = frequencies(head_dim, theta, "llama3", factor, original_len)
    return (plain / scaled).astype(np.float32)


def read_factors(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The table rope_scaling of config.json that these factors mean, or None if they follow another rule."""
    head_dim, largest = 2 * factors.size, float(str(np.float32(factors.max(initial=1.0))))
    if largest <= 1 or not np.isfinite(factors).all():
        return {} if (factors == 1).all() else None
    plain, _ = frequencies(head_dim, theta)
    between = (factors > 1 + ROUNDING) & (factors < largest * (1 - ROUNDING))
    # The share of the unscaled frequency, which is linear in the number of turns, from 0 at 1 turn to 1 at 4.
    kept = (1 / factors[between].astype(np.float64) - 1 / largest) / (1 - 1 / largest)
    found = {round(length) for length in ((1 + 3 * kept) * 2 * math.pi / plain[between]).tolist()}
    for length in sorted(found) or LENGTHS:
        if np.allclose(make_factors(head_dim, theta, largest, length), factors, rtol=ROUNDING, atol=0):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": length,
            }
    return None
