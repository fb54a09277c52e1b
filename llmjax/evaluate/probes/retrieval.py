"""Finding what was hidden in a long text: a sentence at some depth, asked for at the end.

Filler is held-out text, so it is in the language, the style and the tokens that the model knows; the sentences are
English or Chinese, as the text around them is. The likelihood of the hidden answer is compared with the likelihoods of
answers that could have been hidden: a model that cannot write yet can be seen to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmjax.data.packing.packing import hash_integers
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evaluate.probes.fillers import fillers
from llmjax.evaluate.probes.sentences import ANSWERS, Fact, fact, pass_key
from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # how much of the filler comes before what is hidden
GROUPS = 2  # per cell: a fact and a stretch of filler, with each of its answers hidden in turn
LEAST_FILLER = 16  # tokens, below which there is no depth


class Cell(NamedTuple):
    """One field of the grid, and the numbers of what is in it."""

    number: int
    language: str
    length: int
    depth: float
    place: int  # of the filler: the same for all depths


def make_passkey(text: Text, lengths: Sequence[int]) -> Probe:
    """A random key of five digits."""
    return make_retrieval("passkey", pass_key, text, lengths)


def make_needle(text: Text, lengths: Sequence[int]) -> Probe:
    """A fact of a small list."""
    return make_retrieval("needle", fact, text, lengths)


def make_retrieval(
    name: str, make_fact: Callable[[str, int], Fact], text: Text, lengths: Sequence[int]
) -> Probe:
    """A grid of depths and lengths for each language that the held-out text is in.

    What the model reads has `length` tokens in all (some fewer where answers differ in theirs). Lengths that have no
    room for the sentences are left out. In each cell there are 2 facts x 4 hidden answers, and each answer is scored
    after each of these 8 texts:

    choice  how often the hidden answer is the likeliest of the four (sum of log p of its tokens; a tie counts as its
            share). What does not look at the text chooses the same answer whichever is hidden: exactly `chance`
    exact   how often greedy decoding would give the hidden answer, token by token
    loss    nats per token of the hidden answer
    """
    by_language = fillers(text, max(lengths))
    room = {language: least_length(text.tokenizer, make_fact, language) for language in by_language}
    least = max(room.values())
    if least > max(lengths):
        raise UserError(
            f"evaluate.probes has {name!r}, whose sentences take {least} tokens with some text around them, but the "
            f"longest of evaluate.probe_lengths (unset: data.seq_len) is {max(lengths)}; give a longer one or leave "
            f"{name} out"
        )
    grids = {language: [n for n in lengths if n >= room[language]] for language in by_language}
    cells = list(all_cells(grids))
    per_cell = GROUPS * ANSWERS * ANSWERS

    def pieces() -> Iterator[Piece]:
        for cell in sorted(cells, key=lambda cell: cell.length):  # the longest need longer rows
            yield from cell_pieces(cell, make_fact, text.tokenizer, by_language[cell.language], per_cell)

    def summarize(sums: Sums) -> list[dict[str, Any]]:
        values = cell_figures(sums, len(cells))
        results, start = [], 0
        for language, of_language in grids.items():
            shape = len(DEPTHS), len(of_language)
            stop = start + shape[0] * shape[1]
            grid = {key: of_key[start:stop].reshape(shape).tolist() for key, of_key in values.items()}
            results.append(
                {"language": language, "length": of_language, "depth": list(DEPTHS), "chance": 1 / ANSWERS,
                 "examples": GROUPS * ANSWERS, **grid}
            )  # fmt: skip
            start = stop
        return results

    return Probe(pieces, len(cells) * per_cell, summarize)


def all_cells(grids: dict[str, list[int]]) -> Iterator[Cell]:
    """The cells of each language, depth by depth."""
    number = 0
    for language, lengths in grids.items():
        for depth in DEPTHS:
            for place, length in enumerate(lengths):
                yield Cell(number, language, length, depth, place)
                number += 1


def cell_pieces(
    cell: Cell, make_fact: Callable[[str, int], Fact], tokenizer: Tokenizer, filler: np.ndarray, per_cell: int
) -> Iterator[Piece]:
    """Each answer after each text of the cell, labelled (group, hidden, answer)."""
    label = cell.number * per_cell
    for group in range(GROUPS):
        question = make_fact(cell.language, cell.number * GROUPS + group)
        hidden, ask, answers = sentence_ids(tokenizer, question)
        size = cell.length - max(map(len, hidden)) - len(ask) - max(map(len, answers))
        around = cut_filler(tokenizer, filler, size, cell.depth, cell.place * GROUPS + group)
        for sentence in hidden:
            prompt = np.concatenate([[tokenizer.bos_id], around[0], sentence, around[1], ask])
            for answer in answers:
                labels = np.full(len(prompt) + len(answer) - 1, -1, np.int32)
                labels[-len(answer) :] = label
                yield Piece(np.concatenate([prompt, answer]), labels)
                label += 1


def cell_figures(sums: Sums, num_cells: int) -> dict[str, np.ndarray]:
    """`choice`, `exact` and `loss` by cell, of sums labelled (cell, group, hidden, answer)."""
    shape = num_cells, GROUPS, ANSWERS, ANSWERS
    loss, count, correct = (x.reshape(shape) for x in (sums.loss, sums.count, sums.correct))
    right = np.arange(ANSWERS), np.arange(ANSWERS)
    best = loss == loss.min(axis=3, keepdims=True)
    choice = (best / np.maximum(best.sum(axis=3, keepdims=True), 1))[:, :, *right]
    exact = (correct == count)[:, :, *right]
    of_hidden = (x[:, :, *right].sum(axis=(1, 2)) for x in (loss, count))
    return {"choice": choice.mean((1, 2)), "exact": exact.mean((1, 2)), "loss": np.divide(*of_hidden)}


def sentence_ids(
    tokenizer: Tokenizer, question: Fact
) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Ids of the hidden sentence for each answer, of the question at the end, and of each answer.

    What leads to an answer, and the answer, are encoded by themselves, so that they have the same ids in both places.
    """

    def ids(*texts: str) -> np.ndarray:
        return np.array([i for text in texts for i in encode_within(tokenizer, text)], np.int64)

    hidden = [
        ids("\n", question.lead, answer, *_parts(question.rest, answer), "\n") for answer in question.answers
    ]
    return hidden, ids(f"\n{question.question}\n", question.lead), [ids(a) for a in question.answers]


