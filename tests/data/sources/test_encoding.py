"""Text in other encodings than UTF-8: read where they are named, guessed where they are not."""

import builtins
import gzip
import json

import pytest

from llmjax.data.sources.encoding import guess_encoding, other_encoding
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.reading import Reading, ReadStats
from llmjax.data.sources.records import read_records
from llmjax.errors import UserError

TEXTS = {
    "gb18030": "列位看官：你道此书从何而来？说起根由虽近荒唐，细按则深有趣味。待在下将此来历注明，方使阅者了然不惑。\n",
    "big5": "列位看官：你道此書從何而來？說起根由雖近荒唐，細按則深有趣味。待在下將此來歷注明，方使閱者了然不惑。\n",
    "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。\n",
    "euc_jp": "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。\n",
    "euc_kr": "모든 국민은 인간으로서의 존엄과 가치를 가지며, 행복을 추구할 권리를 가진다.\n",
    "latin-1": "Où sont les neiges d'antan ? Voilà l'été, déjà passé; le garçon naïf rêve à la forêt.\n",
    "utf-16": "Text, 文字 and 𝄞.\n",
    "utf-16-le": "Text, 文字 and 𝄞.\n",
    "utf-32": "Text, 文字 and 𝄞.\n",
    "koi8_r": "Все счастливые семьи похожи друг на друга.\n",
    "iso2022_jp": "名前はまだ無い。\n",
}


def texts(path, stats=None, **options):
    return [r.text for f in list_sources([str(path)]) for r in read_records(f, Reading(**options), stats)]


@pytest.mark.parametrize("encoding", TEXTS)
def test_every_encoding_is_read_from_text_json_and_compressed_files(encoding, tmp_path):
    text = TEXTS[encoding] * 3
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    rows = "".join(
        json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in text.splitlines(keepends=True)
    )
    (tmp_path / "c.jsonl").write_bytes(rows.encode(encoding))
    (tmp_path / "d.json").write_bytes(json.dumps([{"text": text}], ensure_ascii=False).encode(encoding))
    assert texts(tmp_path, encoding=encoding) == [text, text, *[TEXTS[encoding]] * 3, text]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "shift_jis", "utf-8"])
def test_characters_are_whole_wherever_chunks_end(encoding, tmp_path, monkeypatch):
    from llmjax.data.sources import encoding as module
    from llmjax.data.sources import text as text_module

    whole = TEXTS.get(encoding, TEXTS["gb18030"]) * 5
    (tmp_path / "a.txt").write_bytes(whole.encode(encoding))
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(module, "_CHUNK", size)
        monkeypatch.setattr(text_module, "CHUNK_BYTES", size)
        assert texts(tmp_path, encoding=encoding) == [whole]


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "shift_jis", "euc_jp", "euc_kr", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
def test_a_file_that_is_not_utf8_is_told_what_it_looks_like(encoding, name, tmp_path):
    data = (
        TEXTS[encoding] * 4
        if name == "a.txt"
        else json.dumps({"text": TEXTS[encoding] * 4}, ensure_ascii=False)
    )
    data = data.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(
        UserError, match=rf"{name}.* looks like {encoding}, which --config\.data\.encoding={encoding}"
    ):
        texts(tmp_path)


