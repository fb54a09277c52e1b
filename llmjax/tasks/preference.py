"""Preferences: of two answers to one prompt, the model learns to give the one that people prefer.

The preferred answer and the other are two streams of tokens, and the model reads each by itself. A pair always lies in
one row, and counts once in the loss, whatever its length. The losses are in `ops/losses/preference.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from llmjax.data.chat.formats import FORMATS
from llmjax.errors import UserError, choose
from llmjax.models.contract import Model
from llmjax.models.reference import REFERENCE
from llmjax.ops.losses.cross_entropy import softmax_cross_entropy, token_cross_entropy
from llmjax.ops.losses.preference import PREFERENCE_LOSSES, Pairs, PreferenceLoss, Strength
from llmjax.ops.segments import look_up_segments, segment_table
from llmjax.parallel.rules import Layout
from llmjax.ranges import Range, Unset, check_ranges, unset
from llmjax.scores.score import Score
from llmjax.tasks.contract import Loss, Setting, Totals
from llmjax.types import Array, Batch, LossSums, Output, Params

# The batch of the preferred answers, and the batch of the others.
Texts = tuple[Batch, Batch]
# What the random key of dropout is folded with for the second answer, so that it draws numbers of its own.
REJECTED_DRAWS = 0x72656A


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The keys of the section `preference`, explained in `configs/base.py`."""

    loss: Annotated[str, Unset("dpo")]
    beta: Annotated[float, Range(0, 1e6, above=True), Unset(0.1)]
    margin: Annotated[float, Range(0, 1e6), Unset(0.0)]
    label_smoothing: Annotated[float, Range(0, 0.5, below=True), Unset(0.0)]
    rejected_field: Annotated[str, Unset("rejected")]
    prompt_field: Annotated[str, Unset("prompt")]
    format: Annotated[str, Unset("auto")]
    system: Annotated[str, Unset("")]

    def __post_init__(self) -> None:
        check_ranges("preference", self)
        choose(FORMATS, "preference.format", self.format)
        reads = choose(PREFERENCE_LOSSES, "preference.loss", self.loss).reads
        for key in ("margin", "label_smoothing"):
            if key not in reads and getattr(self, key) != unset(PreferenceConfig)[key]:
                readers = [name for name, kind in PREFERENCE_LOSSES.items() if key in kind.reads]
                raise UserError(
                    f"preference.{key}={getattr(self, key)} is without effect for preference.loss={self.loss!r}; set "
                    f"it to {unset(PreferenceConfig)[key]}, or preference.loss={' or '.join(readers)}"
                )
        if not self.rejected_field:
            raise UserError("preference.rejected_field='' names no field; give the one with the other answer")

    @property
    def kind(self) -> PreferenceLoss:
        """The loss."""
        return PREFERENCE_LOSSES[self.loss]

    @property
    def strength(self) -> Strength:
        """The numbers in the loss."""
        return Strength(self.beta, self.margin, self.label_smoothing)


class Preference:
    """The loss is that of `preference.loss`, with one term for each pair."""

    section = PreferenceConfig
    sees_both_sides = False
    use = "chat"
    compresses_text = False

    scores = (
        Score("loss", "held-out loss", "per pair", digits=4),
        Score("accuracy", "pairs told apart", higher_is_better=True, digits=4),
        Score("margin", "reward margin", higher_is_better=True, digits=4),
    )

    def has_reference(self, keys: PreferenceConfig) -> bool:
        """Whether the loss compares the model with the one that the run began with."""
        return keys.kind.has_reference

    def make_loss(self, model: Model, setting: Setting) -> Loss:
        if setting.z_loss:
            raise UserError(
                f"train.z_loss={setting.z_loss} has no meaning for task.name='preference', whose loss has terms for "
                "pairs and not for tokens; set train.z_loss=0"
            )
        return make_preference_loss(model, setting)

    def evaluate(self, totals: Totals) -> dict[str, float]:
        """Means over pairs: `loss`; `accuracy`, the share of the pairs whose preferred answer has the larger reward;
        `margin`, how much larger it is; and `chosen_reward` and `rejected_reward` themselves."""
        figures = {name: total / totals.weight for name, total in totals.metrics.items()}
        return {**figures, "loss": totals.loss / totals.weight}


