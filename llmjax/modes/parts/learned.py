"""Shows which tokens of a text a run learns to write, before it trains: those of the assistant, of a translation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.program import Program
from llmjax.data.examples.conversations import format_for
from llmjax.data.tokenizer.tokenizer import StreamDecoder, Tokenizer
from llmjax.escapes import show_marked
from llmjax.parallel import hosts
from llmjax.tasks.table import conversation_keys
from llmjax.terminal.bar import above_bars
from llmjax.terminal.lines import indent, warn

# The most tokens that are shown. A choice.
SHOWN = 300
# Characters of private use around learned tokens, which `show_marked` shows in its way.
HIDDEN = ("\ue010", "\ue011")


def show_learned(program: Program, corpus: Corpus) -> None:
    """Prints the first document to train on with its learned tokens marked, if only some are. One process prints."""
    if "weights" not in corpus.train.columns or not hosts.is_primary():
        return
    text = indent(describe_learned(corpus, HIDDEN))
    with above_bars():
        show_marked(f"learned of the first document: what is {HIDDEN[0]}marked{HIDDEN[1]}\n{text}\n", HIDDEN)
    if program.task.use == "chat" and not _learns_to_end(program, corpus):
        warn(
            "note: the chat template writes no token that ends an answer, so that answers only end after "
            "generate.max_tokens; set the format of conversations to chatml or plain to learn one"
        )


def _learns_to_end(program: Program, corpus: Corpus) -> bool:
    """Whether the first document, a conversation, has the end of an answer among its learned tokens."""
    keys = conversation_keys(program.config.task.name, program.config.tasks)
    end, store, document = format_for(keys.format, corpus.tokenizer).end, corpus.store, _first(corpus)
    return bool(np.any((store.tokens(document) == end) & (store.weights(document) > 0)))


def _first(corpus: Corpus) -> int:
    """The number of the first document to train on."""
    return int(corpus.train.plan.docs.min())


def describe_learned(corpus: Corpus, marks: tuple[str, str]) -> str:
    """The first document to train on, or the part of it around what is learned first, with the marks around every run
    of learned tokens."""
    store, tokenizer, document = corpus.store, corpus.tokenizer, _first(corpus)
    all_learned = store.weights(document) > 0
    begin = max(0, int(np.argmax(all_learned)) - SHOWN // 2)
    count = min(len(all_learned) - begin, SHOWN)
    ids, learned = store.tokens(document, begin, begin + count).tolist(), all_learned[begin : begin + count]
    runs = np.flatnonzero(np.diff(learned, prepend=False, append=False))
    # A learned run begins at every even entry and ends before the next one.
    begins, ends = set(runs[::2].tolist()), set(runs[1::2].tolist())
    parts = ["..." if begin else ""]
    for i, text in enumerate(_texts(tokenizer, ids)):
        parts += [marks[1] if i in ends else "", marks[0] if i in begins else "", text]
    return (
        "".join(parts)
        + (marks[1] if count in ends else "")
        + ("..." if begin + count < len(all_learned) else "")
    )


def _texts(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """The text of each id, with the names of special ones; a character stands with the last of its bytes."""
    name, decoder = getattr(tokenizer, "piece", None), StreamDecoder(tokenizer)
    for i in ids:
        if tokenizer.id_to_bytes(i):
            yield decoder.push(i)
        else:
            yield (name(i) if name else "") or f"<{i}>"
