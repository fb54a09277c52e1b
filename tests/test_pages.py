"""README.md, README.zh.md and docs/: their commands are understood, their keys, files and links exist, and the two
READMEs have the same parts."""

import ast
import re
import shlex

import pytest
import tiny_run

from configs import base
from llmjax.config.file import plain_dict
from llmjax.config.reading import read_config
from llmjax.config.resolve import resolve_config
from llmjax.flags import parse
from llmjax.workdir.contents import write_json
from tools import convert

ROOT = tiny_run.ROOT
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BASE = plain_dict(base.get_config())
# The first words of commands that are not ours, and need no check.
OTHERS = {"git", "cd", "source", "python3", "pip"}


def name(path):
    return path.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text(encoding="utf-8")


def commands():
    """(page, command) for every command in a bash block; lines that end in a backslash go on."""
    for path in PAGES:
        for language, block in BLOCK.findall(text_of(path)):
            if language == "bash":
                lines = block.replace("\\\n", " ").splitlines()
                for line in lines:
                    if words := shlex.split(line, comments=True):
                        yield pytest.param(words, id=f"{name(path)}: {' '.join(words)}")


@pytest.mark.parametrize("words", [*commands()])
def test_a_command_is_understood(words, tmp_path, monkeypatch):
    devices = 1
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        counted = re.fullmatch(r"XLA_FLAGS=--xla_force_host_platform_device_count=(\d+)", words.pop(0))
        devices = int(counted[1])
    if words[0] in OTHERS:
        return
    if words[:3] == ["python", "-m", "tools.convert"]:
        convert.parse(words[3:])
        return
    assert words[:3] == ["python", "-m", "llmjax.main"]
    monkeypatch.chdir(tmp_path)
    # Commands that name no config go on with a run of configs/base.py.
    for run in ("base", "tinyllama", "spam", "translation", "talk"):
        write_json(tmp_path / "runs" / run / "config.json", BASE)
    _, raw = parse(["llmjax", *words[3:]])
    config = read_config(raw)
    if not config.plan.topology:
        resolve_config(config, devices)


@pytest.mark.parametrize("path", READMES, ids=name)
def test_a_readme_first_says_how_to_begin_and_needs_one_device(path):
    language, block = BLOCK.search(text_of(path)).groups()
    assert language == "bash" and block.startswith("git clone ")
    assert block.rstrip().endswith("python -m llmjax.main --config=configs/base.py")
    assert len(text_of(path).splitlines()) <= 130, "long matter belongs into docs/"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_keys_and_sections_of_a_page_exist(path):
    # The guide to extending the code speaks of keys that it adds.
    if path.name == "extending.md":
        return
    text = text_of(path)
    found = re.findall(r"--config\.(\w+)\.(\w+)", text) + re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", text)
    for section, key in found:
        if section in BASE and key not in ("py", "json", "jsonl", "html", "md"):
            assert key in BASE[section], f"{section}.{key} is no key"
    for section in re.findall(r"--help=(\w+)", text):
        assert section in BASE


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_pictures_are_small(path):
    for file in re.findall(r'src="([^"]+)"', text_of(path)):
        assert (path.parent / file).stat().st_size < 300_000


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_files_and_links_of_a_page_exist(path):
    text = text_of(path)
    for link in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), f"{link} is not there"
    for file in re.findall(r"`((?:configs|tests|tools|docs|llmjax|experiments)/[\w/.-]+)`", text):
        # The guide to extending the code makes files, which its own test does.
        assert (ROOT / file).exists() or path.name == "extending.md", f"{file} is not there"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_on_a_page_parses(path):
    for language, block in BLOCK.findall(text_of(path)):
        if language == "python":
            ast.parse(block)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_has_one_kind_of_units(path):
    assert not re.search(r"\d ?[KMGT]iB\b", text_of(path)), "bytes are decimal, as in llmjax/quantities.py"


def parts(path):
    """What a README has in common with its translation: headings' levels, code, links, numbered and listed points."""
    text = text_of(path)
    blocks = [(language, re.sub(r"^#.*\n", "", block, flags=re.M)) for language, block in BLOCK.findall(text)]
    prose = BLOCK.sub("", text)
    links = re.findall(r"\]\(([^)]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    return {
        "headings": re.findall(r"^#+", prose, re.M),
        "blocks": blocks,
        "comments": [block.count("\n#") for _, block in BLOCK.findall(text)],
        "links": [link for link in links if link not in ("README.md", "README.zh.md")],
        "points": re.findall(r"^(?:\d\.|- |\|)", prose, re.M),
        "code": sorted(re.findall(r"`[^`\n]+`", prose)),
    }


def test_the_readmes_have_the_same_headings_commands_links_and_points():
    english, chinese = map(parts, READMES)
    assert english == chinese


def test_each_readme_links_to_the_other_at_its_top():
    for path, other in zip(READMES, reversed(READMES), strict=True):
        assert f"]({other.name})" in text_of(path).split("##")[0]
