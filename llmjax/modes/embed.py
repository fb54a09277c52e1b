"""`--mode=embed`: the vectors of texts, the vectors of the tokens as a file, and what is near a word or a text."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data.examples.contract import Prompting
from llmjax.data.tokenizer.formats.token_names import token_names
from llmjax.errors import UserError
from llmjax.escapes import escape_breaks, show
from llmjax.evaluate.scoring import Arrays
from llmjax.evaluate.text_vectors import make_pooled, nearest, text_vectors
from llmjax.files import write_atomically
from llmjax.models.contract import token_table
from llmjax.models.table import FAMILIES
from llmjax.modes.generate import Loaded, load
from llmjax.modes.parts.interactive import piped_lines
from llmjax.modes.request import Request
from llmjax.parallel import hosts
from llmjax.terminal.lines import say, warn
from llmjax.terminal.stages import on_terminal

# Lines of a pipe that are read together. A choice: many short texts share a row.
GROUP = 256
# A text and the cosine between its vector and that of another.
Near = tuple[str, float]


def run(request: Request) -> int:
    """Writes the table of the tokens, shows neighbours, or else the vectors of the prompts or of the lines of standard
    input, and returns exit code 0."""
    loaded = load(request, on_terminal)
    embedder = TextEmbedder(loaded)
    if request.table is not None:
        # Every process has a part of the table, and one of them writes it.
        table_VD = embedder.table()
        if hosts.is_primary():
            write_atomically(request.table, describe_table(token_names(loaded.tokenizer), table_VD))
            say(f"{request.table} holds the vectors of {loaded.tokenizer.vocab_size:,} tokens")
    if request.neighbours:
        _show_neighbours(request, embedder)
    elif request.prompts or request.table is None:
        for texts in _groups(request):
            for text, vector_D in zip(texts, embedder.embed(texts), strict=True):
                _tell(describe_vector(text, vector_D, request.jsonl))
    return 0


def _show_neighbours(request: Request, embedder: TextEmbedder) -> None:
    found = embedder.nearest(request.neighbours, request.prompts or None)
    for text, near in zip(request.neighbours, found, strict=True):
        _tell(describe_neighbours(text, near, request.jsonl))


def _groups(request: Request) -> Iterable[Sequence[str]]:
    if request.prompts:
        return [request.prompts]
    if jax.process_count() > 1:
        raise UserError("several processes cannot share the lines of standard input; use --prompt_file")
    # A line that is typed is answered at once.
    return _cut(piped_lines(), 1 if sys.stdin.isatty() else GROUP)


def _cut(lines: Iterator[str], size: int) -> Iterator[list[str]]:
    while group := list(itertools.islice(lines, size)):
        yield group


def _tell(text: str) -> None:
    if hosts.is_primary():
        show(text)


def describe_vector(text: str, vector_D: np.ndarray, as_json: bool) -> str:
    """A line with a text and its vector: as JSON, or in the text format of word2vec, in which numbers follow the text.

    A text may have spaces, so that such a line is read from its end: its last D fields are the numbers.
    """
    if as_json:
        return json.dumps({"text": text, "vector": _rounded(vector_D)}, ensure_ascii=False)
    return f"{escape_breaks(text)} {_numbers(vector_D)}"


def describe_neighbours(text: str, near: Sequence[Near], as_json: bool) -> str:
    """A line for each neighbour with the text, the cosine and the neighbour, between tabs; one line of JSON for all."""
    if as_json:
        found = [{"text": other, "cosine": round(cosine, 6)} for other, cosine in near]
        return json.dumps({"text": text, "neighbours": found}, ensure_ascii=False)
    word = escape_breaks(text, tabs=True)
    return "\n".join(f"{word}\t{cosine:.4f}\t{escape_breaks(other, tabs=True)}" for other, cosine in near)


def describe_table(names: Sequence[str], table_VD: np.ndarray) -> str:
    """The text format of word2vec (Mikolov et al. 2013): a line `V D`, then a line for each token."""
    V, D = table_VD.shape
    lines = (f"{name} {_numbers(vector_D)}" for name, vector_D in zip(names, table_VD, strict=True))
    return "\n".join([f"{V} {D}", *lines, ""])


def _rounded(vector_D: np.ndarray) -> list[float]:
    # Nine digits tell all float32 apart.
    return [float(f"{x:.9g}") for x in vector_D.tolist()]


def _numbers(vector_D: np.ndarray) -> str:
    return " ".join(f"{x:.9g}" for x in vector_D.tolist())


class TextEmbedder:
    """Gives texts and tokens their vectors, with a loaded checkpoint of any family."""

    def __init__(self, loaded: Loaded):
        self._loaded = loaded
        program = loaded.program
        self._settings = program.config.embed
        self._encodes_source = FAMILIES[program.config.model.family].reads_source
        sees = FAMILIES[program.config.model.family].sees_both_sides or self._encodes_source
        pooled = make_pooled(program.model, self._settings, sees)
        # The results are complete on every process.
        self._pooled = jax.jit(pooled, out_shardings=program.layout.sharding(None, None, None))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, D]. A text that is longer than the model was trained on is cut at its end, which is said."""
        program = self._loaded.program
        (rows, _), length = program.probe_shape(1), self._length
        encoded = [self._ids(text) for text in texts]
        long = [len(ids) for ids in encoded if len(ids) > length]
        if long:
            self._remark(len(long), max(long), length)
        if not texts:
            return np.zeros((0, program.config.model.model_dim), np.float32)
        return text_vectors(self._run, [self._cut(ids, length) for ids in encoded], (rows, length))

    def size_of(self, text: str) -> tuple[int, int]:
        """The tokens of a text as the model reads it, and the most that are read of one."""
        return len(self._ids(text)), self._length

    def _run(self, arrays: Arrays) -> jax.Array:
        vectors: jax.Array = self._pooled(self._loaded.params, self._loaded.program.placement.place(arrays))
        return vectors

    @property
    def _length(self) -> int:
        """The most tokens of a text that are read."""
        derived = self._loaded.program.derived
        return derived.source_len or self._loaded.program.probe_shape(1)[1]

    @property
    def _ends(self) -> bool:
        """Whether the last token of a text is the one that ends it."""
        return self._settings.read_end or self._encodes_source

    def _ids(self, text: str) -> list[int]:
        """What the model reads of a text: a source as in translation, or a document as in training."""
        tokenizer, examples = self._loaded.tokenizer, self._loaded.program.derived.examples
        if self._encodes_source:
            # Every task with a second stream says what is read of it.
            assert isinstance(examples, Prompting)
            return list(examples.encode_prompt(text, tokenizer).source)
        return [tokenizer.bos_id, *tokenizer.encode(text), *([tokenizer.eos_id] if self._ends else [])]

    def _cut(self, ids: list[int], length: int) -> list[int]:
        if len(ids) <= length:
            return ids
        return [*ids[: length - 1], ids[-1]] if self._ends else ids[:length]

    def _remark(self, count: int, longest: int, length: int) -> None:
        """Says, once, that texts are cut."""
        if "cut" in self._loaded.told:
            return
        self._loaded.told.add("cut")
        warn(
            f"note: {count:,} text{'s'[: count != 1]} of up to {longest:,} tokens {'is' if count == 1 else 'are'} cut "
            f"at the end to the {length:,} tokens that a row holds"
        )

    def table(self) -> np.ndarray:
        """float32 [V, D], the embedding of each token."""
        layout = self._loaded.program.layout
        whole = jax.jit(lambda table: table.astype(jnp.float32), out_shardings=layout.sharding(None, None))
        return np.asarray(whole(token_table(self._loaded.params)))

    def nearest(self, texts: Sequence[str], others: Sequence[str] | None) -> list[list[Near]]:
        """For each of `texts`, those of `others` whose vectors are nearest to its own; for None the nearest tokens."""
        if others is None:
            table_VD, names = self.table(), token_names(self._loaded.tokenizer)
            return [self._nearest_tokens(word, table_VD, names) for word in texts]
        vectors, count = self.embed([*texts, *others]), self._settings.neighbours
        found = [nearest(vector_D, vectors[len(texts) :], count) for vector_D in vectors[: len(texts)]]
        return [[(others[i], cosine) for i, cosine in near] for near in found]

    def _nearest_tokens(self, word: str, table_VD: np.ndarray, names: Sequence[str]) -> list[Near]:
        """The tokens whose embeddings are nearest to that of `word`, which are not tokens of the word itself.

        The embedding of a word of several tokens is their mean. A word may be another token after a space than at the
        beginning of a text; the way to write it with fewer tokens counts. UserError for a word without a token.
        """
        tokenizer = self._loaded.tokenizer
        own = min(tokenizer.encode(f" {word}", continues=True), tokenizer.encode(word), key=len)
        silent = {i for i in range(tokenizer.vocab_size) if not tokenizer.id_to_bytes(i)}
        if not word.strip() or not set(own) - silent:
            raise UserError(f"the word {word!r} has no token in this vocabulary; give another word")
        vector_D = table_VD[own].mean(axis=0)
        others = np.array([i for i in range(tokenizer.vocab_size) if i not in silent.union(own)])
        near = nearest(vector_D, table_VD[others], self._settings.neighbours)
        return [(names[others[i]], cosine) for i, cosine in near]
