"""What every room shares: the batch, the sums, and the legend of dimension letters.

Dimension letters, used as suffixes of array names and in einsums:

    B batch (sequences)    T query position       S key position        D model width
    F feed-forward width   N query heads          K key/value heads     H head width
    V vocabulary           C chunk                L layers              G query heads per key/value head (N / K)

A suffix names logical dimensions, never shards. An *update* is one optimizer step; a *micro-step* is one forward and
backward pass over one micro-batch; an update consists of one or more micro-steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llmjax.batch import Batch as Batch
from llmjax.errors import UserError as UserError

Params = Any  # a nested dict of arrays
Array = jax.Array
jax.tree_util.register_dataclass(Batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over target tokens, never means: divide once, at the very end, by the total weight.

    loss       float32 [], sum of weight * loss, the number that is reported, compared and limited
    weight     float32 [], sum of weights
    metrics    dict of float32 [], further sums over the same tokens (`accuracy`: the weight of correct targets)
    auxiliary  (sum, weight) of each further loss term that has a weight of its own; the sum carries its coefficient
    objective  float32 [], `loss` and the further terms over the same tokens together, each of which is in `metrics` by
               its own name: what training takes the gradient of, where no gradient reaches through `loss`. None: the
               same as `loss`
    """

    loss: Array
    weight: Array
    metrics: dict[str, Array]
    auxiliary: dict[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    objective: Array | None = None

    @property
    def main(self) -> Array:
        """What to take the gradient of, besides the auxiliary terms."""
        return self.loss if self.objective is None else self.objective


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: logits_BTV = softcap(hidden_BTD @ w_VD.T + bias_V).

    w_VD     the output matrix. Whoever applies it casts it to the dtype of the hidden states. Split over devices along
             V alone
    bias_V   float32, or None
    softcap  c of c * tanh(logits / c) (Gemma 2); 0 is off
    """

    w_VD: Array
    bias_V: Array | None = None
    softcap: float = dataclasses.field(default=0.0, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a model makes of a batch.

    hidden_BTD  normalised, ready for the `Head`
    auxiliary   (sum, weight) of each loss term of the model's own, such as the load balance of experts
    carry       of a recurrent family, the state after the last token of each row; None for others
    """

    hidden_BTD: Array
    auxiliary: dict[str, tuple[Array, Array]] = dataclasses.field(default_factory=dict)
    carry: Any = None
