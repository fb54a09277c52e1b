"""Counts how runs end whose files are damaged, which are killed, or whose config has an odd value.

    python tools/bench_faults.py                  # everything: about half an hour on two idle cores
    python tools/bench_faults.py --parts configs  # only the odd configs

storage  a tiny run is stopped after a part of its updates. One file or folder of its workdir or of the cache is
         damaged, and the same command is given again
kills    a process that trains is killed with SIGKILL at a random moment, and the same command is given again. There
         are eight kinds of run
configs  one key of `configs/base.py` gets an odd value (`tools/mutations.py`)

Each case ends in one of five ways, and the last three must never happen:

success        the run ends well, with the numbers of an undisturbed run, bit for bit
sentence       the run ends with one sentence that begins with `llmjax: `
traceback      the user sees an exception of Python
hang           the run does not end within two minutes
silent change  the run ends well, but with other numbers
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from configs.base import get_config  # noqa: E402
from llmjax.main import main as llmjax_main  # noqa: E402
from tools.lines import make_parser, report  # noqa: E402
from tools.mutations import mutations, outcome  # noqa: E402

SUCCESS, SENTENCE, TRACEBACK, HANG, CHANGE = "success", "sentence", "traceback", "hang", "silent change"
FORBIDDEN = (TRACEBACK, HANG, CHANGE)
# The seconds after which a case counts as a hang. A choice: a case takes a few seconds.
PATIENCE = 120
# The characters of a message that are printed.
SHOWN = 300
# The keys of metrics.jsonl whose values depend on the clock.
TIMING = ("seconds", "tokens_per_second", "data_wait", "mfu")
# A run of a second or two, as changes to configs/base.py.
TINY = {
    "model.num_layers": 1, "model.model_dim": 16, "transformer.num_heads": 2, "transformer.mlp_dim": 32,
    "tokenizer.vocab_size": 300, "data.seq_len": 32, "data.held_out_fraction": 0.1, "data.num_workers": 1,
    "train.num_updates": 6, "train.tokens_per_update": 512, "compute.accumulation_steps": 2,
    "optimizer.name": "adamw", "optimizer.learning_rate": 3e-3, "optimizer.warmup_updates": 2,
    "evaluate.every": 3, "checkpoint.every": 2, "generate.max_tokens": 4,
}  # fmt: skip
# The eight kinds of run that are killed.
KINDS: dict[str, dict[str, object]] = {
    "in_place": {},
    "multisteps": {"compute.engine": "multisteps"},
    "fused": {"compute.engine": "fused"},
    "controller": {"controller.name": "noise_scale", "controller.k_min": 2, "controller.k_max": 4,
                   "compute.micro_batch_size": 4, "compute.accumulation_steps": 0},
    "growing batch": {"train.batch_schedule": "piecewise", "train.batch_points": "0:256,1024:512",
                      "compute.micro_batch_size": 4, "compute.accumulation_steps": 0},
    "growing length": {"data.length_points": "0:16,1024:32"},
    "averaged": {"optimizer.name": "schedule_free_adamw", "optimizer.schedule": "constant"},
    "best checkpoints": {"evaluate.every": 1, "checkpoint.every": 1, "checkpoint.keep": 1},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with a corpus, a cache and the workdir of one run.

    folder    the folder
    settings  how the run differs from `TINY`
    """

    folder: pathlib.Path
    settings: dict[str, object]

    @property
    def workdir(self) -> pathlib.Path:
        """The workdir of the run."""
        return self.folder / "run"

    def arguments(self, **changes: object) -> list[str]:
        """The arguments of the command that trains here. `train__num_updates=4` sets train.num_updates."""
        values = {"data.sources": self.folder / "corpus", "data.cache_dir": self.folder / "cache", **TINY}
        values |= self.settings | {key.replace("__", "."): value for key, value in changes.items()}
        keys = [f"--config.{key}={value}" for key, value in values.items()]
        return [f"--config={ROOT / 'configs' / 'base.py'}", f"--workdir={self.workdir}", *keys]

    def copy_to(self, folder: pathlib.Path) -> Place:
        """A copy in `folder`, in place of whatever is there."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder, symlinks=True)
        return dataclasses.replace(self, folder=folder)

    def numbers(self) -> dict[tuple[str, int], dict]:
        """The lines of metrics.jsonl by kind and update, without values that depend on the clock."""
        lines = {}
        for text in (self.workdir / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                values = {name: value for name, value in line.items() if name not in TIMING}
                lines[line["kind"], line["update"]] = values
        return lines


def make_place(folder: pathlib.Path, settings: dict[str, object]) -> Place:
    """A new place with a corpus of 40 short documents."""
    rng = random.Random(0)
    (folder / "corpus").mkdir(parents=True)
    words = [
        "river",
        "stone",
        "cloud",
        "light",
        "code",
        "loop",
        "train",
        "model",
        "token",
        "batch",
        "update",
        "seed",
    ]
    for i in range(40):
        text = " ".join(rng.choices(words, k=rng.randint(2, 120)))
        (folder / "corpus" / f"{i:03d}.txt").write_text(text)
    return Place(folder, settings)


class _TooLong(BaseException):
    """A case did not end in time."""


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    """A context that raises _TooLong if its body takes more than `seconds`."""

    def give_up(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_case(place: Place, expected: dict[tuple[str, int], dict]) -> tuple[str, str]:
    """Trains in `place` to the end. Returns how the case ended, one of the five ways, and what was printed.

    `expected` is what `numbers` gives for an undisturbed run.
    """
    out, err = io.StringIO(), io.StringIO()
    # In this process, which has jax imported and programs compiled already.
    try:
        with patience(PATIENCE), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = llmjax_main(["llmjax", *place.arguments()])
    except _TooLong:
        return HANG, ""
    except BaseException as error:
        return TRACEBACK, f"{type(error).__name__}: {error}"
    words = err.getvalue().strip()
    # A user error begins with the program's name. Anything else on the way out is as bad as a traceback.
    if code != 0:
        return (SENTENCE if words.startswith("llmjax: ") else TRACEBACK), words
    numbers = place.numbers()
    # The last line of an undisturbed run: "train" comes after "evaluate" in the alphabet. Lines of earlier updates may
    # have been lost with the damaged file, but none may be wrong, and those of the last update must be there.
    last = max(expected)
    ends = [key for key in expected if key[1] == last[1]]
    different = [key for key, line in numbers.items() if line != expected.get(key)]
    different += [key for key in ends if key not in numbers]
    return (CHANGE, f"{different[:3]} {words}") if different else (SUCCESS, words)


# Each of the following damages a file in its own way.


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """Flips one bit."""
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: pathlib.Path, rng: random.Random) -> None:
    """Cuts off the end."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))] if data else b"")


