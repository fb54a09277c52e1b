"""Tokenizers that others made: folders of Hugging Face, models with pieces that a text could spell, spaces at seams."""

import io
import json

import pytest
import sentencepiece

from llmjax.data.checksums import DamagedError
from llmjax.data.tokenizer.loading import load_tokenizer
from llmjax.data.tokenizer.tokenizer import StreamDecoder

FOREIGN = ("mistral_v1", "t5_32k", "google_test_model")
TEXTS = [
    "Hello world",
    "  two  spaces ",
    "中文字 end",
    "中",
    "a\nb\n\nc",
    "",
    " ",
    "<pad></s><s>",
    "x <unk> y",
    "naïve ﬁne",
]


def make_model(**options):
    model, texts = (
        io.BytesIO(),
        ["the quick brown fox jumps over the lazy dog " * 3, "<pad> and <mask> in a text"] * 20,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=3, hard_vocab_limit=False,
        **{"vocab_size": 300, "byte_fallback": True, "model_type": "bpe"} | options,
    )  # fmt: skip
    return model.getvalue()


KINDS = {
    "controls": {"control_symbols": ["<pad>", "<mask>"]},
    "user-defined": {"user_defined_symbols": ["<pad>", "<mask>"]},
    "own ids": {"pad_id": 3, "user_defined_symbols": ["<mask>"]},
    "unigram, user-defined": {"user_defined_symbols": ["<pad>", "<mask>"], "model_type": "unigram", "vocab_size": 310},
    "ordinary pieces": {"split_by_unicode_script": False, "vocab_size": 330},
    "without bytes": {"byte_fallback": False, "vocab_size": 60, "user_defined_symbols": ["<pad>"]},
    "identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                 "user_defined_symbols": ["<pad>"]},
    "suffixes": {"treat_whitespace_as_suffix": True, "user_defined_symbols": ["<pad>"]},
    "no prefix": {"add_dummy_prefix": False},
}  # fmt: skip


@pytest.fixture(scope="module", params=[*KINDS, *FOREIGN])
def tokenizer(request, tmp_path_factory):
    if request.param in FOREIGN:
        return load_tokenizer(
            request.getfixturevalue("shared_data") / f"tokenizers/spm/{request.param}.model"
        )
    path = tmp_path_factory.mktemp("model") / "a.model"
    path.write_bytes(make_model(**KINDS[request.param]))
    return load_tokenizer(path)


def test_a_special_piece_that_is_written_in_a_text_is_text(tokenizer):
    special = {
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.mask_id,
        *tokenizer.reserved_ids,
    }
    special -= {tokenizer.unk_id}
    for text in ("<pad>", "a <pad> b", "<mask>", "</s><s>", "[MASK]", "<reserved_0>"):
        assert not special & set(tokenizer.encode(text)), text
    assert all(tokenizer.id_to_bytes(i) == b"" for i in special)


def test_streamed_text_is_decoded_text(tokenizer):
    ids = [*range(0, tokenizer.vocab_size, max(tokenizer.vocab_size // 500, 1))]
    for some in [*map(tokenizer.encode, TEXTS), ids, ids[::-1], [tokenizer.bos_id, *tokenizer.encode(" a")]]:
        for continues in (False, True):
            stream = StreamDecoder(tokenizer, continues)
            assert "".join(stream.push(i) for i in some) + stream.flush() == tokenizer.decode(some, continues)


def test_a_text_and_its_continuation_join_to_the_whole(tokenizer):
    text = "the quick brown fox jumps"
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert whole.strip() == text
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:], continues=True) == whole


def hugging_face(folder):
    folder.mkdir()
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_a_folder_of_hugging_face_gives_its_sentencepiece_model(tmp_path):
    folder = hugging_face(tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(make_model())
    direct = load_tokenizer(folder / "tokenizer.model")
    assert load_tokenizer(folder).fingerprint == direct.fingerprint
    direct.save(tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").fingerprint == direct.fingerprint


def test_a_folder_of_hugging_face_without_such_a_model_is_read_by_its_tokenizer_json(tmp_path):
    with pytest.raises(DamagedError, match=r"hf/tokenizer\.json' cannot be read \(it is another kind of BPE"):
        load_tokenizer(hugging_face(tmp_path / "hf"))
