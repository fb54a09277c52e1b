"""Long texts are cut where the tokenizer cannot notice: the tokens of the pieces are those of the whole."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest
from sections import section

from llmjax.data.tokenizer import cuts
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.cuts import cut_text, neighbours
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.model_file import is_unigram
from llmjax.data.tokenizer.passages import cut_passages
from llmjax.data.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from llmjax.data.tokenizer.training import train_tokenizer

ENGLISH = (
    "Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, "
)
CHINESE = "列位看官：你道此书从何而来？说起根由虽近荒唐，细按则深有趣味。\n　　待在下将此来历注明，方使阅者了然不惑。"
SPECIAL = "<pad> </s> ▁▁ a▁b \t\t  \r\n\n x=1\u0301 ﬁ\u200b 👩‍👩‍👧 \0 "


def random_text(length):
    rng = np.random.default_rng(7)
    codes = np.concatenate(
        [rng.integers(0, 0x110000, length), rng.integers(0, 0x3000, length), rng.integers(32, 127, length)]
    )
    return "".join(chr(c) for c in rng.permutation(codes) if not 0xD800 <= c < 0xE000)


TEXTS = {
    "English": ENGLISH * 60,
    "Chinese": CHINESE * 60,
    "code": (Path(sysconfig.get_paths()["stdlib"]) / "textwrap.py").read_text(),
    "mixed": (ENGLISH + CHINESE + SPECIAL) * 30,
    "random Unicode": random_text(3000),
    "spaces and line ends": (" " * 37 + "\n" * 11 + "word") * 80,
    "one letter": "a" * 3000 + "b" * 3000,
}
FOREIGN = ("mistral_v1", "t5_32k", "google_test_model")


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte", *FOREIGN])
def tokenizer(request):
    if request.param in FOREIGN:
        path = request.getfixturevalue("shared_data") / f"tokenizers/spm/{request.param}.model"
        return load_tokenizer(path)
    return train_tokenizer(section("tokenizer", kind=request.param, vocab_size=900), [*TEXTS.values()])


def is_trained_unigram(tokenizer):
    return (
        tokenizer.lossless and isinstance(tokenizer, SentencePieceTokenizer) and is_unigram(tokenizer._model)
    )


def score(tokenizer, ids):
    return sum(tokenizer._processor.get_score(i) for i in ids)


@pytest.mark.parametrize("name", TEXTS)
def test_the_tokens_of_the_pieces_are_those_of_the_whole(name, tokenizer, monkeypatch):
    text, whole = TEXTS[name], tokenizer.encode(TEXTS[name])
    monkeypatch.setattr(cuts, "MOST_CHARS", 1 << 20)
    for size in (60, 700):
        for key in ("PIECE_CHARS", "UNIGRAM_PIECE_CHARS"):
            monkeypatch.setattr(cuts, key, size)
        pieces = list(tokenizer.pieces([text]))
        assert "".join(pieces) == text
        ids = [i for k, piece in enumerate(pieces) for i in tokenizer.encode(piece, continues=k > 0)]
        if is_trained_unigram(tokenizer):
            # SentencePiece breaks ties between orders of the same pieces by how float32 rounds their sum.
            assert score(tokenizer, ids) == pytest.approx(score(tokenizer, whole), rel=1e-9)
            assert sorted(ids) == sorted(whole) and tokenizer.decode(ids) == text
        else:
            assert ids == whole
        if name in ("English", "code", "mixed"):
            assert len(pieces) > len(text) / size / 4


def test_pieces_depend_on_the_text_and_not_on_its_chunks(tokenizer, monkeypatch):
    for key in ("PIECE_CHARS", "UNIGRAM_PIECE_CHARS"):
        monkeypatch.setattr(cuts, key, 100)
    monkeypatch.setattr(cuts, "MOST_CHARS", 900)
    for text in TEXTS.values():
        pieces = list(tokenizer.pieces([text]))
        assert max(map(len, pieces)) <= 900 + cuts.LOOK_AHEAD
        for size in (1, 77, 100, 5000):
            chunks = [text[i : i + size] for i in range(0, len(text), size)]
            assert list(tokenizer.pieces(chunks)) == pieces


def test_a_text_without_a_place_to_cut_is_cut_after_so_many_characters(monkeypatch):
    monkeypatch.setattr(cuts, "MOST_CHARS", 1000)
    pieces = list(cut_text(["a" * 3500], lambda text, i: False, 100))
    assert [len(piece) for piece in pieces] == [1000, 1000, 1000, 500]


def test_a_cut_is_the_last_allowed_one_before_the_length_of_a_piece_or_the_first_after_it():
    text = "".join(f"{i:04d} " for i in range(200))
    assert [len(p) for p in cut_text([text], lambda text, i: text[i] == " ", 23)][:3] == [19, 20, 20]
    assert next(len(p) for p in cut_text([text], lambda text, i: i % 100 == 99, 30)) == 99
    assert list(cut_text([], lambda text, i: True, 5)) == []


def test_neighbours_are_all_pairs_within_pieces():
    assert neighbours(["abc", "d", "ca"]) == {"ab", "bc", "ca"}


def test_a_byte_is_cut_from_its_neighbours_anywhere(monkeypatch):
    monkeypatch.setattr(cuts, "PIECE_CHARS", 10)
    assert [len(piece) for piece in ByteTokenizer().pieces(["x" * 95])] == [10] * 5 + [45]


def test_passages_of_a_text_in_chunks_are_those_of_the_whole():
    for text in TEXTS.values():
        text = text * 3
        whole = list(cut_passages([text]))
        assert "".join(whole) == text
        for size in (1000, 4096, 4097, 10_000):
            assert list(cut_passages(text[i : i + size] for i in range(0, len(text), size))) == whole


def test_training_on_chunks_gives_the_same_tokenizer():
    config = section("tokenizer", vocab_size=700)
    texts = [TEXTS["English"], TEXTS["Chinese"] * 3, TEXTS["code"]]
    chunks = ((text[i : i + 5000] for i in range(0, len(text), 5000)) for text in texts)
    whole, in_chunks = train_tokenizer(config, texts), train_tokenizer(config, chunks)
    assert whole.fingerprint == in_chunks.fingerprint
