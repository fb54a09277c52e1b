"""Makes the runs of this experiment, each a whole `llmjax` run, and writes a line a run to results.csv.

    python experiments/2026-11-batch-size-rivals/run.py search     # seed 0: every arm, learning rate and scaling rule
    python experiments/2026-11-batch-size-rivals/run.py fit        # seed 0: what the two fitted arms need
    python experiments/2026-11-batch-size-rivals/run.py decide     # fresh seeds: each arm as frozen.json has it

Run it in the root of the repository. Runs that results.csv has already are left out, so that it goes on where it was
stopped, and several processes may share the work: `search --part 0/2` and `search --part 1/2`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import pathlib
import shutil
import sys
import tempfile

from llmjax.main import main as llmjax_main

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.csv"
FROZEN = HERE / "frozen.json"
FITTED = HERE / "fitted.json"
TOKENS = 409_600
RATES = (5e-3, 1e-2, 2e-2)
RULES = ("sqrt", "linear")
FIXED = (2048, 4096, 6144, 8192, 12288)
FRESH_SEEDS = tuple(range(1, 13))
FIELDS = ("arm", "stage", "rate", "rule", "seed", "tokens", "updates", "loss")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One run: `arm` names how its batch is chosen, `rate` is the learning rate of 2,048 tokens, `rule` scales it."""

    arm: str
    stage: str
    rate: float
    rule: str
    seed: int

    def key(self) -> tuple[str, ...]:
        return self.arm, self.stage, repr(self.rate), self.rule, str(self.seed)


def arm_settings(arm: str) -> dict[str, object]:
    """The config keys of an arm, as `fixed-4096`, `wsd-fixed-4096`, `constant-4096`, `controller-3.3`, `wsd-bopt`."""
    kind, _, value = arm.rpartition("-")
    if kind in ("fixed", "wsd-fixed", "constant"):
        schedule = {"fixed": "linear", "wsd-fixed": "wsd", "constant": "constant"}[kind]
        batch = {"train.batch_schedule": "piecewise", "train.batch_points": f"0:{value}"}
        return batch | {"optimizer.schedule": schedule}
    if kind == "controller":
        return {"controller.name": "noise_scale", "controller.batch_per_noise": value}
    points = ",".join(json.loads(FITTED.read_text())[arm])
    schedule = {"ramp": "linear", "wsd-bopt": "wsd"}[arm]
    return {
        "train.batch_schedule": "piecewise",
        "train.batch_points": points,
        "optimizer.schedule": schedule,
    }


def make_run(setting: Setting, keep_metrics: pathlib.Path | None = None) -> dict[str, object]:
    """Trains, and gives the line of results.csv; a copy of metrics.jsonl goes to `keep_metrics`."""
    workdir = pathlib.Path(tempfile.mkdtemp(prefix="llmjax-batch-size-"))
    keys = arm_settings(setting.arm) | {
        "optimizer.learning_rate": setting.rate,
        "optimizer.batch_scaling": setting.rule,
        "seed": setting.seed,
    }
    arguments = [f"--config={HERE / 'config.py'}", f"--workdir={workdir}"]
    arguments += [f"--config.{key}={value}" for key, value in keys.items()]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as words:
            code = llmjax_main(["llmjax", *arguments])
        if code != 0:
            raise RuntimeError(f"{setting} ended with exit code {code}: {words.getvalue()}")
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        if keep_metrics is not None:
            shutil.copy(workdir / "metrics.jsonl", keep_metrics)
    finally:
        shutil.rmtree(workdir, ignore_errors=True)
    updates = [line for line in lines if line["kind"] == "train"]
    loss = [line["loss"] for line in lines if line["kind"] == "evaluate"][-1]
    values = dataclasses.asdict(setting) | {"tokens": updates[-1]["tokens"], "updates": len(updates)}
    return values | {"loss": round(loss, 5)}


