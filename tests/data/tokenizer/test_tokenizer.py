"""Tokenizers: exact round trips for any Unicode text, special ids, streaming, determinism, errors."""

import hashlib
import pickle
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from sections import section

from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import StreamDecoder
from llmjax.data.tokenizer.training import train_tokenizer
from llmjax.errors import UserError

NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n",
    "\t\t x\r",
    "a\0b\0",
    "▁",
    "▁▁a ▁ b▁",
    "a▁",
    "<s>",
    "</s><pad><unk><mask>",
    "<reserved_0>",
    "<0x0A>",
    "<0xE2><0x96><0x81>",
    "👩‍👩‍👧 é e\u0301 ﬁ Ａ ①",
    "中文，标点。\n　　段落",
    "\ufeffx\ufeff",
    "\ufffe\uffff\U0010ffff\u2028\u0085",
    "▅ ⁇ \ufffd",
    "def f(x):\n    return  x  # 注释\n\n\n",
    " leading",
    "trailing ",
    "1234567890",
    "\x01\x1f\x7f",
    "عربى עברית हिन्दी ไทย",
]


@pytest.fixture(scope="module")
def texts():
    root = Path(sysconfig.get_paths()["stdlib"])
    return [*[(root / f"{name}.py").read_text() for name in ("bisect", "heapq", "shlex", "textwrap")], *NASTY]


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte"])
def tokenizer(request, texts):
    return train_tokenizer(section("tokenizer", kind=request.param, vocab_size=700), texts)


@pytest.fixture(scope="module")
def bpe(texts):
    return train_tokenizer(section("tokenizer", vocab_size=700), texts)


def random_texts(count):
    """Random strings over all of Unicode, over its start, and over few characters that make specials."""
    rng = np.random.default_rng(0)
    few = [*"ab<>s/0x \n\t\r▁é中", "<s>", "<0x0A>", "▁▁", "    "]
    for i in range(count):
        length = int(rng.integers(0, 60))
        if i % 3 == 0:
            yield "".join(few[j] for j in rng.integers(0, len(few), length))
        else:
            codes = rng.integers(0, 0x110000 if i % 3 == 1 else 0x3000, length)
            yield "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def test_any_text_comes_back_bit_for_bit(tokenizer):
    for text in [*NASTY, *random_texts(1000)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.id_to_bytes(i) for i in ids) == text.encode()
    assert tokenizer.lossless


def test_no_text_produces_a_special_id(tokenizer):
    t = tokenizer
    special = {t.pad_id, t.bos_id, t.eos_id, t.mask_id, *t.reserved_ids}
    assert len(special) == 4 + 16
    for text in [*NASTY, *random_texts(300)]:
        assert not special & set(tokenizer.encode(text))
    assert all(tokenizer.id_to_bytes(i) == b"" for i in special)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.eos_id]) == "x"


def test_ids_fill_the_vocabulary_and_no_more(tokenizer):
    ids = {i for text in NASTY for i in tokenizer.encode(text)}
    assert max(ids) < tokenizer.vocab_size
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(IndexError, match="must lie in"):
            tokenizer.decode([bad])
        with pytest.raises(IndexError, match="must lie in"):
            tokenizer.id_to_bytes(bad)


def test_a_stream_of_ids_decodes_to_the_whole(tokenizer):
    for text in [*NASTY, *random_texts(200)]:
        stream = StreamDecoder(tokenizer)
        pushed = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pushed) + stream.flush() == text
        assert "\ufffd" in text or "\ufffd" not in "".join(pushed)


def test_a_broken_stream_ends_in_a_replacement_character(tokenizer):
    ids = tokenizer.encode("\U0010ffff")[:-1]
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids) == ""
    assert stream.flush() == "\ufffd" == tokenizer.decode(ids)


def test_decode_takes_arrays_and_iterators(tokenizer):
    ids = tokenizer.encode("a b")
    assert tokenizer.decode(np.array(ids, np.int32)) == tokenizer.decode(iter(ids)) == "a b"


