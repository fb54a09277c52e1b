"""What the suffix of a file name says about its content."""

from __future__ import annotations

import os

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
LINE_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (".json",)
PARQUET_SUFFIX = ".parquet"
# fmt: off
TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".srt", ".py",
    ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".swift",
    ".js", ".jsx", ".ts", ".tsx", ".css", ".sh", ".sql", ".r", ".jl", ".lua", ".rb", ".pl", ".php", ".hs", ".ml", ".ex",
    ".erl", ".f90", ".toml", ".yaml", ".yml", ".ini", ".cfg",
}
# fmt: on


def uncompressed_name(name: str) -> str:
    """`name` without the suffix of a compression."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in COMPRESSED_SUFFIXES else name


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, without that of a compression: `.json` of `a.JSON.gz`."""
    return os.path.splitext(uncompressed_name(name))[1].lower()


def is_known_suffix(name: str) -> bool:
    """Whether a file of this name in a folder is text of some format."""
    suffix = suffix_of(name)
    return suffix in TEXT_SUFFIXES or suffix in (*LINE_SUFFIXES, *JSON_SUFFIXES, PARQUET_SUFFIX)