def make_preference_loss(model: Model, setting: Setting) -> Loss:
    """Returns loss(params, batch, rng) -> LossSums of the pairs of a batch.

    A loss of pairs is no sum of losses of tokens, and only such sums are computed chunk by chunk. Therefore the
    log-probabilities of all tokens are found first. They give the loss of each pair and its derivative for each token,
    which is then the weight of the token in an ordinary sum, whose gradient is the one that is wanted.
    """
    keys, strength, layout = setting.keys, setting.keys.strength, model.layout
    arguments: dict[str, Any] = {"shards": setting.shards, "vocab_shards": setting.vocab_shards}

    def answers(params: Params, texts: Texts, outputs: Sequence[Output]) -> list[Array]:
        """The log-probability of each answer, float32 [B, N + 1] each, without gradient."""
        found = []
        for text, output in zip(texts, outputs, strict=True):
            hidden, head = jax.lax.stop_gradient((output.hidden_BTD, model.head(params)))
            loss_BT, _ = token_cross_entropy(hidden, head, text.targets, **arguments)
            # Tokens without weight may hold infinities, and a product with 0 would make NaN of them.
            found.append(-_sums(jnp.where(text.weights == 0, 0.0, loss_BT), text, texts, layout))
        return found

    def loss(params: Params, batch: Batch, rng: jax.Array | None) -> LossSums:
        texts = split_pairs(batch, layout)
        rngs = (None, None) if rng is None else (rng, jax.random.fold_in(rng, REJECTED_DRAWS))
        outputs = [model.apply(params, text, rng=rng) for text, rng in zip(texts, rngs, strict=True)]
        ours = answers(params, texts, outputs)
        theirs = [jnp.zeros_like(x) for x in ours]
        if keys.kind.has_reference:
            remembered = jax.lax.stop_gradient(params[REFERENCE])
            theirs = answers(remembered, texts, [model.apply(remembered, text) for text in texts])
        tokens = [_sums(text.weights, text, texts, layout) for text in texts]
        # Rows have fewer pairs than entries, and entry 0 is padding.
        is_pair_BN = tokens[0] > 0
        tokens = [jnp.maximum(x, 1.0) for x in tokens]

        def losses(*ours: Array) -> Array:
            return jnp.where(is_pair_BN, keys.kind.of_pairs(Pairs(*ours, *theirs, *tokens), strength), 0.0)

        losses_BN, backward = jax.vjp(losses, *ours)
        total = jnp.sum(losses_BN)
        rewards = keys.kind.reward(Pairs(*ours, *theirs, *tokens))
        chosen_BN, rejected_BN = (jnp.where(is_pair_BN, strength.beta * x, 0.0) for x in rewards)
        metrics = {
            "accuracy": jnp.sum(chosen_BN > rejected_BN, dtype=jnp.float32),
            "margin": jnp.sum(chosen_BN - rejected_BN),
            "chosen_reward": jnp.sum(chosen_BN),
            "rejected_reward": jnp.sum(rejected_BN),
        }
        sums = LossSums(total, jnp.sum(is_pair_BN, dtype=jnp.float32), metrics)
        if not setting.training:
            return sums
        slopes = backward(jnp.ones_like(losses_BN))
        main = jnp.zeros([])
        for text, output, slope_BN in zip(texts, outputs, slopes, strict=True):
            # A cross-entropy is a negative log-probability.
            weights_BT = -look_up_segments(slope_BN[..., None], text.segments)[..., 0] * text.weights
            main += softmax_cross_entropy(
                output.hidden_BTD, model.head(params), text.targets, weights_BT, **arguments
            ).main
        # It has the value of the loss, and the gradient of the weighted sums.
        objective = main + jax.lax.stop_gradient(total - main)
        return _with_terms(dataclasses.replace(sums, objective=objective), texts, outputs, layout)

    return loss


def split_pairs(batch: Batch, layout: Layout) -> Texts:
    """The batch of the preferred answers, and the batch of the others, which is its second stream.

    The two texts of a pair have the same number of a segment, and begin with the same prompt. Its tokens have weight 0
    in the first batch, and here in the second, too.
    """
    names = ("source_tokens", "source_segments", "source_positions")
    tokens, segments, positions = (getattr(batch, name) for name in names)
    following_BS = jnp.roll(segments, -1, axis=1).at[:, -1].set(0)
    has_target_BS = (segments > 0) & (segments == following_BS)
    chosen = dataclasses.replace(batch, **dict.fromkeys(names))
    rejected = Batch(tokens, jnp.roll(tokens, -1, axis=1), has_target_BS, segments, positions, batch.index)
    # A prompt of P tokens has P - 1 predictions without weight, and position i predicts token i + 1.
    prompts_BN = _sums(chosen.weights == 0, chosen, (chosen, rejected), layout)
    begins_BS = look_up_segments(prompts_BN[..., None], segments)[..., 0]
    weights_BS = (has_target_BS & (positions >= begins_BS)).astype(jnp.float32)
    return chosen, dataclasses.replace(rejected, weights=weights_BS)


def _sums(x_BT: Array, text: Batch, texts: Texts, layout: Layout) -> Array:
    """The sum of `x_BT` over each segment of `text`, float32 [B, N + 1], where N is the most pairs of a row."""
    most = min(one.tokens.shape[1] for one in texts)
    # Sums over the texts of a row need the whole row.
    x_BT1 = layout.constrain(x_BT.astype(jnp.float32)[..., None], "batch", None, None)
    return segment_table(x_BT1, text.segments, most)[..., 0]


def _with_terms(sums: LossSums, texts: Texts, outputs: Sequence[Output], layout: Layout) -> LossSums:
    """`sums` with what the model adds to every token, such as the load balance of experts, which counts once a pair."""
    added = dict.fromkeys(outputs[0].penalties, jnp.zeros([]))
    for text, output in zip(texts, outputs, strict=True):
        lengths_BN = jnp.maximum(_sums(text.segments > 0, text, texts, layout), 1.0)
        # The tokens of each of the two texts share one half.
        share_BN1 = 0.5 / lengths_BN.at[:, 0].set(jnp.inf)[..., None]
        share_BT = look_up_segments(share_BN1, text.segments)[..., 0]
        added = {name: x + jnp.sum(output.penalties[name] * share_BT) for name, x in added.items()}
    return dataclasses.replace(
        sums,
        objective=sum(added.values(), sums.main),
        metrics=sums.metrics | added,
        auxiliary=jax.tree.map(jnp.add, outputs[0].auxiliary, outputs[1].auxiliary),
    )
