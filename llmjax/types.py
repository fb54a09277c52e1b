"""Types that all rooms share, and the dimension letters.

Dimension letters are suffixes of array names and appear in einsums:

    B batch (sequences)    T query position       S key position        D model width
    F feed-forward width   N query heads          K key/value heads     H head width
    V vocabulary           C chunk                L layers              G query heads per key/value head (N / K)
    M state of a recurrent layer                  E experts              J experts of a token
    R buckets of relative positions

A suffix names logical dimensions, never shards. An *update* is one optimizer step. A *micro-step* is one forward and
backward pass over one micro-batch. An update consists of one or more micro-steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llmjax.batch import Batch as Batch
from llmjax.errors import UserError as UserError

# A nested dict of arrays.
Params = Any
Array = jax.Array
jax.tree_util.register_dataclass(Batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over target tokens, never means. The only division, by the total weight, comes at the very end.

    loss       float32 [], the sum of weight * loss: the number that is reported, compared and limited
    weight     float32 [], the sum of weights
    metrics    dict of float32 [], further sums over the same tokens, such as `accuracy`, the weight of correct
               targets. In an evaluation they may be arrays, such as a confusion matrix
    auxiliary  (sum, weight) of each further loss term with a weight of its own; the sum includes its coefficient
    objective  float32 [], the sum of `loss` and further terms over the same tokens, which are also in `metrics`.
               Training takes its gradient, and then `loss` has none. None if there are no such terms
    """

    loss: Array
    weight: Array
    metrics: dict[str, Array]
    auxiliary: dict[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    objective: Array | None = None

    @property
    def main(self) -> Array:
        """The scalar that training differentiates, apart from the auxiliary terms."""
        return self.loss if self.objective is None else self.objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: logits_BTV = softcap(hidden_BTD @ w_VD.T + bias_V).

    w_VD     the output matrix, cast by its users to the dtype of the hidden states. Devices may split it along V only
    bias_V   float32, or None
    softcap  c of the soft-cap c * tanh(logits / c) (Gemma 2); 0 is off
    """

    w_VD: Array
    bias_V: Array | None = None
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The output of a model for a batch.

    hidden_BTD  normalised hidden states, ready for the `Head`
    states_BTD  what the last layer made of each token, for uses other than predicting tokens. None if it is hidden_BTD,
                as it is unless the family has further layers before its head
    auxiliary   (sum, weight) of each loss term that the model adds and that has a weight of its own
    penalties   float32 [B, T] of each loss term that the model adds to every token, such as the load balance of
                experts, its coefficient included. The task sums them with the weights of its own loss
    carry       the state of a recurrent model after the last token of each row; None for other models
    """

    hidden_BTD: Array
    auxiliary: dict[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    penalties: dict[str, Array] = dataclasses.field(default_factory=dict)
    carry: Any = None
    states_BTD: Array | None = None
