"""Statistics of each layer, on demand: the sizes of its gradient, its parameters and its activations.

In a healthy network the figures of neighbouring layers are alike. Gradients that shrink or grow by a factor from layer
to layer, a residual stream that grows without bound, and a branch that adds nothing are seen here before the loss shows
them. This is a program of its own, compiled when it is first called, so that training itself is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.train.optim.param_roles import Roles
from llmjax.train.update.gradients import LossFn
from llmjax.types import Array, Batch, Params

# Arrays by name. "other" holds such a dict for each block that is no layer.
Statistics = dict[str, Any]


def make_statistics(
    activations: Callable[[Params, Batch], dict[str, Array]], loss_fn: LossFn, roles: Roles
) -> Callable[[Params, Batch], Statistics]:
    """`statistics(params, batch)`, to be jitted: a forward pass, and a forward and a backward pass, without dropout.

    float32 [L] each, one number for each of L layers:
      the activations        as `Model.activations` gives them: the root mean square of the residual stream and others
      gradient_norm          of the layer's parameters, where every loss term is divided by its weight
      parameter_norm         of the layer's parameters
      gradient_ratio         gradient norm / parameter norm, 0 where the parameters are all 0

    The last three are also under `other`, float32 [], for each further block (embedding, final_norm). A family with
    several stacks of layers has the name of the stack before each of the three.

    Values that are not finite are returned as they are. A batch without weight has a gradient of 0.
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
