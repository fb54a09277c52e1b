"""Documents are cut at matches and into tails: nothing is lost, nothing overlaps, and chunks make no difference."""

import dataclasses
import itertools
import json
import re
import signal
import time

import pytest

from llmjax.data.sources import cutting as cutting_module
from llmjax.data.sources import text as text_module
from llmjax.data.sources.cutting import TAIL, Cutting, compile_split_on, cut_parts, split_text
from llmjax.data.sources.listing import list_sources
from llmjax.data.sources.reading import Reading, ReadStats
from llmjax.data.sources.records import whole
from llmjax.errors import UserError

BOOK = "序\n" + "".join(f"第{i}回 标题\n正文 text {'x' * (i * 7 % 23)}\n\n  \n" for i in range(1, 40)) + "终"
PATTERNS = [
    "第.*回",
    "^第.*回",
    r"\n\s*\n",
    r"\n第",
    "(?=第)",
    "text|第|x+",
    "终",
    "序",
    "nowhere",
    r"(?<=\n)\s+$",
]


def pieces_of(chunks, pattern):
    """The pieces of a text that comes in chunks."""
    pieces = []
    for text, begins in split_text(chunks, compile_split_on(pattern)):
        assert text, "an empty part"
        if begins:
            pieces.append("")
        pieces[-1] += text
    return pieces


def expected(text, pattern):
    """The pieces of a whole text, by the rule as it is written down."""
    cuts = []
    for match in re.finditer(pattern, text, re.MULTILINE):
        cuts.append(match.end() - len(match.group().lstrip()))
    cuts = [0, *sorted({cut for cut in cuts if 0 < cut < len(text)}), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def in_chunks(text, size):
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pieces_are_those_of_the_rule_and_joined_they_are_the_text(pattern):
    pieces = pieces_of([BOOK], pattern)
    assert pieces == expected(BOOK, pattern)
    assert "".join(pieces) == BOOK


@pytest.mark.parametrize("size", [1, 2, 7, 64, 500])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_match_across_the_border_of_chunks_is_found(pattern, size, monkeypatch):
    monkeypatch.setattr(cutting_module, "WINDOW", 40)
    assert pieces_of(in_chunks(BOOK, size), pattern) == expected(BOOK, pattern)


def test_a_match_longer_than_the_window_may_be_missed_but_no_text_is(monkeypatch):
    monkeypatch.setattr(cutting_module, "WINDOW", 5)
    text = "ab<" + "y" * 100 + ">cd<zz>ef"
    assert pieces_of(in_chunks(text, 3), "<[a-z]*>") == [text[:-6], "<zz>ef"]
    # A match that grows with the text is held until it ends.
    assert pieces_of(in_chunks(text, 3), "<[a-z]*") == ["ab", text[2:-6], "<zz>ef"]


def test_white_space_at_the_beginning_of_a_match_ends_the_piece_before():
    assert pieces_of(["a\n\nb\n \nc\n"], r"\n\s*\n") == ["a\n\n", "b\n \n", "c\n"]
    assert pieces_of(["a\nCHAPTER 1\nb\n\nCHAPTER 2\n"], r"\s+CHAPTER") == [
        "a\n",
        "CHAPTER 1\nb\n\n",
        "CHAPTER 2\n",
    ]


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("第(.*回", "is no regular expression"),
        ("*", "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        (r"\s*", "matches the empty text"),
        ("^", "matches the empty text"),
    ],
)
def test_a_pattern_that_will_not_do_is_one_sentence(pattern, words):
    with pytest.raises(UserError, match=words) as error:
        Cutting(pattern)
    assert str(error.value).startswith("data.split_on=") and "\n" not in str(error.value)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A book that comes in many chunks, a short text, an empty one, and rows."""
    monkeypatch.setattr(text_module, "CHUNK_BYTES", 300)
    monkeypatch.setattr(cutting_module, "WINDOW", 64)
    for name, text in {"book": BOOK, "short": "x", "empty": "", "two": "一二"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    rows = [BOOK[:200], "", "第1回 a 第2回 b"]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return list_sources([str(tmp_path)])


def read(files, cutting):
    """(name, text, held out) of every document."""
    found = []
    for file in files:
        for part in whole(cut_parts(file, Reading(), ReadStats(), cutting)):
            found.append((part.record.name, part.record.text, part.held_out))
    return found


@pytest.mark.parametrize("split_on", ["", "第.*?回"])
@pytest.mark.parametrize("tail", [0.0, 1e-9, 0.1, 0.5, 0.99])
def test_all_parts_of_a_document_are_the_document(files, split_on, tail):
    joined = {}
    for name, text, _ in read(files, Cutting(split_on, tail)):
        assert text
        source = name.removesuffix(TAIL)
        source = re.sub(r"#\d+$", "", source) if split_on else source
        joined[source] = joined.get(source, "") + text
    assert joined == {name: text for name, text, _ in read(files, Cutting())}


@pytest.mark.parametrize("split_on", ["", "第.*?回"])
@pytest.mark.parametrize("tail", [1e-9, 0.1, 0.5, 0.99])
def test_the_held_out_part_is_the_last_fraction_of_the_characters_of_each_document(files, split_on, tail):
    parts = read(files, Cutting(split_on, tail))
    assert len({name for name, _, _ in parts}) == len(parts), "two parts have one name"
    for name, text, _ in read(files, Cutting(split_on)):
        # As nanoGPT cuts: data[: int(n * 0.9)] to train on, data[int(n * 0.9) :] to validate on.
        cut = int(len(text) * (1 - tail))
        mine = [part for part in parts if part[0].removesuffix(TAIL) == name]
        both = [(name, text[:cut], False), (name + TAIL, text[cut:], True)]
        assert mine == [part for part in both if part[1]]


def test_pieces_are_numbered_from_1(files):
    names = [name for name, _, _ in read(files, Cutting("第.*?回"))]
    assert names[:3] == ["book.txt#1", "book.txt#2", "book.txt#3"]
    assert "short.txt#1" in names and "r.jsonl#3#2" in names


def test_every_document_of_a_held_out_file_is_held_out(files):
    held = dataclasses.replace(files[0], held_out=True)
    assert {mark for _, _, mark in read([held], Cutting("第"))} == {True}
    assert {mark for _, _, mark in read([files[0]], Cutting("第"))} == {False}


def test_a_file_that_grows_between_its_two_readings_is_refused(files, monkeypatch):
    lengths = cutting_module._lengths
    book = next(file for file in files if file.name == "book.txt")

    def then_write(parts):
        found = lengths(parts)
        with open(book.path, "a") as file:
            file.write("more")
        return found

    monkeypatch.setattr(cutting_module, "_lengths", then_write)
    with pytest.raises(UserError, match=r"book.txt' changed while it was read; start again"):
        read([book], Cutting(tail=0.1))


@pytest.mark.parametrize("pattern, text", [("(a+)+$", "a" * 60 + "b"), (r"a[\s\S]*?z", "a" * 200_000)])
def test_a_pattern_that_takes_for_ever_is_one_sentence(pattern, text, monkeypatch):
    monkeypatch.setattr(cutting_module, "SEARCH_SECONDS", 0.2)
    with pytest.raises(
        UserError, match=r"data\.split_on=.* was searched for in .* for more than 0\.2 s: bound "
    ):
        list(split_text([text], compile_split_on(pattern)))


def test_a_search_leaves_alarms_as_they_were():
    rings = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        list(split_text(["a b " * 1000], compile_split_on("b")))
        assert not rings
        time.sleep(0.4)
        assert rings == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
