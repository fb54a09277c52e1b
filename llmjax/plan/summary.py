"""The plan as text: what a run will read, train and write, before it starts."""

from __future__ import annotations

import math
import pathlib

import jax
import numpy as np

from llmjax.build.corpus import Corpus
from llmjax.build.hold_out import DOCUMENTS, NOTHING, TAILS
from llmjax.build.model import has_reference
from llmjax.build.program import Program
from llmjax.config.schema import Config
from llmjax.data.packing.plan import PackingPlan
from llmjax.data.pipeline import DataConfig
from llmjax.data.sources.cutting import TAIL
from llmjax.data.sources.listing import Listing
from llmjax.data.store.columns import StoreHeader
from llmjax.data.tokenizer.kinds import KINDS
from llmjax.models.reference import own
from llmjax.quantities import format_bytes, format_number, format_quantity
from llmjax.train.optim.optimizer import OptimizerConfig
from llmjax.train.optim.schedules import describe_schedule
from llmjax.train.steering.controller import RULES
from llmjax.train.trees import flatten

# The most labels that are counted one by one. A choice: more do not fit into a line.
MOST_NAMED = 8


def tree_bytes_per_device(tree: object) -> int:
    """The bytes that one device holds of a tree of sharded ShapeDtypeStructs."""

    def leaf_bytes(x: jax.ShapeDtypeStruct) -> int:
        # A random key is two uint32 words.
        itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.dtype(x.dtype).itemsize
        return math.prod(x.sharding.shard_shape(x.shape)) * itemsize

    return sum(leaf_bytes(x) for x in jax.tree.leaves(tree))


def describe_packing(plan: PackingPlan) -> str:
    """How many rows the documents of a plan take, and how full these are."""
    rows = f"{plan.num_rows:,} sequences of {plan.seq_len:,} tokens, {plan.efficiency:.1%} full"
    if plan.source_lengths is None:
        return rows
    share = int(np.sum(plan.source_lengths, dtype=np.int64)) / (plan.num_rows * plan.source_len)
    return f"{rows}, and of {plan.source_len:,} tokens of their second texts, {share:.1%} full"


def describe(corpus: Corpus, program: Program, workdir: pathlib.Path, start: int = 0) -> dict[str, str]:
    """Label -> one line of text, in reading order."""
    store, train, held_out = corpus.store, corpus.train_plan, corpus.held_out_plan
    documents, size, tokens = len(store), int(store.num_bytes.sum()), int(store.lengths.sum())
    held = f"; {held_out.num_documents:,} documents held out"
    if corpus.hold_out == TAILS:
        # The store has two parts of each document. The row "held out" says more.
        documents, held = documents - held_out.num_documents, ""
    rows = {
        "corpus": f"{documents:,} document{'s'[: documents != 1]}, {format_bytes(size)}, {tokens:,} tokens "
        f"({size / tokens:.2f} bytes per token){held}"
        f"{_describe_cuts(corpus, program.config.data)}{_describe_left_out(store.header)}",
        "held out": _describe_held_out(corpus, program.config.data),
        **_describe_labels(corpus, program.config),
        **_describe_long_conversations(corpus, program),
        "files": _describe_files(corpus.listing),
        "tokenizer": _describe_tokenizer(program.config, corpus.tokenizer.vocab_size),
        "packing": describe_packing(train),
    }
    rows |= describe_program(program, train.attended)
    source = program.config.checkpoint
    if source.init_from:
        rows["begins with"] = (
            f"parameters and tokenizer of {source.init_from}, checkpoint {source.init_checkpoint}"
        )
    if program.config.lora.init_from:
        rows["adapters"] = f"those in {program.config.lora.init_from}, until the run has some of its own"
    return rows | {"updates": _describe_updates(program, train.num_rows, start), "output": str(workdir)}


def describe_program(program: Program, attended: float) -> dict[str, str]:
    """The part of the plan that needs no corpus. `attended` is the mean number of keys per token."""
    c, mesh = program.config, program.mesh
    cost = program.cost(attended)
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return {
        "model": f"{c.model.family}, {_describe_params(program)}, "
        f"{format_quantity(cost.flops_per_token, 'FLOP')} per token, {c.model.dtype}",
        "attention": _describe_attention(program),
        "optimizer": _describe_optimizer(c.optimizer, c.train.num_updates),
        "mesh": f"{axes} on {mesh.size} {kind} device{'s' if mesh.size > 1 else ''}",
        "batch": _describe_batch(program),
        "memory": _describe_memory(program, cost.activation_bytes),
    }


