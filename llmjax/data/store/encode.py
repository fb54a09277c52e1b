"""Encodes records into examples of tokens, in worker processes, and returns the results in order.

The workers are plain child processes that exchange pickled objects over pipes and do not import jax. They are not made
by `multiprocessing`. Its fork is unsafe once jax has started threads. Its spawn imports the `__main__` module of the
caller again, jax included, in every worker, and does not work from a notebook or from standard input.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from llmjax.data.examples.contract import Example, Examples, HeldOutBy, InParts, Several
from llmjax.data.store.columns import LABEL, RUN, token_dtype
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError

# Any object that accompanies a batch of records.
Tag = TypeVar("Tag")
# The fields of a record, by name; see `data/sources`.
Fields = Mapping[str, "str | int"]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The columns of some encoded documents.

    ragged  for each ragged column (values, lengths): the values of all documents, one document after the other, and
            int64 [documents], the number of values of each document
    fixed   for each fixed column one value for each document: `num_bytes`, the UTF-8 bytes of the text, which count for
            the first of several documents of a record; `hashes`, the hash of the record, which decides the held-out
            split; and `label`, if the task has labels
    counts  int64 [records], how many documents were made of each record: 1 but for a task of `Several`
    """

    ragged: dict[str, tuple[np.ndarray, np.ndarray]]
    fixed: dict[str, np.ndarray]
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a long document, sent alone. `first` and `last` say whether the document begins and ends with it."""

    fields: Fields
    first: bool
    last: bool


Batch = Sequence[Fields] | Piece


def encode_records(tokenizer: Tokenizer, examples: Examples, batch: Batch) -> Encoded:
    """Encodes some records, or a part of one, in this process.

    Raises ValueError if an example does not match the columns of its task.
    """
    if isinstance(batch, Piece):
        # No other document is cut.
        assert isinstance(examples, InParts)
        records: Sequence[Fields] = [batch.fields]
        of_each = [[examples.encode_part(batch.fields, tokenizer, batch.first, batch.last)]]
    elif isinstance(examples, Several):
        records, of_each = batch, [examples.encode_several(record, tokenizer) for record in batch]
    else:
        records, of_each = batch, [[examples.encode(record, tokenizer)] for record in batch]
    made = [example for several in of_each for example in several]
    counts = np.array([len(several) for several in of_each], "<i8")
    _check(made, examples)
    dtype = token_dtype(tokenizer.vocab_size)
    ragged = {"tokens": _concatenate([example.tokens for example in made], dtype)}
    if "source" in examples.columns:
        ragged["source"] = _concatenate([example.source for example in made], dtype)
    if "weights" in examples.columns:
        ragged["weights"] = _concatenate([example.weights for example in made], RUN)
    if "turns" in examples.columns:
        ragged["turns"] = _concatenate([example.turns for example in made], np.dtype("<u4"))
    # The first field is the text of the document.
    text = examples.fields[0]
    if isinstance(examples, HeldOutBy):
        decisive = [examples.decisive(record) for record in records]
    else:
        # A single field has no separator, so that its hash is the hash of the text.
        decisive = ["\0".join(str(record[name]) for name in examples.fields) for record in records]
    num_bytes, firsts = np.zeros(len(made), "<i8"), np.cumsum(counts) - counts
    num_bytes[firsts] = [len(str(record[text]).encode()) for record in records]
    hashes = np.array([_hash(one) for one in decisive], "<u8")
    fixed = {"num_bytes": num_bytes, "hashes": np.repeat(hashes, counts)}
    if "label" in examples.columns:
        fixed["label"] = np.array([example.label for example in made], LABEL)
    return Encoded(ragged, fixed, counts)


def _check(made: Sequence[Example], examples: Examples) -> None:
    """Raises ValueError if an example fills an undeclared column, or if its loss weights do not cover its tokens."""
    for example in made:
        if any(
            getattr(example, name) and name not in examples.columns for name in ("weights", "source", "turns")
        ):
            raise ValueError(f"{examples!r} fills a column that its `columns` do not name.")
        if "weights" in examples.columns and sum(n for n, _ in example.weights) != len(example.tokens):
            raise ValueError(f"{examples!r} gives weights that do not cover the tokens.")


def _concatenate(values: Sequence[Sequence], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates the sequences of all documents. Also returns their lengths, int64 [documents]."""
    arrays = [np.array(list(one), dtype) for one in values]
    lengths = np.array([len(array) for array in arrays], "<i8")
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype), lengths


