"""Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000) over packed rows.

The states of a layer depend on each other, so they are computed by one scan over time. All that does not depend on a
state is done outside of it, in products over all tokens at once: the products of the inputs before the scan, and the
gradient of the recurrent matrix after the scan of the backward pass. A gradient made by differentiating the scan would
read and write this matrix once for each token.

The gates have the order input, forget, cell, output, as in PyTorch. The dimension 4 stands for them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class State(NamedTuple):
    """What a layer remembers of each sequence, both float32."""

    hidden_BM: jax.Array
    cell_BM: jax.Array


class _Kept(NamedTuple):
    """What the backward pass needs: the gates after their sigmoid or tanh, and the states after each token."""

    gates_TB4M: jax.Array
    hidden_TBM: jax.Array
    cell_TBM: jax.Array


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum that adds up in float32. Its letter g stands for the gates."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def zero_state(B: int, M: int) -> State:
    """The state before the first token of a document."""
    return State(jnp.zeros((B, M), jnp.float32), jnp.zeros((B, M), jnp.float32))


def _where(mask_B: jax.Array, state: State, other: State) -> State:
    return State(*(jnp.where(mask_B[:, None], x, y) for x, y in zip(state, other, strict=True)))


def gate(inputs_B4M: jax.Array, state: State, w_R4M: jax.Array) -> tuple[jax.Array, State]:
    """One token: gates_B4M after their nonlinearities, and the new state.

    inputs_B4M  the product of the inputs, with its bias
    w_R4M       the recurrent matrices, whose rows R are the M elements of the hidden state
    """
    sums_B4M = inputs_B4M.astype(jnp.float32) + _dot(
        "BR,RgM->BgM", state.hidden_BM.astype(w_R4M.dtype), w_R4M
    )
    i, f, o = (jax.nn.sigmoid(sums_B4M[:, n]) for n in (0, 1, 3))
    g = jnp.tanh(sums_B4M[:, 2])
    cell_BM = f * state.cell_BM + i * g
    return jnp.stack([i, f, g, o], axis=1), State(o * jnp.tanh(cell_BM), cell_BM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def run(
    inputs_TB4M: jax.Array, w_R4M: jax.Array, reset_TB: jax.Array, start: State, truncation: int = 0
) -> tuple[jax.Array, State]:
    """hidden_TBM, float32, of a layer for rows of T tokens, and the state after the last token.

    inputs_TB4M  the products of the inputs, with their bias
    w_R4M        the recurrent matrices in the dtype of their products, whose sums are float32
    reset_TB     where the state before the token is zero, whatever it was: at the first token of a document
    start        the state before the first token
    truncation   no gradient flows back over the tokens truncation, 2 x truncation, ..., although the state flows on
                 (truncated backpropagation through time: Williams and Peng 1990); 0 is off
    """
    kept, end = _forward(inputs_TB4M, w_R4M, reset_TB, start)
    return kept.hidden_TBM, end


def _forward(
    inputs_TB4M: jax.Array, w_R4M: jax.Array, reset_TB: jax.Array, start: State
) -> tuple[_Kept, State]:
    nothing = zero_state(*start.cell_BM.shape)

    def step(state: State, token: tuple[jax.Array, jax.Array]) -> tuple[State, _Kept]:
        inputs_B4M, reset_B = token
        # The state of another document is replaced and not multiplied by 0, which would keep a NaN.
        gates_B4M, state = gate(inputs_B4M, _where(reset_B, nothing, state), w_R4M)
        return state, _Kept(gates_B4M, *state)

    end, kept = jax.lax.scan(step, start, (inputs_TB4M, reset_TB))
    return kept, end


def _run_forward(inputs_TB4M, w_R4M, reset_TB, start, truncation):
    kept, end = _forward(inputs_TB4M, w_R4M, reset_TB, start)
    # Of the inputs only the dtype is needed, which an empty array keeps.
    return (kept.hidden_TBM, end), (kept, w_R4M, reset_TB, start, jnp.zeros((0,), inputs_TB4M.dtype))


def _run_backward(truncation, saved, gradients):
    kept, w_R4M, reset_TB, start, like_inputs = saved
    dhidden_TBM, dend = gradients
    T, B, M = kept.cell_TBM.shape
    # Transposed once: a product with it in its other order would cost more in every step.
    w_4MR = w_R4M.transpose(1, 2, 0)

    def before(first_BM: jax.Array, x_TBM: jax.Array) -> jax.Array:
        """The states before each token, as the forward pass used them."""
        shifted_TBM = jnp.concatenate([first_BM[None], x_TBM[:-1]])
        return jnp.where(reset_TB[..., None], 0.0, shifted_TBM)

    hidden_before_TBM, cell_before_TBM = (
        before(first, x) for first, x in zip(start, (kept.hidden_TBM, kept.cell_TBM), strict=True)
    )
    cut_TB = reset_TB
    if truncation:
        numbers_T = jnp.arange(T)
        cut_TB = cut_TB | ((numbers_T % truncation == 0) & (numbers_T > 0))[:, None]

    def step(dstate: State, token: tuple[jax.Array, ...]) -> tuple[State, jax.Array]:
        dhidden_BM, gates_B4M, cell_BM, cell_before_BM, cut_B = token
        i, f, g, o = (gates_B4M[:, n] for n in range(4))
        tanh_BM = jnp.tanh(cell_BM)
        dhidden_BM = dhidden_BM + dstate.hidden_BM
        dcell_BM = dstate.cell_BM + dhidden_BM * o * (1 - tanh_BM * tanh_BM)
        dsums_B4M = jnp.stack(
            [
                dcell_BM * g * i * (1 - i),
                dcell_BM * cell_before_BM * f * (1 - f),
                dcell_BM * i * (1 - g * g),
                dhidden_BM * tanh_BM * o * (1 - o),
            ],
            axis=1,
        )
        dbefore_BM = _dot("BgM,gMR->BR", dsums_B4M.astype(w_4MR.dtype), w_4MR)
        dstate = _where(cut_B, zero_state(B, M), State(dbefore_BM, dcell_BM * f))
        return dstate, dsums_B4M

    tokens = dhidden_TBM, kept.gates_TB4M, kept.cell_TBM, cell_before_TBM, cut_TB
    dstart, dsums_TB4M = jax.lax.scan(step, dend, tokens, reverse=True)
    # One product over all tokens, in the dtype of the recurrent matrix, that adds up in float32.
    hidden_before_TBM, dsums_X = (x.astype(w_R4M.dtype) for x in (hidden_before_TBM, dsums_TB4M))
    dw_R4M = _dot("TBR,TBgM->RgM", hidden_before_TBM, dsums_X)
    return dsums_TB4M.astype(like_inputs.dtype), dw_R4M.astype(w_R4M.dtype), None, dstart


run.defvjp(_run_forward, _run_backward)


def extend(
    inputs_TB4M: jax.Array, w_R4M: jax.Array, valid_TB: jax.Array, start: State
) -> tuple[jax.Array, State]:
    """hidden_TBM of T further tokens of the documents whose states are `start`, and the states after them.

    A token that is not valid is padding: it leaves the state as it is.
    """

    def step(state: State, token: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        inputs_B4M, valid_B = token
        state = _where(valid_B, gate(inputs_B4M, state, w_R4M)[1], state)
        return state, state.hidden_BM

    end, hidden_TBM = jax.lax.scan(step, start, (inputs_TB4M, valid_TB))
    return hidden_TBM, end
