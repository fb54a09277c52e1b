"""Three ways to clip the gradient of an update, all of which see it divided by the loss weight.

    global    the whole gradient is scaled to the threshold where its norm exceeds it (Pascanu et al. 2013)
    block     the same for each block by itself: the embedding, every layer, the final norm. A layer that
              explodes is reined in and leaves the steps of the others alone
    adaptive  AGC (Brock et al. 2021, equation 3): the gradient of each output unit of a matrix is scaled so that
              its norm is at most the threshold times the norm of the unit's weights, at least `eps`. Norm scales
              and biases count as one unit each. Their thresholds are 0.01 to 0.16; a threshold of 1 hardly ever
              clips. They leave the output matrix alone; here it may be the embedding too, and is clipped

`optax.adaptive_grad_clip` guesses the unit from the rank of a leaf, and takes the layers of a stack for part of
a convolution's window. Here names decide, and a stack of layers is clipped like as many separate layers.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llmjax.train.optim.param_roles import block_norms, dimension_letters, layer_dims
from llmjax.types import Array, Params

EPS = 1e-3  # of adaptive: lets units move that begin at zero
_INPUTS = {"wo": "NH", "w_down": "F"}  # these write to the residual stream; all other matrices read it, by D


def make_clip(kind: str, threshold: float, eps: float = EPS) -> optax.GradientTransformation:
    """Clips by one of `CLIPS`, without state; threshold 0 changes nothing. `adaptive` wants `params` in its update."""
    return CLIPS[kind](threshold, eps) if threshold > 0 else optax.identity()


def _global(threshold: float, eps: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(threshold)


def _block(threshold: float, eps: float) -> optax.GradientTransformation:
    def clip(grads: Params, params: Params | None) -> Params:
        norms = block_norms(grads)

        def scale(name: str, g: Array) -> Array:
            factor = threshold / jnp.maximum(norms[name], threshold)
            return g * factor.reshape(factor.shape + (1,) * (g.ndim - factor.ndim))

        return {
            name: jax.tree.map(lambda g, name=name: scale(name, g), block) for name, block in grads.items()
        }

    return optax.stateless(clip)


def _adaptive(threshold: float, eps: float) -> optax.GradientTransformation:
    def clip(grads: Params, params: Params) -> Params:
        lead = {name: layer_dims(name, block) for name, block in params.items()}

        def scale(path: tuple, g: Array, p: Array) -> Array:
            axes = _input_axes(str(path[-1].key), lead[path[0].key], p.ndim)
            g_norm, p_norm = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (g, p))
            limit = threshold * jnp.maximum(p_norm, eps)
            return g * (limit / jnp.maximum(g_norm, limit))

        return jax.tree_util.tree_map_with_path(scale, grads, params)

    return optax.stateless(clip)


def _input_axes(name: str, lead: int, ndim: int) -> tuple[int, ...]:
    """The axes over which the weights of one output unit lie; of a vector, all but those of layers."""
    letters = dimension_letters(name)
    if not letters:
        return tuple(range(lead, ndim))
    inputs = _INPUTS.get(name.removesuffix(f"_{letters}"), "D")
    if not set(inputs) < set(letters):
        raise ValueError(f"the dimension letters of {name!r} do not say which are its inputs")
    return tuple(lead + letters.index(letter) for letter in inputs)


CLIPS: dict[str, Callable[[float, float], optax.GradientTransformation]] = {
    "global": _global,
    "block": _block,
    "adaptive": _adaptive,
}
