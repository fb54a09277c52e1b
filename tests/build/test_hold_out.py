"""What is held out is never trained on, is what the plan says, and is the same on every machine and in old runs."""

import json
import os
import pathlib

import jax
import numpy as np
import pytest
import tiny_run
from families import examples_of, family_for

from configs import base
from llmjax.build.corpus import make_corpus
from llmjax.build.hold_out import is_fair
from llmjax.build.program import make_program
from llmjax.config.reading import complete_config, read_config
from llmjax.config.resolve import resolve_config
from llmjax.data.examples.contract import can_be_cut
from llmjax.data.examples.copies import Copies
from llmjax.data.examples.table import EXAMPLES
from llmjax.data.store.store import Store
from llmjax.errors import UserError
from llmjax.plan.summary import describe

# Every character is at one place only, so that a text says where it is from. They are not in the surrogates.
BOOKS = [
    "".join(map(chr, range(0x4E00 + 3000 * i, 0x4E00 + 3000 * i + n))) for i, n in ((0, 2999), (1, 1501))
]


def config_of(folder, **changes):
    """A tiny run on `folder`/corpus, or on the files of `folder` that `sources` names."""
    raw = base.get_config()
    changes.setdefault("model__family", family_for(changes.get("task__name", "language_model")))
    raw.update_from_flattened_dict(
        tiny_run.SETTINGS
        | {"data.sources": (str(folder / "corpus"),), "data.cache_dir": str(folder / "cache")}
        | {key.replace("__", "."): value for key, value in changes.items()}
    )
    return resolve_config(read_config(raw.to_dict()), 1)


def plan_of(corpus, config, derived):
    program = make_program(config, derived, corpus.tokenizer.vocab_size, jax.devices()[:1])
    return describe(corpus, program, pathlib.Path("runs/x"))


def read_and_predicted(corpus, sequences):
    """The tokens that the model reads and those that it predicts, from the batches: {document: list} each."""
    indices = np.arange(sequences.plan.num_rows)
    batch, pieces = sequences.read(indices), iter(sequences.spans(indices))
    found = {"tokens": {}, "targets": {}}
    for row in range(len(indices)):
        for segment in range(1, batch["segments"][row].max() + 1):
            doc, start, _ = next(pieces)
            for name, of in found.items():
                of.setdefault(doc, []).append((start, batch[name][row][batch["segments"][row] == segment]))
    return tuple(
        {
            doc: np.concatenate([part for _, part in sorted(parts, key=lambda x: x[0])])
            for doc, parts in of.items()
        }
        for of in found.values()
    )


def text_of(corpus, ids):
    """The texts of these documents, one after the other."""
    store = corpus.store
    return "".join(corpus.tokenizer.decode(store.tokens(int(i))[1:-1].tolist()) for i in ids)


def seen(corpus, sequences):
    """All tokens that the sequences read or predict, document by document: {document: set of positions}."""
    found = {}
    for doc, start, stop in sequences.spans(np.arange(sequences.plan.num_rows)):
        found.setdefault(doc, set()).update(range(start, stop))
    return found


@pytest.fixture
def books(tmp_path):
    """Two books of 2,999 and 1,501 different characters."""
    (tmp_path / "corpus").mkdir()
    for i, book in enumerate(BOOKS):
        (tmp_path / "corpus" / f"{i}.txt").write_text(book, encoding="utf-8")
    return tmp_path


@pytest.fixture
def many(tmp_path):
    tiny_run.write_corpus(tmp_path / "corpus")
    return tmp_path


def is_cut(task):
    """Whether the documents of a task are single texts without a label, whose ends can be held out."""
    return can_be_cut(examples_of(task))


