"""The samples of a run for masked language modelling: a text with masks, and the same text as the model fills it in."""

from __future__ import annotations

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
from llmjax.types import Batch, Params

# How a mask is shown, and the most tokens of the text. Both are choices.
MASK, LONGEST = "[MASK]", 64


def fill_masks(program: Program, corpus: Corpus, params: Params) -> list[tuple[str, str]]:
    """(text with masks, text filled in) of the longest held-out document's beginning, or of the first document's."""
    store, ids = corpus.store, corpus.held_out_ids
    doc = int(ids[np.argmax(store.lengths[ids])]) if len(ids) else 0
    length = min(LONGEST, int(store.lengths[doc]), program.config.data.seq_len)
    rows, columns = program.probe_shape(1)
    arrays = empty_arrays({"batch": rows, "length": columns})
    arrays["tokens"][0, :length] = store.tokens(doc, 0, length)
    arrays["segments"][0, :length] = 1
    arrays["positions"][0, :length] = np.arange(length)
    model, vocabulary = program.model, program.vocabulary
    assert vocabulary is not None  # the task has been made with it
    keys, seed = program.config.tasks[program.config.task.name], program.config.seed

    def fill(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        masked, chosen_BT = mask_tokens(batch, keys, vocabulary, seed)
        # The masks alone: a random token in a text would look like a fault.
        read_BT = jnp.where(chosen_BT, vocabulary.mask_id, batch.tokens)
        masked = Batch(**{**vars(masked), "tokens": read_BT})
        logits_BTV = head_logits(model.apply(params, masked).hidden_BTD[:1, :length], model.head(params))
        allowed_V = jnp.where(jnp.asarray(vocabulary.is_text_V), 0.0, -jnp.inf)
        best_BT = jnp.argmax(logits_BTV + allowed_V[None, None], axis=-1)
        return read_BT[:1, :length], chosen_BT[:1, :length], best_BT

    # Complete on every process.
    compiled = jax.jit(fill, out_shardings=program.layout.sharding(None, None))
    read_BT, chosen_BT, best_BT = (
        np.asarray(x)[0] for x in compiled(params, program.placement.place(arrays))
    )
    filled = np.where(chosen_BT, best_BT, read_BT)
    return [(_text(corpus.tokenizer, read_BT, chosen_BT), corpus.tokenizer.decode(filled))]


def _text(tokenizer: Tokenizer, ids: Any, masked: Any) -> str:
    """The text of `ids`, with `MASK` for those that are masked."""
    text, start = "", 0
    for at in [*np.flatnonzero(masked).tolist(), len(ids)]:
        text += tokenizer.decode(ids[start:at], continues=start > 0)
        if at < len(ids):
            text += MASK
        start = at + 1
    return text
