"""The plan's figures are those of the program that it describes."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import tiny_run

from configs import base
from llmjax.build.corpus import make_corpus
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.store.columns import StoreHeader
from llmjax.plan.summary import (
    describe,
    tree_bytes_per_device,
)
from llmjax.quantities import format_number


def program_for(devices, vocab_size=64, **changes):
    raw = base.get_config()
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    raw.update_from_flattened_dict({**tiny_run.SETTINGS, **changes})
    config, derived = resolve_config(read_config(raw.to_dict()), len(devices))
    return make_program(config, derived, vocab_size, devices)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    raw = base.get_config()
    raw.update_from_flattened_dict(tiny_run.SETTINGS)
    raw.data.sources = (str(tiny_run.write_corpus(folder / "corpus")),)
    raw.data.cache_dir = str(folder / "cache")
    return make_corpus(*resolve_config(read_config(raw.to_dict()), 8))


def test_the_state_takes_the_bytes_that_it_takes():
    program = program_for(jax.devices(), mesh__data=2, mesh__fsdp=4)
    state = program.init()
    first = jax.devices()[0]

    def held(x):
        data = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return sum(shard.data.nbytes for shard in data.addressable_shards if shard.device == first)

    assert tree_bytes_per_device(program.abstract_state()) == sum(held(x) for x in jax.tree.leaves(state))


def activation_bytes(program):
    return program.cost(1.0).activation_bytes


def test_activations_shrink_with_devices_and_recomputation():
    one = activation_bytes(program_for(jax.devices()[:1]))
    assert activation_bytes(program_for(jax.devices(), mesh__data=4, mesh__fsdp=2)) == one // 8
    assert activation_bytes(program_for(jax.devices()[:1], model__dtype="bfloat16")) == one // 2
    deep = [activation_bytes(program_for(jax.devices()[:1], model__num_layers=8, compute__remat=remat))
            for remat in ("none", "dots", "full")]  # fmt: skip
    assert deep[0] > deep[1] > deep[2] > one // 8


def test_the_plan_is_that_of_corpus_and_program(corpus):
    program = program_for(jax.devices(), corpus.tokenizer.vocab_size, mesh__fsdp=2)
    rows = describe(corpus, program, pathlib.Path("runs/x"), start=2)
    assert list(rows) == ["corpus", "held out", "files", "tokenizer", "packing", "model", "attention", "optimizer",
                          "mesh", "batch", "memory", "updates", "output"]  # fmt: skip
    assert rows["corpus"].startswith(f"{len(corpus.store)} documents, ")
    assert f"{corpus.store.header.num_tokens:,} tokens" in rows["corpus"]
    assert rows["corpus"].endswith(f"{len(corpus.held_out_ids)} documents held out")
    assert rows["tokenizer"] == f"bytes, {corpus.tokenizer.vocab_size} ids"
    assert rows["packing"].startswith(f"{corpus.train_plan.num_rows} sequences of 32 tokens")
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(program.init().params))
    assert f"{format_number(count)} parameters" in rows["model"]
    assert rows["mesh"] == "data=4 x fsdp=2 x seq=1 x tensor=1 on 8 cpu devices"
    assert rows["batch"] == program.batch.describe()
    epochs = 6 * 16 / corpus.train_plan.num_rows
    assert rows["updates"] == f"6, 2 of them done; 3.07k tokens = {epochs:.2f} epochs"
    assert rows["output"] == "runs/x"
    assert not any("\n" in text for text in rows.values())


def test_files_read_and_left_out_are_counted_by_reason(corpus):
    program = program_for(jax.devices(), corpus.tokenizer.vocab_size)
    assert describe(corpus, program, pathlib.Path("x"))["files"] == "40 files, 14.9 kB"
    listing = dataclasses.replace(corpus.listing, left_out={"of unknown suffix": 2, "hidden": 1000})
    line = describe(dataclasses.replace(corpus, listing=listing), program, pathlib.Path("x"))["files"]
    assert line == "40 files, 14.9 kB; left out: 1,000 hidden, 2 of unknown suffix"


def test_documents_left_out_or_mended_are_counted(corpus):
    program = program_for(jax.devices(), corpus.tokenizer.vocab_size)
    counts = {"empty": 3, "skipped": 1200, "replaced": 2}
    store = type("Store", (), {
        "header": dataclasses.replace(corpus.store.header, **counts), "num_bytes": corpus.store.num_bytes,
        "lengths": corpus.store.lengths, "__len__": lambda self: len(corpus.store)})()  # fmt: skip
    assert isinstance(store.header, StoreHeader)
    line = describe(dataclasses.replace(corpus, store=store), program, pathlib.Path("x"))["corpus"]
    assert line.endswith(
        "; 3 empty; 1,200 skipped, being null or bad text; 2 of bad text, mended with U+FFFD"
    )
