"""Three ways to clip the gradient of an update, all of which see it divided by the loss weight.

    global    the whole gradient is scaled to the threshold where its norm exceeds it (Pascanu et al. 2013)
    block     the same for each block by itself: the embedding, every layer, the final norm. A layer that
              explodes is reined in and leaves the steps of the others alone
    adaptive  AGC (Brock et al. 2021, equation 3): the gradient of each output unit of a matrix is scaled so that
              its norm is at most the threshold times the norm of the unit's weights, at least `eps`. Norm scales
              and biases count as one unit each. Their thresholds are 0.01 to 0.16; a threshold of 1 hardly ever
              clips. They leave the output matrix alone; here it may be the embedding too, and is clipped

`optax.adaptive_grad_clip` guesses the unit from the rank of a leaf, and takes the layers of a stack for part of
a convolution's window. Here logical axes decide, and a stack of layers is clipped like as many separate layers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llmjax.train.optim.param_roles import Role, Roles
from llmjax.types import Array, Params

EPS = 1e-3  # of adaptive: lets units move that begin at zero


def make_clip(kind: str, threshold: float, roles: Roles, eps: float = EPS) -> optax.GradientTransformation:
    """Clips by one of `CLIPS`, without state; threshold 0 changes nothing. `adaptive` wants `params` in its update."""
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
            # A vector is one unit in each layer.
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
