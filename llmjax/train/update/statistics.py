"""How each layer is doing: the size of its gradient, its parameters and its activations, on demand.

A healthy network has much the same figures from layer to layer. Gradients that shrink or grow from layer to
layer by a factor, a residual stream that grows without bound, a branch that adds nothing: all of it is seen
here before the loss shows it. A separate program, compiled when first asked for: training itself is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.train.optim.param_roles import Roles
from llmjax.train.update.gradients import LossFn
from llmjax.types import Array, Batch, Params

Statistics = dict[str, Any]  # of arrays; "other" holds a dict of arrays for each block that is no layer


def make_statistics(
    activations: Callable[[Params, Batch], dict[str, Array]], loss_fn: LossFn, roles: Roles
) -> Callable[[Params, Batch], Statistics]:
    """`statistics(params, batch)`, to be jitted: a forward pass, and a forward and a backward pass, without dropout.

    Float32 [L] each, or where noted also under `other`, float32 [], for each further block (embedding, final_norm):
      what `activations` gives, `Model.activations`: the residual stream's root mean square and others
      gradient_norm    of the block's parameters (also in `other`); every loss term is divided by its weight
      parameter_norm   (also in `other`)
      gradient_ratio   gradient norm / parameter norm, 0 where the parameters are all 0 (also in `other`)

    A family with several stacks of layers has the name of the stack before each of the last three.

    What is not finite comes out as it is. A batch without weight has a gradient of 0.
    """

    def mean_loss(params: Params, batch: Batch) -> Array:
        sums = loss_fn(params, batch, None)
        terms = [(sums.main, sums.weight), *sums.auxiliary.values()]
        means = (jnp.where(weight > 0, loss / jnp.where(weight > 0, weight, 1), 0) for loss, weight in terms)
        return sum(means)  # type: ignore[return-value]  # there is a term

    def statistics(params: Params, batch: Batch) -> Statistics:
        gradient_norms, parameter_norms = (
            roles.block_norms(jax.grad(mean_loss)(params, batch)),
            roles.block_norms(params),
        )
        of_blocks = {
            block: {
                "gradient_norm": gradient_norms[block],
                "parameter_norm": norm,
                "gradient_ratio": jnp.where(
                    norm > 0, gradient_norms[block] / jnp.where(norm > 0, norm, 1), 0
                ),
            }
            for block, norm in parameter_norms.items()
        }
        layers: dict[str, Array] = {}
        for stack in (stacks := roles.stacked(params)):
            prefix = f"{stack}_" if len(stacks) > 1 else ""
            layers |= {prefix + name: value for name, value in of_blocks.pop(stack).items()}
        return {**activations(params, batch), **layers, "other": of_blocks}

    return statistics
