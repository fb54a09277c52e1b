"""Cuts long texts into pieces without changing their tokens, so that memory does not grow with the length of a text.

A token that reached across a cut would contain the two characters beside the cut, one after the other. If no piece of
the vocabulary contains this pair of characters, then the tokens on one side of the cut do not depend on the text on the
other side. The tokens of the two parts, joined, are then the tokens of the whole text.

There is one exception. In a unigram model two ways to split a word can have the same score. Which one wins depends on
the rounding of float32 sums, and so on the length of the text before the word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

# Texts of up to this many characters are one piece, and longer ones are cut at the last possible place before it. A
# choice: large enough that cutting takes no time, and small enough for memory.
PIECE_CHARS = 1 << 18
# The same for unigram models. A choice: SentencePiece sums scores in float32 from the beginning of a text, and another
# beginning may round them so that the other of two nearly equal ways to split a word wins. So there are fewer cuts.
UNIGRAM_PIECE_CHARS = 1 << 21
# A text without a place to cut, such as millions of one letter, is cut after this many characters all the same, or
# after twice the length of a piece if that is more. A choice.
MOST_CHARS = 1 << 20
# How many characters on each side of a cut `may_cut` may look at.
LOOK_AHEAD = 40


def cut_text(chunks: Iterable[str], may_cut: Callable[[str, int], bool], piece_chars: int) -> Iterator[str]:
    """Cuts a text that comes in chunks into pieces. The pieces do not depend on how the text is divided into chunks.

    Args:
      chunks: the text.
      may_cut: a function (text, i) that says whether the text may be cut before its character number i.
      piece_chars: about how many characters a piece has.
    """
    # The next piece begins at the offset `start` of `held`, and up to `searched` there is no place to cut.
    held, start, searched = "", 0, 0
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
    """Where the piece that begins at `start` ends, as a number of characters of `text`.

    If this cannot be told before there is more text, returns minus the number of characters up to which the search for
    a place to cut has come.
    """
    best, most = start + piece_chars, start + max(MOST_CHARS, 2 * piece_chars)
    # `may_cut` looks at the characters after a cut, so the text must go on beyond it.
    last = len(text) - LOOK_AHEAD
    if last < best:
        return -searched
    # The last place up to `best`, or else the first place after it.
    if searched < best:
        for i in range(best, start, -1):
            if may_cut(text, i):
                return i
    for i in range(max(best, searched) + 1, min(last, most) + 1):
        if may_cut(text, i):
            return i
    return most if last >= most else -last


def neighbours(pieces: Iterable[str]) -> frozenset[str]:
    """All pairs of neighbouring characters in the pieces of a vocabulary, each as a string of two characters."""
    return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))
