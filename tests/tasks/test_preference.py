"""Packed preferences: one loss term for each pair, equal to an independent loop over the pairs in PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.errors import UserError
from llmjax.models.reference import REFERENCE, Referenced, with_reference
from llmjax.ops.losses.preference import PREFERENCE_LOSSES
from llmjax.parallel.rules import Layout
from llmjax.tasks.contract import Setting, Totals
from llmjax.tasks.preference import Preference, PreferenceConfig, split_pairs
from llmjax.types import Batch, Head, Output

V, D, T, S = 11, 6, 16, 20
TASK = Preference()
# The numbers of tokens of prompt, preferred answer and other answer, for each pair of each row.
LENGTHS = (((2, 3, 4), (1, 5, 1), (3, 1, 2)), ((4, 2, 5), (2, 6, 1)))


class LookUp:
    """A model whose hidden states are embeddings. One id has an embedding that is not finite."""

    layout, bad = Layout(), V - 1

    def init(self, rng):
        return {"table_VD": jax.random.normal(rng, (V, D)).at[self.bad].set(jnp.inf)}

    def apply(self, params, batch, *, rng=None):
        return Output(params["table_VD"][batch.tokens])

    def head(self, params):
        return Head(params["table_VD"][: self.bad])


def setting(loss="dpo", **changes):
    keys = {"label_smoothing": 0.1} if "label_smoothing" in PREFERENCE_LOSSES[loss].reads else {}
    return Setting(keys=read(loss=loss, beta=0.7, **keys), **changes)


def read(**changes):
    names = {"rejected_field": "rejected", "prompt_field": "prompt", "format": "plain", "system": ""}
    return PreferenceConfig(
        **{"loss": "dpo", "beta": 0.1, "margin": 0.0, "label_smoothing": 0.0} | names | changes
    )


def packed(order=None):
    """A batch of two rows with pairs of these lengths, and the pairs. `order` moves the columns of the first stream."""
    rng = np.random.default_rng(0)
    shapes = {"tokens": (2, T), "source_tokens": (2, S)}
    arrays = {name: np.full(shape, LookUp.bad) for name, shape in shapes.items()}
    for name in ("targets", "segments", "positions", "weights"):
        arrays[name] = np.zeros((2, T), int)
    for name in ("source_segments", "source_positions"):
        arrays[name] = np.zeros((2, S), int)
    pairs = []
    for row, of_row in enumerate(LENGTHS):
        at = [0, 0]
        for segment, (prompt, *lengths) in enumerate(of_row, 1):
            given = rng.integers(0, V - 1, prompt)
            texts = [np.concatenate([given, rng.integers(0, V - 1, length)]) for length in lengths]
            n = len(texts[0]) - 1
            here = row, slice(at[0], at[0] + n)
            arrays["tokens"][here], arrays["targets"][here] = texts[0][:-1], texts[0][1:]
            arrays["segments"][here], arrays["positions"][here] = segment, np.arange(n)
            arrays["weights"][here] = np.arange(n) >= prompt - 1
            there = row, slice(at[1], at[1] + len(texts[1]))
            arrays["source_tokens"][there], arrays["source_segments"][there] = texts[1], segment
            arrays["source_positions"][there] = np.arange(len(texts[1]))
            at = [at[0] + n, at[1] + len(texts[1])]
            pairs.append((prompt, *texts))
    if order is not None:
        arrays |= {name: x[:, order] for name, x in arrays.items() if not name.startswith("source")}
    batch = Batch(index=np.arange(2), **arrays)
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch)
    return dataclasses.replace(batch, weights=batch.weights.astype(jnp.float32)), pairs


def parameters(model):
    """Parameters that differ from those that are remembered."""
    params = model.init(jax.random.key(0))
    if REFERENCE in params:
        params = {**with_reference(LookUp().init(jax.random.key(1))), **LookUp().init(jax.random.key(0))}
    return params


@pytest.mark.parametrize("order", [None, np.random.default_rng(1).permutation(T)], ids=["in order", "moved"])
@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_loss_and_gradients_are_those_of_a_loop_over_the_pairs_in_torch(name, order):
    torch = pytest.importorskip("torch")
    kind = PREFERENCE_LOSSES[name]
    model = Referenced(LookUp()) if kind.has_reference else LookUp()
    params, (batch, pairs) = parameters(model), packed(order)
    loss = TASK.make_loss(model, setting(name))
    (value, sums), gradients = jax.value_and_grad(
        lambda params: ((found := loss(params, batch, None)).main, found), has_aux=True
    )(params)
    assert float(value) == pytest.approx(float(sums.loss), rel=1e-6) and float(sums.weight) == len(pairs)

    def log_probability(table, prompt, text):
        logits = table[torch.tensor(text[:-1])] @ table[: LookUp.bad].T
        found = torch.log_softmax(logits, -1)[torch.arange(len(text) - 1), torch.tensor(text[1:])]
        return found[prompt - 1 :].sum()

    table = torch.tensor(np.array(params["table_VD"]), requires_grad=True)
    before = torch.tensor(np.array(params.get(REFERENCE, params)["table_VD"]))
    total, right, log_sigmoid = torch.zeros([]), 0, torch.nn.functional.logsigmoid
    for prompt, *texts in pairs:
        ours = [log_probability(table, prompt, text) for text in texts]
        gained = [x - log_probability(before, prompt, text) for x, text in zip(ours, texts, strict=True)]
        per_token = [x / (len(text) - prompt) for x, text in zip(ours, texts, strict=True)]
        if name == "dpo":
            h = 0.7 * (gained[0] - gained[1])
            one = -0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h)
        elif name == "ipo":
            one = (gained[0] - gained[1] - 1 / 1.4) ** 2
        elif name == "simpo":
            h = 0.7 * (per_token[0] - per_token[1])
            one = -0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h)
        else:
            odds = [(x.exp() / (1 - x.exp())).log() for x in per_token]
            one = -per_token[0] - 0.7 * log_sigmoid(odds[0] - odds[1])
        total = total + one
        compared = gained if kind.has_reference else per_token
        right += bool(compared[0] > compared[1])
    total.backward()
    assert float(value) == pytest.approx(float(total.detach()), rel=1e-5)
    assert 0 < right < len(pairs) and float(sums.metrics["accuracy"]) == right
    np.testing.assert_allclose(gradients["table_VD"][:-1], table.grad[:-1], rtol=1e-5, atol=1e-5)
    assert not np.asarray(gradients.get(REFERENCE, {"table_VD": 0.0})["table_VD"]).any()


def test_the_second_stream_becomes_a_batch_whose_answers_alone_have_weight():
    batch, pairs = packed()
    _, rejected = split_pairs(batch, Layout())
    at = [0, 0]
    for number, (prompt, _, text) in enumerate(pairs):
        row = int(number >= len(LENGTHS[0]))
        here = row, slice(at[row], at[row] + len(text))
        weights = [float(prompt - 1 <= i < len(text) - 1) for i in range(len(text))]
        np.testing.assert_array_equal(rejected.weights[here], weights)
        np.testing.assert_array_equal(rejected.targets[here][:-1], text[1:])
        at[row] += len(text)
    assert float(rejected.weights.sum()) == sum(len(text) - prompt for prompt, _, text in pairs)


def test_a_model_that_begins_as_the_reference_tells_nothing_apart():
    model = Referenced(LookUp())
    sums = TASK.make_loss(model, Setting(keys=read()))(model.init(jax.random.key(0)), packed()[0], None)
    assert float(sums.loss / sums.weight) == pytest.approx(np.log(2), rel=1e-6)
    assert float(sums.metrics["accuracy"]) == 0 == float(sums.metrics["margin"])


def test_what_a_model_adds_to_tokens_counts_once_for_each_pair():
    class Penalized(LookUp):
        def apply(self, params, batch, *, rng=None):
            output = super().apply(params, batch)
            own = (jnp.float32(batch.tokens.shape[1]), jnp.float32(2.0))
            return dataclasses.replace(
                output, penalties={"extra": jnp.ones(batch.tokens.shape)}, auxiliary={"own": own}
            )

    batch, pairs = packed()
    sums = TASK.make_loss(Penalized(), setting("simpo"))(Penalized().init(jax.random.key(0)), batch, None)
    assert float(sums.metrics["extra"]) == pytest.approx(len(pairs))
    assert float(sums.main - sums.loss) == pytest.approx(len(pairs), rel=1e-5)
    assert [float(x) for x in sums.auxiliary["own"]] == [T + S, 4.0]
    held_out = TASK.make_loss(Penalized(), setting("simpo", training=False))
    assert "extra" not in held_out(Penalized().init(jax.random.key(0)), batch, None).metrics


def test_scores_are_means_over_pairs():
    totals = Totals(6.0, 4.0, {"accuracy": 3.0, "margin": 2.0}, 1)
    assert TASK.evaluate(totals) == {"loss": 1.5, "accuracy": 0.75, "margin": 0.5}


@pytest.mark.parametrize("changes, message", [
    ({"loss": "ppo"}, "preference.loss='ppo' is not known"),
    ({"margin": 0.5}, "preference.margin=0.5 is without effect for preference.loss='dpo'; set it to 0.0, or .*=simpo"),
    ({"loss": "ipo", "label_smoothing": 0.1}, "without effect for preference.loss='ipo'; .*=dpo or simpo"),
    ({"label_smoothing": 0.5}, "preference.label_smoothing=0.5"),
    ({"beta": 0.0}, "preference.beta=0.0"),
    ({"format": "html"}, "preference.format='html'"),
    ({"rejected_field": ""}, "preference.rejected_field='' names no field"),
])  # fmt: skip
def test_mistakes_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_a_loss_term_of_tokens_is_refused():
    with pytest.raises(UserError, match="train.z_loss=0.1 has no meaning for task.name='preference'"):
        TASK.make_loss(LookUp(), setting(z_loss=0.1))
