"""The mixture of experts that may take the place of the feed-forward layer (Shazeer et al. 2017; Mixtral: 2024).

A router chooses a few experts for each token. Two further loss terms keep it healthy: one for an even load, and the
router z-loss, which keeps its logits small (Zoph et al. 2022). Both are values of single tokens, which a task sums
with the weights of its own loss. So they are as exact as the loss, however an update is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.errors import choose
from llmjax.nn.config import BlockConfig
from llmjax.nn.layers import MLP, matrix
from llmjax.ops.activation import ACTIVATIONS
from llmjax.ops.experts import balance, joining_slots, route, run_experts
from llmjax.parallel.rules import Layout, partition_spec, without_axes

# The name of a loss term -> float32 [B, T], its coefficient included.
Penalties = dict[str, jax.Array]


class Experts(nn.Module):
    """The router, the experts, and the experts that all tokens share, if there are any."""

    config: BlockConfig
    layout: Layout

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, alone: bool = False
    ) -> tuple[jax.Array, Penalties]:
        """out_BTD and the loss terms of each token.

        real_BT  false for padding, which has no loss terms
        alone    whether the compiler splits the work, and not `jax.shard_map`, for rows that the devices of a batch
                 cannot share evenly: those of generation
        """
        c = self.config
        D, E, F = c.model_dim, c.num_experts, c.expert_dim
        std, out_std = c.init_std, c.init_std * (2 * c.num_layers) ** -0.5
        activation = choose(ACTIVATIONS, "transformer.activation", c.activation)
        axes = ("experts", "embed", "mlp")
        w_router_DE = matrix(self, "w_router_DE", (D, E), ("embed", "router"), std, c.dtype)
        w_up_EDF = matrix(self, "w_up_EDF", (E, D, F), axes, std, c.dtype)
        w_gate_EDF = matrix(self, "w_gate_EDF", (E, D, F), axes, std, c.dtype) if activation.gated else None
        w_down_EDF = matrix(
            self, "w_down_EDF", (E, D, F), ("experts", "residual", "mlp_in"), out_std, c.dtype
        )
        # A choice between experts is not smooth, so that it is made in float32.
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD, w_router_DE, preferred_element_type=jnp.float32)
        experts_BTJ, gates_BTJ, probabilities_BTE = route(logits_BTE, c.experts_per_token, c.normalize_gates)
        run = self._on_each_device(activation.function, Layout() if alone else self.layout)
        # Generation may decode slots that are apart.
        run = joining_slots(run) if alone else run
        out_BTD = run(x_BTD, experts_BTJ, gates_BTJ, w_up_EDF, w_gate_EDF, w_down_EDF)
        if c.shared_experts:
            shared = dataclasses.replace(c, mlp_dim=c.shared_experts * F)
            out_BTD = out_BTD + MLP(shared, self.layout, name="shared")(x_BTD)
        load_B = balance(experts_BTJ, probabilities_BTE, real_BT)
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
        penalties = {
            "balance_loss": jnp.where(real_BT, c.balance_loss * load_B[:, None], 0.0),
            "router_z_loss": jnp.where(real_BT, c.router_z_loss * z_BT, 0.0),
        }
        return self.layout.constrain(out_BTD, "batch", "length", None), penalties

    def _on_each_device(
        self, activation: Callable[[jax.Array], jax.Array], layout: Layout
    ) -> Callable[..., jax.Array]:
        """`run_experts` on each device of `layout`, for its own tokens and its part of the width of every expert.

        Sorting all tokens of a batch would bring them all to every device. Each device sorts its own.
        """
        dtype: Any = self.config.dtype
        axes = () if layout.mesh is None else {*layout.mesh.axis_names} - {*layout.manual}

        def run(
            x_BTD: jax.Array,
            experts_BTJ: jax.Array,
            gates_BTJ: jax.Array,
            w_up_EDF: jax.Array,
            w_gate_EDF: jax.Array | None,
            w_down_EDF: jax.Array,
        ) -> jax.Array:
            B, T, D = x_BTD.shape
            x_XD, experts_XJ, gates_XJ = (x.reshape(B * T, -1) for x in (x_BTD, experts_BTJ, gates_BTJ))
            x_XD, w_up_EDF, w_gate_EDF, w_down_EDF = jax.tree.map(
                lambda x: x.astype(dtype), (x_XD, w_up_EDF, w_gate_EDF, w_down_EDF)
            )
            out_XD = run_experts(x_XD, experts_XJ, gates_XJ, w_up_EDF, w_gate_EDF, w_down_EDF, activation)
            if "tensor" in axes:
                # The devices of `tensor` have a part of F each, over which the last product sums.
                out_XD = jax.lax.psum(out_XD, "tensor")
            return out_XD.reshape(B, T, D).astype(dtype)

        if not axes:
            return run

        def spec(*names: str | None) -> PartitionSpec:
            return without_axes(partition_spec(names), layout.manual)

        tokens, weights = spec("batch", "length", None), spec(None, None, "mlp")
        split = jax.shard_map(
            run,
            mesh=None if layout.manual else layout.mesh,
            in_specs=(tokens, tokens, tokens, weights, weights, weights),
            out_specs=tokens,
            axis_names=axes,
            check_vma=False,
        )

        def gathered(w_EDF: jax.Array) -> jax.Array:
            return layout.constrain(w_EDF, None, None, "mlp")

        def run_split(
            x_BTD: jax.Array, experts_BTJ: jax.Array, gates_BTJ: jax.Array, *weights: Any
        ) -> jax.Array:
            # The gradients are summed over devices in the dtype of what goes in here: in float32. What the devices
            # hand each other on the way forward, they did before, in the shorter dtype.
            x_BTD, weights = jax.tree.map(
                lambda x: x.astype(jnp.float32), (x_BTD, jax.tree.map(gathered, weights))
            )
            return split(x_BTD, experts_BTJ, gates_BTJ, *weights)

        return run_split
