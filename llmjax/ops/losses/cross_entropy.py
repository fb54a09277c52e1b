"""Softmax cross-entropy straight from hidden states and the output matrix, as sums, without ever holding all logits.

Logits [B, T, V] would be the largest array of a training step. Here they exist for one chunk of tokens at a time. The
gradients of hidden states and output matrix are computed in the forward pass, while the logits exist: the gradient of
a sum of losses needs nothing that comes later (Liger Kernel: Hsu et al. 2024; cut cross-entropy: Wijmans et al.
2024). Nothing of size V per token is stored or computed twice.

Every chunk reads and writes the gradient of the whole output matrix, so large chunks save memory traffic, but their
logits take memory. Therefore a chunk goes through the vocabulary in blocks: float32 logits exist for one block of ids
at a time. A block leaves behind exp(logit - largest logit so far) in the dtype of the hidden states, the numerators
of the softmax (online softmax: Milakov and Gimelshein 2018). After the last block the denominator is known, and the
numerators are turned into gradients in place.

`tiling.py` decides the sizes of chunks and blocks, and `chunk.py` computes one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.ops.losses.chunk import Chunk, cast_weights
from llmjax.ops.losses.tiling import CPU, OTHERS, TPU, Chunking, make_tiling
from llmjax.types import Head, LossSums

# The gradients of hidden_BTD, w_VD and bias_V.
Gradients = tuple[jax.Array, jax.Array, jax.Array | None]
# The scalar that is differentiated, and the separate sums that it consists of, by name.
Sums = tuple[jax.Array, dict[str, jax.Array]]


def softmax_cross_entropy(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_loss: float = 0.0,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    chunking: Chunking | None = None,
) -> LossSums:
    """Sums over tokens. `loss` is the sum of weight * cross-entropy, where cross-entropy = log-sum-exp (lse) - target
    logit.

    head          w_VD is cast to the dtype of hidden_BTD. Its gradient is summed in float32 and returned in the dtype
                  of w_VD
    z_loss        coefficient of a term that pulls lse towards 0 (PaLM: Chowdhery et al. 2022, section 5); 0 is off.
                  If it is on, the metric `z_loss` is the sum of weight * z_loss * lse ** 2, and `objective` is the
                  sum of both terms
    shards        the number of devices that split B and T. Each device loops over its own tokens and sums its own
                  gradient of w_VD, and these are added up once, at the end. Wrong numbers cost communication, never
                  correctness
    vocab_shards  the number of devices that split V. Each device loops over its own ids, and sums over ids are added
                  up once per chunk
    chunking      the sizes of chunks and blocks; None chooses them for the platform

    `weight` is the sum of all weights. The metric `accuracy` is the weight of targets whose logit is the largest,
    ties included. Gradients reach `hidden_BTD` and `head` only through `LossSums.main`, and never reach `weights_BT`.
    A token of weight 0 may have hidden states that are infinite or NaN.
    """
    settings = (float(head.softcap), float(z_loss), (*shards, vocab_shards), chunking)
    main, parts = _sums(settings, hidden_BTD, head.w_VD, head.bias_V, targets_BT, weights_BT)
    # Only `main` has a gradient: the custom backward pass below reads the cotangent of this one scalar.
    parts, weight = jax.lax.stop_gradient(parts), jnp.sum(weights_BT)
    metrics = {name: parts[name] for name in parts if name != "loss"}
    if not z_loss:
        return LossSums(main, weight, metrics)
    return LossSums(parts["loss"], weight, metrics, objective=main)


def token_cross_entropy(
    hidden_BTD: jax.Array,
    head: Head,
    targets_BT: jax.Array,
    *,
    shards: tuple[int, int] = (1, 1),
    vocab_shards: int = 1,
    chunking: Chunking | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(loss_BT, correct_BT) of every token, computed in the same chunks as in `softmax_cross_entropy`. It has no
    gradient.

    loss_BT is float32, the log-sum-exp minus the target logit. correct_BT is true where greedy decoding would emit
    the target: the lowest id among those with the largest logit.
    """
    settings = (float(head.softcap), (*shards, vocab_shards))

    def by(chunking: Chunking) -> Callable[..., tuple]:
        return functools.partial(_score_chunks, chunking, *settings)

    # Without a given chunking, the choice is left to the compiler, which knows the platform: a program may be
    # compiled ahead of time for a TPU on a machine without one.
    arrays = hidden_BTD, head.w_VD, head.bias_V, targets_BT
    if chunking is not None:
        return by(chunking)(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=by(TPU), cpu=by(CPU), default=by(OTHERS))


