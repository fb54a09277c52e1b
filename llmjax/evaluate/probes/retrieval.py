"""Retrieval: a sentence is hidden at some depth of a long text, and the model is asked for it at the end.

The filler is held-out text, whose language, style and tokens the model knows. The hidden sentences are English or
Chinese, like the filler. The likelihood of the hidden answer is compared with other possible answers, so that
retrieval shows even in a model that does not write fluently yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmjax.data.packing.order import hash_integers
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evaluate.probes.fillers import fillers
from llmjax.evaluate.probes.sentences import ANSWERS, Fact, fact, pass_key
from llmjax.evaluate.scoring import Piece, Probe, Sums, Text

# The share of the filler that comes before the hidden sentence.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The number of groups per cell of the grid. A group is a fact and a stretch of filler; each of its answers is hidden
# once.
GROUPS = 2
# Below this many tokens of filler, depth has no meaning. A choice.
LEAST_FILLER = 16


class Cell(NamedTuple):
    """One cell of the grid of depths and lengths.

    number  the index of the cell among all cells
    place   selects the stretch of filler; all depths of a length share it
    """

    number: int
    language: str
    length: int
    depth: float
    place: int


def make_passkey(text: Text, lengths: Sequence[int]) -> Probe:
    """The hidden sentence contains a random key of five digits."""
    return make_retrieval("passkey", pass_key, text, lengths)


def make_needle(text: Text, lengths: Sequence[int]) -> Probe:
    """The hidden sentence is a fact from a short list."""
    return make_retrieval("needle", fact, text, lengths)


def make_retrieval(
    name: str, make_fact: Callable[[str, int], Fact], text: Text, lengths: Sequence[int]
) -> Probe:
    """A grid of depths and lengths for each language of the held-out text.

    A text has `length` tokens in all (slightly fewer where the answers differ in length). Lengths that are too short
    for the sentences are left out. Each cell has 2 facts with 4 possible answers, each hidden once, which makes 8
    texts. After each text, all 4 answers are scored:

    choice  how often the hidden answer is the most likely of the four, by the sum of the log probabilities of its
            tokens; a tie counts as its share. A model that ignores the text always chooses the same answer and scores
            exactly `chance`
    exact   how often greedy decoding would produce the hidden answer, token by token
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
        # Sorted by length, because `pack` starts a new batch when longer texts need longer rows.
        for cell in sorted(cells, key=lambda cell: cell.length):
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
    """Every answer after every text of the cell. Labels count (group, hidden answer, scored answer)."""
    label = cell.number * per_cell
    for group in range(GROUPS):
        question = make_fact(cell.language, cell.number * GROUPS + group)
        hidden, ask, answers = sentence_ids(tokenizer, question)
        # The longest sentence and answer of the group decide the filler, so that all its texts have the same filler.
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
    """`choice`, `exact` and `loss` of each cell, from sums with labels (cell, group, hidden answer, scored answer)."""
    shape = num_cells, GROUPS, ANSWERS, ANSWERS
    # Labels were counted in this order, so that a reshape separates them.
    loss, count, correct = (x.reshape(shape) for x in (sums.loss, sums.count, sums.correct))
    # The diagonal: the scored answer is the hidden one.
    right = np.arange(ANSWERS), np.arange(ANSWERS)
    # The lowest summed loss is the highest probability of the whole answer.
    best = loss == loss.min(axis=3, keepdims=True)
    choice = (best / np.maximum(best.sum(axis=3, keepdims=True), 1))[:, :, *right]
    exact = (correct == count)[:, :, *right]
    of_hidden = (x[:, :, *right].sum(axis=(1, 2)) for x in (loss, count))
    return {"choice": choice.mean((1, 2)), "exact": exact.mean((1, 2)), "loss": np.divide(*of_hidden)}


def sentence_ids(
    tokenizer: Tokenizer, question: Fact
) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """The token ids of the hidden sentence for each answer, of the question at the end, and of each answer.

    The answer and the text before it are encoded separately, so that they have the same ids in both places.
    """

    def ids(*texts: str) -> np.ndarray:
        return np.array([i for text in texts for i in encode_within(tokenizer, text)], np.int64)

    hidden = [
        ids("\n", question.lead, answer, *_parts(question.rest, answer), "\n") for answer in question.answers
    ]
    return hidden, ids(f"\n{question.question}\n", question.lead), [ids(a) for a in question.answers]


def _parts(rest: str, answer: str) -> list[str]:
    """`rest` cut at each {}, with the answer in these places."""
    first, *more = rest.split("{}")
    return [first, *(part for text in more for part in (answer, text))]


def encode_within(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text in the middle of another one: without the space that some tokenizers put before every text."""
    return tokenizer.encode(text.removeprefix(tokenizer.text_prefix.decode()))


def least_length(tokenizer: Tokenizer, make_fact: Callable[[str, int], Fact], language: str) -> int:
    """The shortest length that has room for every sentence of a language, and some filler."""
    longest = 0
    # 64 covers all facts of the list, and enough random keys to see the longest one. A choice.
    for number in range(64):
        hidden, ask, answers = sentence_ids(tokenizer, make_fact(language, number))
        longest = max(longest, max(map(len, hidden)) + len(ask) + max(map(len, answers)))
    return longest + LEAST_FILLER


def cut_filler(
    tokenizer: Tokenizer, filler: np.ndarray, size: int, depth: float, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """About `size` tokens of `filler` from a random place, repeated if necessary, cut in two at `depth`.

    A cut inside of a character moves to the beginning of this character.
    """
    # The hash makes the place random but the same in every run.
    offset = int(hash_integers(np.array([number]), 1)[0] % np.uint64(len(filler)))
    around = filler[(offset + np.arange(size + 1)) % len(filler)]
    ids, which = np.unique(around, return_inverse=True)
    begins = np.array([not _continues(tokenizer.id_to_bytes(int(i))) for i in ids])[which]
    start = int(np.argmax(begins))
    middle, stop = (max([start, *np.flatnonzero(begins[: at + 1])]) for at in (round(depth * size), size))
    return around[start:middle], around[middle:stop]


def _continues(data: bytes) -> bool:
    """Whether these bytes begin in the middle of a UTF-8 character."""
    return bool(data) and data[0] & 0xC0 == 0x80
