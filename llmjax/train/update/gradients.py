"""The gradients of one micro-batch, as sums, apart for each loss term; all are 0 where one of them is not finite.

A loss term may have a weight of its own, such as an auxiliary loss over sequences beside the main loss over tokens. Its
gradient must be divided by its own total weight, which is known only when the update ends, so it is summed apart. Terms
with the main weight are part of the main loss and cost nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llmjax.types import Array, Batch, LossSums, Params

# (params, batch, rng) -> the loss sums. Where rng is None there is no dropout; nothing else changes.
LossFn = Callable[[Params, Batch, Array | None], LossSums]
# The name of the main term, which is weighted by target tokens.
MAIN = "loss"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TermSums:
    """The gradient of one loss term's sum, and the weight by which the end of the update divides it.

    grads   float32, a tree like the parameters
    weight  float32 []
    """

    grads: Params
    weight: Array


# The sums by the names of the loss terms; MAIN is always among them.
Terms = dict[str, TermSums]


def micro_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, rng: Array | None
) -> tuple[Terms, dict[str, Array]]:
    """The gradient of each loss term's sum over `batch`, and the sums of this micro-step.

    Each term takes one backward pass. Where the loss or an element of a gradient is infinite or NaN, all gradients,
    sums and weights are 0 and `dropped` is 1, so that the rest of the update stays exact. The whole `batch` is left
    out then; in a fused update that is the part of one device. Only in this case does the loss curve depend on how the
    work was cut.

    sums, float32 [] each:
      loss, weight             the reported loss and its weight, of `LossSums`, and the task's metrics
      <term>, <term>_weight    of each further loss term
      square_norm              squared norm of the main term's gradient sum, for the gradient noise scale
      weight_square            the square of `weight`, for the gradient noise scale
      dropped                  1 where the micro-step was left out
    """

    def losses(params: Params) -> tuple[dict[str, Array], LossSums]:
        sums = loss_fn(params, batch, rng)
        return {MAIN: sums.main, **{name: loss for name, (loss, _) in sums.auxiliary.items()}}, sums

    by_term, backward, sums = jax.vjp(losses, params, has_aux=True)
    weights = {MAIN: sums.weight, **{name: weight for name, (_, weight) in sums.auxiliary.items()}}
    terms = {}
    for term, weight in weights.items():
        grads = backward({name: jnp.float32(name == term) for name in by_term})[0]
        terms[term] = TermSums(jax.tree.map(lambda g: g.astype(jnp.float32), grads), weight)
    squares = {term: optax.tree.norm(value.grads, squared=True) for term, value in terms.items()}
    # A sum is finite only if all its parts are: one test of a scalar covers every element.
    finite = jnp.isfinite(sum(squares.values()) + sum(by_term.values()))
    values = {
        **sums.metrics,
        MAIN: sums.loss,
        "weight": sums.weight,
        **{name: value for term in sums.auxiliary for name, value in _named(term, by_term, weights)},
        "square_norm": squares[MAIN],
        "weight_square": sums.weight**2,
    }
    keep = lambda x: jnp.where(finite, x, 0).astype(jnp.float32)  # noqa: E731
    return jax.tree.map(keep, terms), {**jax.tree.map(keep, values), "dropped": 1.0 - keep(1.0)}


def _named(term: str, losses: dict[str, Array], weights: dict[str, Array]) -> list[tuple[str, Array]]:
    return [(term, losses[term]), (f"{term}_weight", weights[term])]


def empty_terms(params: Params, names: tuple[str, ...] = ()) -> Terms:
    """Float32 zeros for the main term and for those in `names`: the sums of an update at its start."""

    # Each term gets arrays of its own: they are donated, and an array can be donated only once.
    def zeros() -> Params:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

    return {name: TermSums(zeros(), jnp.zeros([], jnp.float32)) for name in (MAIN, *names)}


def add_terms(a: Terms, b: Terms) -> Terms:
    """Adds the sums of two parts of an update."""
    return jax.tree.map(jnp.add, a, b)


def mean_gradient(terms: Terms) -> Params:
    """The sum of each term's gradient divided by its weight: the one division of an update. Without weight it is 0."""

    def divide(term: TermSums) -> Params:
        divisor = jnp.where(term.weight > 0, term.weight, 1.0)
        return jax.tree.map(lambda g: jnp.where(term.weight > 0, g / divisor, 0.0), term.grads)

    means = [divide(term) for term in terms.values()]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *means)


def total_weight(terms: Terms) -> Array:
    """float32 [], 0 where the update holds nothing to learn from."""
    return sum(term.weight for term in terms.values())  # type: ignore[return-value]  # there is a term
