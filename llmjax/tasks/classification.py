"""Classification: the model reads a whole text and gives it one of a few labels, such as spam or not.

Many short texts share a row, and each of them counts once in the loss, whatever its length. What the classifier looks
at is the hidden state of the last token (Radford et al. 2018), the mean over all tokens of the text, or the hidden
state of the first token (Devlin et al. 2018).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.errors import UserError
from llmjax.models.classifier import ENTRY, Classifier
from llmjax.models.contract import Model
from llmjax.ops.logits import head_logits
from llmjax.ops.segments import segment_sums
from llmjax.ranges import Unset, unset
from llmjax.scores import confusion
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals, with_penalties
from llmjax.types import Batch, LossSums, Params

# The values of classification.label_from.
LABEL_FROM = ("field", "file", "folder")
# The values of classification.pool.
POOLS = ("auto", "last", "mean", "first")
# Into how many parts of equal width the confidences from 0 to 1 are divided to see whether they are right. A choice.
BINS = 10


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
    """The keys of the section `classification`, explained in `configs/base.py`."""

    label_from: Annotated[str, Unset("field")]
    label_field: Annotated[str, Unset("label")]
    labels: Annotated[tuple[str, ...], Unset(())]
    pool: Annotated[str, Unset("auto")]

    def __post_init__(self) -> None:
        for key, known in (("label_from", LABEL_FROM), ("pool", POOLS)):
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"classification.{key}={value!r} is not known; use one of {', '.join(known)}")
        if self.label_from != "field" and self.label_field != unset(ClassificationConfig)["label_field"]:
            raise UserError(
                f"classification.label_field={self.label_field!r} is without effect for classification.label_from="
                f"{self.label_from!r}; set classification.label_from=field, or leave it at 'label'"
            )
        if not self.label_field:
            raise UserError("classification.label_field='' is no name; name the field that has the label")
        if len({*self.labels}) < len(self.labels):
            raise UserError(f"classification.labels={self.labels} has a label twice; name each label once")


class Classification:
    """The loss is the cross-entropy of the label, with one term for each text."""

    section = ClassificationConfig
    # It predicts no token, so that a model of either kind will do.
    sees_both_sides = None
    use = "classify"
    compresses_text = False
    added = (ENTRY,)

    scores = (
        Score("accuracy", "accuracy", higher_is_better=True, digits=4),
        Score("macro_f1", "macro-F1", higher_is_better=True, digits=4),
        Score("matthews", "Matthews correlation", higher_is_better=True, digits=4),
        Score("loss", "held-out loss", "nats per text", digits=4),
        Score("calibration_error", "calibration error", digits=4),
    )

    def make_model(self, model: Model, keys: ClassificationConfig, init_std: float) -> Model:
        if len(keys.labels) < 2:
            raise UserError(
                f"classification.labels={keys.labels} are fewer than two; name at least two labels, or leave it empty "
                "for those of data.sources"
            )
        return Classifier(model, len(keys.labels), init_std)

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        logits_of = make_logits(model, setting)

        def loss(params: Params, batch: Batch, rng: jax.Array | None) -> LossSums:
            output = model.apply(params, batch, rng=rng)
            logits_BTC = logits_of(params, batch, output.hidden_BTD)
            # Every text has weight 1 at its last token, and the others have none.
            sums = text_sums(logits_BTC, batch.labels, batch.weights, setting)
            if not setting.training:
                return sums
            # What the model adds to every token, such as the load balance of experts, counts once for a text, too.
            per_text_BT2 = segment_sums(
                jnp.stack([batch.weights, jnp.ones_like(batch.weights)], -1), batch.segments
            )
            return with_penalties(sums, output, per_text_BT2[..., 0] / per_text_BT2[..., 1])

        return loss

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """`loss` is in nats per text. The other scores follow from the confusion matrix (`scores/confusion.py`)."""
        # The scores below are shares of texts, and would be numbers even where nothing can be computed any more.
        if not math.isfinite(totals.loss):
            return dict.fromkeys((score.name for score in self.scores), math.nan)
        matrix, bins = totals.metrics["confusion"], totals.metrics["calibration"]
        return {
            "accuracy": confusion.accuracy(matrix),
            "macro_f1": confusion.macro_f1(matrix),
            "matthews": confusion.matthews(matrix),
            "loss": totals.loss / totals.weight,
            "calibration_error": confusion.calibration_error(bins),
        }

    def details(self, totals: Totals, keys: ClassificationConfig) -> dict[str, Any]:
        """The confusion matrix and the calibration, for the report."""
        return {
            "labels": list(keys.labels),
            "confusion": np.asarray(totals.metrics["confusion"]).round().astype(int).tolist(),
            "calibration": np.asarray(totals.metrics["calibration"]).tolist(),
        }


def text_sums(
    logits_BTC: jax.Array, labels_BT: jax.Array, weights_BT: jax.Array, setting: Setting
) -> LossSums:
    """The sums over all texts, from the logits at their last tokens, which alone have weight.

    An evaluation has two further sums, which are arrays: `confusion` float32 [C, C], how many texts of each class were
    taken for each class, and `calibration` float32 [BINS, 3], see `confusion.calibration_error`.
    """
    C = logits_BTC.shape[-1]
    # Tokens without weight, such as padding, may hold infinities. A product with 0 would make NaN of them.
    logits_BTC = jnp.where(weights_BT[..., None] == 0, 0.0, logits_BTC)
    label_BTC = jax.nn.one_hot(labels_BT, C)
    normalizer_BT = jax.nn.logsumexp(logits_BTC, axis=-1)
    loss_BT = normalizer_BT - jnp.sum(logits_BTC * label_BTC, -1)
    taken_for_BT = jnp.argmax(logits_BTC, -1)
    right_BT = (taken_for_BT == labels_BT) * weights_BT
    loss, objective = jnp.sum(weights_BT * loss_BT), None
    metrics = {"accuracy": jnp.sum(right_BT)}
    if setting.z_loss:
        metrics["z_loss"] = jnp.sum(weights_BT * setting.z_loss * jnp.square(normalizer_BT))
        objective = loss + metrics["z_loss"]
    if not setting.training:
        taken_for_BTC = jax.nn.one_hot(taken_for_BT, C) * weights_BT[..., None]
        metrics["confusion"] = jnp.einsum("BTC,BTE->CE", label_BTC, taken_for_BTC)
        confidence_BT = jnp.exp(jnp.max(logits_BTC, -1) - normalizer_BT)
        bin_BTF = jax.nn.one_hot(jnp.minimum((confidence_BT * BINS).astype(jnp.int32), BINS - 1), BINS)
        counted_BT3 = jnp.stack([weights_BT, weights_BT * confidence_BT, right_BT], -1)
        metrics["calibration"] = jnp.einsum("BTF,BTN->FN", bin_BTF, counted_BT3)
    return LossSums(loss, jnp.sum(weights_BT), metrics, objective=objective)


def make_logits(model: Model, setting: Setting) -> Callable[[Params, Batch, jax.Array], jax.Array]:
    """Returns `logits(params, batch, hidden_BTD) -> logits_BTC`, float32, in which the logits at the last token of each
    text are those of the text."""
    assert isinstance(model, Classifier)
    pool = setting.keys.pool
    if pool == "auto":
        pool = "mean" if setting.sees_both_sides else "last"
    if pool == "first" and not setting.sees_both_sides:
        raise UserError(
            "classification.pool='first' reads the first token, which sees no other in a family that sees only what "
            "comes before; use last or mean"
        )

    def logits(params: Params, batch: Batch, hidden_BTD: jax.Array) -> jax.Array:
        real_BT = batch.segments > 0
        counted = {"last": batch.weights != 0, "mean": real_BT, "first": real_BT & (batch.positions == 0)}
        counted_BT = counted[pool]
        # Other tokens, such as padding, may hold infinities, and 0 times infinity would spoil the gradient of the head.
        hidden_BTD = jnp.where(counted_BT[..., None], hidden_BTD, 0)
        logits_BTC = head_logits(hidden_BTD, model.class_head(params))
        if pool == "last":
            return logits_BTC
        # The head is linear, so the logits of the mean are the mean of the logits, which are far narrower than hidden
        # states. Sums over the texts of a row need the whole row.
        logits_BTC = model.layout.constrain(logits_BTC, "batch", None, None)
        logits_BTC = jnp.where(counted_BT[..., None], logits_BTC, 0.0)
        sums_BTC = segment_sums(logits_BTC, batch.segments)
        counts_BT1 = segment_sums(counted_BT[..., None], batch.segments)
        return sums_BTC / jnp.maximum(counts_BT1, 1.0)

    return logits


def make_probabilities(model: Model, setting: Setting) -> Callable[[Params, Batch], jax.Array]:
    """Returns `probabilities(params, batch) -> float32 [B, T, C]`, which mean something at the last token of each
    text."""
    logits_of = make_logits(model, setting)

    def probabilities(params: Params, batch: Batch) -> jax.Array:
        hidden_BTD = model.apply(params, batch).hidden_BTD
        return jax.nn.softmax(logits_of(params, batch, hidden_BTD), axis=-1)

    return probabilities
