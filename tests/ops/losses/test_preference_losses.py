"""Losses of pairs of answers, each equal to the formula of its paper written out in PyTorch, gradients included."""

import jax
import numpy as np
import pytest

from llmjax.ops.losses.preference import PREFERENCE_LOSSES, Pairs, Strength

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 9, (2, 5))
PAIRS = Pairs(*-RNG.uniform(0.1, 9, (4, 5)), *TOKENS)
STRENGTH = Strength(beta=0.3, margin=0.4, label_smoothing=0.2)


def written_out(name, torch, chosen, rejected):
    """The loss of each pair, as the papers have it."""
    log_sigmoid = torch.nn.functional.logsigmoid
    before, other = (torch.tensor(x) for x in PAIRS[2:4])
    per_token = chosen / torch.tensor(TOKENS[0]), rejected / torch.tensor(TOKENS[1])
    beta, margin, smoothing = STRENGTH.beta, STRENGTH.margin, STRENGTH.label_smoothing
    if name == "dpo":
        h = beta * ((chosen - before) - (rejected - other))
        return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)
    if name == "ipo":
        return ((chosen - before) - (rejected - other) - 1 / (2 * beta)) ** 2
    if name == "simpo":
        h = beta * per_token[0] - beta * per_token[1] - margin
        return -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)
    assert name == "orpo"
    odds = [x.exp() / (1 - x.exp()) for x in per_token]
    return -per_token[0] - beta * log_sigmoid((odds[0] / odds[1]).log())


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_a_loss_and_its_gradients_are_those_of_the_paper(name):
    torch = pytest.importorskip("torch")
    chosen, rejected = (torch.tensor(x, requires_grad=True) for x in PAIRS[:2])
    expected = written_out(name, torch, chosen, rejected)
    expected.sum().backward()
    kind = PREFERENCE_LOSSES[name]
    found, backward = jax.vjp(lambda *x: kind.of_pairs(Pairs(*x, *PAIRS[2:]), STRENGTH), *PAIRS[:2])
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    for gradient, own in zip(backward(np.ones_like(found)), (chosen, rejected), strict=True):
        np.testing.assert_allclose(gradient, own.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_better_answer_becomes_more_likely_and_the_other_less(name):
    kind = PREFERENCE_LOSSES[name]
    strength = Strength(beta=0.3)
    chosen, rejected = jax.grad(
        lambda x: kind.of_pairs(Pairs(*x, *PAIRS[2:]), strength).sum(), allow_int=False
    )(tuple(PAIRS[:2]))
    # With ipo, a difference that is large enough already is to shrink again.
    small = np.ones(5, bool)
    if name == "ipo":
        small = np.subtract(*(a - b for a, b in zip(PAIRS[:2], PAIRS[2:4], strict=True))) < 1 / 0.6
    assert small.any() and (np.asarray(chosen)[small] < 0).all() and (np.asarray(rejected)[small] > 0).all()


def test_a_certain_answer_has_finite_odds():
    certain = Pairs(*np.zeros((4, 1)), *np.ones((2, 1)))
    value, gradient = jax.value_and_grad(
        lambda x: PREFERENCE_LOSSES["orpo"].of_pairs(certain._replace(chosen=x), STRENGTH).sum()
    )(certain.chosen)
    assert np.isfinite(value) and np.isfinite(gradient).all()
