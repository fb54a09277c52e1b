"""Tokenizers of Hugging Face and of GGUF files: ids of the package tokenizers and of llama.cpp."""

import json
import pickle
import sys

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llmjax.convert.gguf.writing import header_bytes
from llmjax.data.checksums import DamagedError
from llmjax.data.tokenizer.byte_tokenizer import ByteTokenizer
from llmjax.data.tokenizer.formats import word_piece
from llmjax.data.tokenizer.formats.byte_bpe import SPLITTINGS, byte_characters, definition, name_of
from llmjax.data.tokenizer.formats.gguf_vocabulary import gguf_facts
from llmjax.data.tokenizer.imported import tokenizer_for
from llmjax.data.tokenizer.json_tokenizer import JsonTokenizer, SpecialIds
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import StreamDecoder
from llmjax.data.tokenizer.vocabulary import vocabulary_of
from llmjax.errors import UserError

HARD = [
    "", " ", "  two  spaces ", "\n\n\t x\r\n", "Hello world, it's 12345 o'clock. I'LL", "中文字，和English。",
    "🦙 emoji 👩‍👩‍👧",
    "<|end|><|begin|>", "a <|end|> b", "naïve ﬁne e\u0301", "\u2581mark\u2581", "\x00\x7f\xa0", "１２３ Ⅷ ½", "a" * 300,
]  # fmt: skip
PIECES = ["<|end|>", "<|begin|>", "<tool>", *byte_characters(), "Ġt", "Ġth", "he", "ä¸Ń", "ä¸", "in", "Ġthe"]
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "h"), ("ä", "¸"), ("ä¸", "Ń"), ("i", "n"), ("Ġth", "e")]


def byte_bpe(name="gpt-2"):
    text = definition(PIECES, MERGES, SPLITTINGS[name], special=[0, 1], added=[2])
    return JsonTokenizer(text, SpecialIds(bos=1, eos=0))


