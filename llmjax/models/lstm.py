"""The recurrent language model: layers of long short-term memory (Zaremba et al. 2014; Merity et al. 2018).

It is the baseline that the Transformer replaced. A sequence is read token by token, so that mesh.seq cannot split it;
the mesh axes data, fsdp and tensor can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from llmjax.errors import UserError
from llmjax.models.contract import Cost
from llmjax.models.family import Family, Sections
from llmjax.nn.config import ModelConfig
from llmjax.nn.layer_compute import LayerCompute
from llmjax.nn.layers import add_bias, look_up, product
from llmjax.nn.remat import Widths, kept_width, remat
from llmjax.ops import lstm
from llmjax.ops.dropout import dropout, token_keys
from llmjax.ops.logits import head_logits
from llmjax.parallel.rules import Layout
from llmjax.ranges import COUNT, Range, Unset, check_ranges
from llmjax.types import Batch, Head, Output, Params

# The states of all layers: the cache of generation.
Cache = tuple[lstm.State, ...]
# What the bias of the forget gate begins with, so that a new network remembers (Jozefowicz et al. 2015).
FORGET_BIAS = 1.0


@dataclasses.dataclass(frozen=True)
class LSTMConfig:
    """The keys of the section `lstm`, explained in `configs/base.py`."""

    hidden_dim: Annotated[int, Range(1, 2**20, "model.model_dim"), Unset(0)]
    truncation: Annotated[int, Range(1, COUNT, "none"), Unset(0)]

    def __post_init__(self) -> None:
        check_ranges("lstm", self, LSTMConfig)


@dataclasses.dataclass(frozen=True)
class Settings(LSTMConfig, ModelConfig):
    """The keys of the sections `model` and `lstm`, with derived sizes."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        LSTMConfig.__post_init__(self)