def finished() -> list[dict[str, str]]:
    """The lines of results.csv."""
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def append(values: dict[str, object]) -> None:
    """Adds a line to results.csv, also while another process adds one."""
    with RESULTS.open("a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, FIELDS)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(values)


def make_runs(settings: list[Setting], part: str) -> None:
    """Makes those of `settings` that are not done, every n-th of them for `part` = "i/n"."""
    mine, parts = map(int, part.split("/"))
    done = {tuple(line[name] for name in FIELDS[:5]) for line in finished()}
    todo = [setting for setting in settings if setting.key() not in done][mine::parts]
    for number, setting in enumerate(todo, 1):
        append(make_run(setting))
        print(f"{number} of {len(todo)}: {setting}", file=sys.stderr, flush=True)


def search(arms: tuple[str, ...]) -> list[Setting]:
    """Every arm with each learning rate under both rules, on seed 0."""
    return [Setting(arm, "search", rate, rule, 0) for arm in arms for rate in RATES for rule in RULES]


def best(arm: str, lines: list[dict[str, str]]) -> dict[str, str]:
    """The line of the lowest loss that the search found for `arm`."""
    return min(
        (line for line in lines if line["arm"] == arm and line["stage"] == "search"),
        key=lambda line: float(line["loss"]),
    )


def fit() -> None:
    """Writes fitted.json: the batches of the ramp, and of the scheduler of Zhou et al., as functions of tokens seen.

    ramp      the batches that the controller chose in its best run on seed 0, as steps of an eighth of the tokens
    wsd-bopt  Zhou et al. (2026, arXiv 2601.05034): runs of fixed batches at a constant learning rate show for each
              loss the batch that reaches it with the fewest tokens, B_opt; a batch that never reaches the loss is
              below B_min. The batch grows along B_opt
    """
    lines = finished()
    controllers = {line["arm"] for line in lines if line["arm"].startswith("controller")}
    chosen = min((best(arm, lines) for arm in sorted(controllers)), key=lambda line: float(line["loss"]))
    setting = Setting(chosen["arm"], "fit", float(chosen["rate"]), chosen["rule"], 0)
    points = {"ramp": steps_of(train_lines(setting))}
    curves = {}
    for size in FIXED:
        tuned = best(f"fixed-{size}", lines)
        constant = Setting(f"constant-{size}", "fit", float(tuned["rate"]), tuned["rule"], 0)
        curves[size] = smooth_curve(train_lines(constant))
    FITTED.write_text(json.dumps(points | {"wsd-bopt": best_batches(curves)}, indent=1) + "\n")


def train_lines(setting: Setting) -> list[dict]:
    """The updates of a run, as metrics.jsonl has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "metrics.jsonl"
        append(make_run(setting, keep_metrics=path))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def steps_of(lines: list[dict], parts: int = 8) -> list[str]:
    """The mean batch of each `parts`-th of the run, in whole micro-steps, never smaller than before."""
    points, size = [], 512
    for part in range(parts):
        start, stop = TOKENS * part // parts, TOKENS * (part + 1) // parts
        inside = [line["accumulation_steps"] * 512 for line in lines if start < line["tokens"] <= stop]
        mean = sum(inside) / len(inside) if inside else size
        size = max(size, round(mean / 512) * 512)
        points.append(f"{start}:{size}")
    return points


def smooth_curve(lines: list[dict], half_life: int = 16_384) -> list[tuple[int, float]]:
    """Tokens seen and training loss, the loss averaged with this half-life in tokens."""
    curve, level, before = [], None, 0
    for line in lines:
        keep = 0.5 ** ((line["tokens"] - before) / half_life)
        level = line["loss"] if level is None else keep * level + (1 - keep) * line["loss"]
        before = line["tokens"]
        curve.append((line["tokens"], level))
    return curve


def best_batches(curves: dict[int, list[tuple[int, float]]]) -> list[str]:
    """B_opt as a function of tokens seen: for each falling loss, the batch that is first to reach it."""
    levels = sorted({round(loss, 2) for curve in curves.values() for _, loss in curve}, reverse=True)
    points, size = [f"0:{min(curves)}"], min(curves)
    for level in levels:
        reached = {
            batch: next((tokens for tokens, loss in curve if loss <= level), None)
            for batch, curve in curves.items()
        }
        first = {batch: tokens for batch, tokens in reached.items() if tokens is not None}
        if not first:
            continue
        batch = min(first, key=first.get)
        if batch > size:
            size = batch
            points.append(f"{first[batch]}:{batch}")
    return points


def freeze(arms: tuple[str, ...]) -> dict[str, dict]:
    """frozen.json, made of the search the first time and never changed afterwards: rate and rule of each arm."""
    if not FROZEN.exists():
        lines = finished()
        chosen = {arm: best(arm, lines) for arm in arms}
        values = {
            arm: {"rate": float(line["rate"]), "rule": line["rule"], "search_loss": float(line["loss"])}
            for arm, line in chosen.items()
        }
        FROZEN.write_text(json.dumps(values, indent=1) + "\n")
    return json.loads(FROZEN.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("search", "fit", "search-fitted", "decide"))
    parser.add_argument("--part", default="0/1")
    arguments = parser.parse_args()
    fixed = (*(f"fixed-{size}" for size in FIXED), "wsd-fixed-4096")
    closed_loop = ("controller-2", "controller-3.3")
    fitted = ("ramp", "wsd-bopt")
    if arguments.stage == "search":
        make_runs(search(fixed + closed_loop), arguments.part)
    elif arguments.stage == "fit":
        fit()
    elif arguments.stage == "search-fitted":
        make_runs(search(fitted), arguments.part)
    else:
        frozen = freeze(fixed + closed_loop + fitted)
        make_runs(
            [
                Setting(arm, "decide", chosen["rate"], chosen["rule"], seed)
                for seed in FRESH_SEEDS
                for arm, chosen in frozen.items()
            ],
            arguments.part,
        )


if __name__ == "__main__":
    main()