# The gradients are computed in the forward pass; the backward pass only multiplies them by the cotangent of the loss.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    settings: tuple,
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> Sums:
    return _on_platform(settings, False, hidden_BTD, w_VD, bias_V, targets_BT, weights_BT)[0]


def _sums_forward(settings: tuple, *arrays: jax.Array | None) -> tuple[Sums, Gradients]:
    return _on_platform(settings, True, *arrays)


def _sums_backward(settings: tuple, gradients: Gradients, cotangents: Sums) -> tuple:
    scaled = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
    return *scaled, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _on_platform(settings: tuple, gradients: bool, *arrays: jax.Array | None) -> tuple:
    softcap, z_loss, shards, chunking = settings

    def by(chunking: Chunking) -> Callable[..., tuple]:
        return functools.partial(_sum_chunks, chunking, softcap, z_loss, shards, gradients)

    if chunking is not None:
        return by(chunking)(*arrays)
    return jax.lax.platform_dependent(*arrays, tpu=by(TPU), cpu=by(CPU), default=by(OTHERS))


def _sum_chunks(
    chunking: Chunking,
    softcap: float,
    z_loss: float,
    shards: tuple[int, int, int],
    gradients: bool,
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, Gradients | None]:
    """The sums over all tokens, and the gradients of hidden_BTD, w_VD and bias_V if `gradients`, in a loop over
    chunks."""
    (B, T, D), dtype = hidden_BTD.shape, hidden_BTD.dtype
    tiling = make_tiling(chunking, shards, hidden_BTD, w_VD)
    w_ZVD = w_VD.reshape(tiling.Z, tiling.ids, D)
    w_ZVD = w_ZVD.astype(dtype) if chunking.cast_once else w_ZVD
    bias_ZV = None if bias_V is None else bias_V.astype(jnp.float32).reshape(tiling.Z, tiling.ids)
    tokens = tuple(tiling.split(x) for x in (hidden_BTD, targets_BT, weights_BT.astype(jnp.float32)))
    # Each shard of tokens has its own partial sum of the gradient until the end. The order follows the layout of the
    # logits, so that the products below write it without a transposition.
    dw_dims = "XYZVD" if chunking.ids_first else "XYDZV"

    def body(i: jax.Array, carry: tuple) -> tuple:
        sums, *more = carry
        h_XYCD, targets_XYC, weights_XYC = (jax.lax.dynamic_index_in_dim(x, i, 2, False) for x in tokens)
        # A token of weight 0 may hold infinities or NaN. `where` removes them; a product would not, because 0 * NaN
        # is NaN.
        h_XYCD = jnp.where(weights_XYC[..., None] == 0, 0, h_XYCD)
        # The barrier ties the weights to this loop step. Otherwise XLA would move the cast of all weights out of the
        # loop and hold a copy of them.
        w = w_ZVD if w_ZVD.dtype == dtype else jax.lax.optimization_barrier((w_ZVD, i))[0]
        chunk = Chunk(tiling, softcap, w, bias_ZV, h_XYCD, targets_XYC)
        largest_XYC, total_XYC, target_XYC, kept = chunk.read(tuple(more[3:]))
        lse_XYC = largest_XYC + jnp.log(total_XYC)
        found = _found(z_loss, weights_XYC, lse_XYC, target_XYC, largest_XYC)
        sums = jax.tree.map(jnp.add, sums, found)
        if not gradients:
            return (sums,)
        # d objective / d logit_v = weight * (1 + 2 z_loss lse) * softmax_v, minus weight for the target id. softmax_v
        # is numerator_v / total.
        scale_XYC = weights_XYC * (1.0 + 2.0 * z_loss * lse_XYC) / total_XYC
        dtarget_XYC = _target_gradient(softcap, weights_XYC, scale_XYC, target_XYC, largest_XYC)
        dh, dw, dbias = more[:3]
        factors = largest_XYC, scale_XYC, dtarget_XYC
        dlogits, dw, dbias = chunk.add_gradients(kept, *factors, dw, dbias, dw_dims)
        result = jnp.float32 if chunking.wide else None
        dh_XYCD = jnp.einsum(
            f"{tiling.order},ZVD->XYCD", dlogits, cast_weights(w, dtype), preferred_element_type=result
        ).astype(dtype)
        return sums, jax.lax.dynamic_update_index_in_dim(dh, dh_XYCD, i, 2), dw, dbias, dlogits, kept[1]

    # The buffers for gradients, numerators and references are allocated once and reused by every chunk.
    carry: tuple = ({name: jnp.zeros([]) for name in ("loss", "accuracy", *(("z_loss",) if z_loss else ()))},)
    if gradients:
        numerators, references = (
            tiling.zeros(tiling.order, dtype),
            tiling.zeros(f"L{tiling.states}", L=tiling.num_blocks),
        )
        dbias = None if bias_ZV is None else tiling.zeros("XYZV")
        carry += (jnp.zeros_like(tokens[0]), tiling.zeros(dw_dims, D=D), dbias, numerators, references)
    parts, *more = jax.lax.fori_loop(0, tiling.chunks.count, body, carry)
    sums = parts["loss"] + parts["z_loss"] if z_loss else parts["loss"], parts
    if not gradients:
        return sums, None
    # The one sum over shards of tokens: the only communication of this gradient.
    dw_ZVD = jnp.einsum(f"{dw_dims}->ZVD", more[1])
    dbias_V = None if bias_V is None else jnp.sum(more[2], (0, 1)).reshape(-1).astype(bias_V.dtype)
    return sums, (tiling.join(more[0], B, T), dw_ZVD.reshape(w_VD.shape).astype(w_VD.dtype), dbias_V)