def test_other_guesses_need_charset_normalizer_and_are_done_without(monkeypatch):
    pytest.importorskip("charset_normalizer")
    assert guess_encoding((TEXTS["latin-1"] * 20).encode("latin-1")) == "cp1252"
    text = TEXTS["koi8_r"] * 20
    data = text.encode("koi8_r")
    guess = guess_encoding(data)
    assert guess is not None and data.decode(guess) == text
    real = builtins.__import__

    def without(module, *args, **options):
        if module == "charset_normalizer":
            raise ImportError(module)
        return real(module, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert guess_encoding(data) is None
    assert guess_encoding(TEXTS["gb18030"].encode("gb18030")) == "gb18030"


def test_damaged_utf8_is_not_taken_for_another_encoding():
    data = (TEXTS["gb18030"] * 20).encode()
    assert guess_encoding(data[:500] + b"\xff" + data[500:]) is None


def test_a_name_that_is_no_encoding_of_text_is_refused():
    for name in ("gb99", "hex", "rot13", "", "utf 8 or so", "bz2"):
        with pytest.raises(UserError, match=r"data\.encoding='.*' is no encoding that Python knows"):
            Reading(encoding=name)


def test_bytes_that_are_not_of_the_encoding_follow_the_rule_for_bad_text(tmp_path):
    good = TEXTS["gb18030"].encode("gb18030")
    (tmp_path / "a.txt").write_bytes(good + b"\xff" + good)
    with pytest.raises(
        UserError, match=rf"data\.encoding='gb18030' and file .*a\.txt' .* at byte {len(good)}:"
    ):
        texts(tmp_path, encoding="gb18030")
    stats = ReadStats()
    assert texts(tmp_path, stats, encoding="gb18030", on_bad_text="skip") == []
    assert stats.skipped == 1
    mended = f"{TEXTS['gb18030']}\ufffd{TEXTS['gb18030']}"
    assert texts(tmp_path, stats, encoding="gb18030", on_bad_text="replace") == [mended]
    assert stats.replaced == 1
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xc4\xe3"}\n{"text": "x\xff"}\n{"text": "\xba\xc3"}\n')
    assert texts(tmp_path, encoding="gb18030", on_bad_text="skip") == ["你", "好"]


def test_a_text_left_out_for_its_last_byte_is_left_out_whole(tmp_path, monkeypatch):
    from llmjax.data.sources import text as text_module

    monkeypatch.setattr(text_module, "CHUNK_BYTES", 16)
    (tmp_path / "a.txt").write_bytes(b"text " * 50 + b"\xff")
    (tmp_path / "b.txt").write_bytes(b"text " * 50)
    stats = ReadStats()
    assert texts(tmp_path, stats, on_bad_text="skip") == ["text " * 50]
    assert (stats.documents, stats.skipped) == (1, 1)
    with pytest.raises(UserError, match="not UTF-8 at byte 250:"):
        texts(tmp_path)
    assert texts(tmp_path, on_bad_text="replace")[0] == "text " * 50 + "\ufffd"


# Pairs of (the encoding of a file, the encoding of the config) in which the text decodes to nonsense, or might.
MISTAKEN = [
    *(("utf-8", named) for named in ("gb18030", "big5", "shift_jis", "latin-1", "utf-16-le")),
    ("big5", "gb18030"), ("gb18030", "big5"), ("shift_jis", "gb18030"), ("euc_kr", "gbk"),
]  # fmt: skip


@pytest.mark.parametrize("real, named", MISTAKEN)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.py"])
def test_a_text_that_only_seems_to_be_of_the_named_encoding_is_refused(real, named, name, tmp_path):
    text = TEXTS.get(real, TEXTS["gb18030"]) * 40
    text = json.dumps({"text": text}, ensure_ascii=False) if name.endswith("jsonl") else text
    (tmp_path / name).write_bytes(text.encode(real))
    for on_bad_text in ("error", "replace"):
        with pytest.raises(
            UserError, match=rf"data\.encoding='{named}' and file .*{name}' looks like {real}: set "
        ):
            texts(tmp_path, encoding=named, on_bad_text=on_bad_text)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.md", "a.jsonl", "a.py"])
def test_utf16_and_utf32_without_a_byte_order_mark_are_not_taken_for_utf8(encoding, name, tmp_path):
    text = json.dumps({"text": "plain text\n" * 9})
    (tmp_path / name).write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=rf"data\.encoding='utf-8' and file .* looks like {encoding}: set "):
        texts(tmp_path)
    if name != "a.jsonl":
        stats = ReadStats()
        assert texts(tmp_path, stats, on_bad_text="skip") == []
        assert stats.skipped == 1
    assert texts(tmp_path, encoding=encoding) == [text if name != "a.jsonl" else "plain text\n" * 9]


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("text", TEXTS.values())
def test_a_text_in_the_named_encoding_is_never_taken_for_another(encoding, text):
    data = (text * 40).encode(encoding, "ignore")
    assert other_encoding(data, encoding) is None


def test_text_with_a_few_zeros_is_utf8():
    for text in ("a\0b" * 50, "\0" * 50, "\0", "a\0", ""):
        assert other_encoding(text.encode(), "utf-8") is None


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.py", "part-0"])
def test_a_file_of_zeros_is_no_text(name, tmp_path):
    (tmp_path / name).write_bytes(b"text" + bytes(5000))
    with pytest.raises(
        UserError, match=rf"{name}', which is no text \(most of its bytes are 0\): repair or remove it"
    ):
        texts(tmp_path / name)
    (tmp_path / name).write_text(json.dumps({"text": "a\0" * 9}))
    assert len(texts(tmp_path / name)) == 1
