"""The sample of passages that a tokenizer is trained on."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llmjax.errors import UserError

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
_BOUNDARY = "\t"  # SentencePiece never learns a piece across a tab
_PASSAGE_CHARS = 4096  # its trainer counts positions within a word in 16 bits


def check_unicode(text: str) -> None:
    """Raises `UserError` where the text holds a lone surrogate, which UTF-8 cannot express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text to encode holds a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no UTF-8 can express: remove or replace it."
        ) from None


def sample_passages(texts: Iterable[str | Iterable[str]], train_bytes: float) -> list[str]:
    """The passages with the smallest hashes, about `train_bytes` in all, sorted by hash.

    A text may come as an iterable of its chunks.
    """
    heap: list[tuple[int, str, int]] = []  # (-hash, passage, bytes): the root is the first to go
    total = 0
    for text in texts:
        for passage in cut_passages([text] if isinstance(text, str) else text):
            check_unicode(passage)
            data = passage.encode()
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            if total >= train_bytes and -key < heap[0][0]:
                continue
            heapq.heappush(heap, (-key, passage, len(data)))
            total += len(data)
            while total - heap[0][2] >= train_bytes:
                total -= heapq.heappop(heap)[2]
    return [passage for _, passage, _ in sorted(heap, reverse=True)]


def cut_passages(chunks: Iterable[str]) -> Iterator[str]:
    """The text in pieces of at most `_PASSAGE_CHARS`, cut after a line end or before a space if any."""
    held = ""
    for chunk in chunks:
        held, start = held + chunk, 0
        while len(held) - start > _PASSAGE_CHARS:
            stop = start + _PASSAGE_CHARS
            newline = held.rfind("\n", start, stop) + 1
            stop = newline or max(held.rfind(" ", start, stop), 0) or stop
            stop = stop if stop > start else start + _PASSAGE_CHARS
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def trainable(passages: Sequence[str], coverage: float, max_characters: int) -> list[str]:
    """Passages with a boundary in place of every character that gets no piece of its own or would be misread.

    The characters kept are the most frequent that cover `coverage` of the text, at most `max_characters`.
    SentencePiece's own coverage may not go below 0.98, and it drops whole sentences over U+2585.
    """
    counts = np.zeros(0x110000, dtype=np.int64)
    for start in range(0, len(passages), 256):
        codes = np.frombuffer("".join(passages[start : start + 256]).encode("utf-32-le"), dtype=np.uint32)
        counts += np.bincount(codes, minlength=len(counts))
    present = np.flatnonzero(counts)
    unlearnable = [ord(c) for c in (_BOUNDARY, SPACE_MARK, "\u2585")]
    counts[unlearnable] = 0
    by_frequency = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[by_frequency])
    needed = int(np.searchsorted(covered, coverage * covered[-1])) + 1
    kept = by_frequency[: min(needed, max_characters)]
    dropped = dict.fromkeys(np.setdiff1d(present, kept).tolist() + unlearnable, _BOUNDARY)
    return [passage.translate(dropped) for passage in passages]