def empty(path: pathlib.Path, rng: random.Random) -> None:
    """Leaves an empty file."""
    path.write_bytes(b"")


def lengthen(path: pathlib.Path, rng: random.Random) -> None:
    """Appends random bytes."""
    path.write_bytes(path.read_bytes() + rng.randbytes(9))


def scramble(path: pathlib.Path, rng: random.Random) -> None:
    """Writes random bytes in place of all bytes."""
    path.write_bytes(rng.randbytes(len(path.read_bytes())))


def remove(path: pathlib.Path, rng: random.Random) -> None:
    """Deletes the file."""
    path.unlink()


def folder_instead(path: pathlib.Path, rng: random.Random) -> None:
    """Puts a folder in place of the file."""
    path.unlink()
    path.mkdir()


def link_to_nothing(path: pathlib.Path, rng: random.Random) -> None:
    """Puts a broken link in place of the file."""
    path.unlink()
    path.symlink_to("nothing")


def remove_its_folder(path: pathlib.Path, rng: random.Random) -> None:
    """Deletes the folder of the file with all that is in it."""
    shutil.rmtree(path.parent)


DAMAGES: tuple[Callable[[pathlib.Path, random.Random], None], ...] = (
    flip, cut, empty, lengthen, scramble, remove, folder_instead, link_to_nothing, remove_its_folder,
)  # fmt: skip


