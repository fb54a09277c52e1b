"""Measures the data pipeline: the speed of tokenizing and of making batches, and the memory of long documents.

    python tools/bench_data.py

The figures are

    the seconds to train the tokenizer, and the tokens per second from text to the store;
    the tokens per second from the store to batches, beside the packers of grain;
    the peak memory while the tokenizer is trained on one document of 10 MB, 100 MB or 1 GB and tokenizes it.

The corpus is the source code of the Python standard library. Ours and the rivals read the same store, which is in the
page cache, through one prefetching thread, in turns within one process. Figures are medians over the rounds. The output
has one JSON object in each line.

The rivals do less than ours. ConcatThenSplit cuts documents wherever a row ends and does not shift targets. The packers
have a state, so they cannot be restored from one integer.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from bench_train import load_config
from grain.experimental import (
    BestFitPackIterDataset,
    ConcatThenSplitIterDataset,
    FirstFitPackIterDataset,
    ThreadPrefetchIterDataset,
)
from lines import make_parser, report

from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.packing.plan import PackingPlan
from llmjax.data.pipeline import PackedSequences, make_batches
from llmjax.data.sources.listing import SourceFile, list_sources
from llmjax.data.sources.records import read_records, read_texts
from llmjax.data.store.build import build_store
from llmjax.data.store.store import Store
from llmjax.data.tokenizer.kinds import TokenizerConfig
from llmjax.data.tokenizer.training import train_tokenizer

# The goal of the pipeline alone, in tokens per second: far more than a training step takes.
GOAL = 20e6
# The positions of a batch, and the batches that the thread makes in advance. Choices.
TOKENS_PER_BATCH = 32768
PREFETCH = 2
# grain reads documents in the thread that makes the batches, as ours does.
READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Documents:
    """A source for grain whose records are whole documents."""

    def __init__(self, store: Store):
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, doc: int) -> dict[str, np.ndarray]:
        return {"tokens": self.store.tokens(doc, 0, int(self.store.lengths[doc])).astype(np.int32)}


class Pieces:
    """A source for grain whose records are documents with inputs and targets.

    Documents that are longer than a row are cut as in our packing plan.
    """

    def __init__(self, store: Store, plan: PackingPlan):
        self.store, self.plan = store, plan

    def __len__(self) -> int:
        return self.plan.num_pieces

    def __getitem__(self, piece: int) -> dict[str, np.ndarray]:
        start = int(self.plan.starts[piece])
        stop = start + int(self.plan.lengths[piece]) + 1
        tokens = self.store.tokens(int(self.plan.docs[piece]), start, stop).astype(np.int32)
        return {"tokens": tokens[:-1], "targets": tokens[1:]}


def make_rivals(store: Store, plan: PackingPlan, batch_size: int) -> dict[str, Callable[[], Iterator]]:
    """The rivals: name -> a function that starts a stream of batches with `batch_size` rows."""
    seq_len = plan.seq_len

    def records(source: Documents | Pieces) -> grain.IterDataset:
        return grain.MapDataset.source(source).seed(0).shuffle().repeat().to_iter_dataset(READ)

    def batches(rows: grain.IterDataset) -> Iterator:
        return iter(ThreadPrefetchIterDataset(rows.batch(batch_size), prefetch_buffer_size=PREFETCH))

    def fit(packer: type) -> Callable[[], Iterator]:
        lengths = {"tokens": seq_len, "targets": seq_len}
        pieces = records(Pieces(store, plan))
        return lambda: batches(packer(pieces, length_struct=lengths, num_packing_bins=batch_size))

    # One token more than a row has, for inputs and targets.
    whole = records(Documents(store))
    concatenated = ConcatThenSplitIterDataset(whole, length_struct={"tokens": seq_len + 1})
    return {
        "grain_concat_then_split": lambda: batches(concatenated),
        "grain_first_fit": fit(FirstFitPackIterDataset),
        "grain_best_fit": fit(BestFitPackIterDataset),
    }


def measure(start: Callable[[], Iterator], seq_len: int, num_tokens: int) -> float:
    """The positions of batches per second, measured over `num_tokens` positions after a first batch."""
    batches = start()
    # The first batch starts the thread and fills the caches.
    next(batches)
    count, began = 0, time.perf_counter()
    while count < num_tokens:
        count += len(next(batches)["tokens"]) * seq_len
    seconds = time.perf_counter() - began
    batches.close()
    return count / seconds


def bench_store(
    files: Sequence[SourceFile],
    cache_dir: pathlib.Path,
    config: TokenizerConfig,
    rounds: int,
    num_workers: int,
) -> Store:
    """Measures the training of the tokenizer once and the building of the store `rounds` times. Returns the store."""
    began = time.perf_counter()
    tokenizer = train_tokenizer(config, (text for file in files for text in read_texts(file)))
    report("train_tokenizer", time.perf_counter() - began, "s")
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        store = build_store(cache_dir / "store", files, tokenizer, num_workers=num_workers)
        seconds.append(time.perf_counter() - began)
    report("build_store", store.header.num_tokens / statistics.median(seconds), "tokens/s")
    return store


def bench_pipeline(store: Store, seq_len: int, rounds: int, num_tokens: int) -> None:
    """Measures our pipeline and the rivals in turns, `rounds` times, on rows of `seq_len` tokens."""
    plan = plan_packing(store.lengths, np.arange(len(store)), seq_len, seed=0)
    batch_size = TOKENS_PER_BATCH // seq_len
    source = PackedSequences(store, plan, seed=0)
    contenders = {
        "ours": lambda: make_batches(source, start=0, batch_size=batch_size, prefetch=PREFETCH),
        **make_rivals(store, plan, batch_size),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    # In turns, so that whatever slows the machine down slows down all of them.
    for _ in range(rounds):
        for name, start in contenders.items():
            rates[name].append(measure(start, seq_len, num_tokens))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = medians.pop("ours")
    for rival, rate in medians.items():
        report(f"pipeline_{seq_len}", ours, "tokens/s", rival, rate, GOAL, ours >= GOAL)
    report(f"packing_efficiency_{seq_len}", plan.efficiency, "used positions / positions")


# A program that trains a tokenizer on a file and tokenizes it. It runs in a process of its own and prints three peaks
# of memory in units of 1024 bytes: at the start, after training, and of tokenizing. The last is the sum over the
# process and its workers. Writing 5 to clear_refs resets the peak.
MEMORY_OF_ONE_DOCUMENT = """
import os, pathlib, re, sys
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.records import read_texts
from llmjax.data.store.build import build_store
from llmjax.data.tokenizer.kinds import TokenizerConfig
from llmjax.data.tokenizer.training import train_tokenizer