@dataclasses.dataclass(frozen=True)
class LSTM:
    """The `Model` contract for a network of LSTM layers.

    config  resolved settings
    compute of these choices, only `remat` is read
    The arguments about attention are those of every family and have no effect here.
    """

    config: Settings
    vocab_size: int
    max_positions: int
    layout: Layout = Layout()
    attend: Callable[..., jax.Array] | None = None
    holds_scores: bool = False
    compute: LayerCompute = LayerCompute()

    @property
    def position_limit(self) -> int:
        return 0

    @property
    def _projects(self) -> bool:
        """Whether a matrix takes the last hidden state to the width of the embeddings, which are the output matrix."""
        return self.config.tie_embeddings and self.config.hidden_dim != self.config.model_dim

    def _shapes(self) -> dict[str, dict[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
        """The shape and the logical axes of each parameter."""
        V, D, M = self.vocab_size, self.config.model_dim, self.config.hidden_dim
        shapes: dict[str, dict[str, tuple[tuple[int, ...], tuple[str, ...]]]]
        shapes = {"embedding": {"embedding_VD": ((V, D), ("vocab", "embed"))}}
        if not self.config.tie_embeddings:
            shapes["embedding"]["unembedding_VM"] = (V, M), ("classes", "recurrent")
        for layer in range(self.config.num_layers):
            inputs, axis = (M, "recurrent") if layer else (D, "embed")
            shapes[f"layer_{layer:03d}"] = {
                "w_input_4IM": ((4, inputs, M), ("gates", axis, "mlp")),
                "w_recurrent_4RM": ((4, M, M), ("gates", "recurrent", "mlp")),
                "bias_4M": ((4, M), ("gates", "mlp")),
            }
        if self._projects:
            shapes["projection"] = {"w_MD": ((M, D), ("recurrent", "mlp"))}
        return shapes

    def init(self, rng: jax.Array) -> Params:
        """Matrices are drawn from N(0, init_std^2); biases are 0, but for the forget gates."""
        shapes = self._shapes()
        keys = iter(jax.random.split(rng, sum(map(len, shapes.values()))))

        def new(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
            if name == "bias_4M":
                return jnp.zeros(shape).at[1].set(FORGET_BIAS)
            return self.config.init_std * jax.random.normal(key, shape)

        return {
            block: {name: new(name, shape, next(keys)) for name, (shape, _) in params.items()}
            for block, params in shapes.items()
        }

    def axes(self) -> Any:
        return {
            block: {name: axes for name, (_, axes) in params.items()}
            for block, params in self._shapes().items()
        }

    def _layers(self, params: Params) -> list[Params]:
        return [params[f"layer_{layer:03d}"] for layer in range(self.config.num_layers)]

    def _recurrent(self, layer: Params) -> jax.Array:
        """The recurrent matrices w_R4M, gathered once if they are split along their rows, and not for every token."""
        w_R4M = layer["w_recurrent_4RM"].astype(self.config.dtype).swapaxes(0, 1)
        return self.layout.constrain(w_R4M, None, None, "mlp")

    def _inputs(self, layer: Params, x_BTI: jax.Array) -> jax.Array:
        """inputs_BT4M, the products of the inputs of all tokens, with their bias."""
        B, T, I = x_BTI.shape
        w_I4M = layer["w_input_4IM"].astype(x_BTI.dtype).swapaxes(0, 1)
        inputs_BT4M = product(x_BTI, w_I4M.reshape(I, -1), self.layout).reshape(B, T, 4, -1)
        return self.layout.constrain(add_bias(inputs_BT4M, layer["bias_4M"]), "batch", None, None, "mlp")

    def _run_layer(
        self, layer: Params, x_BTI: jax.Array, reset_BT: jax.Array
    ) -> tuple[jax.Array, lstm.State]:
        """hidden_BTM of a layer in the dtype of its inputs, and its state after the last token."""
        inputs_TB4M = self._inputs(layer, x_BTI).swapaxes(0, 1)
        start = lstm.zero_state(x_BTI.shape[0], self.config.hidden_dim)
        hidden_TBM, end = lstm.run(
            inputs_TB4M, self._recurrent(layer), reset_BT.T, start, self.config.truncation
        )
        hidden_BTM = hidden_TBM.swapaxes(0, 1).astype(x_BTI.dtype)
        return self.layout.constrain(hidden_BTM, "batch", None, None), end

    def _embed(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = look_up(params["embedding"]["embedding_VD"], tokens_BT, self.layout)
        return self.layout.constrain(x_BTD.astype(self.config.dtype), "batch", None, None)

    def _project(self, params: Params, hidden_BTM: jax.Array) -> jax.Array:
        """The hidden states in the width of the head."""
        if not self._projects:
            return hidden_BTM
        return product(hidden_BTM, params["projection"]["w_MD"].astype(hidden_BTM.dtype), self.layout)

    def _run(
        self, params: Params, batch: Batch, rng: jax.Array | None
    ) -> tuple[list[jax.Array], list[lstm.State]]:
        """x_BTI that goes into each layer, and hidden_BTM of the last; the states after the last token."""
        keys_BT = None
        if rng is not None and self.config.dropout:
            columns_BT = jax.lax.broadcasted_iota(jnp.int32, batch.tokens.shape, 1)
            keys_BT = token_keys(rng, batch.index, columns_BT)
        # A state may only come from the token before, if that token is of the same document.
        before_BT = jnp.pad(batch.segments[:, :-1], ((0, 0), (1, 0)))
        reset_BT = batch.segments != before_BT
        run_layer = remat(self._run_layer, self.compute.remat, ())
        x = [dropout(self._embed(params, batch.tokens), keys_BT, self.config.dropout, 0)]
        states = []
        for number, layer in enumerate(self._layers(params), 1):
            hidden_BTM, state = run_layer(layer, x[-1], reset_BT)
            x.append(dropout(hidden_BTM, keys_BT, self.config.dropout, number))
            states.append(state)
        return x, states

    def apply(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Output:
        x, states = self._run(params, batch, rng)
        return Output(self._project(params, x[-1]), carry=tuple(states))

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """`hidden_rms` is the root mean square of the hidden states of each layer."""
        real_BT = (batch.segments > 0)[..., None]
        x, _ = self._run(params, batch, None)
        squares = [jnp.sum(jnp.where(real_BT, jnp.square(h.astype(jnp.float32)), 0)) for h in x[1:]]
        count = jnp.maximum(jnp.sum(real_BT), 1) * self.config.hidden_dim
        return {"hidden_rms": jnp.sqrt(jnp.stack(squares) / count)}

    def _output_table(self, params: Params) -> jax.Array:
        return params["embedding"]["embedding_VD" if self.config.tie_embeddings else "unembedding_VM"]

    def head(self, params: Params) -> Head:
        w_VD = self._output_table(params)
        # Gathered along D once here; otherwise each chunk of the loss would gather it.
        if self.layout.axis_size("fsdp") > 1:
            w_VD = self.layout.constrain(w_VD.astype(self.config.dtype), "classes", None)
        return Head(w_VD, softcap=self.config.logit_softcap)

    def make_cache(self, batch: int, slots: int) -> Cache:
        return tuple(lstm.zero_state(batch, self.config.hidden_dim) for _ in range(self.config.num_layers))

    def select_rows(self, cache: Cache, rows_B: jax.Array) -> Cache:
        selected: Cache = jax.tree.map(lambda x_BM: x_BM[rows_B], cache)
        return selected

    def decode(
        self, params: Params, tokens_BT: jax.Array, cache: Cache, valid_BT: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        valid_BT = jnp.ones(tokens_BT.shape, bool) if valid_BT is None else valid_BT
        x_BTI, states = self._embed(params, tokens_BT), []
        for layer, state in zip(self._layers(params), cache, strict=True):
            hidden_TBM, state = lstm.extend(
                self._inputs(layer, x_BTI).swapaxes(0, 1), self._recurrent(layer), valid_BT.T, state
            )
            x_BTI = hidden_TBM.swapaxes(0, 1).astype(x_BTI.dtype)
            states.append(state)
        head = Head(self._output_table(params), softcap=self.config.logit_softcap)
        return head_logits(self._project(params, x_BTI), head), tuple(states)

    def cost(self, attended: float, tokens_per_device: float, seq_len: int) -> Cost:
        """6 operations per weight of a matrix product, of which there is one per gate."""
        c, tensor = self.config, self.layout.axis_size("tensor")
        weights = sum(
            shape[0] * shape[1] * shape[2]
            for params in self._shapes().values()
            for shape, _ in params.values()
            if len(shape) == 3
        )
        weights += c.hidden_dim * c.model_dim * self._projects
        weights += self.vocab_size * (c.model_dim if c.tie_embeddings else c.hidden_dim)
        # A layer keeps its input, the products of the input, the gates, and two states in two copies. All but the
        # first two are float32, whatever the dtype.
        M, itemsize = c.hidden_dim, jnp.dtype(c.dtype).itemsize
        everything = M + 4 * M / tensor + 8 * M / tensor * 4 / itemsize
        widths = Widths(residual=M, heads=0, products=4 * M / tensor, everything=everything)
        width = kept_width(self.compute.remat, (), widths, c.num_layers)
        return Cost(6.0 * weights, int(tokens_per_device * width * itemsize))


def _resolve(model: ModelConfig, sections: Sections, seq_len: int, compute: LayerCompute) -> Sections:
    own = sections["lstm"]
    if own.truncation > seq_len:
        raise UserError(
            f"lstm.truncation={own.truncation} is longer than data.seq_len={seq_len}, so that it cuts nothing; use "
            "less, or 0 for no truncation"
        )
    return {**sections, "lstm": dataclasses.replace(own, hidden_dim=own.hidden_dim or model.model_dim)}


def _hidden_dim(sections: Sections) -> dict[str, int]:
    return {"lstm.hidden_dim": sections["lstm"].hidden_dim}


LSTM_FAMILY = Family(
    LSTM,
    sections={"lstm": LSTMConfig},
    compute=("remat",),
    resolve=_resolve,
    config=lambda model, sections: Settings(**vars(model), **vars(sections["lstm"])),
    split=_hidden_dim,
    rows=_hidden_dim,
    free_on_init=("lstm.truncation",),
)
