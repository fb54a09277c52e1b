"""Chooses the passages of a corpus that a tokenizer is trained on, and prepares them for SentencePiece."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from llmjax.errors import UserError

# What SentencePiece writes for a space.
SPACE_MARK = "\u2581"
# What SentencePiece writes between pieces while it trains. It leaves out whole sentences with this character.
_PIECE_MARK = "\u2585"
# SentencePiece never learns a piece with a tab in it.
_BOUNDARY = "\t"
# The most characters of a passage. The trainer counts positions within a word in 16 bits, and a passage without spaces
# is one word. A choice below that limit.
_PASSAGE_CHARS = 4096
# The passages whose characters are counted at once. A choice that bounds the memory.
_COUNTED_PASSAGES = 256
# Unicode has code points below this number.
_NUM_CODE_POINTS = 0x110000


def check_unicode(text: str) -> None:
    """Raises `UserError` if the text has a lone surrogate, which cannot be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text to encode holds a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no UTF-8 can express: remove or replace it."
        ) from None


def sample_passages(texts: Iterable[str | Iterable[str]], train_bytes: float) -> list[str]:
    """Chooses passages of about `train_bytes` bytes in all, each as likely as any other.

    The passages with the smallest hashes are taken and sorted by hash, so the sample does not depend on the order of
    the texts. A text may come as an iterable of its chunks. Memory holds the sample only. Raises `UserError` for a lone
    surrogate.
    """
    # (-hash, passage, bytes). The root of the heap is the passage with the largest hash, which is dropped first.
    heap: list[tuple[int, str, int]] = []
    total = 0
    for text in texts:
        for passage in cut_passages([text] if isinstance(text, str) else text):
            check_unicode(passage)
            data = passage.encode()
            key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
            # The sample is full, and this hash is larger than all in it.
            if total >= train_bytes and -key < heap[0][0]:
                continue
            heapq.heappush(heap, (-key, passage, len(data)))
            total += len(data)
            while total - heap[0][2] >= train_bytes:
                total -= heapq.heappop(heap)[2]
    return [passage for _, passage, _ in sorted(heap, reverse=True)]


def cut_passages(chunks: Iterable[str]) -> Iterator[str]:
    """Cuts a text into passages of at most `_PASSAGE_CHARS` characters.

    A cut lies after a line end if there is one, otherwise before a space, and otherwise anywhere.
    """
    held = ""
    for chunk in chunks:
        held, start = held + chunk, 0
        while len(held) - start > _PASSAGE_CHARS:
            stop = start + _PASSAGE_CHARS
            newline = held.rfind("\n", start, stop) + 1
            stop = newline or max(held.rfind(" ", start, stop), 0) or stop
            # A space at the beginning of the passage would make an empty one.
            stop = stop if stop > start else start + _PASSAGE_CHARS
            yield held[start:stop]
            start = stop
        held = held[start:]
    if held:
        yield held


def trainable(passages: Sequence[str], coverage: float, max_characters: int) -> list[str]:
    """Replaces characters that are to have no piece of their own by tabs, which SentencePiece learns nothing across.

    Characters keep their place if they are among the most frequent ones, which cover the share `coverage` of the text
    and are at most `max_characters`. The characters that SentencePiece itself uses as marks are replaced too.
    SentencePiece could choose characters by coverage itself, but it refuses a coverage below 0.98.
    """
    counts = np.zeros(_NUM_CODE_POINTS, dtype=np.int64)
    for start in range(0, len(passages), _COUNTED_PASSAGES):
        text = "".join(passages[start : start + _COUNTED_PASSAGES])
        counts += np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), minlength=len(counts))
    present = np.flatnonzero(counts)
    unlearnable = [ord(c) for c in (_BOUNDARY, SPACE_MARK, _PIECE_MARK)]
    counts[unlearnable] = 0
    by_frequency = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[by_frequency])
    needed = int(np.searchsorted(covered, coverage * covered[-1])) + 1
    kept = by_frequency[: min(needed, max_characters)]
    dropped = dict.fromkeys(np.setdiff1d(present, kept).tolist() + unlearnable, _BOUNDARY)
    return [passage.translate(dropped) for passage in passages]
