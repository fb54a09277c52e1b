"""What happens to logits between the last matrix product and the softmax: soft-capping, and sampling from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap) (Bello et al. 2017; Gemma 2), which keeps logits in (-cap, cap); cap 0 is off."""
    return cap * jnp.tanh(logits / cap) if cap else logits


def sample(
    rng: jax.Array, logits_BV: jax.Array, *, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """Token ids int32 [B]. temperature 0 is greedy; then top-k (Fan et al. 2018; 0 = off); then top-p, the smallest
    set of most likely tokens whose probability reaches top_p (Holtzman et al. 2020; 1 = off)."""
    if temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(
            sorted_BV, axis=-1
        )
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(rng, logits_BV, axis=-1).astype(jnp.int32)
