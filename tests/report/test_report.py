"""Claims about report.html, read back with an HTML parser."""

import html.parser
import json
import math
import re
import subprocess
import sys

import pytest

from llmjax.report import report
from llmjax.scores.score import FILE, Score, scores_as_json
from llmjax.tasks.language_model import LanguageModel
from llmjax.workdir.samples import Sample, write_samples

VOID = {"meta", "input", "br", "link", "img"}


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text):
        super().__init__()
        self.source, self.open, self.tags, self.texts = text, [], [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, *tags):
        return "\n".join("".join(self.texts.get(tag, [])) for tag in tags)

    def count(self, tag, css=""):
        return sum(t == tag and set(css.split()) <= set(a.get("class", "").split()) for t, a in self.tags)


def _train(update):
    return {
        "kind": "train", "update": update, "tokens": 16384 * update, "seconds": 0.5 * update + 2,
        "loss": 2 + 6 * math.exp(-update / 30), "learning_rate": 3e-4, "grad_norm": 0.5 + 1 / update,
        "tokens_per_second": 32768.0, "accumulation_steps": 4, "packing_efficiency": 0.975,
        "data_wait": 0.001,
    }  # fmt: skip


def _evaluate(update, loss):
    return {"kind": "evaluate", "update": update, "tokens": 16384 * update, "loss": loss,
            "perplexity": math.exp(loss), "bits_per_byte": 0.7 * loss}  # fmt: skip


def _workdir(folder, lines=(), tail="", **files):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (folder / FILE).write_text(scores_as_json(LanguageModel.scores))
    for name, content in files.items():
        if name == "samples":
            write_samples(folder, content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def _page(folder):
    path = report.write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob("*.tmp"))
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def full(tmp_path):
    lines = [_train(i) for i in range(1, 41)] + [_evaluate(20, 2.5), _evaluate(40, 2.25)]
    summary = {
        "title": "a small <GPT>",
        "plan": {"Corpus": "612 documents & more", "Mesh": "data 8"},
        "results": {
            "held-out loss": "9.99",
            "gzip bits per byte": "1.83",
            "xz": "1.62",
            "Parameters": "1.3M",
        },
        "commands": {"Resume": "python -m llmjax.main --prompt='a < b'"},
    }
    config = {
        "seed": 7,
        "model": {"num_layers": 4, "names": ["a"], "rope": {"base": 10000.0}},
        "train": {"num_updates": 80},
    }
    text = "():\n\treturn '<script>alert(1)</script>'\n## no heading\n```\n从前有座山"
    samples = [Sample(20, "", "early"), Sample(40, "def f", text)]
    return _page(_workdir(tmp_path, lines, summary=summary, config=config, samples=samples))


def test_the_page_loads_nothing_from_anywhere(full):
    assert not re.search(r"(https?:)?//[a-z0-9]", re.sub(r"^\s*//.*$", "", full.source, flags=re.MULTILINE))
    assert not any({"src", "href", "srcset", "data"} & set(attributes) for _, attributes in full.tags)
    assert not re.search(r"@import|url\(|@font-face", full.source)
    policy = [
        a["content"] for t, a in full.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy and policy[0].startswith("default-src 'none'")


def test_every_measurement_has_its_chart_on_every_axis(full):
    assert full.count("figure", "chart") == 7
    # Loss and gradient norm: linear, logarithmic, close-up; the others linear; each on three horizontal axes.
    assert full.count("svg", "plot") == 3 * (2 * 3 + 5)
    assert full.count("path", "curve heldout") == 9
    assert full.count("path", "curve raw") == 9 + 9 + 3 * 3
    spoken = [a.get("aria-label", "") for t, a in full.tags if t == "svg" and "plot" in a.get("class", "")]
    assert all(spoken) and spoken[0].startswith("Loss over updates. mean: first 7.803")


def test_results_are_those_of_the_last_evaluation_with_compressors_beside(full):
    tiles = re.search(r'<dl class="tiles">(.*?)</dl>', full.source)[1]
    assert "2.250" in tiles and "9.488" in tiles and "1.575" in tiles
    assert "gzip 1.83 · xz 1.62" in tiles and "1.3M" in tiles
    assert "9.99" not in tiles  # the summary's rounder text of the same number
    assert "32.8k" in tiles


def test_plan_commands_and_configuration_are_shown_escaped(full):
    assert full.text("h1") == "a small <GPT>" and "<GPT>" not in full.source
    assert "612 documents & more" in full.text("td")
    assert full.texts["code"] == ["python -m llmjax.main --prompt='a < b'"]
    assert {"seed", "num_layers", "rope.base"} <= set(full.texts["th"])
    assert {"7", "4", '["a"]', "10000.0"} <= set(full.texts["td"])
    assert "40 of 80 updates · 655k tokens · 22 s" in full.text("p")


def test_the_last_samples_are_open_with_their_white_space_and_nothing_runs(full):
    prompt, sample = full.texts["pre"][:2]
    assert (prompt, sample) == (
        "def f",
        "():\n\treturn '<script>alert(1)</script>'\n## no heading\n```\n从前有座山",
    )
    assert full.count("script") == 7 + 1  # one of values for each chart, and the page's own
    assert full.source.index("从前有座山") < full.source.index("<summary>update 20</summary>")


def test_the_evaluations_are_a_table(full):
    row = re.search(r"<tr><td>40</td>(.*?)</tr>", full.source)[1]
    assert re.findall(r"<td>(.*?)</td>", row) == ["655.4k", "2.2500", "9.488", "1.5750"]


@pytest.mark.parametrize(
    "lines",
    [[], [_train(1)], [_evaluate(0, 9.0)], [_evaluate(10, 2.0), _evaluate(20, 1.5)],
     [{"kind": "train", "update": 1}], [{"kind": "evaluate", "update": 1}], [_train(1) | {"loss": "nan"}],
     [{"kind": "other"}]],
)  # fmt: skip
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path, lines):
    page = _page(_workdir(tmp_path, lines))
    assert page.text("title") == tmp_path.name
    assert page.count("figure") >= any("loss" in line for line in lines)


