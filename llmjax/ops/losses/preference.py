"""Losses of pairs of answers to one prompt, of which a person prefers one: how each follows from log-probabilities.

Each loss is a function of `Pairs`, in which every entry of an array is a pair, and gives the loss of each pair. None
depends on how pairs are grouped, so that a sum over pairs is the same however the work is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmjax.types import Array


class Pairs(NamedTuple):
    """Log-probabilities in nats, float32, and numbers of tokens; each array has an entry for every pair.

    chosen, rejected                      the log-probability of the preferred answer and of the other, by the model
    chosen_reference, rejected_reference  the same by the model that the run began with; 0 for losses without it
    chosen_tokens, rejected_tokens        the tokens of the answers, at least 1
    """

    chosen: Array
    rejected: Array
    chosen_reference: Array
    rejected_reference: Array
    chosen_tokens: Array
    rejected_tokens: Array


@dataclasses.dataclass(frozen=True)
class Strength:
    """The numbers in a loss, which are keys of the section `preference` of the config.

    beta             how much a difference of log-probabilities counts
    margin           how much larger the reward of the preferred answer is to be, for simpo
    label_smoothing  the probability that a person meant the other answer
    """

    beta: float
    margin: float = 0.0
    label_smoothing: float = 0.0


def _gained(pairs: Pairs) -> tuple[Array, Array]:
    """How much more likely each of the two answers became since the run began, in nats."""
    return pairs.chosen - pairs.chosen_reference, pairs.rejected - pairs.rejected_reference


def _per_token(pairs: Pairs) -> tuple[Array, Array]:
    """The mean log-probability of the tokens of each of the two answers."""
    return pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens


def _log_sigmoid_loss(difference: Array, strength: Strength) -> Array:
    """-log of the probability that a person prefers as they did, where `difference` is the log-odds of it."""
    epsilon = strength.label_smoothing
    right, wrong = jax.nn.log_sigmoid(difference), jax.nn.log_sigmoid(-difference)
    return -(1 - epsilon) * right - epsilon * wrong


def _dpo(pairs: Pairs, strength: Strength) -> Array:
    chosen, rejected = _gained(pairs)
    return _log_sigmoid_loss(strength.beta * (chosen - rejected), strength)


def _ipo(pairs: Pairs, strength: Strength) -> Array:
    chosen, rejected = _gained(pairs)
    return jnp.square(chosen - rejected - 1 / (2 * strength.beta))


def _simpo(pairs: Pairs, strength: Strength) -> Array:
    chosen, rejected = _per_token(pairs)
    return _log_sigmoid_loss(strength.beta * (chosen - rejected) - strength.margin, strength)


def _log_odds(log_probability: Array) -> Array:
    """log(p / (1 - p)) of a probability p below 1, from its logarithm."""
    # A probability so near 1 that float32 cannot tell it apart would have infinite odds.
    log_probability = jnp.minimum(log_probability, -1e-7)
    return log_probability - jnp.log(-jnp.expm1(log_probability))


def _orpo(pairs: Pairs, strength: Strength) -> Array:
    chosen, rejected = _per_token(pairs)
    return -chosen - strength.beta * jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A value of `preference.loss`.

    of_pairs       (Pairs, Strength) -> the loss of each pair, in nats but for ipo
    reward         Pairs -> of both answers, what is compared; beta times it is the reward of the paper
    has_reference  whether it looks at the model that the run began with
    reads          the keys of `Strength`, besides beta, that it reads
    """

    of_pairs: Callable[[Pairs, Strength], Array]
    reward: Callable[[Pairs], tuple[Array, Array]]
    has_reference: bool
    reads: tuple[str, ...] = ()


# The values of preference.loss.
PREFERENCE_LOSSES = {
    # Direct preference optimization: Rafailov et al. 2023; with label smoothing: Mitchell 2023.
    "dpo": PreferenceLoss(_dpo, _gained, True, ("label_smoothing",)),
    # Identity preference optimization: Azar et al. 2023, equation 17.
    "ipo": PreferenceLoss(_ipo, _gained, True),
    # Simple preference optimization with a reference-free reward: Meng et al. 2024, equation 6.
    "simpo": PreferenceLoss(_simpo, _per_token, False, ("margin", "label_smoothing")),
    # Odds ratio preference optimization: Hong et al. 2024, equations 6 and 7. Its first term, the cross-entropy of the
    # preferred answer, is the mean over the tokens of each answer.
    "orpo": PreferenceLoss(_orpo, _per_token, False),
}
