"""Learning rates that fall from layer to layer towards the input (Howard and Ruder 2018; Clark et al. 2020).

The lower layers of a trained model know what all texts have in common, and the upper ones what the old task wanted.
What lies above the layers (output matrix, last norm, a head for labels) has the whole learning rate. The topmost layer
has it times the decay, the next times its square, and tables such as the embedding one power more than the lowest
layer. Each stack of layers is counted from its own top.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmjax.train.optim.param_roles import Role, Roles
from llmjax.types import Array, Params


def deepest(roles: Roles, shapes: Params) -> int:
    """The number of layers of the largest stack in a tree of arrays or ShapeDtypeStructs; 0 where there is none."""
    sizes = roles.map(lambda role, x: x.shape[0] if role.layers else 0, shapes)
    return max(jax.tree.leaves(sizes), default=0)


def scale_by_depth(decay: float, num_layers: int, roles: Roles) -> optax.GradientTransformation:
    """Multiplies what is added to a parameter by `decay` to the power of its depth; a transformation without state.

    num_layers  the layers of the model's largest stack. The stacks that are given may lack their first layers
    """

    def scaled(role: Role, x: Array) -> Array:
        if role.layers:
            powers = decay ** np.arange(x.shape[0], 0, -1, dtype=np.float64)
            return x * jnp.asarray(powers.reshape(-1, *(1,) * (x.ndim - 1)), x.dtype)
        return x * (decay ** (num_layers + 1)) if role.is_table else x

    return optax.stateless(lambda updates, params: roles.map(scaled, updates))
