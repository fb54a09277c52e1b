"""Texts to tokens in worker processes, in order.

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from llmjax.data.tokenizer.tokenizer import Tokenizer
from llmjax.errors import UserError

Label = TypeVar("Label")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Some documents, each `[bos] tokens [eos]`, one after the other.

    tokens     uint16 or uint32, of all documents
    lengths    int64 [documents], tokens of each, bos and eos included
    num_bytes  int64 [documents], UTF-8 bytes of each text
    hashes     uint64 [documents], of the text alone: what the held-out split goes by
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Encodes some texts here and now."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens, num_bytes, hashes = [], [], []
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        tokens.append(np.array(ids, dtype=dtype))
        data = text.encode()
        num_bytes.append(len(data))
        hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"))
    return Encoded(
        np.concatenate(tokens) if tokens else np.zeros(0, dtype),
        np.array([len(t) for t in tokens], dtype="<i8"),
        np.array(num_bytes, dtype="<i8"),
        np.array(hashes, dtype="<u8"),
    )


def encode_batches(
    tokenizer: Tokenizer, batches: Iterable[tuple[Label, Sequence[str]]], num_workers: int
) -> Iterator[tuple[Label, Encoded]]:
    """Encodes batches of texts and yields each with its label, in order, whatever the number of workers.

    At most two batches a worker are in flight, so an endless stream of batches takes bounded memory. With
    `num_workers` below 2 everything happens in this process.
    """
    if num_workers < 2:
        for label, texts in batches:
            yield label, encode_texts(tokenizer, texts)
        return
    pending: collections.deque = collections.deque()
    with _workers(tokenizer, num_workers) as submit:
        for label, texts in batches:
            pending.append((label, submit(texts)))
            if len(pending) > 2 * num_workers:
                label, result = pending.popleft()
                yield label, result.result()
        while pending:
            label, result = pending.popleft()
            yield label, result.result()


@contextlib.contextmanager
def _workers(tokenizer: Tokenizer, count: int):
    """Starts worker processes and gives a function from texts to a future of `Encoded`; ends them after."""
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

    def encode(texts: Sequence[str]) -> Encoded:
        process = idle.get()
        try:
            return _ask(process, texts)
        finally:
            idle.put(process)

    threads = ThreadPoolExecutor(count)
    try:
        for process in processes:
            pickle.dump(tokenizer, _pipes(process)[0])
            idle.put(process)
        yield lambda texts: threads.submit(encode, texts)
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


def _ask(process: subprocess.Popen, texts: Sequence[str]) -> Encoded:
    stdin, stdout = _pipes(process)
    try:
        pickle.dump(texts, stdin, protocol=5)
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
    """The body of a worker process: a tokenizer, then batches of texts from stdin, results to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may mix with the answers
    with contextlib.suppress(EOFError, BrokenPipeError):
        tokenizer = pickle.load(sys.stdin.buffer)
        while True:
            texts = pickle.load(sys.stdin.buffer)
            answer: Encoded | Exception
            try:
                answer = encode_texts(tokenizer, texts)
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
