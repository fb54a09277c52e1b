"""Parameters with logical axes, normalisation layers, and the feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llmjax.errors import choose
from llmjax.nn.config import BlockConfig
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.norm import NORMS
from llmjax.ops.position_bias import PositionBias
from llmjax.ops.wide_product import wide_product
from llmjax.parallel.rules import Layout


def matrix(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float,
    dtype: str = "float32",
) -> jax.Array:
    """A parameter initialised from N(0, std^2), stored in float32 and returned in `dtype`. `axes` names its
    dimensions."""
    init = nn.with_logical_partitioning(jax.nn.initializers.normal(std), axes)
    return _param(module, name, init, shape).astype(dtype)


def vector(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], value: float
) -> jax.Array:
    """A float32 parameter that starts at a constant `value`: scales at 1, biases at 0. It has no weight decay."""
    init = nn.with_logical_partitioning(jax.nn.initializers.constant(value), axes)
    return _param(module, name, init, shape)


def _param(module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...]) -> jax.Array:
    # flax removes the metadata box around the array, but its types do not say so.
    unboxed: Any = module.param(name, init, shape, jnp.float32)
    return unboxed


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [B, T, ...] plus the float32 bias of its trailing dimensions, in the dtype of x."""
    # The cast comes after the broadcast, so that the backward pass sums the gradient over tokens in float32. In
    # bfloat16, 256 + 1 is 256.
    return x + jnp.broadcast_to(bias[None, None], x.shape).astype(x.dtype)


def product(x_BTX: jax.Array, w: jax.Array, layout: Layout, transposed: bool = False) -> jax.Array:
    """x @ w_XY, or x @ w_YX.T if `transposed`, with batch and length merged into one dimension unless the mesh axis
    `seq` splits the length."""
    if layout.axis_size("seq") > 1:
        return x_BTX @ (w.T if transposed else w)
    # With one token dimension, the gradient of w contracts a single dimension. With two, XLA on CPU makes a
    # transposed copy of the wider operand.
    B, T, X = x_BTX.shape
    x_TX = x_BTX.reshape(B * T, X)
    if layout.platform == "cpu" and x_BTX.dtype == jnp.bfloat16:
        y_TY = wide_product(x_TX, w, transposed)
    else:
        y_TY = x_TX @ (w.T if transposed else w)
    return y_TY.reshape(B, T, -1)


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, layout: Layout) -> jax.Array:
    """x_BTD, the rows of the table for these tokens."""
    if layout.manual and layout.axis_size("tensor") > 1:
        # Each device looks up all ids in its own columns. If the ids were split over `tensor`, XLA of jax 0.12
        # would abort where three mesh axes split the table.
        table_VD = layout.constrain(table_VD, None, "mlp")
    if layout.manual or layout.axis_size("seq") == 1:
        return jnp.take(table_VD, tokens_BT, axis=0, mode="clip")
    # Devices that share sequences look up all tokens of these sequences, each in its own columns of the table,
    # and then exchange columns for tokens. By default, XLA would gather everything on every device in between.
    table_VD = layout.constrain(table_VD, "vocab", "length")
    x_BTD = jnp.take(table_VD, layout.constrain(tokens_BT, "batch", None), axis=0, mode="clip")
    return layout.constrain(x_BTD, "batch", None, "length")


class Norm(nn.Module):
    """A normalisation of `ops.norm.NORMS` over the last dimension, in float32, with its learned scale and bias."""

    kind: str
    eps: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normalize = choose(NORMS, "transformer.norm", self.kind)
        y = normalize(x.astype(jnp.float32), self.eps)
        shape = (1,) * (x.ndim - 1) + (x.shape[-1],)
        y = y * vector(self, "scale", shape[-1:], ("feature",), 1.0).reshape(shape)
        if normalize.has_bias and self.use_bias:
            y = y + vector(self, "bias", shape[-1:], ("feature",), 0.0).reshape(shape)
        return y.astype(x.dtype)


class OutputBias(nn.Module):
    """The bias of the logits."""

    vocab_size: int

    @nn.compact
    def __call__(self) -> None:
        vector(self, "bias_V", (self.vocab_size,), ("classes",), 0.0)


class RelativePositions(nn.Module):
    """The bias of `transformer.position=relative`, which all layers of a stack share (T5: Raffel et al. 2020).

    `both_sides` says whether a token sees those after it as well.
    """

    config: BlockConfig
    both_sides: bool = False

    @nn.compact
    def __call__(self) -> PositionBias:
        c = self.config
        shape, axes = (c.relative_buckets, c.num_heads), ("positions", "heads")
        table_RN = matrix(self, "table_RN", shape, axes, c.init_std)
        return PositionBias(table_RN, c.relative_distance, self.both_sides)


class MLP(nn.Module):
    """The position-wise feed-forward layer, with an activation of `ops.activation.ACTIVATIONS`.

    All weights are stored as [D, F], also the last one. In the product that gives its gradient, XLA on CPU then
    transposes the narrower of the two operands.
    """

    config: BlockConfig
    layout: Layout

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activation = choose(ACTIVATIONS, "transformer.activation", c.activation)
        # As in attention: matrices that write to the residual stream start smaller, by 1 / sqrt(2 L).
        std, out_std = c.init_std, c.init_std * (2 * c.num_layers) ** -0.5
        w_up_DF = matrix(self, "w_up_DF", (c.model_dim, c.mlp_dim), ("embed", "mlp"), std, c.dtype)
        w_down_DF = matrix(
            self, "w_down_DF", (c.model_dim, c.mlp_dim), ("residual", "mlp_in"), out_std, c.dtype
        )
        up_BTF = product(x_BTD, w_up_DF, self.layout)
        if c.use_bias:
            up_BTF = add_bias(up_BTF, vector(self, "up_bias", (c.mlp_dim,), ("mlp",), 0.0))
        if activation.gated:
            w_gate_DF = matrix(self, "w_gate_DF", (c.model_dim, c.mlp_dim), ("embed", "mlp"), std, c.dtype)
            h_BTF = activation.function(product(x_BTD, w_gate_DF, self.layout)) * up_BTF
        else:
            h_BTF = activation.function(up_BTF)
        h_BTF = self.layout.constrain(h_BTF, "batch", "length", "mlp")
        out_BTD = product(h_BTF, w_down_DF, self.layout, transposed=True)
        if c.use_bias:
            out_BTD = add_bias(out_BTD, vector(self, "down_bias", (c.model_dim,), ("feature",), 0.0))
        return self.layout.constrain(out_BTD, "batch", "length", None)
