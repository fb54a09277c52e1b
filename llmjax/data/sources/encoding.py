"""Turns bytes into text: reads other encodings than UTF-8, deals with bytes that do not belong to the encoding, and
guesses the encoding of such a file for the error message."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator

from llmjax.data.sources.compression import open_unpacked
from llmjax.data.sources.formats import PARQUET_MAGIC
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import BAD_TEXT, Reading, ReadStats
from llmjax.errors import UserError
from llmjax.names import plain_name

# How many bytes a guess looks at. A choice: enough text to tell languages apart.
_SAMPLE = 1 << 16
# The bytes that are converted at once. A choice: large enough to be fast.
_CHUNK = 1 << 20
# A byte that does not belong to the encoding becomes this character, which `_AsUTF8` writes as the byte 0xff. UTF-8
# has no such byte either, so the reader of the document finds it and obeys data.on_bad_text.
_UNKNOWN = "\udcff"
codecs.register_error("llmjax_unknown", lambda error: (_UNKNOWN, error.end))  # type: ignore[attr-defined]

# Encoding -> the most frequent characters of the languages that are written in it. They make up much of any text.
_CANDIDATES = {
    "gb18030": "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生，。、：“”",
    "big5": "的一是不了人我在有他這為之大來以個中上們到說國和地也子時道出而要於就下得可你年生，。、：「」",
    "shift_jis": "のにはをたがでてとしれさあいうかくこすそなまもらりるんー、。「」ッアイスト",
    "euc_jp": "のにはをたがでてとしれさあいうかくこすそなまもらりるんー、。「」ッアイスト",
    "euc_kr": "이다는을를의에가하고지은도로한그나사기어자리서아라인대니만해",
}
# A guess needs at least this share of frequent characters among those that are not ASCII. A choice: text in the right
# encoding has about twice as many, and text in a wrong one hardly any.
_COMMON = 0.2
# The same for western Europe, whose languages have only a few letters beside ASCII. Other encodings have letters in the
# same places, so nearly all characters must be among these. A choice.
_LATIN, _LATIN_LETTERS, _LATIN_COMMON = "cp1252", "éèàêçôùâîûëïüöäßñáíóúãõåæøÉÀÖÄÜ’‘“”–—…«»°", 0.9
# With fewer bytes than this that are not ASCII, charset-normalizer would guess at random. A choice.
_ENOUGH = 8
# UTF-8 with a few damaged places has at least this many good characters beyond ASCII for each bad one. Text of another
# encoding that is read as UTF-8 is mostly bad. A choice.
_GOOD_PER_BAD = 10
# Another encoding must have this many times more frequent characters than the one of the config. A choice.
_MORE_SENSE = 4
# The encodings, by Python's names, whose texts are compared with `_CANDIDATES`: those that share the same bytes.
_NAMED = frozenset({*_CANDIDATES, "gbk", "gb2312", "cp949", "cp932", "big5hkscs"})
# The longest character of any encoding, in bytes.
_LONGEST_CHARACTER = 4


@contextlib.contextmanager
def open_text(file: SourceFile, reading: Reading, stats: ReadStats) -> Iterator[io.BufferedReader]:
    """Opens a file as a stream of its text in UTF-8, without its compression.

    If `reading.encoding` is UTF-8, these are the bytes of the file, unchecked. Raises `UserError` for damage, see
    `open_unpacked`, and, while reading, for bytes that do not belong to another encoding. Raises `WrongEncodingError`
    if the first bytes show that the whole file is in another encoding, even if it could be decoded.
    """
    with open_unpacked(file, reading, stats) as stream:
        head = stream.peek(_SAMPLE)[:_SAMPLE]
        if found := other_encoding(head, reading.encoding):
            raise WrongEncodingError(
                f"data.encoding={reading.encoding!r} and file {file.path!r} looks like {found}: set "
                f"--config.data.encoding={found} if all files are, or else convert it (iconv)."
            )
        # A download or a disk that failed can leave a file of zeros, which are valid UTF-8.
        zeros = len(head) >= _ENOUGH and 2 * head.count(0) > len(head)
        if reading.is_utf8 and zeros and not _marked_encoding(head):
            raise WrongEncodingError(
                f"data.sources names {file.path!r}, which is no text (most of its bytes are 0): repair or remove it."
            )
        if reading.is_utf8:
            yield stream
        else:
            yield io.BufferedReader(_AsUTF8(stream, file, reading), _CHUNK)


class WrongEncodingError(UserError):
    """A file is in another encoding than the config says, or in none."""


def other_encoding(data: bytes, encoding: str) -> str | None:
    """The encoding of a file if its first bytes, `data`, show that it is not the one of the config.

    Some texts can be decoded in a wrong encoding, and a model would learn to write the nonsense that comes out. Returns
    None if nothing is wrong, or if decoding will fail anyway.
    """
    name = codecs.lookup(encoding).name
    if name in ("utf-8", "utf-8-sig"):
        return _wide_encoding(data)
    if _is_utf8(data):
        return "utf-8"
    if name not in _NAMED:
        return None
    shares = {other: _common_share(data, other, common) for other, common in _CANDIDATES.items()}
    best = max(shares, key=lambda other: shares[other])
    # What is common in one language may also be in another, so the text must make no sense in the named encoding.
    sense = max(_common_share(data, name, common) for common in _CANDIDATES.values())
    return best if shares[best] >= max(_COMMON, _MORE_SENSE * sense) else None


def _wide_encoding(data: bytes) -> str | None:
    """The encoding of a text in UTF-32 or UTF-16 without a byte order mark, or None if `data` is no such text.

    Its characters have bytes of 0 at the same places, and bytes of 0 are valid UTF-8.
    """
    if len(data) < _ENOUGH or _marked_encoding(data):
        return None
    # The share of zeros in the first, second, third and fourth byte of every four.
    zeros = [data[i::4].count(0) / len(data[i::4]) for i in range(4)]
    for order, found in ((zeros, "utf-32-le"), (zeros[::-1], "utf-32-be")):
        if order[3] == 1 and order[2] > 0.5 and order[0] * _GOOD_PER_BAD < 1:
            return found
    for low, high, found in ((0, 1, "utf-16-le"), (1, 0, "utf-16-be")):
        if zeros[high] + zeros[high + 2] > 1 and (zeros[low] + zeros[low + 2]) * _GOOD_PER_BAD < 1:
            return found
    return None


def _marked_encoding(data: bytes) -> str | None:
    """The encoding of a text that begins with the byte order mark of UTF-32 or UTF-16, or None if it does not."""
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                       (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):  # fmt: skip
        if data.startswith(mark):
            return name
    return None


def _is_utf8(data: bytes) -> bool:
    """Whether the beginning of a file is UTF-8 with enough characters beyond ASCII to be no accident."""
    try:
        # An incremental decoder accepts a character that is cut at the end.
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return sum(ord(c) > 127 for c in text) >= _ENOUGH


class _AsUTF8(io.RawIOBase):
    """A stream that converts another stream from `reading.encoding` to UTF-8.

    A byte that does not belong to the encoding raises `UserError` if `data.on_bad_text` is `error`. Otherwise it
    becomes a byte that is not UTF-8, so that the reader of the document skips or replaces it.
    """

    def __init__(self, stream: io.BufferedReader, file: SourceFile, reading: Reading):
        self._stream, self._file, self._reading = stream, file, reading
        self._decoder = codecs.getincrementaldecoder(reading.encoding)(
            "strict" if reading.on_bad_text == "error" else "llmjax_unknown"
        )
        # Bytes of the other encoding that were decoded, UTF-8 that waits to be read, and whether the stream has ended.
        self._consumed, self._ready, self._ended = 0, memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        # A chunk may hold no whole character. To return 0 would mean the end.
        while not self._ready and not self._ended:
            data = self._stream.read(_CHUNK)
            self._ended = not data
            self._ready = memoryview(self._decode(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decode(self, data: bytes) -> bytes:
        """The next bytes of the stream in UTF-8."""
        # Bytes of a character that the last chunk cut in two, if the codec keeps them as bytes.
        pending = self._decoder.getstate()[0]
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeError as error:
            start = getattr(error, "start", 0)
            at = self._consumed - len(pending if isinstance(pending, bytes) else b"") + start
            raise UserError(
                f"data.encoding={self._reading.encoding!r} and file {self._file.path!r} is not of this encoding at "
                f"byte {at}: {advice(self._file, self._reading)}"
            ) from None
        self._consumed += len(data)
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            # A codec with escapes can spell half of a surrogate pair, which becomes bytes that are not UTF-8.
            return text.encode("utf-8", "surrogatepass")


def decode(
    data: bytes, file: SourceFile, reading: Reading, stats: ReadStats, where: str, offset: int
) -> str | None:
    """Decodes UTF-8, and deals with other bytes as `reading.on_bad_text` says.

    Args:
      data: the bytes of a field or a line.
      file: the file that they come from.
      reading: how files are read.
      stats: counts a text with U+FFFD in place of bad bytes as replaced.
      where: what errors call the place, such as `line 17 of ...`.
      offset: where in the file `data` begins, in bytes.

    Returns the text, or None if the document is to be left out. Raises `UserError` if `on_bad_text` is `error`.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if reading.on_bad_text == "error":
            raise not_utf8(file, reading, where, offset + error.start) from None
    if not BAD_TEXT[reading.on_bad_text]:
        return None
    stats.replaced += 1
    return data.decode("utf-8", "replace")


