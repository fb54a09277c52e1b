"""Bytes to text: other encodings than UTF-8, what is done about bytes that are none, and a guess at what they are."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator

from llmjax.data.sources.compression import open_unpacked
from llmjax.data.sources.listing import SourceFile
from llmjax.data.sources.reading import BAD_TEXT, Reading, ReadStats
from llmjax.errors import UserError
from llmjax.names import plain_name

# Bytes that a guess looks at.
_SAMPLE = 1 << 16
_CHUNK = 1 << 20
# What a byte that the encoding does not know becomes on the way to UTF-8: a byte that UTF-8 does not know either.
_UNKNOWN = "\udcff"
codecs.register_error("llmjax_unknown", lambda error: (_UNKNOWN, error.end))  # type: ignore[attr-defined]

# Encoding -> characters that make up much of any text that is written in it.
_CANDIDATES = {
    "gb18030": "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生，。、：“”",
    "big5": "的一是不了人我在有他這為之大來以個中上們到說國和地也子時道出而要於就下得可你年生，。、：「」",
    "shift_jis": "のにはをたがでてとしれさあいうかくこすそなまもらりるんー、。「」ッアイスト",
    "euc_jp": "のにはをたがでてとしれさあいうかくこすそなまもらりるんー、。「」ッアイスト",
    "euc_kr": "이다는을를의에가하고지은도로한그나사기어자리서아라인대니만해",
}
# Of the characters that are not ASCII, the share that must be common for a guess.
_COMMON = 0.2
# The same for languages with a few letters beside those of ASCII, which other encodings have in the same places.
_LATIN, _LATIN_LETTERS, _LATIN_COMMON = "cp1252", "éèàêçôùâîûëïüöäßñáíóúãõåæøÉÀÖÄÜ’‘“”–—…«»°", 0.9
# Bytes that are not ASCII, below which charset-normalizer has too little to go by.
_ENOUGH = 8


@contextlib.contextmanager
def open_text(file: SourceFile, reading: Reading, stats: ReadStats) -> Iterator[io.BufferedReader]:
    """The file's text as UTF-8, unpacked. Where `reading.encoding` is UTF-8 its bytes are given as they are."""
    with open_unpacked(file, reading, stats) as stream:
        if reading.is_utf8:
            yield stream
        else:
            yield io.BufferedReader(_AsUTF8(stream, file, reading), _CHUNK)


class _AsUTF8(io.RawIOBase):
    """A stream of text in another encoding as UTF-8.

    Bytes that are not of the encoding raise `UserError`, or become a byte that is not UTF-8, so that whoever reads the
    document does with it what `data.on_bad_text` says.
    """

    def __init__(self, stream: io.BufferedReader, file: SourceFile, reading: Reading):
        self._stream, self._file, self._reading = stream, file, reading
        self._decoder = codecs.getincrementaldecoder(reading.encoding)(
            "strict" if reading.on_bad_text == "error" else "llmjax_unknown"
        )
        self._consumed, self._ready, self._ended = 0, memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready and not self._ended:
            data = self._stream.read(_CHUNK)
            self._ended = not data
            self._ready = memoryview(self._decode(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decode(self, data: bytes) -> bytes:
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
        except UnicodeEncodeError:  # a codec of escapes can spell half of a surrogate pair
            return text.encode("utf-8", "surrogatepass")


def decode(
    data: bytes, file: SourceFile, reading: Reading, stats: ReadStats, where: str, offset: int
) -> str | None:
    """UTF-8 to text; None where the document is to be left out. `data` begins at `offset` of its file."""
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
    """The error for bytes that are not UTF-8."""
    return UserError(
        f"data.on_bad_text = 'error' and {where} is not UTF-8 at byte {offset}: {advice(file, reading)}"
    )


def advice(file: SourceFile, reading: Reading) -> str:
    """What to do about a file that is not of its encoding: a guess at the encoding if there is one."""
    with contextlib.suppress(UserError, OSError), open_unpacked(file, reading, ReadStats()) as stream:
        guess = guess_encoding(stream.read(_SAMPLE))
        if guess and codecs.lookup(guess) != codecs.lookup(reading.encoding):
            return f"it looks like {guess}, which --config.data.encoding={guess} reads."
    return "correct it, name its encoding in data.encoding, or set skip or replace."


def guess_encoding(data: bytes) -> str | None:
    """What the bytes of a text that is not UTF-8 are likely to be; None where nothing is likely.

    Looks for byte order marks, then for what is common in Chinese, Japanese, Korean and western Europe, then asks
    charset-normalizer.
    """
    for mark, name in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                       (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):  # fmt: skip
        if data.startswith(mark):
            return name
    mended = data.decode("utf-8", "replace")
    bad, foreign = mended.count("\ufffd"), sum(ord(c) > 127 for c in mended)
    if foreign > 10 * bad:
        return None  # UTF-8 that is damaged here and there
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
    """Of the characters that are not ASCII, how many are common; 0 where the bytes are not of this encoding."""
    for cut in range(4):  # the sample may end within a character
        with contextlib.suppress(UnicodeDecodeError):
            text = data[: len(data) - cut].decode(encoding)
            foreign = [c for c in text if ord(c) > 127]
            return sum(c in common for c in foreign) / len(foreign) if foreign else 0.0
    return 0.0


def without_surrogates(text: str, reading: Reading, stats: ReadStats, where: str) -> str | None:
    """JSON may spell half of a surrogate pair, `"\\ud800"`, which is no Unicode text."""
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
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
