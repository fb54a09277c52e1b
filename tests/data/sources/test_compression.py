"""Compressed files: cut anywhere, of several members, followed by other bytes, misnamed, and larger than they look."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

import pytest

from llmjax.data.sources import compression
from llmjax.data.sources.compression import COMPRESSIONS
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.reading import Reading
from llmjax.data.sources.records import read_records
from llmjax.errors import UserError


def zstandard(data):
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


FREE_BYTES = 1 << 21
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}
ROWS = b"".join(json.dumps({"text": f"row {i} {os.urandom(6).hex()}"}).encode() + b"\n" for i in range(40))


def texts(path, **options):
    return [r.text for f in list_sources([str(path)]) for r in read_records(f, Reading(**options))]


def test_every_compression_is_tested():
    assert PACK.keys() == COMPRESSIONS.keys()


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_cut_anywhere_is_an_error_that_names_it(suffix, tmp_path):
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = PACK[suffix](ROWS) + PACK[suffix](ROWS)
    member = len(PACK[suffix](ROWS))
    path.write_bytes(whole)
    assert len(texts(path)) == 80
    for cut in {
        *range(20),
        *range(20, len(whole), 37),
        *range(member - 9, member + 9),
        *range(len(whole) - 9, len(whole)),
    }:
        path.write_bytes(whole[:cut])
        if cut == member:
            assert len(texts(path)) == 40  # what is left is a whole file
            continue
        with pytest.raises(UserError, match=rf"rows\.jsonl\{suffix}.*cannot be read") as error:
            texts(path)
        assert "\n" not in str(error.value) and "JSON" not in str(error.value)


def test_a_zstandard_file_cut_between_blocks_is_an_error(tmp_path):
    """The library reads what is there as if the frame ended so."""
    module = pytest.importorskip("zstandard")
    path, written = tmp_path / "rows.jsonl.zst", io.BytesIO()
    writer = module.ZstdCompressor().stream_writer(written, closefd=False)
    for _ in range(3):
        writer.write(ROWS)
        writer.flush(module.FLUSH_BLOCK)
    path.write_bytes(written.getvalue())
    with pytest.raises(UserError, match="cut short"):
        texts(path)
    writer.close()
    path.write_bytes(written.getvalue())
    assert len(texts(path)) == 120


@pytest.mark.parametrize("suffix", PACK)
def test_bytes_after_the_end_are_an_error_and_padding_is_none(suffix, tmp_path):
    path = tmp_path / f"rows.jsonl{suffix}"
    for tail in (b"garbage", b"g", b"\nmore of it" * 100):
        path.write_bytes(PACK[suffix](ROWS) + tail)
        with pytest.raises(UserError, match=rf"rows\.jsonl\{suffix}.*cannot be read"):
            texts(path)
    path.write_bytes(PACK[suffix](b"") + PACK[suffix](ROWS))
    assert len(texts(path)) == 40
    if suffix in (".gz", ".xz"):
        path.write_bytes(PACK[suffix](ROWS) + bytes(8))
        assert len(texts(path)) == 40


def test_frames_to_skip_and_frames_with_large_windows_are_read(tmp_path):
    module = pytest.importorskip("zstandard")
    parameters = module.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    # Without its size in the header the frame needs the whole window.
    packer = module.ZstdCompressor(compression_params=parameters).compressobj()
    frame = packer.compress(ROWS) + packer.flush()
    assert module.get_frame_parameters(frame).window_size == 1 << 28
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    (tmp_path / "a.jsonl.zst").write_bytes(skipped + frame + skipped + zstandard(ROWS))
    assert len(texts(tmp_path / "a.jsonl.zst")) == 80


@pytest.mark.parametrize("suffix", PACK)
def test_the_content_says_that_a_file_is_compressed_whatever_its_name(suffix, tmp_path):
    for name in ("rows.jsonl", "rows.json", "text.txt", "part-00000"):
        (tmp_path / name).write_bytes(PACK[suffix](ROWS))
        assert "".join(texts(tmp_path / name))[:6] in ("row 0 ", '{"text')
    (tmp_path / f"plain.txt{suffix}").write_bytes(b"just text")
    with pytest.raises(UserError, match="cannot be read"):
        texts(tmp_path / f"plain.txt{suffix}")


@pytest.mark.parametrize("suffix", PACK)
def test_a_small_file_that_unpacks_to_very_much_is_refused_unless_allowed(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "FREE_BYTES", FREE_BYTES)
    path = tmp_path / f"bomb.txt{suffix}"
    path.write_bytes(PACK[suffix](b"a " * (FREE_BYTES + 5000)))
    with pytest.raises(UserError, match=r"data\.max_expansion=9 and .*bomb.* unpacks to more.*raise data"):
        texts(path, max_expansion=9)
    (text,) = texts(path, max_expansion=10**8)
    assert len(text) == 2 * FREE_BYTES + 10_000
    path.write_bytes(PACK[suffix](b"a " * (FREE_BYTES // 2)))
    assert len(texts(path, max_expansion=1)) == 1


def test_archives_are_named_for_what_they_are(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(__file__, "x.txt")
    (tmp_path / "b.txt").write_bytes(b"PK\x03\x04 and so on")
    for name, kind in (("a.tar.gz", "tar archive"), ("b.txt", "zip archive")):
        with pytest.raises(UserError, match=rf"{name}.*{kind}.*unpack it"):
            texts(tmp_path / name)


@pytest.mark.parametrize("outer", PACK)
@pytest.mark.parametrize("inner", PACK)
def test_a_file_that_is_compressed_twice_is_named_for_it(inner, outer, tmp_path):
    path = tmp_path / f"a.txt{inner}{outer}"
    path.write_bytes(PACK[outer](PACK[inner](b"text")))
    with pytest.raises(UserError, match="which is compressed twice: unpack it"):
        texts(path)


@pytest.mark.parametrize(
    "text", ["Rar! he cried.", "x" * 257 + "ustar is a word", "PK 4", "BZh9 begins it", "PAR1"]
)
def test_text_with_the_words_of_archives_stays_text(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path / "a.txt") == [text]