def not_utf8(file: SourceFile, reading: Reading, where: str, offset: int) -> UserError:
    """The error for text that is not UTF-8 at byte `offset` of its file. `where` says where the text lies."""
    return UserError(
        f"data.on_bad_text = 'error' and {where} is not UTF-8 at byte {offset}: {advice(file, reading)}"
    )


def advice(file: SourceFile, reading: Reading) -> str:
    """What to do about a file that is not in the encoding of the config, as the end of an error message.

    If the encoding can be guessed, the advice is to set it.
    """
    with contextlib.suppress(UserError, OSError), open_unpacked(file, reading, ReadStats()) as stream:
        sample = stream.read(_SAMPLE)
        # The strings of Parquet are UTF-8, whatever data.encoding says.
        if sample.startswith(PARQUET_MAGIC):
            return "correct it, or set skip or replace."
        guess = guess_encoding(sample)
        if guess and codecs.lookup(guess) != codecs.lookup(reading.encoding):
            return f"it looks like {guess}, which --config.data.encoding={guess} reads."
    return "correct it, name its encoding in data.encoding, or set skip or replace."


def guess_encoding(data: bytes) -> str | None:
    """Guesses the encoding of a text that is not UTF-8, from its first bytes.

    Looks for a byte order mark, then for frequent characters of Chinese, Japanese, Korean and western Europe, and then
    asks charset-normalizer if it is installed. Returns a name that Python knows, or None if there is no likely one.
    """
    if marked := _marked_encoding(data):
        return marked
    mended = data.decode("utf-8", "replace")
    bad, foreign = mended.count("\ufffd"), sum(ord(c) > 127 for c in mended)
    # This is UTF-8 that is damaged here and there.
    if foreign > _GOOD_PER_BAD * bad:
        return None
    shares = {name: _common_share(data, name, common) for name, common in _CANDIDATES.items()}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] >= _COMMON:
        return best
    if sum(byte > 127 for byte in data) < _ENOUGH:
        return None
    if _common_share(data, _LATIN, _LATIN_LETTERS) >= _LATIN_COMMON:
        return _LATIN
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return None
    found = from_bytes(data).best()
    return None if found is None or found.encoding in ("utf_8", "ascii") else found.encoding