def _hash(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def encode_batches(
    tokenizer: Tokenizer,
    examples: Examples,
    batches: Iterable[tuple[Tag, Batch]],
    num_workers: int,
) -> Iterator[tuple[Tag, Encoded]]:
    """Encodes batches of records and yields (tag, Encoded) for each batch, in the order of the batches.

    With `num_workers` below 2 the records are encoded in this process. Raises UserError if a worker process ends early.
    """
    if num_workers < 2:
        for tag, records in batches:
            yield tag, encode_records(tokenizer, examples, records)
        return
    pending: collections.deque = collections.deque()
    with _workers(tokenizer, examples, num_workers) as submit:
        for tag, records in batches:
            pending.append((tag, submit(records)))
            # Two batches for each worker keep all of them busy, and an endless stream takes bounded memory.
            if len(pending) > 2 * num_workers:
                tag, result = pending.popleft()
                yield tag, result.result()
        while pending:
            tag, result = pending.popleft()
            yield tag, result.result()


@contextlib.contextmanager
def _workers(tokenizer: Tokenizer, examples: Examples, count: int):
    """Starts `count` worker processes, and ends them when the `with` block is left.

    Gives a function that takes records and returns a future of `Encoded`.
    """
    # The workers import the package from where this process found it. -P leaves the current folder out of their path.
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", "from llmjax.data.store.encode import run_worker; run_worker()"]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        for _ in range(count)
    ]
    # One thread for each process waits for its answer. The queue gives every thread a process that is free.
    idle: queue.SimpleQueue = queue.SimpleQueue()

    def encode(records: Batch) -> Encoded:
        process = idle.get()
        try:
            return _ask(process, records)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(count)
    try:
        for process in processes:
            pickle.dump((tokenizer, examples), _pipes(process)[0])
            idle.put(process)
        yield lambda records: threads.submit(encode, records)
    finally:
        for process in processes:
            # Workers have nothing to save. Their end also wakes the threads that wait for an answer.
            process.terminate()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.wait()
            stdin, stdout = _pipes(process)
            stdout.close()
            with contextlib.suppress(BrokenPipeError):
                stdin.close()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """The standard input and the standard output of a worker process."""
    # Workers are started with pipes for both; the type checker cannot know that.
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _ask(process: subprocess.Popen, records: Batch) -> Encoded:
    """Sends records to a worker and waits for its answer. Raises the error that the worker raised.

    Raises UserError if the worker process has ended.
    """
    stdin, stdout = _pipes(process)
    try:
        pickle.dump(records, stdin, protocol=5)
        stdin.flush()
        answer = pickle.load(stdout)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        process.kill()
        raise UserError(
            f"data.num_workers: a process that tokenizes ended with code {process.wait()}, perhaps for want of memory; "
            "lower data.num_workers"
        ) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def run_worker() -> None:
    """Runs a worker process until its standard input is closed.

    The worker reads a pickled (tokenizer, examples) and then batches of records. For each batch it writes a pickled
    `Encoded` or exception to standard output.
    """
    # Ctrl-C reaches all processes of a terminal. Only the parent handles it, and then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Answers go to a copy of standard output. Descriptor 1 then leads to standard error, so that nothing that a library
    # prints can mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer, examples = pickle.load(sys.stdin.buffer)
        while True:
            records = pickle.load(sys.stdin.buffer)
            answer: Encoded | Exception
            try:
                answer = encode_records(tokenizer, examples, records)
            except Exception as error:
                answer = error if _can_be_pickled(error) else RuntimeError(f"{type(error).__name__}: {error}")
            pickle.dump(answer, answers, protocol=5)
            answers.flush()


def _can_be_pickled(error: Exception) -> bool:
    """Whether the error can be sent to the parent process."""
    # Some exceptions are pickled without complaint but fail, or change their type, when they are loaded.
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