def _found(
    z_loss: float, weights_XYC: jax.Array, lse_XYC: jax.Array, target_XYC: jax.Array, largest_XYC: jax.Array
) -> dict[str, jax.Array]:
    """The sums over the tokens of a chunk, from their log-sum-exp, target logit and largest logit."""
    found = {
        "loss": jnp.sum(weights_XYC * (lse_XYC - target_XYC)),
        "accuracy": jnp.sum(jnp.where(target_XYC >= largest_XYC, weights_XYC, 0.0)),
    }
    if z_loss:
        found["z_loss"] = jnp.sum(weights_XYC * (z_loss * jnp.square(lse_XYC)))
    return found


def _target_gradient(
    softcap: float,
    weights_XYC: jax.Array,
    scale_XYC: jax.Array,
    target_XYC: jax.Array,
    largest_XYC: jax.Array,
) -> jax.Array:
    """The gradient of the target logits of a chunk. `scale_XYC` turns exp(logit - largest) into a gradient."""
    # In float32, because the two terms nearly cancel for a target that is predicted well.
    dtarget_XYC = scale_XYC * jnp.exp(target_XYC - largest_XYC) - weights_XYC
    if softcap:
        # The derivative of softcap c * tanh(x / c), from its value y, is 1 - (y / c)^2.
        dtarget_XYC *= 1.0 - jnp.square(target_XYC / softcap)
    return dtarget_XYC


def _score_chunks(
    chunking: Chunking,
    softcap: float,
    shards: tuple[int, int, int],
    hidden_BTD: jax.Array,
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    targets_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token, and whether its target is the id of greedy decoding, in a loop over chunks."""
    (B, T, D), dtype = hidden_BTD.shape, hidden_BTD.dtype
    tiling = make_tiling(chunking, shards, hidden_BTD, w_VD)
    w_ZVD = w_VD.reshape(tiling.Z, tiling.ids, D)
    w_ZVD = w_ZVD.astype(dtype) if chunking.cast_once else w_ZVD
    bias_ZV = None if bias_V is None else bias_V.astype(jnp.float32).reshape(tiling.Z, tiling.ids)

    def score(arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk = Chunk(tiling, softcap, w_ZVD, bias_ZV, *arrays)
        largest_XYC, total_XYC, target_XYC, _ = chunk.read(())
        likeliest_XYC = chunk.likeliest(largest_XYC)
        return largest_XYC + jnp.log(total_XYC) - target_XYC, likeliest_XYC == arrays[1]

    tokens = (jnp.moveaxis(tiling.split(x), 2, 0) for x in (hidden_BTD, targets_BT))
    loss, correct = jax.lax.map(score, tuple(tokens))
    return tiling.join(jnp.moveaxis(loss, 0, 2), B, T), tiling.join(jnp.moveaxis(correct, 0, 2), B, T)
