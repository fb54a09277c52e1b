"""Held-out text in one language, which probes hide something in or take tokens from."""

from __future__ import annotations

import numpy as np

from llmjax.evaluate.scoring import Text

DOCUMENTS = 256  # looked at, spread evenly over the held-out ones
PREFIX = 512  # tokens of a document by which its language is told
LEAST = 1 / 16  # of the tokens, for a language to count as one of the text


def fillers(text: Text, length: int) -> dict[str, np.ndarray]:
    """ "en" and "zh" -> tokens of documents joined without bos and eos, of each at most 4 x `length`.

    "zh" is what is written in Chinese characters, "en" all else. A language that has a small part of the text only
    is left out.
    """
    chosen = text.ids[np.linspace(0, len(text.ids) - 1, min(len(text.ids), DOCUMENTS)).astype(int)]
    found: dict[str, list[np.ndarray]] = {}
    for doc in np.unique(chosen).tolist():
        stop = int(text.sequences.store.lengths[doc]) - 1
        tokens = np.asarray(text.tokens(doc, 1, max(1, min(stop, 1 + max(4 * length, PREFIX)))), np.int64)
        if len(tokens):
            language = language_of(text.tokenizer.decode(tokens[:PREFIX].tolist()))
            found.setdefault(language, []).append(tokens)
    joined = {language: np.concatenate(found[language]) for language in sorted(found)}
    total = sum(map(len, joined.values()))
    return {language: tokens for language, tokens in joined.items() if len(tokens) >= LEAST * total}


def language_of(text: str) -> str:
    """ "zh" where Chinese characters are more than half as many as other letters, for they say more; else "en"."""
    han = sum("\u3400" <= c <= "\u9fff" or c >= "\U00020000" for c in text)
    letters = sum(map(str.isalpha, text)) - han
    return "zh" if 2 * han > letters else "en"
