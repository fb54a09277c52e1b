"""Sampling of token ids with settings that differ from row to row, for texts that are written side by side.

`ops/logits.py` samples with one setting for all rows, which is known when it is compiled. Where the settings of a row
are the same, both draw the same ids.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.ops.logits import keep_first


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an id is drawn in each of B rows.

    temperature_B  float32; 0 takes the likeliest id
    top_k_B        int32, draws from the k likeliest ids only (Fan et al. 2018); 0 is off
    top_p_B        float32, draws from the likeliest ids that together reach this probability (Holtzman et al. 2020),
                   after top_k; 1 is off
    min_p_B        float32, draws from ids whose probability is at least this share of the largest one (Nguyen et al.
                   2024); 0 is off
    penalty_B      float32, divides the positive logits of ids that are there already, and multiplies their negative
                   ones (Keskar et al. 2019, which calls it repetition penalty); 1 is off
    """

    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    penalty_B: Any


jax.tree_util.register_dataclass(Settings)


def sample_rows(keys_B: jax.Array, logits_BV: jax.Array, seen_BV: jax.Array, settings: Settings) -> jax.Array:
    """Token ids int32 [B], each drawn with the key of its row.

    seen_BV  bool, the ids that the text of a row has already

    Ties and logits that are -inf or NaN are treated as in `ops/logits.py: sample`.
    """
    logits_BV = jnp.where(jnp.isnan(logits_BV), -jnp.inf, logits_BV.astype(jnp.float32))
    penalty_B1 = settings.penalty_B[:, None]
    punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    greedy_B = settings.temperature_B == 0
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    temperature_B1 = jnp.where(greedy_B, 1.0, settings.temperature_B)[:, None]
    # Divided after the shift, as in `sample`: even the smallest temperature keeps the order of the logits.
    scaled_BV = jnp.where(logits_BV == largest_B1, 0.0, (logits_BV - largest_B1) / temperature_B1)
    scaled_BV = jnp.where(largest_B1 > -jnp.inf, scaled_BV, -jnp.inf)
    # Sorting the vocabulary takes long, and many texts do without.
    sorts_B = ((settings.top_k_B > 0) | (settings.top_p_B < 1)) & ~greedy_B
    kept_BV = jax.lax.cond(jnp.any(sorts_B), _keep_likeliest, lambda x_BV, _: x_BV, scaled_BV, settings)
    # The largest of the scaled logits is 0.
    kept_BV = jnp.where(scaled_BV < jnp.log(settings.min_p_B)[:, None], -jnp.inf, kept_BV)
    # A row draws by itself, so that it does not depend on the other rows.
    drawn_B = jax.vmap(lambda key, row_V: jax.random.categorical(key, row_V[None], axis=-1)[0])(
        keys_B, kept_BV
    )
    return jnp.where(greedy_B, likeliest_B, drawn_B.astype(jnp.int32))


def _keep_likeliest(scaled_BV: jax.Array, settings: Settings) -> jax.Array:
    """`scaled_BV` with -inf for the ids that top_k and top_p leave out."""
    V = scaled_BV.shape[-1]
    k_B1 = jnp.where(settings.top_k_B > 0, jnp.minimum(settings.top_k_B, V), V)[:, None]
    order_1V = jnp.arange(V, dtype=jnp.int32)[None]
    sorted_BV = jnp.sort(scaled_BV, axis=-1, descending=True)
    among_BV = jnp.where(order_1V < k_B1, sorted_BV, -jnp.inf)
    sums_BV = jnp.cumsum(jax.nn.softmax(among_BV, axis=-1), axis=-1)
    # An id belongs to the nucleus if the probabilities before it sum to less than top_p. The first always belongs.
    inside_BV = (sums_BV < settings.top_p_B[:, None]) & (order_1V < k_B1 - 1)
    count_B1 = jnp.sum(inside_BV, axis=-1, keepdims=True, dtype=jnp.int32) + 1
    count_B1 = jnp.where(settings.top_p_B[:, None] < 1, count_B1, k_B1)
    return keep_first(scaled_BV, count_B1, jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1))
