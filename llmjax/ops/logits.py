"""From hidden states to logits, soft-capping of logits, and sampling of token ids from logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.types import Head


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap), which keeps logits within (-cap, cap) (Bello et al. 2017; Gemma 2). A cap of 0 is
    off."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def head_logits(hidden_BTD: jax.Array, head: Head) -> jax.Array:
    """float32 logits_BTV of all tokens at once, for generation. Training computes them in chunks instead
    (`ops/losses/cross_entropy.py`)."""
    w_VD = head.w_VD.astype(hidden_BTD.dtype)
    # The matrix product adds up in float32, whatever the dtype of its operands: bfloat16 logits would be too coarse.
    logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, w_VD, preferred_element_type=jnp.float32)
    if head.bias_V is not None:
        logits_BTV = logits_BTV + head.bias_V[None, None]
    return softcap(logits_BTV, head.softcap)


def sample(
    rng: jax.Array, logits_BV: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """Token ids int32 [B], drawn from softmax(logits / temperature).

    temperature  0 is greedy decoding: the id with the largest logit, and the lowest id among equal ones
    top_k        draw from the k ids with the largest logits only (Fan et al. 2018); 0 is off
    top_p        draw from the smallest set of most probable ids whose probability reaches top_p (nucleus sampling:
                 Holtzman et al. 2020), after top_k; 1 is off

    Where equal logits compete for the last place in such a set, the lowest ids win. A logit that is -inf or NaN is
    never drawn, unless a row has no other.
    """
    logits_BV = jnp.where(jnp.isnan(logits_BV), -jnp.inf, logits_BV.astype(jnp.float32))
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # The largest logit is shifted to 0 before the division, and all others below it. So the order of the logits
    # survives the division by even the smallest temperature, which could make all of them infinite otherwise.
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    scaled_BV = jnp.where(logits_BV == largest_B1, 0.0, (logits_BV - largest_B1) / temperature)
    scaled_BV = jnp.where(largest_B1 > -jnp.inf, scaled_BV, -jnp.inf)
    if top_k or top_p < 1.0:
        scaled_BV = _keep_first(scaled_BV, *_count_likeliest(scaled_BV, top_k, top_p))
    return jax.random.categorical(rng, scaled_BV, axis=-1).astype(jnp.int32)


def _count_likeliest(logits_BV: jax.Array, top_k: int, top_p: float) -> tuple[jax.Array, jax.Array]:
    """The number of ids that `sample` draws from, int32 [B, 1], and the smallest logit among these ids, [B, 1]."""
    V = logits_BV.shape[-1]
    k = min(top_k or V, V)
    sorted_Bk = jnp.sort(logits_BV, axis=-1, descending=True)[:, :k]
    count_B1 = jnp.full((len(logits_BV), 1), k, jnp.int32)
    if top_p < 1.0:
        sums_Bk = jnp.cumsum(jax.nn.softmax(sorted_Bk, axis=-1), axis=-1)
        # An id belongs to the nucleus if the probabilities before it sum to less than top_p. The first id always
        # belongs.
        reached_B1 = jnp.sum(sums_Bk[:, :-1] < top_p, axis=-1, keepdims=True, dtype=jnp.int32)
        count_B1 = reached_B1 + 1
    return count_B1, jnp.take_along_axis(sorted_Bk, count_B1 - 1, axis=-1)


def _keep_first(logits_BV: jax.Array, count_B1: jax.Array, least_B1: jax.Array) -> jax.Array:
    """`logits_BV` with -inf for all but the `count` largest, of which `least` is the smallest. Among logits that equal
    it, the first ids stay."""
    above_BV, equal_BV = logits_BV > least_B1, logits_BV == least_B1
    # Ties: of the ids whose logit equals the least one kept, only as many stay as there are places left.
    left_B1 = count_B1 - jnp.sum(above_BV, axis=-1, keepdims=True, dtype=jnp.int32)
    kept_BV = above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1, dtype=jnp.int32) <= left_B1))
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


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

    Ties and logits that are -inf or NaN are treated as in `sample`, which draws the same ids with the same settings.
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
    return _keep_first(scaled_BV, count_B1, jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1))