def storage(scratch: pathlib.Path, count: int) -> list[tuple[str, str, str]]:
    """(what was damaged, how the case ended, message) for `count` faults, each in a fresh copy of one stopped run."""
    # With a constant learning rate a run of 4 updates that goes on to 6 has the numbers of a run of 6.
    begun = make_place(scratch / "begun", {"optimizer.schedule": "constant"})
    train(begun, train__num_updates=4)
    whole = begun.copy_to(scratch / "whole")
    train(whole)
    expected, results = whole.numbers(), []
    for number in range(count):
        rng = random.Random(number)
        place = begun.copy_to(scratch / "damaged")
        # The folder is drawn first, so that the many files of the cache do not crowd out the others.
        area = rng.choice((place.workdir, place.workdir / "checkpoints", place.folder / "cache"))
        path = rng.choice(sorted(p for p in area.rglob("*") if p.is_file() and "tensorboard" not in p.parts))
        damage = rng.choice(DAMAGES)
        # Without its whole workdir or cache a run begins anew, which would show nothing.
        if damage is remove_its_folder and path.parent in (place.workdir, place.folder / "cache"):
            damage = remove
        damage(path, rng)
        name = f"{damage.__name__} {path.relative_to(place.folder)}"
        results.append((name, *run_case(place, expected)))
        say(results[-1])
    return results


def train(place: Place, **changes: object) -> None:
    """Trains in `place`. Raises RuntimeError if the run does not end well."""
    words = io.StringIO()
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        code = llmjax_main(["llmjax", *place.arguments(**changes)])
    if code != 0:
        raise RuntimeError(f"training ended with exit code {code}: {words.getvalue()}")


def kills(scratch: pathlib.Path, count: int) -> list[tuple[str, str, str]]:
    """(kind of run and moment, how the case ended, message) for `count` kills, spread over the kinds of run."""
    results = []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        whole = scratch / f"whole-{kind}"
        if not whole.exists():
            train(make_place(whole, KINDS[kind]))
        expected, rng = Place(whole, KINDS[kind]).numbers(), random.Random(number)
        shutil.rmtree(scratch / "killed", ignore_errors=True)
        place = make_place(scratch / "killed", KINDS[kind])
        update = kill_after(place, rng)
        results.append((f"{kind}, killed {update}", *run_case(place, expected)))
        say(results[-1])
    return results


def kill_after(place: Place, rng: random.Random) -> str:
    """Starts a run and kills it, a random time after it has written a random line of metrics.jsonl. Returns when."""
    command = [sys.executable, "-m", "llmjax.main", *place.arguments()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
    # The moments are spread over the start, over all updates, and over the saves between them.
    lines, delay = rng.randrange(8), rng.uniform(0.0, 1.0)
    metrics, started = place.workdir / "metrics.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() - started < PATIENCE:
        if lines == 0 or (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()
    return f"{delay:.2f} s after line {lines} of metrics.jsonl"


def odd_configs(scratch: pathlib.Path, count: int) -> list[tuple[str, str, str]]:
    """(what was changed, how the case ended, message) for `count` mutations of the base config. Nothing is trained."""
    results = []
    for mutation in mutations(get_config().to_dict(), seed=0, count=count):
        try:
            with patience(PATIENCE):
                sentence = outcome(mutation)
            ending = (SUCCESS if sentence == "accepted" else SENTENCE), sentence
        except _TooLong:
            ending = HANG, ""
        except Exception as error:
            ending = TRACEBACK, f"{type(error).__name__}: {error}"
        results.append((mutation.name, *ending))
        if ending[0] in FORBIDDEN:
            say(results[-1])
    return results


def say(result: tuple[str, str, str]) -> None:
    """Prints how a case ended."""
    name, ending, words = result
    print(f"{ending}: {name}: {words[:SHOWN]}", file=sys.stderr, flush=True)


# Part -> (function, cases, cases of a smoke run). Choices: half an hour in all.
PARTS = {"storage": (storage, 150, 2), "kills": (kills, 40, 1), "configs": (odd_configs, 2000, 30)}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llmjax-faults-") as folder:
        # Most cases compile the same programs.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        for part in arguments.parts:
            make, whole, smoke = PARTS[part]
            count = smoke if arguments.smoke else whole
            scratch = pathlib.Path(folder) / part
            scratch.mkdir()
            endings = collections.Counter(ending for _, ending, _ in make(scratch, count))
            for ending in (SUCCESS, SENTENCE, *FORBIDDEN):
                goal = {"goal": 0, "met": endings[ending] == 0} if ending in FORBIDDEN else {}
                name = f"faults_{part}_{ending.replace(' ', '_')}"
                report(name, endings[ending], f"of {count} cases", **goal)


if __name__ == "__main__":
    main()