def _describe_memory(program: Program, activations: int) -> str:
    """The bytes of a device, and what takes them. The compiler may need more for what it makes on the way."""
    state, shapes = program.abstract_state(), flatten(program.params_shape)
    # Gradients have the shapes and the sharding of the parameters.
    parts = {"state": tree_bytes_per_device(state), "gradients": tree_bytes_per_device(state.params)}
    if adapters := program.tuning.adapters:
        # An adapter is added to a copy of its matrix, which has a gradient before the adapter has one.
        parts["adapted matrices"] = 2 * tree_bytes_per_device([shapes[path] for path in adapters])
    parts["activations"] = activations
    each = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    return f"about {format_bytes(sum(parts.values()))} per device: {each}"


def _describe_params(program: Program) -> str:
    """How many parameters the model has, and how many of the run's train and are frozen if not all train."""
    state = program.abstract_state()
    whole, trained, frozen = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(own(tree)))
        for tree in (program.params_shape, state.params, state.frozen)
    )
    text = f"{format_number(whole)} parameters"
    if has_reference(program.config):
        text += ", compared with those that the run begins with"
    if not frozen:
        return text
    lora, adapters = program.config.lora, program.tuning.adapters
    by = f" (adapters of rank {lora.rank} in {len(adapters)} arrays)" if adapters else ""
    return f"{text}, {format_number(trained)} train{by} and {format_number(frozen)} are frozen"


def _describe_optimizer(config: OptimizerConfig, num_updates: int) -> str:
    text = f"{config.name}, learning rate {describe_schedule(config, num_updates)}"
    if config.batch_scaling != "none":
        text += f", times the size of the batch by {config.batch_scaling}"
    return text


def _describe_attention(program: Program) -> str:
    (kernel, why), (sharing, why_so) = program.attention["kernel"], program.attention["mesh.seq"]
    text = f"{kernel} ({why})"
    if sharing:
        text += f"; over mesh.seq {sharing} ({why_so}), layout {program.derived.row_layout.name}"
    return text


def _describe_batch(program: Program) -> str:
    steering, text = program.steering, program.batch.describe()
    if not program.engine.stops_within:
        text += ", fused"
    if steering.schedule.kind != "constant":
        points = " ".join(f"{seen}:{size}" for seen, size in steering.schedule.points)
        text += f"; {steering.schedule.kind} {points}"
    if steering.lengths.points != ((0, program.batch.seq_len),):
        text += f"; rows of {steering.lengths.describe()}"
    c = steering.controller
    if RULES[c.name].decides:
        text += f"; then {c.k_min} to {c.k_max} micro-steps by {c.name}"
    return text


def _describe_cuts(corpus: Corpus, data: DataConfig) -> str:
    """Whether `data.split_on` cut anything."""
    if not data.split_on:
        return ""
    # Pieces are numbered from 1, so the second piece of any document shows that there was a match.
    names = (corpus.store.name(i).removesuffix(TAIL) for i in range(len(corpus.store)))
    if all(name.endswith("#1") for name in names):
        return f"; data.split_on={data.split_on!r} matches nowhere"
    return f"; cut at {data.split_on!r}"


def _describe_held_out(corpus: Corpus, data: DataConfig) -> str:
    """What is held out and how it was chosen."""
    if corpus.hold_out == NOTHING:
        return "nothing, as data.held_out_fraction=0 says"
    number, documents = len(corpus.held_out_ids), len(corpus.store)
    size, total = corpus.held_out_bytes, int(corpus.store.num_bytes.sum())
    share = f"{format_bytes(size)}, {size / total:.1%} of the text"
    if corpus.hold_out == DOCUMENTS:
        return f"{number:,} of {documents:,} documents, whole, by a hash of each: {share}"
    if corpus.hold_out == TAILS:
        text = f"the last {100 * data.held_out_fraction:g}% of the characters of each document: {share}"
        if data.hold_out == "auto":
            text += "; whole documents (data.hold_out=documents) would be too few, or one of them too large"
    else:
        files = len(corpus.held_out_files)
        text = f"data.held_out_sources, {files:,} file{'s'[: files != 1]}, {number:,} document{'s'[: number != 1]}: "
        text += share
        if data.held_out_fraction:
            text += f"; data.held_out_fraction={data.held_out_fraction:g} is not used"
        if data.hold_out != "auto":
            text += f"; data.hold_out={data.hold_out} is not used"
    same = corpus.held_out_duplicates
    return f"{text}; {same:,} of {number:,} are trained on too, word for word" if same else text


