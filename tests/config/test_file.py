"""Config files are found from any folder, by path or by name, in a checkout and in an installed package."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from llmjax.config import file
from llmjax.config.file import find_config, load_config_file
from llmjax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = load_config_file(str(ROOT / "configs" / f"{name}.py"))
    assert (
        by_path
        == load_config_file(name)
        == load_config_file(f"configs/{name}.py")
        == load_config_file(f"{name}.py")
    )


def test_a_config_of_ones_own_may_lie_anywhere_and_build_on_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from configs import llama_1b\ndef get_config(layers='2'):\n    c = llama_1b.get_config()\n"
    (tmp_path / "mine.py").write_text(text + "    c.model.num_layers = int(layers)\n    return c\n")
    assert load_config_file("mine.py")["model"]["num_layers"] == 2
    assert load_config_file(f"{tmp_path}/mine.py:7")["model"]["num_layers"] == 7


def test_a_base_beside_the_config_goes_before_the_shipped_one(tmp_path):
    shutil.copy(ROOT / "configs" / "base.py", tmp_path / "base.py")
    changed = (tmp_path / "base.py").read_text().replace("c.seed = 0", "c.seed = 11")
    (tmp_path / "base.py").write_text(changed)
    text = "from configs import base\ndef get_config():\n    return base.get_config()\n"
    (tmp_path / "mine.py").write_text(text)
    modules = set(sys.modules)
    assert load_config_file(str(tmp_path / "mine.py"))["seed"] == 11
    assert load_config_file("base")["seed"] == 0
    assert "configs.base" not in set(sys.modules) - modules


def test_a_file_of_the_working_folder_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.py").write_text("def get_config():\n    return 5\n")
    with pytest.raises(UserError, match="of --config=base.py returns a int"):
        load_config_file("base.py")


def test_a_name_that_is_nowhere_lists_the_shipped_ones():
    with pytest.raises(UserError, match=f"--config=nope does not exist; .*: {', '.join(SHIPPED)}"):
        find_config("nope")


def test_an_installed_package_brings_its_configs(tmp_path, monkeypatch):
    """As `pip install .` lays them: configs/ inside of the package, and none beside it."""
    package = tmp_path / "site" / "llmjax"
    shutil.copytree(ROOT / "configs", package / "configs")
    monkeypatch.setattr(file, "SHIPPED", (tmp_path / "site" / "configs", package / "configs"))
    monkeypatch.chdir(tmp_path)
    assert find_config("gpt2_124m") == package / "configs" / "gpt2_124m.py"
    assert load_config_file("gpt2_124m")["model"]["num_layers"] == 12


@pytest.mark.parametrize("module", ["llmjax", "llmjax.main"])
def test_the_module_answers_from_any_folder(module, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", module, "--config=base", "--config.optimizer.lr=1"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    sentence = "llmjax: --config.optimizer.lr is not known; did you mean --config.optimizer.learning_rate?\n"
    assert (done.returncode, done.stderr) == (2, sentence)