def test_an_empty_folder_has_a_page(tmp_path):
    page = _page(tmp_path)
    assert "No updates yet." in page.text("p") and page.count("section") == 0


def test_a_torn_last_line_is_ignored_and_a_broken_one_is_named(tmp_path):
    page = _page(_workdir(tmp_path, [_train(1), _train(2)], '{"kind":"tra'))
    assert page.count("p", "trouble") == 0 and "2 updates" in page.text("p")
    page = _page(_workdir(tmp_path, [_train(1)], '{"kind":"tra\n' + json.dumps(_train(2)) + "\n"))
    assert "1 unreadable lines" in page.text("p") and "2 updates" in page.text("p")


def test_values_that_are_not_finite_are_named_and_do_not_spoil_the_axis(tmp_path):
    lines = [_train(i) for i in range(1, 9)]
    lines[4]["loss"], lines[5]["grad_norm"] = "nan", "inf"
    page = _page(_workdir(tmp_path, lines))
    assert "train: not finite at 1 of 8 updates (5)." in page.text("p")
    assert "Not finite at 1 of 8 updates (6)." in page.text("p")
    assert not any(re.search("nan|inf", a["d"]) for t, a in page.tags if t == "path")


def test_unreadable_side_files_are_named_and_leave_the_page_whole(tmp_path):
    _workdir(tmp_path, [_train(1), _train(2)])
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "summary.json").write_text("[]")
    page = _page(tmp_path)
    assert page.count("p", "trouble") == 2 and page.count("figure", "chart") == 7


def test_unknown_measurements_are_folded_and_their_names_escaped(tmp_path):
    page = _page(_workdir(tmp_path, [_train(i) | {"<i>z": 0.1 * i} for i in (1, 2, 3)]))
    assert "More measurements (1)" in page.text("summary") and page.count("i", "") == page.count(
        "i", "swatch"
    )
    assert "<i>z" in page.texts["h3"]


def test_a_long_run_is_thinned_but_keeps_its_spike(tmp_path):
    lines = [{"kind": "train", "update": i, "loss": 3.0 + (i % 7) / 100} for i in range(1, 4001)]
    lines[2344]["loss"] = 8.25
    page = _page(_workdir(tmp_path, lines))
    raw = next(a["d"] for t, a in page.tags if t == "path" and "raw" in a["class"])
    assert 900 < len(re.findall("[ML]", raw)) <= 1000
    assert '"8.25"' in page.text("script") and "thinned" in page.text("p")


def test_samples_without_a_prompt_or_with_an_open_fence_are_shown(tmp_path):
    text = "Some words.\n\n~~~\n  text\n```\n\n\nend"
    page = _page(_workdir(tmp_path, samples=[Sample(1, "", text)]))
    assert page.texts["pre"] == [text] and page.texts["h3"] == ["update 1"]


def test_lines_of_samples_that_cannot_be_read_are_counted(tmp_path):
    _workdir(tmp_path, samples=[Sample(1, "a", "b")])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("{\n")
    page = _page(tmp_path)
    assert "samples.jsonl: 1 unreadable lines were left out." in page.text("p") and page.texts["pre"] == [
        "a",
        "b",
    ]


def _steered(update):
    """A run whose batch grows, with statistics of its layers."""
    more = {"accumulation_steps": 4 + 4 * (update > 5), "noise_scale": 9e4, "reason": f"noise <{update}>"}
    layers = [0.1 * 2**i for i in range(4)]
    return [
        _train(update) | more,
        {"kind": "statistics", "update": update, "gradient_norm": layers, "residual_rms": layers,
         "mlp_rms": [*layers[:3], "nan"], "other": {"embedding": {"gradient_norm": 0.3}}},
    ]  # fmt: skip