def peak(process="self"):
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path(f"/proc/{process}/status").read_text())[1])

def look(done, total):
    for process in pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        workers[process] = peak(process)

path, store, vocab_size, train_bytes, num_workers = sys.argv[1:]
config = TokenizerConfig("bpe", "", int(vocab_size), int(train_bytes), 0.9995, 16)
files, before, workers = list_sources([path]), peak(), {}
tokenizer = train_tokenizer(config, (text for file in files for text in read_texts(file)))
trained = peak()
pathlib.Path("/proc/self/clear_refs").write_text("5")
build_store(store, files, tokenizer, num_workers=int(num_workers), progress=look)
print(before, trained, peak() + sum(workers.values()))
"""


def bench_memory(
    files: Sequence[SourceFile], megabytes: int, config: TokenizerConfig, num_workers: int
) -> None:
    """Reports the peak memory for one document of this many megabytes, which repeats the text of the sources."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = pathlib.Path(folder, "one.txt"), 0
        with path.open("wb") as file:
            for text in itertools.cycle(record.text for source in files for record in read_records(source)):
                size += file.write(text.encode())
                if size >= megabytes * 1_000_000:
                    break
        arguments = [config.vocab_size, config.train_bytes, num_workers]
        command = [
            sys.executable,
            "-c",
            MEMORY_OF_ONE_DOCUMENT,
            path,
            pathlib.Path(folder, "store"),
            *arguments,
        ]
        began = time.perf_counter()
        output = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - began
    before, trained, tokenized = (int(kilobytes) / 1024 for kilobytes in output.split())
    more = {"seconds": seconds, "at_start": before, "training_the_tokenizer": trained}
    report(f"peak_memory_one_document_{megabytes}_MB", tokenized, "MiB", **more)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sources", nargs="+", default=["stdlib"], help="as data.sources")
    parser.add_argument("--rounds", type=int, default=5, help="the figures are medians over these")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="read in each round")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that tokenize")
    args = parser.parse_args()
    lengths, sizes, tokenizer = (512, 8192), (10, 100, 1000), load_config({})[0].tokenizer
    if args.smoke:
        args.sources, args.rounds, args.tokens, args.num_workers = (
            [str(pathlib.Path(__file__).parent)],
            1,
            9000,
            1,
        )
        lengths, sizes = (128,), (10, 100)
        tokenizer = dataclasses.replace(tokenizer, vocab_size=512, train_bytes=1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        files = list_sources(args.sources)
        store = bench_store(files, pathlib.Path(folder), tokenizer, args.rounds, args.num_workers)
        for megabytes in sizes:
            bench_memory(files, megabytes, tokenizer, args.num_workers)
        for seq_len in lengths:
            bench_pipeline(store, seq_len, args.rounds, args.tokens)


if __name__ == "__main__":
    main()
