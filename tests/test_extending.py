"""docs/extending.md does what it says: its files and lines, put into a copy of the code, train and answer."""

import email.message
import gzip
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest
import quick
import tiny_run

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\S+)\n(.*?)^```$", TEXT, re.M | re.S))
EDITS = [
    part.split("\n", 1)
    for block in re.findall(r"^```diff\n--- (.*?)^```$", TEXT, re.M | re.S)
    for part in block.split("--- ")
]


# Names from the page, and the files of tests that loop over the tables they are added to.
ADDED = ("whole_rows", "signum", "pairs")
REACHED = (
    "ops/attention/test_isolation.py",
    "ops/attention/test_sequence_attention.py",
    "train/update/test_state.py",
    "tasks/test_tasks.py",
)


def edited(text: str, lines: list[str]) -> str:
    """`text` after the lines of a diff: ` ` is looked for, `-` is replaced by the `+` behind it, `+` is put there."""
    at = 0
    for line in lines:
        sign, content = line[:1], line[1:] + "\n"
        if sign in (" ", "-"):
            assert content in text[at:], f"no line {content!r} any more"
            at = text.index(content, at)
            if sign == "-":
                text = text[:at] + text[at + len(content) :]
            else:
                at += len(content)
        elif sign == "+":
            text = text[:at] + content + text[at:]
            at += len(content)
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code with everything of the page in it, and a small corpus of pairs."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("llmjax", "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        assert not (root / name).exists(), f"{name} is taken"
        (root / name).write_text(text, encoding="utf-8")
    for name, lines in EDITS:
        (root / name).write_text(
            edited((root / name).read_text(encoding="utf-8"), lines.split("\n")), encoding="utf-8"
        )
    rng, rows = random.Random(0), []
    for _ in range(60):
        words = rng.choices(range(6), k=rng.randint(2, 8))
        text = "".join("河石云光码环"[i] for i in words)
        rows.append(json.dumps({"text": text, "source": " ".join(tiny_run.WORDS[i] for i in words)}))
    (root / "pairs.jsonl").write_text("\n".join(rows))
    return root


def run(root, *arguments, code=0, stderr=""):
    environment = {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(quick.FLAGS),
        "PATH": "",
    }
    command = [sys.executable, "-m", "llmjax", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, stderr), done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tests_of_the_tables_reach_what_was_added(copy):
    """The copy of the tests is as it is: what was added is in their tables."""
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    files = [f"tests/{name}" for name in REACHED]
    command = [sys.executable, "-m", "pytest", "-vv", "-n", "0", "-k", " or ".join(ADDED), *files]
    environment = {"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    passed = [line for line in done.stdout.splitlines() if " PASSED" in line]
    assert all(any(name in line for line in passed) for name in ADDED), passed


def test_the_page_adds_at_most_a_file_and_two_lines_to_a_table_each():
    assert len(FILES) == 7
    for name, lines in EDITS:
        added = [line for line in lines.split("\n") if line.startswith("+")]
        assert len(added) <= (3 if name.startswith("configs/") else 2), name


def test_a_new_family_task_and_optimizer_train_together_and_a_new_sink_and_mode_see_the_run(copy):
    settings = {
        **tiny_run.settings_of("leaky_averages"), "data.sources": copy / "pairs.jsonl",
        "data.cache_dir": copy / "cache", "data.seq_len": 96, "train.tokens_per_update": 768, "task.name": "pairs",
        "model.family": "leaky_averages",
        "optimizer.name": "signum", "signum.momentum": 0.8, "optimizer.learning_rate": 0.02, "train.num_updates": 12,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    out = run(copy, "--config=base", f"--workdir={copy / 'work'}", *words)
    losses = tiny_run.losses(copy / "work")
    assert losses[-1] < losses[0] - 0.3
    assert "leaky_averages" in out and "signum" in out
    assert (copy / "work" / "newest_loss.txt").read_text() == f"12 {losses[-1]}\n"
    assert run(copy, f"--workdir={copy / 'work'}", "--mode=vocabulary") == "277 ids\n"
    sentence = "llmjax: task.name='pairs' reads two texts, and a prompt is one; use --mode=evaluate\n"
    run(copy, f"--workdir={copy / 'work'}", "--mode=generate", "--prompt=a", code=2, stderr=sentence)


def test_files_of_a_new_format_are_read_like_any_other(copy):
    folder = copy / "mails"
    folder.mkdir()
    for i in range(50):
        message = email.message.EmailMessage()
        message["Subject"] = f"Nr. {i}"
        message.set_content(f"石，云 {i}", charset="gb18030")
        (folder / f"{i}.eml.gz").write_bytes(gzip.compress(bytes(message)))
    settings = {**tiny_run.SETTINGS, "data.sources": folder, "data.cache_dir": copy / "cache"}
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    out = run(copy, "--config=base", f"--workdir={copy / 'mail'}", "--mode=plan", *words)
    assert "50 documents, " in out and "50 files" in out


def test_a_new_activation_is_chosen_by_its_name(copy):
    code = "import jax.numpy as jnp; from llmjax.ops.activation import ACTIVATIONS; "
    code += "print(ACTIVATIONS['mish'].function(jnp.ones([])))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env={"PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert float(done.stdout) == pytest.approx(0.8651, abs=1e-4), done.stderr
