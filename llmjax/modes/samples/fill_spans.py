"""The samples of a run for span corruption: a text with gaps, and what the model writes into them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from llmjax.batch import empty_arrays
from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.data.examples.contract import Prompt
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.generate.generate import make_generator
from llmjax.modes.generate import no_text, sources_of
from llmjax.parallel.rules import Layout
from llmjax.tasks.span_corruption import draw_spans
from llmjax.train.loop.stop_request import Watch
from llmjax.types import Batch, Params

# The most tokens that are written. A choice: a gap has a few.
LONGEST = 64


def make_span_filler(program: Program, corpus: Corpus) -> Callable[[Params, Watch], list[tuple[str, str]]]:
    """A function (params, watch) -> [(text with numbered gaps, what the model wrote)], compiled once for a whole run.

    The text is the longest held-out document, or the first one where none is held out.
    """
    tokenizer, store, ids = corpus.tokenizer, corpus.store, corpus.held_out_ids
    doc = int(ids[np.argmax(store.lengths[ids])]) if len(ids) else 0
    keys, seed = program.config.tasks[program.config.task.name], program.config.seed
    source = np.asarray(
        draw_spans(_alone(store.tokens(doc), store.source(doc)), keys, seed, Layout()).source_tokens
    )[0]
    prompt = Prompt([tokenizer.bos_id], source=source.tolist())
    sentinels = tokenizer.reserved_ids[: keys.sentinels][::-1]
    greedy = dataclasses.replace(
        program.config.generate,
        num_samples=1,
        num_beams=1,
        length_penalty=1.0,
        temperature=0.0,
        max_tokens=min(program.config.generate.max_tokens, LONGEST),
    )
    banned = sorted(set(no_text(tokenizer)) - set(sentinels))
    write = make_generator(program.model, greedy, eos_id=tokenizer.eos_id, banned_ids=banned)

    def sample(params: Params, watch: Watch) -> list[tuple[str, str]]:
        tokens = watch(write(params, [prompt.tokens], 0, sources_of([prompt])))
        written = [new[0] for new in tokens if new[0] is not None]
        return [(_marked(tokenizer, prompt.source[:-1], sentinels), _marked(tokenizer, written, sentinels))]

    return sample


def _alone(tokens: np.ndarray, source: np.ndarray) -> Batch:
    """A batch of one document, as the store holds it."""
    arrays = empty_arrays({"batch": 1, "length": len(tokens) - 1})
    return dataclasses.replace(
        Batch(**arrays),
        tokens=tokens[None, :-1].astype(np.int32),
        targets=tokens[None, 1:].astype(np.int32),
        segments=np.ones((1, len(tokens) - 1), np.int32),
        positions=np.arange(len(tokens) - 1, dtype=np.int32)[None],
        source_tokens=source[None].astype(np.int32),
        source_segments=np.ones((1, len(source)), np.int32),
        source_positions=np.arange(len(source), dtype=np.int32)[None],
    )


def _marked(tokenizer: Tokenizer, ids: Iterable[int], sentinels: tuple[int, ...]) -> str:
    """The text of `ids`, with [1] for the first sentinel, [2] for the second, and so on."""
    text, part = "", list[int]()
    for i in ids:
        if i not in sentinels:
            part.append(i)
            continue
        text += tokenizer.decode(part, continues=bool(text)) + f"[{sentinels.index(i) + 1}]"
        part = []
    return text + tokenizer.decode(part, continues=bool(text))
