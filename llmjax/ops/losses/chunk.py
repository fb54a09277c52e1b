"""One chunk of the loss: logits, softmax statistics and gradients, one block of vocabulary ids at a time
(`ops/losses/cross_entropy.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.ops.logits import softcap as cap_logits
from llmjax.ops.losses.tiling import Tiling


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The hidden states and targets of one chunk of tokens, and the output matrix.

    The methods pass a pair `kept` along: the softmax numerators exp(logit - reference), multiplied by the derivative
    of the soft-cap, with the dimensions in `tiling.order`; and the references, one for each block, token and shard of
    ids. The reference is the largest logit up to and including the block.
    """

    tiling: Tiling
    softcap: float
    w_ZVD: jax.Array
    bias_ZV: jax.Array | None
    h_XYCD: jax.Array
    targets_XYC: jax.Array

    def logits(self, start: jax.Array | int, size: int) -> jax.Array:
        """float32 logits of `size` ids from `start` on (in each shard of ids), in the order of `tiling`."""
        w = cast_weights(jax.lax.dynamic_slice_in_dim(self.w_ZVD, start, size, 1), self.h_XYCD.dtype)
        raw = jnp.einsum(f"XYCD,ZVD->{self.tiling.order}", self.h_XYCD, w, preferred_element_type=jnp.float32)
        if self.bias_ZV is not None:
            bias_ZV = jax.lax.dynamic_slice_in_dim(self.bias_ZV, start, size, 1)
            after = len(self.tiling.order) - self.tiling.z - 2
            raw = raw + bias_ZV.reshape((1,) * self.tiling.z + bias_ZV.shape + (1,) * after)
        return cap_logits(raw, self.softcap)

    def likeliest(self, largest_XYC: jax.Array) -> jax.Array:
        """The lowest id of each token whose logit equals `largest_XYC`, int32."""
        tiling, none = self.tiling, self.tiling.Z * self.tiling.ids

        def block(number: jax.Array | int, start: jax.Array | int, size: int, first: jax.Array) -> jax.Array:
            logits = self.logits(start, size)
            shard, place = (
                jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (tiling.z, tiling.z + 1)
            )
            ids = shard * tiling.ids + start + place
            # Ids without the largest logit become V, which is larger than every id, so that the minimum ignores them.
            is_largest = logits == tiling.by_id(tiling.by_shard(largest_XYC))
            return jnp.minimum(first, jnp.min(jnp.where(is_largest, ids, none), axis=tiling.z + 1))

        return jnp.min(
            tiling.over_blocks(block, tiling.zeros(tiling.states, jnp.int32) + none), axis=tiling.z
        )

    def read(self, kept: tuple) -> tuple[jax.Array, jax.Array, jax.Array, tuple]:
        """Goes through all ids once. Returns per token the largest logit, sum(exp(logit - largest)) and the target
        logit, and `kept`.

        `kept` is updated if it is not empty, for the gradients.
        """
        tiling, v = self.tiling, self.tiling.z + 1

        def block(number: jax.Array | int, start: jax.Array | int, size: int, carry: tuple) -> tuple:
            largest, total, target, kept = carry
            logits = self.logits(start, size)
            higher = jnp.maximum(largest, jnp.max(logits, axis=v))
            exp = jnp.exp(logits - tiling.by_id(higher))
            # Online softmax: when the largest logit grows, the sum so far is rescaled to the new one.
            total = total * jnp.exp(largest - higher) + jnp.sum(exp, axis=v)
            target += jnp.sum(jnp.where(tiling.is_target(self.targets_XYC, start, size), logits, 0.0), axis=v)
            if kept:
                exp = exp * (1.0 - jnp.square(logits / self.softcap)) if self.softcap else exp
                # The derivative of the soft-cap is multiplied in here, while the float32 logits exist.
                numerators = jax.lax.dynamic_update_slice_in_dim(kept[0], exp.astype(kept[0].dtype), start, v)
                kept = numerators, jax.lax.dynamic_update_index_in_dim(kept[1], higher, number, 0)
            return higher, total, target, kept

        zero = tiling.zeros(tiling.states)
        start = (zero - jnp.inf, zero, zero, kept)
        largest, total, target, kept = tiling.over_blocks(block, start)
        # So far each shard of ids has its own statistics; here they are brought to a common reference and added up.
        largest_XYC = jnp.max(largest, axis=tiling.z)
        total *= jnp.exp(largest - tiling.by_shard(largest_XYC))
        return largest_XYC, jnp.sum(total, axis=tiling.z), jnp.sum(target, axis=tiling.z), kept

    def add_gradients(
        self,
        kept: tuple,
        largest_XYC: jax.Array,
        scale_XYC: jax.Array,
        dtarget_XYC: jax.Array,
        dw: jax.Array,
        dbias: jax.Array | None,
        dw_dims: str,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Turns the numerators in `kept` into gradients of the logits, in place, and adds this chunk's part to `dw`
        and `dbias`.

        scale_XYC    factor that turns exp(logit - largest) into a gradient
        dtarget_XYC  gradient of the target logit
        dw_dims      the order of the dimensions of `dw`

        Returns the gradients of the logits, `dw` and `dbias`.
        """
        tiling, v, dw_v = self.tiling, self.tiling.z + 1, dw_dims.index("V")
        numerators, references = kept

        def block(number: jax.Array | int, start: jax.Array | int, size: int, carry: tuple) -> tuple:
            dlogits, dw, dbias = carry
            # The numerators of a block refer to the largest logit at the time of the block; here they are brought to
            # the final one.
            scale = tiling.by_shard(scale_XYC) * jnp.exp(references[number] - tiling.by_shard(largest_XYC))
            part = jax.lax.dynamic_slice_in_dim(dlogits, start, size, v) * tiling.by_id(scale)
            dtarget = tiling.by_id(tiling.by_shard(dtarget_XYC))
            part = jnp.where(tiling.is_target(self.targets_XYC, start, size), dtarget, part)
            # Matrix products read the gradients in the dtype of the hidden states and add up in float32.
            part = part.astype(dlogits.dtype)
            dw_part = jnp.einsum(
                f"{tiling.order},XYCD->{dw_dims}", part, self.h_XYCD, preferred_element_type=jnp.float32
            )
            dw_part += jax.lax.dynamic_slice_in_dim(dw, start, size, dw_v)
            dlogits = jax.lax.dynamic_update_slice_in_dim(dlogits, part, start, v)
            if dbias is not None:
                dbias_part = jnp.einsum(f"{tiling.order}->XYZV", part.astype(jnp.float32))
                dbias_part += jax.lax.dynamic_slice_in_dim(dbias, start, size, 3)
                dbias = jax.lax.dynamic_update_slice_in_dim(dbias, dbias_part, start, 3)
            return dlogits, jax.lax.dynamic_update_slice_in_dim(dw, dw_part, start, dw_v), dbias

        return tiling.over_blocks(block, (numerators, dw, dbias))


def cast_weights(w: jax.Array, dtype: Any) -> jax.Array:
    """`w` in `dtype`."""
    if w.dtype == dtype:
        return w
    # Rounding to the precision of `dtype` first ties the cast to this place. Otherwise XLA on TPU would cast all
    # weights once and hold the copy.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w, info.nexp, info.nmant).astype(dtype)
