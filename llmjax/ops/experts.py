"""The experts of a mixture: every token goes through the few feed-forward networks that its router chose.

No token is dropped and no expert has a limit: the tokens are sorted by their experts, and one grouped product
(`jax.lax.ragged_dot`) multiplies each group by the matrix of its expert (MegaBlocks: Gale et al. 2022).

The letter X counts tokens, Y the pairs of a token and one of its experts, and J the experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def route(logits_BTE: jax.Array, per_token: int, normalize: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(experts_BTJ, gates_BTJ, probabilities_BTE): the `per_token` likeliest experts, and the weights of their outputs.

    `normalize` makes the weights of a token sum to 1 (Mixtral); otherwise they are the probabilities themselves
    (OLMoE). Logits and results are float32.
    """
    probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    gates_BTJ, experts_BTJ = jax.lax.top_k(probabilities_BTE, per_token)
    if normalize:
        gates_BTJ = gates_BTJ / jnp.sum(gates_BTJ, axis=-1, keepdims=True)
    return experts_BTJ, gates_BTJ, probabilities_BTE


def balance(experts_BTJ: jax.Array, probabilities_BTE: jax.Array, real_BT: jax.Array) -> jax.Array:
    """balance_B, float32: E x sum over experts of (share of the row's choices) x (mean probability in the row).

    It is 1 where all experts are used alike, and larger otherwise (Fedus et al. 2021, equation 4). The shares are those
    of one row (the sequence-wise loss of DeepSeek-V3), and not of a whole batch, so that the sum over rows does not
    depend on how an update is cut into micro-steps. Padding does not count.
    """
    E = probabilities_BTE.shape[-1]
    real_BT1 = real_BT.astype(jnp.float32)[..., None]
    chosen_BTE = jnp.sum(jax.nn.one_hot(experts_BTJ, E, dtype=jnp.float32), axis=2) * real_BT1
    count_B1 = jnp.maximum(jnp.sum(real_BT1, axis=1), 1.0)
    share_BE = jnp.sum(chosen_BTE, axis=1) / (count_B1 * experts_BTJ.shape[-1])
    # Padding may hold anything, also what is not a number.
    probability_BE = jnp.sum(jnp.where(real_BT1 > 0, probabilities_BTE, 0.0), axis=1) / count_B1
    return E * jnp.sum(jax.lax.stop_gradient(share_BE) * probability_BE, axis=-1)


def run_experts(
    x_XD: jax.Array,
    experts_XJ: jax.Array,
    gates_XJ: jax.Array,
    w_up_EDF: jax.Array,
    w_gate_EDF: jax.Array | None,
    w_down_EDF: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """out_XD in float32: the outputs of each token's experts, added up with the weights `gates_XJ`.

    With w_gate_EDF, `activation` acts on the product with it, which then multiplies the product with w_up_EDF (SwiGLU).
    The matrices have the dtype of x.
    """
    X, J = experts_XJ.shape
    E = w_up_EDF.shape[0]
    experts_Y = experts_XJ.reshape(X * J)
    # A stable sort: the tokens of an expert keep their order.
    order_Y = jnp.argsort(experts_Y, stable=True)
    sizes_E = jnp.bincount(experts_Y, length=E).astype(jnp.int32)
    x_YD = jnp.take(x_XD, order_Y // J, axis=0)

    def grouped(x_YA: jax.Array, w_EAB: jax.Array) -> jax.Array:
        y_YB = jax.lax.ragged_dot(x_YA, w_EAB, sizes_E, preferred_element_type=jnp.float32)
        return y_YB.astype(x_XD.dtype)

    h_YF = grouped(x_YD, w_up_EDF)
    h_YF = activation(h_YF) if w_gate_EDF is None else activation(grouped(x_YD, w_gate_EDF)) * h_YF
    out_YD = grouped(h_YF, w_down_EDF.swapaxes(1, 2)).astype(jnp.float32)
    # Back to the order of the tokens: the inverse of a permutation is where it puts each number.
    out_XJD = jnp.take(out_YD, jnp.argsort(order_Y), axis=0).reshape(X, J, -1)
    return jnp.sum(out_XJD * gates_XJ[..., None].astype(jnp.float32), axis=1)


def joining_slots(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run(x_BTD, experts_BTJ, gates_BTJ, *weights)`, for which `jax.vmap` over the first three joins the mapped
    dimension and B: the grouped product has no rule of its own. It has no gradient.
    """
    joined = custom_vmap(run)

    @joined.def_vmap
    def _(size: int, mapped: Any, *arrays: Any) -> tuple[jax.Array, bool]:
        assert all(mapped[:3]) and not any(jax.tree.leaves(mapped[3:]))
        tokens = (x.reshape(-1, *x.shape[2:]) for x in arrays[:3])
        out_BTD = run(*tokens, *arrays[3:])
        return out_BTD.reshape(size, -1, *out_BTD.shape[1:]), True

    return joined
