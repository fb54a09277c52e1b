"""Held-out text in one language, for probes that hide something in a text or draw tokens from it."""

from __future__ import annotations

import numpy as np

from llmjax.evaluate.scoring import Text

# The number of documents that are read, spread evenly over the held-out ones. A choice.
DOCUMENTS = 256
# The number of tokens at the beginning of a document that decide its language. A choice.
PREFIX = 512
# A language counts only if it has at least this share of the tokens. A choice.
LEAST = 1 / 16


def fillers(text: Text, length: int) -> dict[str, np.ndarray]:
    """ "en" and "zh" -> tokens of documents, joined without bos and eos, at most 4 x `length` tokens of each
    document.

    "zh" is text in Chinese characters, "en" is all other text. A language with only a small part of the text is left
    out.
    """
    chosen = text.ids[np.linspace(0, len(text.ids) - 1, min(len(text.ids), DOCUMENTS)).astype(int)]
    found: dict[str, list[np.ndarray]] = {}
    for doc in np.unique(chosen).tolist():
        # Tokens 1 to stop - 1 of a document: without bos and eos.
        stop = int(text.sequences.store.lengths[doc]) - 1
        tokens = np.asarray(text.tokens(doc, 1, max(1, min(stop, 1 + max(4 * length, PREFIX)))), np.int64)
        if len(tokens):
            language = language_of(text.tokenizer.decode(tokens[:PREFIX].tolist()))
            found.setdefault(language, []).append(tokens)
    joined = {language: np.concatenate(found[language]) for language in sorted(found)}
    total = sum(map(len, joined.values()))
    return {language: tokens for language, tokens in joined.items() if len(tokens) >= LEAST * total}


def language_of(text: str) -> str:
    """ "zh" if the Chinese characters are more than half as many as all other letters, because one stands for more;
    else "en"."""
    han = sum("\u3400" <= c <= "\u9fff" or c >= "\U00020000" for c in text)
    letters = sum(map(str.isalpha, text)) - han
    return "zh" if 2 * han > letters else "en"
