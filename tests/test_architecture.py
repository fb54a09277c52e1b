"""The house rules that a machine can check: imports point downward, and each library is known where it should be."""

import ast
import fnmatch
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "llmjax"
# From the ground up. A room may import from itself and from rooms before it.
ORDER = [
    "errors",
    "names",
    "failures",
    "files",
    "ranges",
    "gguf",
    "escapes",
    "batch",
    "types",
    "scores",
    "quantities",
    "parallel",
    "terminal",
    "ops",
    "data",
    "nn",
    "models",
    "convert",
    "tasks",
    "generate",
    "train",
    "workdir",
    "evaluate",
    "report",
    "serve",
    "config",
    "build",
    "plan",
    "modes",
    "flags",
    "main",
    "api",
    "__main__",
]
# The same within a room, for folders and files that have a place in it.
WITHIN = {
    "train": ["optim", "tuning", "update", "steering", "checkpoint", "loop"],
    "plan": ["hlo", "topology", "summary", "communication", "compile", "memory", "advice"],
    "data": ["checksums", "sources", "tokenizer", "examples", "store", "layout", "packing", "pipeline"],
    "config": ["file", "help", "schema", "reading", "resolve", "imported", "resume", "init_from"],
    "convert": [
        "files",
        "architectures",
        "window_keys",
        "rope_keys",
        "config_keys",
        "places",
        "params",
        "source",
        "certificate",
        "hf_folder",
        "peft_folder",
        "gguf",
        "foreign",
    ],
    "terminal": ["bar", "lines", "stages", "progress"],
    "evaluate": ["held_out", "scoring", "not_finite", "probes"],
}
# (room, a room below it that it does without)
APART = [
    ("train", "generate"),
    ("train", "data"),
    ("train", "models"),
    ("train", "tasks"),
    ("data", "ops"),
    ("data", "parallel"),
    ("data", "types"),
    ("nn", "data"),
    ("models", "data"),
    ("convert", "data"),
    ("evaluate", "train"),
    ("report", "train"),
    ("report", "evaluate"),
    ("report", "data"),
    ("report", "models"),
    ("report", "types"),
]
ALONE = {  # library, or what it is asked for -> the files or rooms that alone know it
    "orbax": ["train/checkpoint/orbax_files.py"],
    "grain": ["data/pipeline.py"],
    "sentencepiece": ["data/tokenizer/"],
    "flax": ["nn/", "models/"],
    "tensorboardX": ["workdir/sinks/tensorboard.py"],
    "wandb": ["workdir/sinks/weights_and_biases.py"],
    "ml_collections": ["config/file.py"],
    "starlette": ["serve/"],
    "uvicorn": ["serve/"],
    "tqdm": ["terminal/bar.py"],
    "gguf": ["convert/gguf/"],
    "tokenizers": ["data/tokenizer/json_tokenizer.py"],
    "safetensors": ["convert/files/safetensors_folder.py"],
    "torch": ["convert/verify.py"],
    "transformers": ["convert/verify.py"],
    "jax.distributed": ["parallel/hosts.py"],
    "optax.MultiSteps": ["train/update/multisteps.py"],
    "jax.shard_map": ["nn/", "models/", "ops/attention/", "train/update/fused.py"],
}
# Rooms and files that do without jax, and so does what they import: it takes seconds to import.
HOST_SIDE = (
    "data",
    "report",
    "batch",
    "scores",
    "escapes",
    "failures",
    "files",
    "names",
    "quantities",
    "ranges",
    "gguf",
    "flags",
    "modes/table",
)
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [
    PACKAGE,
    *(path for path in sorted(PACKAGE.rglob("*")) if path.is_dir() and path.name != "__pycache__"),
]


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path, late: bool = True) -> list[str]:
    """What a file imports; `late`: also within its functions."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_there_is_code_to_check():
    assert {room(path) for path in FILES} >= set(ORDER)


EACH = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@EACH
def test_imports_point_downward(path):
    if path.name == "__init__.py":
        return
    here, place = room(path), ORDER.index(room(path))
    for name in imports(path):
        if not name.startswith("llmjax.") or name == "llmjax.__version__":
            continue
        other = name.split(".")[1]
        assert ORDER.index(other) <= place, f"{path.name} imports {name} from above"
        assert (here, other) not in APART, f"{here} does without {other}, but {path.name} imports {name}"
        if other == here and here in WITHIN:
            below, above = name.split(".")[2], path.relative_to(PACKAGE).parts[1].removesuffix(".py")
            if below in WITHIN[here] and above in WITHIN[here]:
                order = WITHIN[here].index
                assert order(below) <= order(above), f"{path.name} imports {name} from above"


@EACH
def test_each_library_is_known_in_its_own_place(path):
    where = str(path.relative_to(PACKAGE))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = {
        *imports(path),
        *(ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)),
    }
    for name in known:
        for library, places in ALONE.items():
            if name == library or name.startswith(f"{library}."):
                assert any(where.startswith(place) for place in places), f"{where} knows {name}"
    for name in imports(path):
        assert "jax._src" not in name, f"{where} imports private {name}"


def imported_with(path: pathlib.Path, seen: set[pathlib.Path]) -> set[str]:
    """The names of all libraries that importing `path` imports, through files of the package as well."""
    if path in seen:
        return set()
    seen.add(path)
    found = set()
    for name in imports(path, late=False):
        parts = name.split(".")
        if parts[0] != "llmjax":
            found.add(parts[0])
            continue
        files = (PACKAGE.joinpath(*parts[1:end]).with_suffix(".py") for end in (len(parts), len(parts) - 1))
        for file in files:
            if file.is_file():
                found |= imported_with(file, seen)
    return found


@pytest.mark.parametrize("place", HOST_SIDE)
def test_the_host_side_does_without_jax(place):
    whole = [path for path in FILES if str(path.relative_to(PACKAGE).with_suffix("")).split("/")[0] == place]
    for path in whole or [PACKAGE / f"{place}.py"]:
        assert not {"jax", "flax", "optax", "orbax"} & imported_with(path, set()), path


@EACH
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
            assert not any(set(mode) <= set("xbt+") and "x" in mode for mode in modes) or where in (
                "data/store/build.py",
                "convert/gguf/writing.py",
            )


@EACH
def test_each_file_says_what_it_is_for(path):
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_is_crowded(path):
    """What holds more than a dozen files is two things."""
    assert len([file for file in path.glob("*.py") if not file.name.startswith("__")]) <= 13, path


@pytest.mark.parametrize("path", [p for p in (ROOT / "tests").rglob("*") if p.is_dir()], ids=str)
def test_tests_lie_in_folders_as_the_code_does(path):
    # Golden files are data of the tests beside them.
    if path.name not in ("__pycache__", "runs") and "golden" not in path.parts:
        assert (PACKAGE / path.relative_to(ROOT / "tests")).is_dir()


def test_every_folder_of_tests_is_searched(pytestconfig):
    for path in (ROOT / "tests").rglob("test_*.py"):
        for folder in path.relative_to(ROOT).parts[:-1]:
            assert not any(fnmatch.fnmatch(folder, name) for name in pytestconfig.getini("norecursedirs")), (
                path
            )
