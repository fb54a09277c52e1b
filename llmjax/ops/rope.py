"""Rotary position embedding (RoPE: Su et al. 2021) and its scalings to sequences longer than in training.

Dimension i of a head is paired with dimension i + H/2, as in GPT-NeoX and Llama.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import choose
from llmjax.ops.phase import cos_sin

# The base of the sinusoidal positions of Vaswani et al. 2017.
SINUSOID_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The inputs of a scaling. The frequency of pair i is f_i = theta ** (-2i / H), where H is `head_dim`.

    factor        s, the new sequence length divided by `original_len`
    original_len  the sequence length in tokens that the model was trained at; 0 if the scaling does not read it
    """

    head_dim: int
    theta: float
    factor: float
    original_len: int

    @property
    def frequencies(self) -> np.ndarray:
        """f_i without any scaling, float64 [H/2]."""
        pairs = self.head_dim // 2
        return self.theta ** (-np.arange(pairs, dtype=np.float64) / pairs)


def _none(r: Rotary) -> np.ndarray:
    return r.frequencies


# Position interpolation: f_i / s (Chen et al. 2023).
def _linear(r: Rotary) -> np.ndarray:
    return r.frequencies / r.factor


# NTK-aware scaling (bloc97 2023): theta grows by s ** (H / (H - 2)), so that the highest frequency stays as it is and
# the lowest becomes f / s.
def _ntk(r: Rotary) -> np.ndarray:
    theta = r.theta * r.factor ** (r.head_dim / (r.head_dim - 2))
    return dataclasses.replace(r, theta=theta).frequencies


# YaRN (Peng et al. 2023): pairs that turn at least 32 times within the original length keep their frequency, pairs
# that turn at most once are interpolated (f_i / s), and between them is a ramp. The ramp is linear in i, between
# bounds rounded to whole numbers: the authors' code does so, and therefore published checkpoints do.
def _yarn(r: Rotary) -> np.ndarray:
    pairs = r.head_dim // 2
    first, last = (
        pairs * math.log(r.original_len / (turns * 2 * math.pi)) / math.log(r.theta) for turns in (32.0, 1.0)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), r.head_dim - 1)
    # The 0.001 avoids a division by zero where both bounds are equal, as in the authors' code.
    kept = 1.0 - np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0.0, 1.0)
    return r.frequencies * (kept + (1.0 - kept) / r.factor)


# Llama 3.1 (2024): as YaRN with 4 turns and 1 turn, but the ramp is linear in the number of turns.
def _llama3(r: Rotary) -> np.ndarray:
    turns = r.original_len * r.frequencies / (2 * math.pi)
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return r.frequencies * (kept + (1.0 - kept) / r.factor)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One value of `transformer.rope_scaling`.

    frequencies   function of `Rotary` to float64 [H/2], radians per position
    magnitude     function of the factor s to the number that multiplies cos and sin
    reads_length  whether the frequencies depend on the length of training
    """

    frequencies: Callable[[Rotary], np.ndarray]
    magnitude: Callable[[float], float] = lambda factor: 1.0
    reads_length: bool = False


# The formulas are explained above each function. YaRN also multiplies cos and sin by 0.1 ln(s) + 1, so that attention
# scores grow by its square.
SCALINGS = {
    "none": Scaling(_none),
    "linear": Scaling(_linear),
    "ntk": Scaling(_ntk),
    "yarn": Scaling(_yarn, lambda factor: 0.1 * math.log(factor) + 1.0, reads_length=True),
    "llama3": Scaling(_llama3, reads_length=True),
}


def frequencies(
    head_dim: int, theta: float, scaling: str = "none", factor: float = 1.0, original_len: int = 0
) -> tuple[np.ndarray, float]:
    """The frequency of each pair of dimensions, float64 [H/2], radians per position, and the factor for cos and sin.

    `scaling` is a name in `SCALINGS`. `factor` is the new sequence length divided by `original_len`, the length of
    training.
    """
    chosen = choose(SCALINGS, "transformer.rope_scaling", scaling)
    return chosen.frequencies(Rotary(head_dim, theta, factor, original_len)), chosen.magnitude(factor)


def rotation(
    positions_BT: jax.Array,
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    original_len: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * frequency, float32 [B, T, 1, H/2] each. All layers share them.

    The result is exact to float32 at every position below 2^31 (`ops/phase.py`).
    """
    per_position, magnitude = frequencies(head_dim, theta, scaling, factor, original_len)
    # The added dimension broadcasts over heads.
    cos, sin = cos_sin(positions_BT[:, :, None], per_position)
    return cos * magnitude, sin * magnitude


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x_BTNH with each pair (i, i + H/2) rotated by the angle of its position. Computed in float32, returned in the
    dtype of x."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def sinusoid(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Fixed sinusoidal position embeddings, float32 [B, T, D] (Vaswani et al. 2017, section 3.5).

    The first half of the dimensions holds sines and the second half cosines; the paper interleaves them.
    """
    per_position = Rotary(dim, SINUSOID_THETA, 1.0, 0).frequencies
    cos, sin = cos_sin(positions_BT, per_position)
    return jnp.concatenate([sin, cos], axis=-1)
