"""Packed classification: one loss term for each text, equal to an independent loop over the texts in PyTorch."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from some_slow import often

from configs import base
from llmjax.build.corpus import make_corpus
from llmjax.build.labels import with_labels
from llmjax.build.program import make_program
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.errors import UserError
from llmjax.models.classifier import ENTRY, Classifier
from llmjax.parallel.rules import Layout
from llmjax.plan.summary import describe
from llmjax.tasks.classification import BINS, Classification, ClassificationConfig
from llmjax.tasks.contract import Setting, Totals
from llmjax.types import Batch, Head, Output

V, D, C, T = 11, 6, 3, 12
TASK = Classification()


class LookUp:
    """A model whose hidden states are embeddings. One id has an embedding that is not finite."""

    layout, bad = Layout(), V - 1

    def init(self, rng):
        table_VD = jax.random.normal(rng, (V, D))
        return {"table_VD": table_VD.at[self.bad].set(jnp.inf)}

    def apply(self, params, batch, *, rng=None):
        return Output(params["table_VD"][batch.tokens])

    def head(self, params):
        return Head(params["table_VD"])


def setting(pool, **changes):
    keys = ClassificationConfig("field", "label", ("a", "b", "c"), pool)
    return Setting(keys=keys, sees_both_sides=True, **changes)


def packed(lengths, seed=0, order=None):
    """A batch of two rows with texts of these lengths, padding at the end; `order` moves the columns."""
    rng = np.random.default_rng(seed)
    names = ("tokens", "segments", "positions", "labels", "weights")
    arrays = {name: np.zeros((2, T), np.float32 if name == "weights" else np.int32) for name in names}
    arrays["tokens"][:] = LookUp.bad
    texts = []
    for row, of_row in enumerate(lengths):
        at = 0
        for segment, length in enumerate(of_row, 1):
            tokens, label = rng.integers(0, V - 1, length), int(rng.integers(0, C))
            here = row, slice(at, at + length)
            arrays["tokens"][here], arrays["segments"][here] = tokens, segment
            arrays["positions"][here], arrays["labels"][here] = np.arange(length), label
            at += length
            arrays["weights"][row, at - 1] = 1
            texts.append((tokens, label))
    if order is not None:
        arrays = {name: values[:, order] for name, values in arrays.items()}
    batch = Batch(targets=arrays["tokens"], index=np.arange(2, dtype=np.int32), **arrays)
    return jax.tree.map(jnp.asarray, batch), texts


@pytest.mark.parametrize("order", [None, np.random.default_rng(1).permutation(T)], ids=["in order", "moved"])
@pytest.mark.parametrize("pool", ["last", "mean", "first"])
def test_loss_and_gradients_are_those_of_a_loop_over_the_texts_in_torch(pool, order):
    torch = pytest.importorskip("torch")
    model = TASK.make_model(LookUp(), setting(pool).keys, 0.5)
    assert isinstance(model, Classifier)
    params = model.init(jax.random.key(0))
    batch, texts = packed(((4, 1, 5), (3, 2)), order=order)
    loss = TASK.make_loss(model, setting(pool))
    sums, gradients = jax.value_and_grad(lambda params: loss(params, batch, None).loss)(params)
    table, w, bias = (
        torch.tensor(np.array(x), requires_grad=True)
        for x in (params["table_VD"], params[ENTRY]["w_CD"], params[ENTRY]["bias_C"])
    )
    choose = {"last": lambda h: h[-1], "mean": lambda h: h.mean(0), "first": lambda h: h[0]}[pool]
    total = torch.zeros([])
    for tokens, label in texts:
        logits = w @ choose(table[torch.tensor(tokens)]) + bias
        total = total + torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]))
    total.backward()
    assert float(sums) == pytest.approx(float(total.detach()), rel=1e-5)
    for found, expected in (
        (gradients["table_VD"][:-1], table.grad[:-1]),
        (gradients[ENTRY]["w_CD"], w.grad),
        (gradients[ENTRY]["bias_C"], bias.grad),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_an_evaluation_counts_every_text_once_and_its_scores_follow_from_the_counts():
    model = TASK.make_model(LookUp(), setting("mean").keys, 0.5)
    params = model.init(jax.random.key(0))
    sums = [
        TASK.make_loss(model, setting("mean", training=False))(params, packed(lengths, seed)[0], None)
        for seed, lengths in enumerate([((4, 1, 5), (3, 2)), ((12,), (1, 1, 1))])
    ]
    metrics = {name: sum(np.asarray(s.metrics[name]) for s in sums) for name in sums[0].metrics}
    totals = Totals(float(sum(s.loss for s in sums)), float(sum(s.weight for s in sums)), metrics, 1)
    assert totals.weight == 9 == metrics["confusion"].sum() == metrics["calibration"][:, 0].sum()
    assert metrics["calibration"].shape == (BINS, 3)
    scores = TASK.evaluate(totals)
    assert scores["accuracy"] == np.trace(metrics["confusion"]) / 9 == pytest.approx(metrics["accuracy"] / 9)
    assert set(scores) == {score.name for score in TASK.scores}
    details = json.loads(json.dumps(TASK.details(totals, setting("mean").keys)))
    assert details["labels"] == ["a", "b", "c"] and np.sum(details["confusion"]) == 9


def test_a_model_that_is_not_finite_has_no_score():
    totals = Totals(float("nan"), 9.0, {"confusion": np.eye(3), "calibration": np.ones((BINS, 3))}, 1)
    assert all(np.isnan(value) for value in TASK.evaluate(totals).values())


def test_what_a_model_adds_to_tokens_counts_once_for_each_text():
    class Penalized(LookUp):
        def apply(self, params, batch, *, rng=None):
            output = super().apply(params, batch)
            return dataclasses.replace(output, penalties={"extra": jnp.ones(batch.tokens.shape)})

    model = TASK.make_model(Penalized(), setting("last").keys, 0.5)
    sums = TASK.make_loss(model, setting("last"))(
        model.init(jax.random.key(0)), packed(((4, 1), (3,)))[0], None
    )
    assert float(sums.metrics["extra"]) == pytest.approx(3)


def test_the_first_token_is_no_summary_where_it_sees_no_other():
    model = TASK.make_model(LookUp(), setting("first").keys, 0.5)
    with pytest.raises(UserError, match="classification.pool='first' reads the first token"):
        TASK.make_loss(model, dataclasses.replace(setting("first"), sees_both_sides=False))


@pytest.mark.parametrize(
    "values, message",
    [
        (("column", "label", (), "auto"), "label_from='column' is not known; use one of field, file, folder"),
        (("field", "label", (), "max"), "pool='max' is not known; use one of auto, last, mean, first"),
        (("field", "", (), "auto"), "label_field='' is no name"),
        (("field", "label", ("a", "a"), "auto"), "has a label twice"),
    ],
)
def test_wrong_keys_are_one_sentence(values, message):
    with pytest.raises(UserError, match=message):
        ClassificationConfig(*values)


def write_texts(folder, number=120, words=6):
    """`corpus`/texts.tsv: texts with the label `stone` if the word is in them, and else `other`."""
    rng = np.random.default_rng(0)
    lines = ["label\ttext"]
    for _ in range(number):
        text = " ".join(rng.choice(tiny_run.WORDS, rng.integers(1, words + 1)))
        lines.append(f"{'stone' if 'stone' in text else 'other'}\t{text}")
    (folder / "corpus").mkdir(exist_ok=True)
    (folder / "corpus" / "texts.tsv").write_text("\n".join(lines))


def config_of(folder, devices=1, **changes):
    raw = base.get_config()
    settings = tiny_run.settings_of(changes.get("model__family", "gpt")) | {
        "task.name": "classification", "data.sources": (str(folder / "corpus"),), "data.seq_len": 64,
        "data.cache_dir": str(folder / "cache"), "compute.accumulation_steps": 1, "data.held_out_fraction": 0.2,
    }  # fmt: skip
    raw.update_from_flattened_dict(
        settings | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return with_labels(*resolve_config(read_config(raw.to_dict()), devices))


def first_sums(folder, devices, **changes):
    config, derived = config_of(folder, len(devices), **changes)
    corpus = make_corpus(config, derived)
    program = make_program(config, derived, corpus.tokenizer.vocab_size, devices)
    with program.placement.batches(corpus.train) as batches:
        return jax.device_get(program.eval_step(program.init().params, next(batches)))


# 278 ids, which two devices can share.
VOCABULARY = {"tokenizer__num_reserved": 17}
CUTS = {"seq": {"mesh__seq": 2}, "fsdp": {"mesh__fsdp": 2, "mesh__tensor": 2}}
POOLED = [
    ("bert", pool, cut, layout)
    for pool in ("mean", "first")
    for cut, layout in (("seq", "zigzag"), ("seq", "documents"), ("fsdp", "auto"))
]


@pytest.mark.parametrize(
    "family, pool, cut, layout",
    often(
        [*POOLED, ("lstm", "mean", "fsdp", "auto")], lambda case: case[1] == "mean" and case[3] != "zigzag"
    ),
)
def test_every_way_to_pool_gives_the_same_sums_on_every_mesh_and_layout(family, pool, cut, layout, tmp_path):
    write_texts(tmp_path)
    settings = {"model__family": family, "classification__pool": pool, **VOCABULARY}
    whole = first_sums(tmp_path, jax.devices()[:1], **settings)
    split = first_sums(tmp_path, jax.devices()[:4], mesh__layout=layout, **CUTS[cut], **settings)
    assert whole.weight == split.weight > 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, split)


def test_texts_that_are_too_long_are_cut_at_the_end_and_still_have_a_label(tmp_path):
    write_texts(tmp_path, words=20)
    config, derived = config_of(tmp_path)
    corpus = make_corpus(config, derived)
    store, tokenizer = corpus.store, corpus.tokenizer
    # Ids are bytes, and bos, eos and 63 bytes fit into the 64 positions of a row and its last target.
    assert store.lengths.max() == 65 and store.num_bytes.max() > 80
    for doc, size in enumerate(store.num_bytes.tolist()):
        assert (store.tokens(doc)[-1] == tokenizer.eos_id) == (size <= 63)
    rows = corpus.train.read(np.arange(corpus.train_plan.num_rows))
    assert rows["weights"].sum() == corpus.train_plan.num_documents == corpus.train_plan.num_pieces
    labels = [config.tasks["classification"].labels[i] for i in store.labels]
    lines = (tmp_path / "corpus" / "texts.tsv").read_text().split("\n")[1:]
    assert labels == [line.split("\t")[0] for line in lines]
    program = make_program(config, derived, tokenizer.vocab_size, jax.devices()[:1])
    cut = int((store.num_bytes > 63).sum())
    line = describe(corpus, program, tmp_path)["labels"]
    assert (
        line.startswith("2: other ") and f"; {cut} texts of more than data.seq_len=64 tokens, cut at" in line
    )


def test_a_loss_is_of_the_labels_of_the_store(tmp_path):
    """The label of a token is that of its document, and padding has label 0 and no weight."""
    write_texts(tmp_path)
    config, derived = config_of(tmp_path)
    corpus = make_corpus(config, derived)
    rows = corpus.train.read(np.arange(corpus.train_plan.num_rows))
    for row in range(corpus.train_plan.num_rows):
        for segment, (doc, _, _) in enumerate(corpus.train.spans(np.array([row])), 1):
            here = rows["segments"][row] == segment
            assert set(rows["labels"][row, here]) == {int(corpus.store.labels[doc])}
            assert rows["weights"][row, here].tolist() == [0.0] * (here.sum() - 1) + [1.0]
    assert not rows["labels"][rows["segments"] == 0].any()


def test_fewer_than_two_labels_are_refused():
    keys = types.SimpleNamespace(labels=("a",))
    with pytest.raises(UserError, match=r"classification.labels=\('a',\) are fewer than two"):
        TASK.make_model(LookUp(), keys, 0.1)