@pytest.mark.parametrize("hold_out", ["auto", "tails"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("task", list(filter(is_cut, EXAMPLES)))
def test_of_few_documents_the_end_of_each_is_held_out_and_never_trained_on(books, hold_out, fraction, task):
    # A copied tail has to fit into what is held out as a whole, so the lengths of rows do not matter here.
    corpus = make_corpus(
        *config_of(books, data__hold_out=hold_out, data__held_out_fraction=fraction, task__name=task)
    )
    assert corpus.hold_out == "tails"
    train_ids = np.setdiff1d(np.arange(len(corpus.store)), corpus.held_out_ids)
    trained, held_out = seen(corpus, corpus.train), seen(corpus, corpus.held_out)
    assert not set(trained) & set(held_out)
    assert set(trained) == set(train_ids) and set(held_out) == set(corpus.held_out_ids)
    # Every token of either side is read or predicted, and nothing of the text is missing from both.
    for side in (trained, held_out):
        assert all(len(places) == corpus.store.lengths[doc] for doc, places in side.items())
    if task == "language_model":
        cuts = [int(len(book) * (1 - fraction)) for book in BOOKS]
        assert text_of(corpus, train_ids) == "".join(book[:cut] for book, cut in zip(BOOKS, cuts))
        tails = "".join(book[cut:] for book, cut in zip(BOOKS, cuts))
        assert text_of(corpus, corpus.held_out_ids) == tails
        assert corpus.held_out_bytes == len(tails.encode()) and corpus.held_out_text() == tails.encode()
    assert corpus.store.num_bytes.sum() == sum(len(book.encode()) for book in BOOKS)


def test_no_character_of_a_tail_is_an_input_or_a_target_of_training(books):
    """Each character is at one place of the books, so that it would be recognised."""
    corpus = make_corpus(*config_of(books, data__hold_out="tails"))
    tokenizer, characters = corpus.tokenizer, []
    for sequences in (corpus.train, corpus.held_out):
        inputs, targets = read_and_predicted(corpus, sequences)
        sets = []
        for doc in inputs:
            # The model reads all but eos and predicts all but bos.
            assert inputs[doc][0] == tokenizer.bos_id and targets[doc][-1] == tokenizer.eos_id
            sets.append(set(tokenizer.decode(inputs[doc][1:].tolist())))
            assert sets[-1] == set(tokenizer.decode(targets[doc][:-1].tolist()))
        characters.append(set().union(*sets))
    trained, held_out = characters
    assert not trained & held_out
    assert trained | held_out == set("".join(BOOKS))


def test_many_documents_are_held_out_whole_as_before_the_key(many):
    """With `auto` a corpus of many documents has the split, the store and the plans that it always had."""
    corpora = [make_corpus(*config_of(many, data__hold_out=hold_out)) for hold_out in ("auto", "documents")]
    for corpus in corpora:
        assert corpus.hold_out == "documents"
        # What these documents had before there was a choice: data cursors of such runs stay valid.
        assert corpus.fingerprint == (
            "1f2b836a2be0289efc43a2b3641e4c441ce90220bdd4b0965f1578e41817040089300e413b0638bb40bc2e3abe8fe523"
        )
        assert corpus.held_out_plan.fingerprint == "87b67d5cc074c6250394afece38268c7"
        assert len(corpus.held_out_ids) == 7
    assert len(list((many / "cache").glob("store-*"))) == 1


def test_a_config_without_the_keys_holds_out_whole_documents(books):
    config, _ = config_of(books)
    saved = json.loads(json.dumps(config.to_dict()))
    for key in ("hold_out", "held_out_sources", "split_on"):
        del saved["data"][key]
    old = complete_config(saved, "runs/old")["data"]
    assert (old["hold_out"], tuple(old["held_out_sources"]), old["split_on"]) == ("documents", (), "")


@pytest.mark.parametrize(
    "settings", [{}, {"data__split_on": "[一-丯]"}, {"data__hold_out": "tails"}], ids=str
)
def test_the_split_does_not_depend_on_the_number_of_workers_or_the_time(books, settings, monkeypatch):
    from llmjax.data.store import build

    monkeypatch.setattr(build, "_INLINE_BYTES", 0)
    found = []
    for workers in (1, 2):
        config, derived = config_of(
            books, data__num_workers=workers, data__cache_dir=str(books / str(workers)), **settings
        )
        for _ in range(2):
            corpus = make_corpus(config, derived)
            rows = {key: values.tolist() for key, values in corpus.held_out.read(np.arange(3)).items()}
            found.append((corpus.fingerprint, corpus.held_out_plan.fingerprint, corpus.held_out_bytes, rows))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize(
    "sizes, fraction, fair",
    [
        ([100] * 40, 0.1, True),
        ([100] * 39, 0.1, False),
        ([100] * 134, 0.03, True),
        ([100] * 133, 0.03, False),
        ([100] * 1000 + [11_111], 0.1, True),
        ([100] * 1000 + [11_200], 0.1, False),
        ([100], 0.5, False),
        ([100, 200], 0.5, False),
    ],
)
def test_whole_documents_are_fair_where_four_are_expected_and_none_is_a_tenth(sizes, fraction, fair):
    sizes, hashes = np.array(sizes, np.int64), np.arange(len(sizes), dtype=np.uint64)
    assert is_fair(sizes, fraction, hashes) is fair
    # Documents of the same text go to the same side, so a copy of each makes no difference.
    assert is_fair(np.repeat(sizes, 2), fraction, np.repeat(hashes, 2)) is fair


@pytest.mark.parametrize("texts", [1, 3, 30])
def test_the_same_texts_again_and_again_are_held_out_at_their_ends(texts, tmp_path):
    (tmp_path / "corpus").mkdir()
    rows = [json.dumps({"text": f"row {i % texts} " + "of words " * 20}) for i in range(600)]
    (tmp_path / "corpus" / "rows.jsonl").write_text("\n".join(rows))
    assert make_corpus(*config_of(tmp_path)).hold_out == "tails"


@pytest.mark.parametrize("number", [0, 1])
def test_auto_holds_out_ends_where_chance_puts_all_documents_on_one_side(number, many, monkeypatch):
    ids = (np.arange(40), np.arange(0))
    real = Store.split
    monkeypatch.setattr(
        Store, "split", lambda self, f: real(self, f) if len(self) != 40 else (ids[number], ids[1 - number])
    )
    assert make_corpus(*config_of(many)).hold_out == "tails"


def test_documents_too_short_to_be_cut_are_one_sentence_that_does_not_advise_to_cut_them(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "rows.jsonl").write_text('{"text": "a"}\n' * 300)
    with pytest.raises(
        UserError, match="at the end of each of the 300 documents .* leaves none .* longer documents$"
    ):
        make_corpus(*config_of(tmp_path))


def test_rows_are_counted_as_documents_before_auto_decides(tmp_path):
    (tmp_path / "corpus").mkdir()
    for count, hold_out in ((80, "documents"), (20, "tails")):
        rows = [json.dumps({"text": f"row {i} " + "of words " * 20}) for i in range(count)]
        (tmp_path / "corpus" / "rows.jsonl").write_text("\n".join(rows))
        assert make_corpus(*config_of(tmp_path)).hold_out == hold_out


def test_pieces_of_a_book_are_documents(books):
    """80 chapters are many documents: whole ones are held out."""
    chapters = [f"第{i}回 " + chr(0x4E00 + i) * (200 + i) + "\n" for i in range(80)]
    (books / "corpus" / "0.txt").write_text("".join(chapters), encoding="utf-8")
    (books / "corpus" / "1.txt").unlink()
    config, derived = config_of(books, data__split_on="^第.*回")
    corpus = make_corpus(config, derived)
    assert corpus.hold_out == "documents" and len(corpus.store) == 80
    assert [text_of(corpus, [i]) for i in range(80)] == chapters
    assert corpus.store.name(2) == "0.txt#3"
    plan = plan_of(corpus, config, derived)
    assert plan["corpus"].startswith("80 documents, ") and "cut at '^第.*回'" in plan["corpus"]
    # Another expression, or none, is another store.
    other = make_corpus(*config_of(books, data__split_on="第"))
    assert other.store.directory != corpus.store.directory


def test_a_pattern_that_matches_nowhere_is_said(books):
    config, derived = config_of(books, data__split_on="CHAPTER")
    corpus = make_corpus(config, derived)
    assert "data.split_on='CHAPTER' matches nowhere" in plan_of(corpus, config, derived)["corpus"]


@pytest.fixture
def own(many):
    """`many` with files of its own to hold out, one of which is also trained on word for word."""
    (many / "own").mkdir()
    (many / "own" / "a.txt").write_text("the words that are held out, every one of them " * 30)
    (many / "own" / "b.txt").write_text((many / "corpus" / "005.txt").read_text())
    return many


def test_files_of_ones_own_are_the_held_out_set(own):
    config, derived = config_of(own, data__held_out_sources=(str(own / "own"),))
    corpus = make_corpus(config, derived)
    assert [corpus.store.name(int(i)) for i in corpus.held_out_ids] == ["a.txt", "b.txt"]
    assert corpus.train_plan.num_documents == 40
    assert corpus.store.origins[corpus.held_out_ids].tolist() == [1, 1]
    text = b"".join((own / "own" / name).read_bytes() for name in ("a.txt", "b.txt"))
    assert corpus.held_out_text() == text and corpus.held_out_bytes == len(text)
    line = plan_of(corpus, config, derived)["held out"]
    assert line.startswith("data.held_out_sources, 2 files, 2 documents: ")
    assert "; data.held_out_fraction=0.1 is not used; " in line
    assert line.endswith("1 of 2 are trained on too, word for word")


def test_files_to_hold_out_have_no_say_in_the_tokenizer(own):
    settings = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 300}
    alone = make_corpus(*config_of(own, **settings))
    both = make_corpus(*config_of(own, data__held_out_sources=(str(own / "own" / "a.txt"),), **settings))
    assert alone.tokenizer.fingerprint == both.tokenizer.fingerprint
    assert alone.store.directory != both.store.directory


def test_which_files_are_held_out_is_part_of_the_data(own):
    """The same files on other sides are another store and another cursor."""
    a, b = (str(own / "own" / name) for name in ("a.txt", "b.txt"))
    corpus = str(own / "corpus")
    one = make_corpus(*config_of(own, data__sources=(corpus, a), data__held_out_sources=(b,)))
    two = make_corpus(*config_of(own, data__sources=(corpus, b), data__held_out_sources=(a,)))
    assert one.store.directory != two.store.directory and one.fingerprint != two.fingerprint


@pytest.mark.parametrize("way", ["itself", "a folder", "a link"])
def test_a_file_on_both_sides_is_refused(own, way):
    path = own / "corpus" / "003.txt"
    if way == "a link":
        path = own / "link.txt"
        path.symlink_to(own / "corpus" / "003.txt")
    name = str(own / "corpus") if way == "a folder" else str(path)
    with pytest.raises(UserError, match="data.held_out_sources name '.*which data.sources name too") as error:
        make_corpus(*config_of(own, data__held_out_sources=(name,)))
    assert ("and 39 more" in str(error.value)) == (way == "a folder")


@pytest.mark.parametrize(
    "name, words",
    [
        ("absent.txt", r"data.held_out_sources names '.*absent.txt', which does not exist"),
        ("*.none", r"data.held_out_sources names '.*', which matches no file"),
        ("empty.txt", "data.held_out_sources has no document of more than one token; name sources with text"),
    ],
)
def test_held_out_sources_that_will_not_do_are_named(own, name, words):
    (own / "empty.txt").write_text("")
    with pytest.raises(UserError, match=words):
        make_corpus(*config_of(own, data__held_out_sources=(str(own / name),)))


# At this fraction the hash holds out one of the two books.
FRACTION = 0.22
TAILS = "the last 10% of the characters of each document: 1.35 kB, 10.0% of the text"
LINES = {
    "tails by choice": ({"data__hold_out": "tails"}, TAILS),
    "tails by auto": (
        {},
        f"{TAILS}; whole documents (data.hold_out=documents) would be too few, or one of them too large",
    ),
    "documents": (
        {"data__hold_out": "documents", "data__held_out_fraction": FRACTION},
        "1 of 2 documents, whole, by a hash of each: ",
    ),
    "nothing": ({"data__held_out_fraction": 0.0}, "nothing, as data.held_out_fraction=0 says"),
}


@pytest.mark.parametrize("name", LINES)
def test_the_plan_says_what_is_held_out(books, name):
    settings, words = LINES[name]
    config, derived = config_of(books, **settings)
    line = plan_of(make_corpus(config, derived), config, derived)["held out"]
    assert line == words or (words.endswith(": ") and line.startswith(words)), line


def test_documents_of_several_fields_are_not_cut(books, monkeypatch):
    """A part of a translation would lack its other half."""

    class Pairs(Copies):
        fields = ("text", "other")

    monkeypatch.setitem(EXAMPLES, "copy", lambda setting: Pairs(setting.text_field))
    for settings, words in (
        ({"data__split_on": "a"}, "data.split_on='a' cuts documents of one text"),
        ({"data__hold_out": "tails"}, "data.hold_out='tails' cuts documents of one text"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(books, task__name="copy", **settings)
    rows = [json.dumps({"text": f"row {i} " + "of words " * 20, "other": "x"}) for i in range(9)]
    for path in (books / "corpus").iterdir():
        path.unlink()
    (books / "corpus" / "rows.jsonl").write_text("\n".join(rows))
    # Too few for a fair sample, and all the same whole: `auto` does not cut them.
    settings = {"data__held_out_fraction": 0.3, "task__name": "copy"}
    assert make_corpus(*config_of(books, **settings)).hold_out == "documents"


def test_texts_that_have_labels_are_not_cut(books):
    rows = [json.dumps({"text": f"row {i} " + "of words " * 20, "label": "ab"[i % 2]}) for i in range(30)]
    for path in (books / "corpus").iterdir():
        path.unlink()
    (books / "corpus" / "rows.jsonl").write_text("\n".join(rows))
    settings = {"data__held_out_fraction": 0.3, "task__name": "classification"}
    for more, words in (
        ({"data__hold_out": "tails"}, "data.hold_out='tails' cuts texts"),
        ({"data__length_points": ("0:16",)}, r"data.length_points=\('0:16',\) cuts rows"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(books, **settings, **more)
    config = config_of(books, classification__labels=("a", "b"), **settings)
    assert make_corpus(*config).hold_out == "documents"


def test_an_unknown_way_to_hold_out_is_one_sentence(books):
    with pytest.raises(UserError, match="data.hold_out='tail' must be one of auto, documents, tails"):
        config_of(books, data__hold_out="tail")


def test_probes_do_with_held_out_sources_alone(own):
    settings = {"evaluate__probes": ("position",), "data__held_out_fraction": 0.0}
    with pytest.raises(UserError, match="need held-out documents"):
        config_of(own, **settings)
    config_of(own, data__held_out_sources=(str(own / "own"),), **settings)


SHARED = pathlib.Path(os.environ.get("LLMJAX_SHARED", tiny_run.ROOT.parent / "shared")) / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real texts in {SHARED}")
@pytest.mark.slow
def test_real_books_are_cut_where_their_readers_would(tmp_path):
    path = SHARED / "lm_en" / "tinyshakespeare.txt"
    corpus = make_corpus(*config_of(tmp_path, data__sources=(str(path),)))
    text = path.read_text(encoding="utf-8")
    # The validation set of nanoGPT.
    assert corpus.held_out_text().decode() == text[int(len(text) * 0.9) :]
    novels = (str(SHARED / "lm_zh" / "novels"),)
    corpus = make_corpus(*config_of(tmp_path, data__sources=novels, data__split_on="第.{1,9}回"))
    names = [corpus.store.name(i).split("#")[0] for i in range(len(corpus.store))]
    # Dream of the Red Chamber has 120 chapters, Journey to the West 100.
    assert names.count("hongloumeng.txt") > 120 and names.count("xiyouji.txt") > 100
    assert text_of(corpus, range(len(corpus.store))) == "".join(
        path.read_text(encoding="utf-8") for path in sorted(SHARED.glob("lm_zh/novels/*.txt"))
    )