def test_events_are_marked_and_listed_with_the_changes_of_the_batch(tmp_path):
    lines = [line for update in range(1, 11) for line in _steered(update)]
    lines[4] |= {"dropped": 2}
    lines += [{"kind": "event", "update": 3, "event": "spike", "text": "the loss <b>leapt</b>"}]
    page = _page(_workdir(tmp_path, lines))
    assert "spike" in page.texts["td"] and "the loss <b>leapt</b>" in page.texts["td"]
    assert (
        page.count("line", "mark") == 3 * 3 and page.count("svg", "flag") == 3 * 3
    )  # each drawing of the loss
    assert "Changes of the batch (1)" in page.text("summary")
    assert {"4 → 8", "noise <6>"} <= set(page.texts["td"]) and "noise <7>" not in page.text("td")
    assert "2 micro-steps dropped" in page.text("p") and "skipped" not in page.text("p")


def test_layers_have_charts_and_the_batch_one_with_its_noise(tmp_path):
    lines = [line for update in range(1, 11) for line in _steered(update)]
    page = _page(_workdir(tmp_path, lines))
    titles = page.texts["h3"]
    assert {"Gradient norm by layer", "Residual stream by layer", "Tokens per update"} <= set(titles)
    assert "Accumulation" not in titles and "More layers (1)" in page.text("summary")
    assert page.count("path", "curve depth") == 3 * 3 * 4 and page.count("path", "curve other") == 3
    assert "More measurements" not in page.text("summary")  # texts, events and batch are none


def test_a_run_without_any_of_these_has_nothing_of_them(full):
    assert "Events" not in full.texts["h2"] and full.count("svg", "flag") == 0
    assert "Accumulation" in full.texts["h3"] and "Tokens per update" not in full.texts["h3"]
    assert not any("layer" in title for title in full.texts["h3"])


def _grid(**changes):
    grid = {"language": "zh", "length": [128, 2048], "depth": [0.0, 1.0], "chance": 0.25, "examples": 8,
            "choice": [[1.0, 0.25], [0.625, 0.125]], "exact": [[0.5, 0.0], [0.25, 0.0]]}  # fmt: skip
    return grid | changes


def test_probes_have_curves_over_lengths_and_grids_of_depth_by_length(tmp_path):
    probes = {
        "update": 1200,
        "position": {"from": [0, 1, 2, 4], "loss": [6.0, 5.0, 4.5, 4.25], "targets": [9, 9, 9, 9]},
        "context": {"length": [1, 16, 32], "loss": [6.0, 5.0, None], "targets": 32768, "documents": 12},
        "copy": {"distance": [8, 16, 1024], "accuracy": [1.0, 0.5, 0.25], "chance": 0.002},
        "passkey": [_grid(), _grid(language="en", length=[64], choice=[[1.0], [1.0]], exact=[[0.0], [0.0]])],
        "needle": [_grid(language="<x>")],
    }  # fmt: skip
    page = _page(_workdir(tmp_path, [_train(1), _train(2)], probes=probes))
    assert (
        page.texts["h2"].count("Is the long context used?") == 1 and "After update 1,200." in page.texts["p"]
    )
    paths = {
        key: re.search(rf'plot x-{key}.*?class="curve [a-z]+" d="([^"]*)"', page.source)[1]
        for key in ("position", "context", "distance")
    }
    assert re.findall(r"[ML](\d+),", paths["position"]) == ["0", "1333", "2667", "4000"]
    assert re.findall(r"[ML](\d+),", paths["context"]) == ["0", "4000"]  # what is no number is left out
    assert paths["distance"] == "M0,0L571,500L4000,750"  # in per cent, over the logarithm
    assert page.count("table", "heat") == 3
    cells = re.findall(r'<td style="--heat:(\d+)%"><b>(\d+)</b><small>(\d+)</small>', page.source)
    assert cells[:4] == [("100", "100", "50"), ("0", "25", "0"), ("50", "62", "25"), ("0", "12", "0")]
    assert "32,768 targets of 12 documents" in page.text("p") and "Guessing: 0.2%." in page.text("p")
    assert page.texts["span"].count("Chinese") == page.texts["span"].count("English") == 1


@pytest.mark.parametrize("probes", [
    {}, {"update": 3}, {"position": 7, "context": [], "copy": None, "passkey": {}, "needle": [3]},
    {"position": {"from": [0], "loss": "x"}, "copy": {"distance": [None], "accuracy": [1.0]}},
    {"passkey": [_grid(choice=[[1.0]])], "needle": [_grid(exact=[["a", 1], [1, 1]]), _grid(chance=None)]},
    {"passkey": [_grid(length=[]), _grid(depth="all")], "context": {"length": [1], "loss": [math.inf]}},
])  # fmt: skip
def test_probes_that_cannot_be_read_are_left_out(tmp_path, probes):
    page = _page(_workdir(tmp_path, [_train(1)], probes=probes))
    assert "Is the long context used?" not in page.source