def test_a_lone_surrogate_is_refused_in_one_sentence(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for copy in (load_tokenizer(tmp_path / "t"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert [copy.encode(t) for t in NASTY] == [tokenizer.encode(t) for t in NASTY]
        assert (copy.pad_id, copy.mask_id, copy.reserved_ids) == (
            tokenizer.pad_id,
            tokenizer.mask_id,
            tokenizer.reserved_ids,
        )


def test_special_ids_stand_at_the_front(bpe):
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id, bpe.mask_id) == (0, 1, 2, 4)
    assert bpe.reserved_ids == tuple(range(5, 21))
    assert bpe.vocab_size == 700


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_depends_on_the_texts_and_not_on_their_order(kind, texts):
    config = section("tokenizer", kind=kind, vocab_size=600)
    once = train_tokenizer(config, texts)
    again = train_tokenizer(config, iter(texts[::-1]))
    other = train_tokenizer(config, texts[1:])
    assert once.fingerprint == again.fingerprint != other.fingerprint
    model = once.__reduce__()[1][0]
    assert once.fingerprint == hashlib.sha256(model).hexdigest()


def test_training_reads_a_bounded_sample(texts):
    seen = []
    config = section("tokenizer", vocab_size=400, train_bytes=20_000)
    small = train_tokenizer(config, (seen.append(t) or t for t in texts))
    large = train_tokenizer(section("tokenizer", vocab_size=400), texts)
    assert len(seen) == len(texts)
    assert small.fingerprint != large.fingerprint


def test_code_takes_few_tokens(texts):
    code = "".join(texts[:4])
    tokenizer = train_tokenizer(section("tokenizer", vocab_size=1500), texts)
    assert len(code) / len(tokenizer.encode(code)) > 3
    assert len(tokenizer.encode("        ")) == 1


def test_a_small_vocabulary_keeps_chinese_lossless(texts):
    """More distinct characters than ids: the rare ones are spelled in bytes, the frequent ones keep an id."""
    text = "".join(chr(0x4E00 + i) * (1 if i > 40 else 50) for i in range(2000)) + "\n" + "的一是" * 500
    tokenizer = train_tokenizer(section("tokenizer", vocab_size=400, character_coverage=1.0), [text, *texts])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("的")) == 1
    assert len(tokenizer.encode(chr(0x4E00 + 1999))) == 3


@pytest.mark.parametrize("mark", ["\0", "▅", "▁", "\t"])
def test_passages_with_nul_or_marks_of_sentencepiece_are_learnt_from(mark, texts):
    text = texts[1].replace("e", "e" + mark)
    tokenizer = train_tokenizer(section("tokenizer", vocab_size=600), [text])
    assert len(tokenizer.encode(texts[1])) < len(texts[1]) / 1.5
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_that_imitates_special_pieces_or_holds_control_characters_can_be_trained_on():
    texts = ["<s> <pad> <0x0A> <mask> a▁b a\0b ▅ <reserved_3>\n" * 50, "x" * 100_000, "\t\t\t"]
    tokenizer = train_tokenizer(section("tokenizer", vocab_size=300), texts)
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_too_large_for_the_corpus_names_the_largest_that_works(kind):
    texts = ["the quick brown fox jumps over the lazy dog 你好\n" * 3]
    with pytest.raises(UserError, match=r"^tokenizer.vocab_size = 5000 .* use at most \d+, ") as error:
        train_tokenizer(section("tokenizer", kind=kind, vocab_size=5000), texts)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    assert train_tokenizer(section("tokenizer", kind=kind, vocab_size=largest), texts).vocab_size == largest


def test_too_little_text_for_any_vocabulary_says_so():
    with pytest.raises(UserError, match=r"no smaller one would do: add text, or set tokenizer\.kind to byte"):
        train_tokenizer(section("tokenizer"), ["ab"])
    with pytest.raises(UserError, match="hold no text"):
        train_tokenizer(section("tokenizer"), [])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "wordpiece"}, "tokenizer.kind='wordpiece' is not known; use one of bpe"),
        ({"vocab_size": 100}, "tokenizer.vocab_size = 100 leaves no room"),
        ({"train_bytes": 0}, "tokenizer.train_bytes=0"),
        ({"character_coverage": 1.5}, "tokenizer.character_coverage=1.5"),
        ({"num_reserved": -1}, "tokenizer.num_reserved=-1"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        section("tokenizer", **change)


def test_a_path_that_holds_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "junk.model").write_bytes(b"junk")
    for path, message in [
        ("absent.model", "is no tokenizer"),
        (".", "is no tokenizer"),
        ("junk.model", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=f"tokenizer .*{message}"):
            load_tokenizer(tmp_path / path)


def test_nothing_is_printed(texts, tmp_path, capfd):
    train_tokenizer(section("tokenizer", vocab_size=400), texts).save(tmp_path)
    load_tokenizer(tmp_path).encode("x")
    (tmp_path / "tokenizer.model").write_bytes(b"junk")
    for fails in (lambda: load_tokenizer(tmp_path), lambda: train_tokenizer(section("tokenizer"), ["a\0b"])):
        with pytest.raises(UserError):
            fails()
    assert capfd.readouterr() == ("", "")


def test_the_byte_tokenizer_is_its_specials_and_256_bytes():
    tokenizer = ByteTokenizer(num_reserved=3)
    assert tokenizer.vocab_size == 5 + 3 + 256
    assert tokenizer.encode("a中") == [8 + b for b in "a中".encode()]


def test_mistral_is_lossless_without_its_dummy_prefix(shared_data):
    import sentencepiece

    path = shared_data / "tokenizers/spm/mistral_v1.model"
    tokenizer = load_tokenizer(path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.lossless
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (32000, 1, 2, 0)
    for text in [*NASTY, *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = StreamDecoder(tokenizer)
        assert "".join(stream.push(i) for i in ids) + stream.flush() == text
        if "▁" not in text:
            assert ids == original.encode(text)
    later = StreamDecoder(tokenizer, continues=True)
    assert "".join(later.push(i) for i in tokenizer.encode("world")) == " world"


@pytest.mark.parametrize("name, pad, bos, eos", [("t5_32k", 0, 0, 1), ("google_test_model", 0, 1, 2)])
def test_models_that_normalize_say_so_and_decode_as_sentencepiece_does(shared_data, name, pad, bos, eos):
    import sentencepiece

    path = shared_data / f"tokenizers/spm/{name}.model"
    tokenizer = load_tokenizer(path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert not tokenizer.lossless
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (pad, bos, eos)
    for text in ["Hello  world", "ﬁne", "", "a\nb", "naïve 中文 end"]:
        ids = tokenizer.encode(text)
        assert ids == original.encode(text)
        assert tokenizer.decode(ids) == original.decode(ids)
        stream = StreamDecoder(tokenizer)
        assert "".join(stream.push(i) for i in ids) + stream.flush() == original.decode(ids)


@pytest.mark.parametrize("novel, least", [("hongloumeng", 4.2), ("xiyouji", 3.8)])
def test_a_chinese_novel_fits_the_default_vocabulary(shared_data, novel, least):
    text = (shared_data / f"lm_zh/novels/{novel}.txt").read_bytes().decode()
    tokenizer = train_tokenizer(section("tokenizer"), [text])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > least
