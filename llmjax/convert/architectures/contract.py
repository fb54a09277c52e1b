"""What a name table says of a family of models of another program: its config.json and its tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from llmjax.convert.architectures.forms import Stored

# The key of config.json for the id that a text begins with which is written after a source was read.
START = "decoder_start_token_id"
# The keys of `transformer` that the rotary positions of config.json say, see `rope_keys.py`.
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_factor", "rope_original_len")
# The keys of ours that change no function of the parameters: a table need not mention them.
FREE = ("model.dropout", "model.dtype", "model.init_std")
# Our keys of a model for which `scales_tied` holds.
SCALES_TIED = ("model.tie_embeddings", "encoder_decoder.scale_output")
# What a model has that is not mentioned in a table.
PLAIN = {
    "model.family": "gpt",
    "model.logit_softcap": 0.0,
    "transformer.position": "rope",
    "transformer.norm": "rmsnorm",
    "transformer.activation": "swiglu",
    "transformer.qk_norm": False,
    "transformer.qk_norm_over": "head",
    "transformer.norm_at": "input",
    "transformer.scale_embedding": False,
    "transformer.score_dim": 0,
    "transformer.local_rope_theta": 0.0,
    "transformer.relative_buckets": 32,
    "transformer.relative_distance": 128,
    "transformer.use_bias": False,
    "transformer.qkv_bias": False,
    "transformer.window": 0,
    "transformer.global_every": 0,
    "transformer.attention_softcap": 0.0,
    "transformer.attention_sinks": False,
    "experts.num_experts": 0,
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that says the same as a key of ours.

    ours     the whole name of our key
    default  what config.json means without the key, or with null
    none     our value that config.json writes as null; `...` for no such value
    also     another name that some versions of config.json have for the key
    """

    ours: str
    default: Any
    none: Any = ...
    also: str = ""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One family of models, as `transformers` or another program names its parts.

    name        the class of `transformers` that reads it
    model_type  its name in config.json
    keys        the keys of config.json that are keys of ours, by their names there
    only        the keys of config.json of which we can do some values only: name -> (what is meant without the key,
                *values that we can do). The first value is written
    must        the same for keys without which config.json means a value that we cannot do
    always      our keys with the value that all models of the family have; others have that of `PLAIN`
    outer       the tensors outside of the layers, by their names
    layer       the tensors of a layer; the first `{}` in a name stands for the number of the layer, from 0, and a
                second one for that of the expert
    encoder     the same of a layer of the encoder, for a family that reads a second text
    form        what tells the models of the table from others of the same class; "" where there is but one table
    buffers     regular expressions of tensors that hold nothing that was learned, and that are skipped
    left_out    regular expressions of tensors that were learned and have no place in our model, with what they are, for
                a sentence that says so
    repeats     tensors that repeat another one of the table, besides an output matrix that repeats the embedding
    renamed     (regular expression, replacement) for names that other versions of a file have
    prefix      the beginning of the names of all tensors but those of the head, which some files leave out
    rope        the base of the rotary wavelengths without a key of config.json that says it; 0 without rotation
    local_rope  the same for layers with a window, where it is another; 0 where it is the same
    alternates  if layers with a window alternate with layers without: every how many-th layer has none, where
                config.json does not say it; 0 if all layers are alike
    scales_tied  whether models whose output matrix is the embedding divide the last states by the root of
                model_dim, and others do not, as T5
    described_by  the part of a model that says its sizes, for errors
    also        further classes of `transformers` whose files can be read as those of `name`
    opened_as   the class of `transformers` that opens it to compare its results, see `verify.py`
    untrained   what a model of this family does not have, as the end of a sentence; "" if it has everything
    """

    name: str
    model_type: str
    keys: Mapping[str, Key]
    only: Mapping[str, tuple[Any, ...]]
    always: Mapping[str, Any]
    outer: Mapping[str, Stored]
    layer: Mapping[str, Stored]
    encoder: Mapping[str, Stored] = dataclasses.field(default_factory=dict)
    form: str = ""
    must: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    rope: float = 10000.0
    local_rope: float = 0.0
    alternates: int = 0
    scales_tied: bool = False
    described_by: str = "config.json"
    also: tuple[str, ...] = ()
    opened_as: str = "AutoModelForCausalLM"
    untrained: str = ""

    @property
    def title(self) -> str:
        """The name of the table, which no other one has."""
        return f"{self.name} {self.form}".strip()

    @property
    def output(self) -> str:
        """The name of the output matrix; nothing if the family has none."""
        matrix = ("embedding/unembedding_VD",)
        return next((name for name, line in self.outer.items() if line.ours == matrix), "")

    def full_name(self, name: str, short: bool) -> str:
        """The name in the table for a tensor that a file calls `name`; `short` if it leaves out the prefix."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        if not short or name in self.outer or name in self.repeats:
            return name
        return self.prefix + name

    def useless(self, name: str) -> str:
        """What the tensor of this name is, if it was learned and has no place in our model; nothing if it has one."""
        return next((what for pattern, what in self.left_out.items() if re.fullmatch(pattern, name)), "")

    def skips(self, name: str) -> bool:
        """Whether the tensor of this name, with or without the prefix, holds nothing that was learned."""
        return any(
            re.fullmatch(pattern, full) for pattern in self.buffers for full in (name, self.prefix + name)
        )

    @property
    def fixed(self) -> dict[str, Any]:
        """The values of our keys that every model of the family has."""
        said = {key.ours for key in self.keys.values()}
        said |= {"transformer.global_every"} if self.alternates else set()
        said |= {"transformer.local_rope_theta"} if self.local_rope else set()
        said |= set(SCALES_TIED) if self.scales_tied else set()
        return {key: value for key, value in {**PLAIN, **self.always}.items() if key not in said}
