"""The samples of a run for masked language modelling: a text with masks, and the same text as the model fills it in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch import empty_arrays
from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.ops.logits import head_logits
from llmjax.tasks.masked_language_model import mask_tokens
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Batch, Params

# How a mask is shown, and the most tokens of the text. Both are choices.
MASK, LONGEST = "[MASK]", 64


def make_filler(program: Program, corpus: Corpus) -> Callable[[Params, Watch], list[tuple[str, str]]]:
    """A function (params, watch) -> [(text with masks, text filled in)], which is compiled once for a whole run.

    The text is the beginning of the longest held-out document, or of the first one where none is held out. `watch` is
    that of samples that go on token by token, and is not used.
    """
    store, ids, tokenizer = corpus.store, corpus.held_out_ids, corpus.tokenizer
    doc = int(ids[np.argmax(store.lengths[ids])]) if len(ids) else 0
    length = min(LONGEST, int(store.lengths[doc]), program.config.data.seq_len)
    rows, columns = program.probe_shape(1)
    arrays = empty_arrays({"batch": rows, "length": columns})
    arrays["tokens"][0, :length] = store.tokens(doc, 0, length)
    arrays["segments"][0, :length] = 1
    arrays["positions"][0, :length] = np.arange(length)
    model, vocabulary = program.model, corpus.vocabulary()
    keys, seed = program.config.tasks[program.config.task.name], program.config.seed

    def fill(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        masked, chosen_BT = mask_tokens(batch, keys, vocabulary, seed)
        # The masks alone: a random token in a text would look like a fault.
        read_BT = jnp.where(chosen_BT, vocabulary.mask_id, batch.tokens)
        hidden_BTD = model.apply(params, dataclasses.replace(masked, tokens=read_BT)).hidden_BTD
        logits_BTV = head_logits(hidden_BTD[:1, :length], model.head(params))
        allowed_V = jnp.where(jnp.asarray(vocabulary.is_text_V), 0.0, -jnp.inf)
        best_BT = jnp.argmax(logits_BTV + allowed_V[None, None], axis=-1)
        return read_BT[:1, :length], chosen_BT[:1, :length], best_BT

    # The results are complete on every process.
    compiled = jax.jit(fill, out_shardings=program.layout.sharding(None, None))

    def texts(params: Params, watch: Watch) -> list[tuple[str, str]]:
        results = compiled(params, program.placement.place(arrays))
        read_T, chosen_T, best_T = (np.asarray(x)[0] for x in results)
        return [(_text(tokenizer, read_T, chosen_T), tokenizer.decode(np.where(chosen_T, best_T, read_T)))]

    return texts


def _text(tokenizer: Tokenizer, ids: Any, masked: Any) -> str:
    """The text of `ids`, with `MASK` for those that are masked."""
    text, start = "", 0
    for at in [*np.flatnonzero(masked).tolist(), len(ids)]:
        text += tokenizer.decode(ids[start:at], continues=start > 0)
        if at < len(ids):
            text += MASK
        start = at + 1
    return text
