"""Prints the table of this experiment from results.csv and draws losses.png: `pip install matplotlib`, then run it."""

import collections
import csv
import math
import pathlib
import statistics

import matplotlib
import scipy.stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
MARGIN = 0.02  # nats per token
CONTROLLERS = ("controller-2", "controller-3.3")
# Where the names of arms stand that lie close to others, in points.
SHIFTS = {
    "fixed-6144": (-48, -3), "fixed-8192": (-48, -3), "ramp": (-24, -12), "controller-2": (5, 22),
    "wsd-fixed-4096": (6, 14), "wsd-bopt": (6, 2), "fixed-4096": (6, -10),
}  # fmt: skip

losses, updates = collections.defaultdict(dict), collections.defaultdict(dict)
for line in csv.DictReader((HERE / "results.csv").open()):
    if line["stage"] == "decide":
        losses[line["arm"]][line["seed"]] = float(line["loss"])
        updates[line["arm"]][line["seed"]] = int(line["updates"])


def mean(values: dict[str, float]) -> float:
    return statistics.mean(values.values())


def difference(arm: str, rival: str) -> tuple[float, float]:
    """Mean paired difference of the loss, and half of its 95 % interval."""
    pairs = [loss - losses[rival][seed] for seed, loss in losses[arm].items()]
    reach = scipy.stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return statistics.mean(pairs), reach


def cell(arm: str, rival: str) -> str:
    if arm == rival:
        return ""
    middle, reach = difference(arm, rival)
    word = "as good" if middle + reach < MARGIN else "worse" if middle - reach > MARGIN else "not shown"
    return f"{middle:+.4f} [{middle - reach:+.4f}, {middle + reach:+.4f}] {word}"


rivals = list(losses)
print("| arm | held-out loss | updates |", *(f"{arm} minus it |" for arm in CONTROLLERS))
print("|---|---|---|---|---|")
for rival in rivals:
    cells = " | ".join(cell(arm, rival) for arm in CONTROLLERS)
    print(f"| {rival} | {mean(losses[rival]):.4f} | {mean(updates[rival]):.1f} | {cells} |")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
for arm in rivals:
    color = "tab:blue" if arm in CONTROLLERS else "tab:orange" if arm in ("ramp", "wsd-bopt") else "tab:gray"
    spread = statistics.stdev(losses[arm].values())
    left.errorbar(
        mean(updates[arm]), mean(losses[arm]), spread, fmt="o", color=color, markersize=4, capsize=2
    )
    shift = SHIFTS.get(arm, (5, 3))
    left.annotate(arm, (mean(updates[arm]), mean(losses[arm])), shift, textcoords="offset points", fontsize=7)
left.set(
    xscale="log", xlabel="updates", ylabel="held-out loss", title="12 seeds: mean and standard deviation"
)
left.set_xticks((40, 60, 100, 200), (40, 60, 100, 200))
left.minorticks_off()
names = [rival for rival in reversed(rivals) if rival not in CONTROLLERS and rival != "fixed-12288"]
for row, rival in enumerate(names):
    middle, reach = difference("controller-2", rival)
    right.errorbar(middle, row, xerr=reach, fmt="o", color="tab:blue", markersize=4, capsize=2)
right.axvline(0, color="lightgray", zorder=0)
right.axvline(MARGIN, color="tab:red", linestyle=":", label=f"margin, +{MARGIN} nats")
right.set_yticks(range(len(names)), names)
right.set(xlabel="nats per token", title="controller-2 minus its rival: 95 % interval")
right.legend(frameon=False, fontsize=8, loc="upper left")
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(HERE / "losses.png", dpi=110)
