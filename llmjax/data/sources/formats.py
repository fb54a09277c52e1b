"""The suffixes of file names, and what they say about the content of a file."""

from __future__ import annotations

import os
from collections.abc import Collection

# Suffixes of compressed files. A second suffix before one of these says what is compressed, as in `a.json.gz`.
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# JSON with one object in each line.
LINE_SUFFIXES = (".jsonl", ".ndjson")
# JSON in any layout. Many such files are settings and not a corpus, so folders are searched with more care for them.
JSON_SUFFIXES = (".json",)
# Tables with cells between commas, and with cells between tabs.
COMMA_SUFFIXES = (".csv",)
TAB_SUFFIXES = (".tsv",)
PARQUET_SUFFIX = ".parquet"
# The bytes that every Parquet file begins with.
PARQUET_MAGIC = b"PAR1"
# A choice: texts, markup and program code that people train on. A file of another suffix can still be named itself.
# fmt: off
TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".srt", ".py",
    ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".swift",
    ".js", ".jsx", ".ts", ".tsx", ".css", ".sh", ".sql", ".r", ".jl", ".lua", ".rb", ".pl", ".php", ".hs", ".ml", ".ex",
    ".erl", ".f90", ".toml", ".yaml", ".yml", ".ini", ".cfg",
}
# fmt: on
# Suffixes that say little: people keep rows of JSON under them, too, so that the content decides.
VAGUE_SUFFIXES = (".txt", ".text")
# Format, a key of `records.READERS` -> the suffixes of its files.
SUFFIXES: dict[str, Collection[str]] = {
    "parquet": (PARQUET_SUFFIX,),
    "rows": (*LINE_SUFFIXES, *JSON_SUFFIXES),
    "table": (*COMMA_SUFFIXES, *TAB_SUFFIXES),
    "text": TEXT_SUFFIXES,
}


def uncompressed_name(name: str) -> str:
    """`name` without the suffix of a compression: `a.json` for `a.json.gz`, and `a.json` for `a.json`."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in COMPRESSED_SUFFIXES else name


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, where the suffix of a compression does not count: `.json` for
    `a.JSON.gz`."""
    return os.path.splitext(uncompressed_name(name))[1].lower()


def format_of(name: str) -> str | None:
    """The format of a file of this name, as far as its suffix tells; None if the suffix is unknown."""
    suffix = suffix_of(name)
    return next((format for format, suffixes in SUFFIXES.items() if suffix in suffixes), None)
