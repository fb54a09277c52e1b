"""The notebooks run from top to bottom, and what is committed of them is what they printed."""

import json
import pathlib
import re

import pytest
import tiny_run

# The extra `notebook`, which the extra `test` contains.
nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
FOLDER = tiny_run.ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# The most lines of one cell's output. A choice: more bury the text around them.
MOST_LINES = 100
MOST_BYTES = 100_000
# Jupyter's own libraries warn about sockets and event loops.
LIBRARIES_WARN = pytest.mark.filterwarnings("default")


def read(path):
    return nbformat.read(path, 4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def cell_with(notebook, words):
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    return cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_what_it_printed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size < MOST_BYTES
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1)), "run it from top to bottom before it is committed"
    text = json.dumps(outputs(notebook))
    assert '"error"' not in text and not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|opt|var)/", text)
    for cell in notebook.cells:
        assert len([output.get("name") for output in cell.get("outputs", [])]) <= MOST_LINES
        assert not set(re.findall(r"[\x00-\x08\x0b-\x1f]", json.dumps(cell.source)))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook `first_run` after it ran in an empty folder, and that folder."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = read(FOLDER / "first_run.ipynb")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMJAX_INSTALLED", "1")
        patch.setenv("PYTHONPATH", str(tiny_run.ROOT))
        patch.setenv("XLA_FLAGS", "")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return notebook, folder


@pytest.mark.slow
@LIBRARIES_WARN
def test_the_loss_falls(executed):
    losses = tiny_run.losses(pathlib.Path(executed[1]) / "runs" / "first")
    assert len(losses) == 100 and losses[0] > 5 and losses[-1] < 1


@pytest.mark.slow
@LIBRARIES_WARN
def test_it_generates_text_in_both_languages(executed):
    text = printed(cell_with(executed[0], "run.generate(prompt"))
    assert len(text) > 200 and "Twinkle, twinkle, little star" in text and "疑是地上霜" in text


@pytest.mark.slow
@LIBRARIES_WARN
def test_what_it_knows_scores_better(executed):
    scores = re.findall(r"([\d.]+) bits per byte", printed(cell_with(executed[0], "run.score")))
    rhyme, poem, unknown = map(float, scores)
    assert max(rhyme, poem) < 4 < unknown


@pytest.mark.slow
@LIBRARIES_WARN
def test_training_shows_its_progress_in_few_plain_lines(executed):
    text = printed(cell_with(executed[0], "llmjax.train("))
    assert "update 100/100  loss" in text and len(text.splitlines()) <= MOST_LINES
    assert "\r" not in text and "\x1b" not in text


@pytest.mark.slow
@LIBRARIES_WARN
def test_the_loss_is_drawn_and_the_run_is_found_again(executed):
    (output, *_) = cell_with(executed[0], "plt.show").outputs
    assert "image/png" in output.data
    assert "Jack and" in printed(cell_with(executed[0], "llmjax.load"))
