"""The event files of a run hold the texts that it sampled, as they are."""

import os
import subprocess
import sys

import pytest
from event_files import read_texts

from llmjax.workdir.samples import Sample
from llmjax.workdir.sinks.contract import NOWHERE, Opening
from llmjax.workdir.sinks.tensorboard import FOLDER, TensorBoard

# Texts that are something else in Markdown, that end a fence of it, or that are not UTF-8.
HARD = [
    "# not a headline",
    "```\n~~~\n<b>x</b>",
    "    indented\n\n* list",
    "春江\t潮水\r\n\r海",
    "",
    "a\udcff",
]


def write(workdir, update, *samples):
    sink = TensorBoard(Opening(workdir, update, NOWHERE, {}, print))
    sink.samples(update, samples)
    sink.close(failed=False)


@pytest.mark.parametrize("text", HARD)
def test_a_sampled_text_is_shown_as_it_is(text, tmp_path):
    write(tmp_path, 3, Sample(3, "prompt", text))
    ((update, tag, shown),) = read_texts(tmp_path)
    assert (update, tag) == (3, "sample/1/text_summary")
    _, block = shown.split("**the model wrote**\n\n")
    lines = block.split("\n")
    assert all(line.startswith("    ") for line in lines)
    expected = text.replace("\udcff", "\\udcff").replace("\r\n", "\n").replace("\r", "\n")
    assert "\n".join(line[4:] for line in lines) == expected


def test_each_sample_of_an_update_has_a_tag_of_its_own_with_its_prompt(tmp_path):
    write(tmp_path, 5, Sample(5, "one", "x"), Sample(5, "", "y"))
    first, second = read_texts(tmp_path)
    assert first[1] != second[1]
    assert "    one\n" in first[2] and "**without a prompt" in second[2]


def test_tensorboard_itself_reads_the_texts(tmp_path):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    write(tmp_path, 3, Sample(3, "prompt", "text"))
    accumulator = loader.EventAccumulator(str(tmp_path / FOLDER)).Reload()
    (event,) = accumulator.Tensors("sample/1/text_summary")
    assert event.step == 3 and b"text" in event.tensor_proto.string_val[0]


def test_torch_is_not_imported_where_it_is_installed(tmp_path):
    """tensorboardX imports torch if it can, which takes seconds; later imports of torch work as before."""
    (tmp_path / "torch.py").write_text("print('torch was imported')\nTensor = int\n", encoding="utf-8")
    code = (
        "import sys, pathlib\n"
        "from llmjax.workdir.sinks.contract import NOWHERE, Opening\n"
        "from llmjax.workdir.sinks.tensorboard import TensorBoard\n"
        "TensorBoard(Opening(pathlib.Path(sys.argv[1]), 0, NOWHERE, {}, print)).close(False)\n"
        "assert 'torch' not in sys.modules and 'tensorboardX' in sys.modules\n"
        "import torch\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "torch was imported\n"), done.stderr