def _describe_labels(corpus: Corpus, config: Config) -> dict[str, str]:
    """How many texts have each label, and how many texts are cut; nothing for a task without labels."""
    if "label" not in corpus.train.columns:
        return {}
    store = corpus.store
    assert store.labels is not None
    labels = config.tasks[config.task.name].labels
    counts = np.bincount(store.labels, minlength=len(labels))
    named = [f"{label} {count:,}" for label, count in zip(labels, counts.tolist())]
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    text = f"{len(labels)}: {', '.join(named[:MOST_NAMED])}{more}"
    # A text that was cut has no end.
    limit = config.data.seq_len
    full = np.flatnonzero(store.lengths == limit + 1)
    cut = sum(int(store.tokens(int(doc), limit)[0]) != corpus.tokenizer.eos_id for doc in full)
    if cut:
        text += f"; {cut:,} text{'s'[: cut != 1]} of more than data.seq_len={limit:,} tokens, cut at the end"
    return {"labels": text}


def _describe_long_conversations(corpus: Corpus, program: Program) -> dict[str, str]:
    """How many conversations are longer than a row, and how many have a turn that is."""
    limit, store = program.config.data.seq_len, corpus.store
    if "turns" not in program.derived.examples.columns:
        return {}
    long = np.flatnonzero(np.asarray(store.lengths) > limit + 1).tolist()
    ends = ([0, *store.turns(doc).tolist(), int(store.lengths[doc]) - 1] for doc in long)
    cut = sum(max(np.diff(each)) > limit for each in ends)
    if not long:
        return {}
    count = f"{len(long):,} conversation{'s'[: len(long) != 1]}"
    text = f"{count} of more than data.seq_len={limit:,} tokens, between turns"
    if cut:
        text += f"; {cut:,} of them within a turn of more than that, so that an answer stands in two rows"
    return {"cut": text}


def _describe_files(listing: Listing) -> str:
    """How many files were read, and what in their folders was not."""
    count = len(listing.files)
    text = f"{count:,} file{'s' if count != 1 else ''}, {format_bytes(sum(f.size for f in listing.files))}"
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in sorted(listing.left_out.items()))
    return f"{text}; left out: {left_out}" if left_out else text


def _describe_left_out(header: StoreHeader) -> str:
    """What reading did to documents that are empty or not UTF-8, if any; `data.on_bad_text` decides."""
    empty = f"; {header.empty:,} empty" if header.empty else ""
    skipped = f"; {header.skipped:,} skipped, being null or bad text" if header.skipped else ""
    replaced = f"; {header.replaced:,} of bad text, mended with U+FFFD" if header.replaced else ""
    return empty + skipped + replaced


def _describe_tokenizer(config: Config, vocab_size: int) -> str:
    """Where the tokenizer comes from, and the number of its ids."""
    own = config.tokenizer
    taken = config.checkpoint.init_from and "that of checkpoint.init_from"
    return f"{own.path or taken or KINDS[own.kind].words}, {vocab_size:,} ids"


def _describe_updates(program: Program, num_rows: int, start: int) -> str:
    train, varies = program.config.train, program.config.controller.name != "none"
    varies = varies or program.config.train.batch_schedule != "constant"
    total = train.num_updates if varies else max(train.num_updates, start)
    sequences = total * program.batch.sequences_per_update
    done = f", {start:,} of them done" if start else ""
    return (
        f"{total:,}{done}; {format_number(sequences * program.batch.seq_len)} tokens = "
        f"{sequences / num_rows:.2f} epochs"
    )
