"""Three ways to clip the gradient of an update, which has been divided by the loss weight before.

    global    the whole gradient is scaled down to the threshold if its norm is larger (Pascanu et al. 2013)
    block     each block is scaled like that by itself: the embedding, every layer, the final norm. Where one layer
              explodes, only its own step becomes smaller
    adaptive  adaptive gradient clipping, AGC (Brock et al. 2021, equation 3). The gradient of each output unit of a
              matrix is scaled down until its norm is at most the threshold times the norm of the unit's weights,
              where this norm counts as at least `eps`. A norm scale or a bias counts as one unit. The paper uses
              thresholds from 0.01 to 0.16; a threshold of 1 hardly ever clips. The paper leaves the output matrix
              unclipped. Here the output matrix may be the embedding too, so it is clipped

`optax.adaptive_grad_clip` guesses the units from the rank of an array and would take the layers of a stack for a part
of a convolution's window. Here the logical axes say what a unit is, so stacked layers are clipped like separate ones.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llmjax.train.optim.param_roles import Role, Roles
from llmjax.types import Array, Params

# The smallest norm that adaptive clipping sees in the weights of a unit, so that a unit that begins at zero can move
# (the paper's value).
EPS = 1e-3


def make_clip(kind: str, threshold: float, roles: Roles, eps: float = EPS) -> optax.GradientTransformation:
    """The clipping `kind` of `CLIPS`, a transformation without state; with threshold 0 it changes nothing.

    `update` needs the parameters if `kind` is `adaptive`.
    """
    return CLIPS[kind](threshold, eps, roles) if threshold > 0 else optax.identity()


def _global(threshold: float, eps: float, roles: Roles) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(threshold)


def _block(threshold: float, eps: float, roles: Roles) -> optax.GradientTransformation:
    def clip(grads: Params, params: Params | None) -> Params:
        norms = roles.block_norms(grads)

        def scale(name: str, g: Array) -> Array:
            factor = threshold / jnp.maximum(norms[name], threshold)
            return g * factor.reshape(factor.shape + (1,) * (g.ndim - factor.ndim))

        return {
            name: jax.tree.map(lambda g, name=name: scale(name, g), block) for name, block in grads.items()
        }

    return optax.stateless(clip)


def _adaptive(threshold: float, eps: float, roles: Roles) -> optax.GradientTransformation:
    def clip(grads: Params, params: Params) -> Params:
        def scale(role: Role, g: Array, p: Array) -> Array:
            # The norm of a unit is taken over the inputs of a matrix, and over a whole vector of one layer.
            axes = role.inputs or tuple(i for i in range(p.ndim) if i not in role.stack)
            g_norm, p_norm = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (g, p))
            limit = threshold * jnp.maximum(p_norm, eps)
            return g * (limit / jnp.maximum(g_norm, limit))

        return roles.map(scale, grads, params)

    return optax.stateless(clip)


CLIPS: dict[str, Callable[[float, float, Roles], optax.GradientTransformation]] = {
    "global": _global,
    "block": _block,
    "adaptive": _adaptive,
}