def _common_share(data: bytes, encoding: str, common: str) -> float:
    """The share of the characters beyond ASCII that are among `common`. It is 0 if `data` cannot be in `encoding`."""
    # The sample may end within a character, so up to 3 bytes are left out.
    for cut in range(_LONGEST_CHARACTER):
        with contextlib.suppress(UnicodeDecodeError):
            text = data[: len(data) - cut].decode(encoding)
            foreign = [c for c in text if ord(c) > 127]
            return sum(c in common for c in foreign) / len(foreign) if foreign else 0.0
    return 0.0


def without_surrogates(text: str, reading: Reading, stats: ReadStats, where: str) -> str | None:
    """Deals with lone surrogates as `reading.on_bad_text` says.

    JSON can spell half of a surrogate pair, as in `"\\ud800"`, which is not Unicode text and cannot be encoded. Returns
    the text without them, or None if the document is to be left out. Raises `UserError` if `on_bad_text` is `error`.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if reading.on_bad_text == "error":
            raise UserError(
                f"data.on_bad_text = 'error' and {plain_name(where)} has a lone surrogate at character "
                f"{error.start} of its text: correct it, or set skip or replace."
            ) from None
    if not BAD_TEXT[reading.on_bad_text]:
        return None
    stats.replaced += 1
    # Through UTF-16, where two halves that belong together become one character and only lone ones are bad.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
