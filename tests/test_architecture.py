"""The house rules that a machine can check: imports point downward, and each library is known where it should be."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "llmjax"
# From the ground up. A room may import from itself and from rooms before it.
ORDER = [
    "errors",
    "names",
    "failures",
    "files",
    "ranges",
    "escapes",
    "types",
    "parallel",
    "ops",
    "data",
    "nn",
    "models",
    "tasks",
    "generate",
    "train",
    "evaluate",
    "config",
    "build",
    "plan",
    "terminal",
    "workdir",
    "documents",
    "lock",
    "standing",
    "initial",
    "resume",
    "flags",
    "modes",
    "main",
]
SIBLINGS = [
    ("generate", "train"),
    ("train", "generate"),
    ("data", "ops"),
    ("nn", "data"),
    ("terminal", "plan"),
]
ALONE = {  # library -> the files or rooms that may import it
    "orbax": ["train/checkpoint.py"],
    "grain": ["data/pipeline.py"],
    "sentencepiece": ["data/tokenizer.py"],
    "flax": ["nn/", "models/"],
    "tensorboardX": ["train/metrics.py"],
    "ml_collections": ["flags.py"],
    "torch": [],
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_there_is_code_to_check():
    assert {room(path) for path in FILES} >= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    if path.name == "__init__.py":
        return
    here = ORDER.index(room(path))
    for name in imports(path):
        if name.startswith("llmjax."):
            other = name.split(".")[1]
            assert ORDER.index(other) <= here, f"{path.name} imports {name} from above"
            assert (room(path), other) not in SIBLINGS, f"{path.name} imports {name} from beside"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_is_known_in_its_own_place(path):
    where = str(path.relative_to(PACKAGE))
    for name in imports(path):
        library = name.split(".")[0]
        if library in ALONE:
            assert any(where.startswith(place) for place in ALONE[library]), f"{where} imports {library}"
        assert "jax._src" not in name, f"{where} imports private {name}"
        if room(path) == "data":
            assert library not in ("jax", "flax", "optax"), f"{where}: the host side does without {library}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_writer_writes_files(path):
    """Apart from what grows line by line, and what is filled in a folder that the writer made."""
    where = str(path.relative_to(PACKAGE))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or where == "files.py":
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        assert name not in ("write_text", "write_bytes", "mkstemp", "mkdtemp", "NamedTemporaryFile"), where
        if name == "open":
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            assert not any(set(mode) <= set("wbt+") and "w" in mode for mode in modes), where
            assert (
                not any(set(mode) <= set("xbt+") and "x" in mode for mode in modes)
                or where == "data/store.py"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_file_says_what_it_is_for(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_only_numerals_and_types_reach_workers():
    """What tokenizing processes import must not drag jax along."""
    for file in (
        "errors.py",
        "escapes.py",
        "ranges.py",
        "names.py",
        "files.py",
        "data/checksums.py",
        "data/sources.py",
        "data/tokenizer.py",
        "data/store.py",
        "data/encode.py",
        "data/cache.py",
    ):
        for name in imports(PACKAGE / file):
            assert not name.startswith("llmjax.types"), f"{file} imports {name}, which imports jax"


def test_only_one_file_accumulates_by_optax():
    """`train/multisteps.py`: what it calls is what `train.accumulation=multisteps` promises."""
    users = [
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "MultiSteps"
    ]
    assert users == ["train/multisteps.py"]
