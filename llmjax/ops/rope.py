"""Rotary position embedding (Su et al. 2021) in the half-split form of GPT-NeoX and Llama, and its scaling to texts
longer than those of training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import choose
from llmjax.ops.phase import cos_sin

SINUSOID_THETA = 10000.0  # Vaswani et al. 2017


@dataclasses.dataclass(frozen=True)
class Rotary:
    """What a scaling starts from: f_i = theta ** (-2i / H), H the head_dim; the factor s is the new length over
    `original_len`, the one of training."""

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


def _linear(r: Rotary) -> np.ndarray:
    return r.frequencies / r.factor


def _ntk(r: Rotary) -> np.ndarray:
    theta = r.theta * r.factor ** (r.head_dim / (r.head_dim - 2))
    return dataclasses.replace(r, theta=theta).frequencies


def _yarn(r: Rotary) -> np.ndarray:
    pairs = r.head_dim // 2
    first, last = (
        pairs * math.log(r.original_len / (turns * 2 * math.pi)) / math.log(r.theta) for turns in (32.0, 1.0)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), r.head_dim - 1)
    kept = 1.0 - np.clip((np.arange(pairs) - first) / max(last - first, 0.001), 0.0, 1.0)
    return r.frequencies * (kept + (1.0 - kept) / r.factor)


def _llama3(r: Rotary) -> np.ndarray:
    turns = r.original_len * r.frequencies / (2 * math.pi)
    kept = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return r.frequencies * (kept + (1.0 - kept) / r.factor)


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One value of `model.rope_scaling`.

    frequencies   float64 [H/2], radians per position
    magnitude     of the factor s: what cos and sin are multiplied by
    reads_length  the frequencies depend on the length of training
    """

    frequencies: Callable[[Rotary], np.ndarray]
    magnitude: Callable[[float], float] = lambda factor: 1.0
    reads_length: bool = False


# linear  f_i / s: position interpolation (Chen et al. 2023)
# ntk     theta grows by s ** (H / (H - 2)): the highest frequency stays, the lowest becomes f / s (bloc97 2023)
# yarn    pairs that turn 32 times or more within the original length stay, those that turn once or less are
#         interpolated, a ramp over i lies between; cos and sin grow by 0.1 ln(s) + 1, scores by its square
#         (Peng et al. 2023; the ramp is linear in i between whole i, as in the authors' code and so in checkpoints)
# llama3  the same with 4 turns and 1, linear in the number of turns (Llama 3.1, 2024)
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
    """Radians per position of each pair of dimensions, float64 [H/2], and what to multiply cos and sin by, as `scaling`
    of `SCALINGS` has them. factor is the new length over `original_len`, the one of training."""
    chosen = choose(SCALINGS, "model.rope_scaling", scaling)
    return chosen.frequencies(Rotary(head_dim, theta, factor, original_len)), chosen.magnitude(factor)


def rotation(
    positions_BT: jax.Array,
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    original_len: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """cos, sin, each float32 [B, T, 1, H/2], of the angles position * frequency. Shared by all layers.

    Exact to float32 at every position below 2^31 (`ops.phase`).
    """
    per_position, magnitude = frequencies(head_dim, theta, scaling, factor, original_len)
    cos, sin = cos_sin(positions_BT[:, :, None], per_position)
    return cos * magnitude, sin * magnitude


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x with the pair (i, i + H/2) of each head turned by its position's angle; computed in float32."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def sinusoid(positions_BT: jax.Array, dim: int) -> jax.Array:
    """Fixed sinusoidal positions, float32 [B, T, D] (Vaswani et al. 2017, section 3.5; halves, not interleaved).

    Exact to float32 at every position below 2^31 (`ops.phase`).
    """
    per_position = Rotary(dim, SINUSOID_THETA, 1.0, 0).frequencies
    cos, sin = cos_sin(positions_BT, per_position)
    return jnp.concatenate([sin, cos], axis=-1)
