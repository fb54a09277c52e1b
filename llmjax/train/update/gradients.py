"""The gradients of one micro-batch: sums, every loss term apart, and none of it where not all of it is finite.

A term whose weight is not that of the main loss (an auxiliary loss over sequences beside one over tokens) must
be divided by a total of its own, and that total is known only when the update ends. So its gradient is summed
apart. Terms that share the main weight are part of the main loss and cost nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llmjax.types import Array, Batch, LossSums, Params

# (params, batch, rng) -> the loss sums. Without an rng there is no dropout; nothing else changes.
LossFn = Callable[[Params, Batch, Array | None], LossSums]
MAIN = "loss"  # the term whose weight is that of the target tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TermSums:
    """One loss term's part of a gradient: the gradient of its sum, and the weight to divide it by in the end."""

    grads: Params
    weight: Array


Terms = dict[str, TermSums]  # by the name of the loss term; MAIN is always there


def micro_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, rng: Array | None
) -> tuple[Terms, dict[str, Array]]:
    """The gradient of each loss term's sum over `batch`, and the sums of this micro-step.

    A backward pass for each term. Where the loss or any number of a gradient is infinite or not a number, all
    gradients and sums are 0, with their weights, and `dropped` is 1: what is left of the update stays exact. All of
    `batch` is left out, which in a fused update is the part of one device: a loss curve depends on how the work was cut
    where, and only where, something was not finite.

    sums, float32 []: `loss` (of `LossSums`: what is reported), `weight`, the task's metrics,
    `<term>` and `<term>_weight` of each further term,
    `square_norm` (of the main term's gradient sum) and `weight_square` for the gradient noise scale, `dropped`.
    """

    def losses(params: Params) -> tuple[dict[str, Array], LossSums]:
        sums = loss_fn(params, batch, rng)
        return {MAIN: sums.main, **{name: loss for name, (loss, _) in sums.auxiliary.items()}}, sums

    by_term, pull, sums = jax.vjp(losses, params, has_aux=True)
    weights = {MAIN: sums.weight, **{name: weight for name, (_, weight) in sums.auxiliary.items()}}
    terms = {}
    for term, weight in weights.items():
        grads = pull({name: jnp.float32(name == term) for name in by_term})[0]
        terms[term] = TermSums(jax.tree.map(lambda g: g.astype(jnp.float32), grads), weight)
    squares = {term: optax.tree.norm(value.grads, squared=True) for term, value in terms.items()}
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

    def zeros() -> Params:  # of each term its own: they are donated
        return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

    return {name: TermSums(zeros(), jnp.zeros([], jnp.float32)) for name in (MAIN, *names)}


def add_terms(a: Terms, b: Terms) -> Terms:
    """The sums over two parts of an update."""
    return jax.tree.map(jnp.add, a, b)


def mean_gradient(terms: Terms) -> Params:
    """Each term's gradient divided by its weight, the one division of an update, and added up; 0 where it has none."""

    def divide(term: TermSums) -> Params:
        divisor = jnp.where(term.weight > 0, term.weight, 1.0)
        return jax.tree.map(lambda g: jnp.where(term.weight > 0, g / divisor, 0.0), term.grads)

    means = [divide(term) for term in terms.values()]
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *means)


def total_weight(terms: Terms) -> Array:
    """float32 [], 0 where the update holds nothing to learn from."""
    return sum(term.weight for term in terms.values())  # type: ignore[return-value]  # there is a term
