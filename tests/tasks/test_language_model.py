"""The loss of a document does not depend on the other documents in its row, from the tokenizer to the loss."""

import jax
import numpy as np
import pytest
import tiny_run
from sections import section

from configs import base
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.packing.make_plan import plan_packing
from llmjax.data.pipeline import PackedSequences
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.records import read_records
from llmjax.data.store.build import build_store
from llmjax.data.tokenizer.training import train_tokenizer
from llmjax.evaluate.not_finite import documents_not_finite
from llmjax.ops.logits import head_logits
from llmjax.types import Batch

T, DOCUMENTS = 48, 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The packed sequences of twenty documents, some of them longer than T, and their tokenizer."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_run.write_corpus(folder / "corpus", DOCUMENTS, words=25, text=tiny_run.CHINESE)
    files = list_sources([str(folder / "corpus")])
    texts = [document.text for file in files for document in read_records(file)]
    tokenizer = train_tokenizer(section("tokenizer", vocab_size=400), texts)
    store = build_store(folder / "store", files, tokenizer)
    plan = plan_packing(store.lengths, np.arange(len(store)), T, seed=0)
    assert plan.num_rows < DOCUMENTS and store.lengths.max() > T + 1
    return PackedSequences(store, plan, seed=0, repeat=False), tokenizer


def program_for(tokenizer, **changes):
    raw = base.get_config()
    sizes = {"model.num_layers": 2, "model.model_dim": 32, "model.init_std": 0.3, "data.seq_len": T,
             "train.tokens_per_update": T, "compute.accumulation_steps": 1}  # fmt: skip
    raw.update_from_flattened_dict(sizes | {key.replace("__", "."): value for key, value in changes.items()})
    config, derived = resolve_config(read_config(raw.to_dict()), 1)
    return make_program(config, derived, tokenizer.vocab_size, jax.devices()[:1])


def alone(sequences, document, start, stop):
    """A row that holds one piece of one document and no other."""
    arrays = {name: np.zeros((1, T), np.int32) for name in ("tokens", "targets", "segments", "positions")}
    tokens = sequences.store.tokens(document, start, stop)
    length = len(tokens) - 1
    arrays["tokens"][0, :length], arrays["targets"][0, :length] = tokens[:-1], tokens[1:]
    arrays["segments"][0, :length], arrays["positions"][0, :length] = 1, np.arange(length)
    weights = (arrays["segments"] > 0).astype(np.float32)
    return Batch(**arrays, weights=weights, index=np.zeros(1, np.int32))


@pytest.mark.parametrize(
    "position, attention", [("rope", "blockwise"), ("learned", "full"), ("sinusoidal", "blockwise")]
)
def test_packed_loss_equals_unpacked_document_by_document(position, attention, packed):
    sequences, tokenizer = packed
    program = program_for(
        tokenizer, transformer__position=position, compute__kernel=attention, transformer__norm="layernorm"
    )
    params = program.init().params
    names = [sequences.store.name(i) for i in range(DOCUMENTS)]
    total, weight, seen = 0.0, 0.0, set()
    for row in range(sequences.plan.num_rows):
        arrays = sequences.read(np.array([row]))
        whole = program.eval_step(params, Batch(**arrays))
        parts = []
        for segment, (name, start, stop) in enumerate(sequences.documents(np.array([row])), 1):
            only = arrays["weights"] * (arrays["segments"] == segment)
            inside = program.eval_step(params, Batch(**arrays | {"weights": only}))
            outside = program.eval_step(params, alone(sequences, names.index(name), start, stop))
            np.testing.assert_allclose(inside.loss, outside.loss, rtol=1e-5)
            assert float(inside.weight) == float(outside.weight) == stop - start - 1
            parts.append(outside)
            seen.add(name)
        np.testing.assert_allclose(whole.loss, sum(float(part.loss) for part in parts), rtol=1e-5)
        total, weight = total + float(whole.loss), weight + float(whole.weight)
    assert seen == set(names)
    assert weight == (sequences.store.lengths - 1).sum()
    assert total / weight > 0.5 * np.log(tokenizer.vocab_size)


def test_attention_between_documents_of_a_row_would_change_the_loss(packed):
    sequences, tokenizer = packed
    program = program_for(tokenizer, compute__kernel="full")
    params = program.init().params
    rows = [row for row in range(sequences.plan.num_rows) if len(sequences.documents(np.array([row]))) > 1]
    arrays = sequences.read(np.array(rows[:1]))
    merged = arrays | {"segments": (arrays["segments"] > 0).astype(np.int32)}
    right, wrong = (float(program.eval_step(params, Batch(**fields)).loss) for fields in (arrays, merged))
    assert abs(wrong - right) > 1e-3 * right


@pytest.mark.parametrize("attention", ["full", "blockwise"])
def test_only_the_document_with_a_loss_that_is_not_finite_is_named(attention, packed):
    """A token that occurs in one document alone gets an embedding of NaN."""
    sequences, tokenizer = packed
    program = program_for(tokenizer, compute__kernel=attention, model__tie_embeddings=False)
    rows = np.arange(sequences.plan.num_rows)
    pieces = {}
    for row in rows:
        for document in sequences.documents(np.array([row])):
            pieces.setdefault(document[0], []).append((row, document))
    names = [sequences.store.name(i) for i in range(DOCUMENTS)]
    texts = {
        name: set(sequences.store.tokens(i, 0, sequences.store.lengths[i]).tolist())
        for i, name in enumerate(names)
    }
    word, name = next(
        (word, name)
        for name in names
        for word in texts[name].difference(*(texts[other] for other in names if other != name))
        if any(len(sequences.documents(np.array([row]))) > 1 for row, _ in pieces[name])
    )
    params = jax.tree.map(jax.numpy.array, program.init().params)
    table = params["embedding"]["embedding_VD"]
    params["embedding"]["embedding_VD"] = table.at[word].set(jax.numpy.nan)
    losses = lambda params, arrays: program.token_losses(params, program.placement.place(arrays))  # noqa: E731
    found = documents_not_finite(losses, params, sequences, 0, len(rows))
    assert found and {document[0] for document in found} == {name}


def test_accuracy_is_the_weight_of_the_targets_that_are_the_most_likely_token(packed):
    sequences, tokenizer = packed
    program = program_for(tokenizer, model__logit_softcap=10.0)
    params = program.init().params
    batch = Batch(**sequences.read(np.array([0])))
    logits_BTV = jax.jit(
        lambda p: head_logits(program.model.apply(p, batch).hidden_BTD, program.model.head(p))
    )(params)
    expected = (np.argmax(logits_BTV, -1) == batch.targets) * batch.weights
    sums = program.eval_step(params, batch)
    assert float(sums.metrics["accuracy"]) == expected.sum()
    assert float(sums.weight) == batch.weights.sum()
