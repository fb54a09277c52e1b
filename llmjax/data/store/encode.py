"""Records to examples of tokens in worker processes, in order.

The workers are plain child processes that speak pickle over pipes and import nothing but the tokenizer. They
are not made by multiprocessing: fork is unsafe once jax has threads, and spawn imports the caller's
`__main__` again, jax included, in every worker, and does not work from a notebook or standard input.
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

from llmjax.data.examples.contract import Example, Examples, InParts
from llmjax.data.store.columns import LABEL, RUN, token_dtype
from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError

Tag = TypeVar("Tag")
Fields = Mapping[str, "str | int"]  # of a record, see `data/sources`


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Some documents as columns of the store.

    ragged  column -> its values for all documents, one document after the other, and int64 [documents], the number
            of values of each document
    fixed   column -> one value for each document: num_bytes (UTF-8 bytes of the text), hashes (of the whole
            record, which decides the held-out split) and where the task has one the label
    """

    ragged: dict[str, tuple[np.ndarray, np.ndarray]]
    fixed: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a long document, which comes alone; `first` and `last` say whether the document begins and ends so."""

    fields: Fields
    first: bool
    last: bool


Batch = Sequence[Fields] | Piece


def encode_records(tokenizer: Tokenizer, examples: Examples, batch: Batch) -> Encoded:
    """Encodes some records, or a part of one, here and now."""
    if isinstance(batch, Piece):
        assert isinstance(examples, InParts)  # else no document is cut
        records: Sequence[Fields] = [batch.fields]
        made = [examples.encode_part(batch.fields, tokenizer, batch.first, batch.last)]
    else:
        records, made = batch, [examples.encode(record, tokenizer) for record in batch]
    _check(made, examples)
    dtype = token_dtype(tokenizer.vocab_size)
    ragged = {"tokens": _joined([example.tokens for example in made], dtype)}
    if "source" in examples.columns:
        ragged["source"] = _joined([example.source for example in made], dtype)
    if "weights" in examples.columns:
        ragged["weights"] = _joined([example.weights for example in made], RUN)
    text = examples.fields[0]
    fixed = {
        "num_bytes": np.array([len(str(record[text]).encode()) for record in records], "<i8"),
        "hashes": np.array([_hash(record, examples.fields) for record in records], "<u8"),
    }
    if "label" in examples.columns:
        fixed["label"] = np.array([example.label for example in made], LABEL)
    return Encoded(ragged, fixed)


def _check(made: Sequence[Example], examples: Examples) -> None:
    """Raises ValueError where an example is not what the columns of its task promise."""
    for example in made:
        if (example.weights and "weights" not in examples.columns) or (
            example.source and "source" not in examples.columns
        ):
            raise ValueError(f"{examples!r} fills a column that its `columns` do not name.")
        if "weights" in examples.columns and sum(n for n, _ in example.weights) != len(example.tokens):
            raise ValueError(f"{examples!r} gives weights that do not cover the tokens.")


def _joined(values: Sequence[Sequence], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    arrays = [np.array(list(one), dtype) for one in values]
    lengths = np.array([len(array) for array in arrays], "<i8")
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype), lengths


def _hash(record: Fields, fields: Sequence[str]) -> int:
    """A 64-bit hash of the fields. With a single field it is the hash of the text alone."""
    data = "\0".join(str(record[field]) for field in fields).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def encode_batches(
    tokenizer: Tokenizer,
    examples: Examples,
    batches: Iterable[tuple[Tag, Batch]],
    num_workers: int,
) -> Iterator[tuple[Tag, Encoded]]:
    """Encodes batches of records and yields each with its tag, in order, whatever the number of workers.

    At most two batches a worker are in flight, so an endless stream of batches takes bounded memory. With
    `num_workers` below 2 everything happens in this process.
    """
    if num_workers < 2:
        for tag, records in batches:
            yield tag, encode_records(tokenizer, examples, records)
        return
    pending: collections.deque = collections.deque()
    with _workers(tokenizer, examples, num_workers) as submit:
        for tag, records in batches:
            pending.append((tag, submit(records)))
            if len(pending) > 2 * num_workers:
                tag, result = pending.popleft()
                yield tag, result.result()
        while pending:
            tag, result = pending.popleft()
            yield tag, result.result()


@contextlib.contextmanager
def _workers(tokenizer: Tokenizer, examples: Examples, count: int):
    """Starts worker processes and gives a function from records to a future of `Encoded`; ends them after."""
    root = str(Path(__file__).parents[3])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-c", "from llmjax.data.store.encode import work; work()"]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
        )
        for _ in range(count)
    ]
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
            process.terminate()  # nothing can be lost, and a thread that waits for one goes on
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.wait()
            stdin, stdout = _pipes(process)
            stdout.close()
            with contextlib.suppress(BrokenPipeError):
                stdin.close()


def _pipes(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes]]:
    """Where a worker reads, and where it writes."""
    assert process.stdin is not None and process.stdout is not None  # it was started with both
    return process.stdin, process.stdout


def _ask(process: subprocess.Popen, records: Batch) -> Encoded:
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


def work() -> None:
    """The body of a worker process: reads a tokenizer and a task's `Examples` from stdin, then batches of records, and
    writes one `Encoded` for each to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may mix with the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer, examples = pickle.load(sys.stdin.buffer)
        while True:
            records = pickle.load(sys.stdin.buffer)
            answer: Encoded | Exception
            try:
                answer = encode_records(tokenizer, examples, records)
            except Exception as error:
                answer = error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")
            pickle.dump(answer, answers, protocol=5)
            answers.flush()


def _travels(error: Exception) -> bool:
    """Whether the parent can read this error."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False
