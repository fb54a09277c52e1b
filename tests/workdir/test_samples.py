"""The samples of a run: written line by line, replaced where a run samples again, read by everyone alike."""

import json

import pytest

from llmjax.workdir.samples import FILE, Sample, read_samples, write_samples

HARD = 'a\n```\n{"update": 5}\r\n\u2028\n\n'


@pytest.mark.parametrize(
    "prompt, text", [("import ", "os\n"), (HARD, HARD), ("", ""), ("春江", "潮水"), ("a", "\udcff")]
)
def test_samples_of_any_text_are_read_back(prompt, text, tmp_path):
    assert read_samples(tmp_path) == ([], 0)
    write_samples(tmp_path, [Sample(1, prompt, text)])
    assert read_samples(tmp_path) == ([Sample(1, prompt, text)], 0)


def test_chinese_stays_readable_in_the_file(tmp_path):
    write_samples(tmp_path, [Sample(1, "春江", "潮水")])
    line = (tmp_path / FILE).read_text(encoding="utf-8")
    assert line == '{"update": 1, "prompt": "春江", "text": "潮水"}\n'


def test_samples_are_added_and_those_made_again_are_replaced(tmp_path):
    for update in (100, 200, 300):
        write_samples(tmp_path, [Sample(update, HARD, f"before {update}")])
    for update in (200, 300):  # resumed from 100
        write_samples(tmp_path, [Sample(update, "p", f"after {update}"), Sample(update, "q", "b")])
    samples, unreadable = read_samples(tmp_path)
    assert [(sample.update, sample.text) for sample in samples] == [
        (100, "before 100"), (200, "after 200"), (200, "b"), (300, "after 300"), (300, "b"),
    ]  # fmt: skip
    assert unreadable == 0


DAMAGE = [b"\xff\xfe bytes", b'{"update": 9', b"[" * 100_000, b'{"update": ' + b"9" * 5000 + b"}", b"[]", b"5",
          b'{"update": true, "prompt": "", "text": ""}', b'{"update": 1, "prompt": 1, "text": ""}']  # fmt: skip


def test_lines_that_others_damaged_stop_nothing_and_stay(tmp_path):
    write_samples(tmp_path, [Sample(2, "a", "b")])
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b"\n".join(DAMAGE) + b"\n")
    write_samples(tmp_path, [Sample(4, "c", "d")])
    assert all(line in path.read_bytes().splitlines() for line in DAMAGE)
    assert read_samples(tmp_path) == ([Sample(2, "a", "b"), Sample(4, "c", "d")], len(DAMAGE))


def test_further_keys_of_a_newer_version_do_no_harm(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"update": 3, "prompt": "a", "text": "b", "seed": 1}) + "\n")
    assert read_samples(tmp_path) == ([Sample(3, "a", "b")], 0)


def test_a_workdir_of_an_older_version_goes_on_in_the_new_file(tmp_path):
    (tmp_path / "samples.md").write_text("# Samples\n")
    write_samples(tmp_path, [Sample(7, "a", "b")])
    assert read_samples(tmp_path) == ([Sample(7, "a", "b")], 0)
    assert (tmp_path / "samples.md").read_text() == "# Samples\n"
