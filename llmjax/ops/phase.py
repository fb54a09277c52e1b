"""cos and sin of position * frequency, as exact at position two billion as at position two.

A float32 product of the two loses the angle: from 2^24 on even neighbouring positions are one number. Here a
frequency is a 64-bit fraction of a turn, made on the host without rounding. A position times that fraction, of which
whole turns are dropped as integers drop what overflows, leaves the angle as 32 bits of a turn, at every position
below 2^31. No device needs float64 or 64-bit integers for it.
"""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

TWO_PI = Fraction("6.28318530717958647692528676655900576839433879875021164194988918461563281257241799725607")
LOW_HALF = 0xFFFF  # of a 32-bit word


def turns_of(frequencies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low word, uint32 [F] each, of frequency / 2 pi modulo 1, in units of 2^-64.

    frequencies: float64 [F], radians per position; taken as the exact numbers that they are.
    """
    fractions = [round(Fraction(float(f)) / TWO_PI * 2**64) % 2**64 for f in frequencies]
    return (
        np.array([f >> 32 for f in fractions], np.uint32),
        np.array([f & 0xFFFFFFFF for f in fractions], np.uint32),
    )


def phases(positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """position * frequency / 2 pi modulo 1, in units of 2^-32 and less than 4 of these off: uint32 [..., F].

    positions: int32 [...], from 0 to 2^31 - 1. frequencies: float64 [F], radians per position.
    """
    lead = (1,) * positions.ndim
    high, low = (words.reshape(*lead, -1) for words in turns_of(frequencies))
    p = positions.astype(jnp.uint32)[..., None]
    # Of p * high the overflow is whole turns. Of p * low the upper word counts, put together from products of 16-bit
    # halves; what is left out, the product of the lower halves and two carries, is less than 3 units.
    p_high, p_low = p >> 16, p & LOW_HALF
    low_high, low_low = low >> 16, low & np.uint32(LOW_HALF)
    return p * high + p_high * low_high + (p_high * low_low >> 16) + (p_low * low_high >> 16)


def cos_sin(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [..., F] each, of position * frequency, to within 2e-7 at every position.

    positions: int32 [...], from 0 to 2^31 - 1. frequencies: float64 [F], radians per position.
    """
    phase = phases(positions, frequencies)
    # cos(x) = sin(x + a quarter turn). In a loop of two, for XLA computes the result of a loop once, but that of plain
    # arithmetic again in every place that uses it: for each layer and head, forward and backward.
    quarters = np.array([1 << 30, 0], np.uint32)
    cos, sin = jax.lax.map(lambda quarter: _sin(phase + quarter), quarters)
    return cos, sin


def _sin(phase: jax.Array) -> jax.Array:
    """The sine, float32, of a phase in units of 2^-32 of a turn, uint32.

    sin(x) = sin(pi - x) brings the phase within a quarter of a turn of 0 while it is an integer, which loses nothing.
    What rounding to float32 then loses is most where the sine is flat.
    """
    phase, mirrored = (
        jax.lax.bitcast_convert_type(x, jnp.int32) for x in (phase, np.uint32(1 << 31) - phase)
    )
    near = jnp.where(jnp.abs(phase >> 1) <= 1 << 29, phase, mirrored)
    return jnp.sin(near.astype(jnp.float32) * np.float32(2 * np.pi / 2**32))