def _parts(rest: str, answer: str) -> list[str]:
    """`rest` in pieces, with the answer as a piece of its own wherever it says {}."""
    first, *more = rest.split("{}")
    return [first, *(part for text in more for part in (answer, text))]


def encode_within(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on after another: a tokenizer that begins every text with a space is not to add one."""
    return tokenizer.encode(text.removeprefix(tokenizer.text_prefix.decode()))


def least_length(tokenizer: Tokenizer, make_fact: Callable[[str, int], Fact], language: str) -> int:
    """The shortest length that has room for every sentence of a language and some filler."""
    longest = 0
    for number in range(64):
        hidden, ask, answers = sentence_ids(tokenizer, make_fact(language, number))
        longest = max(longest, max(map(len, hidden)) + len(ask) + max(map(len, answers)))
    return longest + LEAST_FILLER


def cut_filler(
    tokenizer: Tokenizer, filler: np.ndarray, size: int, depth: float, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """About `size` tokens from a random place of `filler`, round and round if need be, cut in two at `depth`.

    A cut within a character is moved to before it.
    """
    offset = int(hash_integers(np.array([number]), 1)[0] % np.uint64(len(filler)))
    around = filler[(offset + np.arange(size + 1)) % len(filler)]
    ids, which = np.unique(around, return_inverse=True)
    begins = np.array([not _continues(tokenizer.id_to_bytes(int(i))) for i in ids])[which]
    start = int(np.argmax(begins))
    middle, stop = (max([start, *np.flatnonzero(begins[: at + 1])]) for at in (round(depth * size), size))
    return around[start:middle], around[middle:stop]


def _continues(data: bytes) -> bool:
    """Whether these bytes begin within a UTF-8 character."""
    return bool(data) and data[0] & 0xC0 == 0x80
