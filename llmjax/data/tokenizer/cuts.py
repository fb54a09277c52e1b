"""Long texts in pieces, cut where the tokenizer cannot notice, so that memory does not grow with the text.

A BPE merge or a unigram piece that lies across a cut would have to hold the two characters beside the cut, one after
the other. Where no piece of the vocabulary does, the tokens on one side do not depend on the other side, and those of
the two parts, joined, are the tokens of the whole. (Of a unigram model two orders of the same pieces can have the same
score; which of them wins depends on how sums of float32 are rounded, and so on how long the text before them is.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

# Texts up to this length are one piece, and longer ones are cut at the last place before it.
PIECE_CHARS = 1 << 18
# The same for unigram models. SentencePiece sums their scores in float32 from the beginning of a text. In a long one
# sums are rounded, and of two nearly equal ways to split a word the other may win: texts are not cut without need.
UNIGRAM_PIECE_CHARS = 1 << 21
# Where a text has no place to cut, such as millions of one letter, it is cut after so many characters all the same.
MOST_CHARS = 1 << 20  # or twice the length of a piece
# Characters after a cut that `may_cut` looks at.
LOOK_AHEAD = 40


def cut_text(chunks: Iterable[str], may_cut: Callable[[str, int], bool], piece_chars: int) -> Iterator[str]:
    """The text of the chunks in pieces that depend on the text alone, however it comes in chunks.

    `may_cut(text, i)` says whether `text` may be cut before its character number `i`. `piece_chars` is
    about how long pieces are.
    """
    held, start, searched = "", 0, 0  # the piece begins at `start`, and up to `searched` there is no cut
    for chunk in chunks:
        held, start, searched = held[start:] + chunk, 0, searched - start
        while (cut := _find_cut(held, start, searched, may_cut, piece_chars)) > 0:
            yield held[start:cut]
            start = searched = cut
        searched = -cut
    if held[start:]:
        yield held[start:]


def _find_cut(
    text: str, start: int, searched: int, may_cut: Callable[[str, int], bool], piece_chars: int
) -> int:
    """Where the piece that begins at `start` ends; if that cannot be said yet, minus how far there is no cut."""
    best, most = start + piece_chars, start + max(MOST_CHARS, 2 * piece_chars)
    # What follows a cut decides whether it is one, so that a few characters after it must be there.
    last = len(text) - LOOK_AHEAD
    if last < best:
        return -searched
    if searched < best:
        for i in range(best, start, -1):
            if may_cut(text, i):
                return i
    for i in range(max(best, searched) + 1, min(last, most) + 1):
        if may_cut(text, i):
            return i
    return most if last >= most else -last


def neighbours(pieces: Iterable[str]) -> frozenset[str]:
    """All pairs of characters that stand beside each other within a piece of a vocabulary."""
    return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))