def sentencepiece_like():
    """A tokenizer as the one of Llama 2, learned from a little text."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    library.train_from_iterator(["the quick brown fox", "the lazy dog, the end", "中文字"] * 3, trainer)
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    contents = json.loads(library.to_str())
    # The trainer makes the byte pieces special tokens.
    contents["added_tokens"] = [
        token for token in contents["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return JsonTokenizer(json.dumps(contents), SpecialIds(bos=1, eos=2, unk=0))


WORDS = [
    "[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "qu", "##ick", "brown", "fox", ",", ".", "中",
    "文", "字", "in", "2024", "end", "##e", "e", "##x", "t", "##w", "##o", "##s", "na", "##ive", "[", "]", "cl", "##fo",
]  # fmt: skip


def word_pieces(pieces=WORDS, **settings):
    return JsonTokenizer(
        word_piece.definition(pieces, settings), SpecialIds(bos=3, eos=4, pad=0, unk=2, mask=5)
    )


MAKERS = {
    **{name: (lambda name=name: byte_bpe(name)) for name in SPLITTINGS},
    "spaces": sentencepiece_like,
    "words": word_pieces,
}
# What comes back from those that know no other characters than those of their vocabulary.
LOSE = {"words": "the quick brown fox, in 2024."}


@pytest.fixture(params=MAKERS, scope="module")
def tokenizer(request):
    return MAKERS[request.param]()


@pytest.mark.parametrize("name", MAKERS)
def test_every_text_comes_back(name):
    tokenizer = MAKERS[name]()
    for text in [LOSE[name]] if name in LOSE else HARD:
        if tokenizer.lossless or "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text, text
    assert tokenizer.lossless == (tokenizer.text_prefix == b"")


def test_special_tokens_are_text_where_a_text_spells_them(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.reserved_ids}
    for i in special:
        assert tokenizer.id_to_bytes(i) == b""
        assert special.isdisjoint(tokenizer.encode(f"a {tokenizer.piece(i)}{tokenizer.piece(i)} b"))


def test_streamed_text_is_decoded_text_although_characters_are_spread_over_tokens(tokenizer):
    spread = any(len(tokenizer.encode(text)) > len(text) for text in ("中", "🦙"))
    assert spread != tokenizer.is_word_piece
    for text in HARD:
        for continues in (False, True):
            ids, stream = tokenizer.encode(text, continues), StreamDecoder(tokenizer, continues)
            assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids, continues)


def test_pieces_of_a_long_text_have_the_ids_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr("llmjax.data.tokenizer.cuts.PIECE_CHARS", 100)
    text = "the quick brown fox, 中文字 in 2024.\n\nthe   end\n" * 40
    pieces = list(tokenizer.pieces([text[:77], text[77:1000], text[1000:]]))
    assert "".join(pieces) == text and len(pieces) > 10
    ids = [i for number, piece in enumerate(pieces) for i in tokenizer.encode(piece, continues=number > 0)]
    assert ids == tokenizer.encode(text)


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    for copy in (load_tokenizer(tmp_path / "t"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert [copy.encode(text) for text in HARD] == [tokenizer.encode(text) for text in HARD]
    (tmp_path / "t" / "huggingface.json").write_text(tokenizer.definition + " ")
    with pytest.raises(DamagedError, match="is not what was saved there"):
        load_tokenizer(tmp_path / "t")


def test_ids_are_those_of_the_package_that_reads_the_file(tokenizer):
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    for text in HARD:
        if "<|" not in text:
            assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids, text


def test_ids_without_a_piece_are_reserved():
    tokenizer = byte_bpe()
    more = JsonTokenizer(tokenizer.definition, tokenizer.special, tokenizer.vocab_size + 5)
    assert more.vocab_size == len(PIECES) + 5 and set(more.reserved_ids) == {
        *range(len(PIECES), more.vocab_size)
    }
    assert more.decode([len(PIECES)]) == "" and more.fingerprint != tokenizer.fingerprint


def test_an_added_token_that_is_not_special_is_one_id_and_text():
    tokenizer = byte_bpe()
    assert tokenizer.encode("<tool>") == [2] and tokenizer.decode([2]) == "<tool>"


def folder_of(path, tokenizer, **config):
    path.mkdir()
    (path / "tokenizer.json").write_text(tokenizer.definition)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_folder_says_which_tokens_begin_and_end_texts(tmp_path):
    names = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "pad_token": None}
    folder = folder_of(tmp_path / "a", byte_bpe(), **names)
    for path in (folder, folder / "tokenizer.json"):
        found = load_tokenizer(path)
        assert (found.bos_id, found.eos_id, found.special.pad) == (1, 0, None)
        assert found.fingerprint == byte_bpe().fingerprint
    assert tokenizer_for(folder, len(PIECES) + 2).vocab_size == len(PIECES) + 2


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"type": "Unigram"},
            "it is a Unigram tokenizer, and byte-level BPE.* give its SentencePiece model",
        ),
        ({"type": "WordPiece", "vocab": {"a": 0}}, "the package tokenizers cannot read it"),
        ({"merges": [["x", "notthere"]]}, "the package tokenizers cannot read it"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path, change, message):
    contents = json.loads(byte_bpe().definition)
    contents["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(DamagedError, match=rf"tokenizer .* cannot be read \({message}"):
        load_tokenizer(tmp_path)


def test_without_the_package_the_sentence_says_what_to_install(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "a", byte_bpe())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"by the package tokenizers; pip install llmjax\[convert\]"):
        load_tokenizer(folder)


def test_an_unknown_special_token_is_one_sentence(tmp_path):
    folder = folder_of(tmp_path / "a", byte_bpe(), bos_token="<nowhere>")
    with pytest.raises(DamagedError, match="bos_token='<nowhere>', which is in no vocabulary"):
        load_tokenizer(folder)


def write_gguf(path, facts):
    path.write_bytes(header_bytes(facts, {}, {}))
    return path


def test_a_gguf_file_gives_back_the_tokenizer_that_was_written_to_it(tokenizer, tmp_path):
    if not tokenizer.lossless:
        with pytest.raises(UserError, match="no name in GGUF files here"):
            gguf_facts(tokenizer)
        return
    found = load_tokenizer(write_gguf(tmp_path / "a.gguf", gguf_facts(tokenizer)))
    assert [found.encode(text) for text in HARD] == [tokenizer.encode(text) for text in HARD]
    assert (found.bos_id, found.eos_id, found.vocab_size) == (1, 0, len(PIECES))
    assert found.encode("<tool>") == [2]


@pytest.mark.parametrize("path", ["mistral_v1.model", None])
def test_so_does_one_of_sentencepiece_and_one_of_bytes(path, tmp_path, request):
    own = ByteTokenizer(3)
    if path:
        own = load_tokenizer(request.getfixturevalue("shared_data") / "tokenizers/spm" / path)
    found = load_tokenizer(write_gguf(tmp_path / "a.gguf", gguf_facts(own)))
    assert [found.encode(text) for text in HARD] == [own.encode(text) for text in HARD]
    for name in ("bos_id", "eos_id", "unk_id", "vocab_size", "text_prefix", "lossless", "reserved_ids"):
        assert getattr(found, name) == getattr(own, name), name
    assert [found.id_to_bytes(i) for i in range(own.vocab_size)] == [
        own.id_to_bytes(i) for i in range(own.vocab_size)
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model='bert', which is not known"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            "tokenizer.ggml.pre='tekken', which is not known here, but only gpt-2",
        ),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "has a piece twice"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type is no list of 266 numbers"),
        ({"tokenizer.ggml.bos_token_id": 999}, "bos_token_id=999 is no id"),
        ({"tokenizer.ggml.merges": ["a b"]}, "the package tokenizers cannot read it"),
    ],
)
def test_a_damaged_vocabulary_in_a_gguf_file_is_one_sentence(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(write_gguf(tmp_path / "a.gguf", {**gguf_facts(byte_bpe()), **change}))


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return load_tokenizer(shared_data / "tokenizers/gpt2")


def test_gpt2_files_give_the_ids_of_llama_cpp(gpt2, shared_data):
    folder = shared_data / "tokenizers/llamacpp_vectors"
    texts = (folder / "gpt-2.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "gpt-2.out").read_text().rstrip("\n").split("\n")
    expected = [[int(word) for word in line.split()] for line in lines]
    assert len(texts) == len(expected) + 1 > 40
    for text, ids in zip(texts, expected, strict=False):
        assert gpt2.encode(text) == ids, text
        assert gpt2.decode(ids) == text
    assert gpt2.lossless and gpt2.bos_id == gpt2.eos_id == 50256


def test_the_names_of_splittings_are_found_again():
    for name in SPLITTINGS:
        assert name_of(json.loads(byte_bpe(name).definition)) == name
    # As GPT-2 and SmolLM2 are written in their own files.
    plain = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__())
    digits = json.loads(pre_tokenizers.Digits(individual_digits=True).__getstate__())
    assert name_of({"pre_tokenizer": plain}) == "gpt-2"
    assert name_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, plain]}}) == "smollm"
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = byte_bpe("smollm")
    for text in HARD:
        parts = [part for part, _ in own.pre_tokenizer.pre_tokenize_str(text)]
        split = tokenizers.Tokenizer.from_str(ours.definition).pre_tokenizer.pre_tokenize_str(text)
        assert [part for part, _ in split] == parts


def test_vocabularies_are_arrays_of_any_number(tmp_path):
    facts = gguf_facts(byte_bpe())
    path = write_gguf(tmp_path / "a.gguf", facts)
    reader = gguf.GGUFReader(path)
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert types == facts["tokenizer.ggml.token_type"] and np.unique(types).tolist() == [1, 3, 4]


BERT_HARD = [
    *HARD, "Ünïcödé İSTANBUL Straße ﬁ Ω", "我爱北京天安门，2008年。A股", "日本語のテキスト 한국어",
    "a\u200bb\u00adc\ufeffd\u0000\ufffde", "don't stop-me_now @user #tag $5.00 50%",
    "[CLS] [MASK][SEP] ##ing [unused1] [UNK]",
    "𠮷野家 ㍿ ①",
    "e\u0301\u0323 \u2028x\u3000y",
    "\t\r\n tabs\x1b[0m", "supercalifragilisticexpialidocious " * 2, "x" * 101, "👨‍👩‍👧‍👦🇨🇳", "नमस्ते العربية עברית ไทย",
]  # fmt: skip


@pytest.mark.parametrize("name", ["bert_uncased", "bert_base_chinese"])
@pytest.mark.parametrize("lowers", [None, False])
def test_a_vocabulary_of_bert_gives_the_ids_of_the_package(shared_data, tmp_path, name, lowers):
    vocabulary = shared_data / f"tokenizers/bert/{name}_vocab.txt"
    path = tmp_path / "vocab.txt"
    path.write_bytes(vocabulary.read_bytes())
    if lowers is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowers}))
    own = load_tokenizer(tmp_path)
    pieces = path.read_text(encoding="utf-8").split("\n")[:-1]
    ids = {piece: i for i, piece in enumerate(pieces)}
    library = tokenizers.BertWordPieceTokenizer(ids, lowercase=lowers is None)
    library._tokenizer.encode_special_tokens = True
    for text in BERT_HARD:
        expected = library.encode(text, add_special_tokens=False).ids
        assert own.encode(text) == expected, text
        assert expected == [] or own.unk_id in expected or own.decode(expected)
    special = {"bos": "[CLS]", "eos": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    assert {role: getattr(own, f"{role}_id") for role in special} == {
        role: ids[piece] for role, piece in special.items()
    }
    assert not own.lossless and own.vocab_size == len(pieces) and ids["[unused1]"] in own.reserved_ids
    assert vocabulary_of(own).mask_id == ids["[MASK]"]


def test_a_tokenizer_json_of_bert_is_the_same_as_its_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    of_text = load_tokenizer(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.json").write_text(of_text.definition)
    of_json = load_tokenizer(tmp_path)
    assert of_json.fingerprint == of_text.fingerprint and of_json.special.bos == 3
    assert of_text.decode(of_text.encode("THE Naïve, fox 中文!")) == "the naive, fox中文"
    # A vocabulary with capitals keeps them.
    assert word_pieces([*WORDS, "A"]).encode("A") == [len(WORDS)]
    assert word_pieces([*WORDS, "A"], do_lower_case=True).encode("A") == [2]


@pytest.mark.parametrize(
    "lines, message", [("a\nb\na\n[UNK]", "has a piece twice"), ("a\nb", r"has no line \[UNK\]")]
)
def test_a_text_that_is_no_vocabulary_is_one_sentence(tmp_path, lines, message):
    (tmp_path / "vocab.txt").write_text(lines)
    with pytest.raises(DamagedError, match=message):
        load_tokenizer(tmp_path / "vocab.txt")