def test_kinds_and_fields_that_are_unknown_do_no_harm(tmp_path):
    strange = {"kind": "weather", "update": 2, "rain": [1, {"a": None}]}
    lines = [_train(1) | {"list": [1], "dict": {}, "loss": "5"}, strange, _train(2) | {"tokens": "many"}]
    lines += [
        {"kind": "statistics", "update": 2, "other": 7, "residual_rms": [None, "x", 1]},
        {"kind": "event", "update": 2},
    ]
    lines += [{"kind": "evaluate", "update": 2, "loss": "text", "perplexity": [1]}]
    page = _page(_workdir(tmp_path, lines))
    assert page.count("p", "trouble") == 0 and "2 updates" in page.text("p")


def test_the_report_needs_no_jax():
    code = "import sys, llmjax.report.report; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GARBAGE = [
    [], [1], None, 3, "text", {}, {"a": [{}]}, {"title": [1], "plan": [2], "results": 3, "commands": {"a": [1]}},
    {"update": 10**400, "position": 1, "context": [], "passkey": {}, "needle": [1], "copy": "x"},
    {"position": {"from": [1, 2], "loss": ["a"]}, "passkey": [{"length": 1}], "copy": {"distance": [1]}},
    {"passkey": [{"language": 1, "length": [1], "depth": [1], "choice": [[]], "exact": 1, "chance": "x"}]},
    {"train": {"num_updates": 10**400}, "model": [1], "seed": {"a": {}}},
]  # fmt: skip
BROKEN = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b"1" * 5000,
    b"\0" * 10,
    b'{"update": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "probes.json", "metrics.jsonl", "samples.jsonl"]
)
def test_whatever_a_file_of_the_run_holds_there_is_a_page(name, tmp_path):
    line = '{"kind": "evaluate", "update": 1, "tokens": 10, "loss": 2.0, "perplexity": "inf", "bits_per_byte": null}'
    for garbage in [*(json.dumps(value).encode() for value in GARBAGE), *BROKEN]:
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        (tmp_path / name).write_bytes(garbage + b"\n" + b"{}" * (name == "metrics.jsonl"))
        page = report.write_report(tmp_path).read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>")
        if garbage in BROKEN[1:] and name.endswith(".json"):
            assert f"{name} cannot be read" in page


def test_what_cannot_be_drawn_is_named_and_the_rest_is(tmp_path, monkeypatch):
    (tmp_path / "probes.json").write_text(json.dumps({"copy": {"distance": [1], "accuracy": [1.0]}}))
    (tmp_path / "summary.json").write_text(json.dumps({"plan": {"model": "gpt of 3 parameters"}}))
    monkeypatch.setattr(report.probe_charts, "curve_charts", lambda probes: probes["copy"]["loss"])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert (
        "probes.json holds values that cannot be shown (KeyError)" in page and "gpt of 3 parameters" in page
    )


def test_a_score_of_which_more_is_better_says_its_highest(tmp_path):
    lines = [_evaluate(20, 2.5) | {"f1": 0.9}, _evaluate(40, 2.25) | {"f1": 0.8}]
    _workdir(tmp_path, lines)
    (tmp_path / FILE).write_text(scores_as_json([Score("f1", "macro F1", higher_is_better=True)]))
    page = report.write_report(tmp_path).read_text()
    tiles = re.search(r'<dl class="tiles">(.*?)</dl>', page)[1]
    assert "Macro F1</dt><dd><b>0.800</b><small>highest 0.900 at update 20" in tiles


def test_a_workdir_of_an_older_version_shows_all_that_its_evaluations_have(tmp_path):
    _workdir(tmp_path, [_evaluate(20, 2.5)])
    (tmp_path / FILE).unlink()
    tiles = re.search(r'<dl class="tiles">(.*?)</dl>', report.write_report(tmp_path).read_text())[1]
    assert "Held-out loss</dt><dd><b>2.500" in tiles and "Bits per byte</dt><dd><b>1.750" in tiles


def test_samples_in_the_file_of_an_older_version_are_named_and_do_no_harm(tmp_path):
    _workdir(tmp_path, [_train(1)], samples=[Sample(1, "new", "text")])
    (tmp_path / "samples.md").write_text("# Samples\n\n## update 1\n\n```\nold text\n```\n")
    page = _page(tmp_path)
    assert "samples.md was written by an older version and is not shown here." in page.text("p")
    assert "old text" not in page.source and page.texts["pre"] == ["new", "text"]
