"""Draws batches.png from results.csv and batches.csv: `pip install matplotlib`, then run this file."""

import csv
import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
COLORS = {"fixed": "tab:gray", "controller": "tab:blue"}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
ticks = (100, 200, 400, 800)
for row in csv.DictReader((HERE / "results.csv").open()):
    kind = "controller" if "controller" in row["run"] else "fixed"
    if row["tokens"] != "819200":
        left.plot(int(row["updates"]), float(row["held_out_loss"]), "o", color=COLORS[kind], markersize=4)
left.set(xscale="log", xlabel="updates", ylabel="held-out loss", title="Fixed batches gray, controller blue")
left.set_xticks(ticks, ticks)
left.minorticks_off()
for name, group in itertools.groupby(
    csv.DictReader((HERE / "batches.csv").open()), key=lambda row: row["run"]
):
    group = list(group)
    tokens = [int(r["tokens"]) / 1e6 for r in group]
    (line,) = right.plot(
        tokens, [int(r["batch"]) for r in group], drawstyle="steps-post", label=f"{name}: batch"
    )
    right.plot(tokens, [float(r["noise_scale"] or "nan") for r in group], ":", color=line.get_color(),
               label=f"{name}: noise scale")  # fmt: skip
right.set(yscale="log", xlabel="million tokens", ylabel="tokens", title="Batch and gradient noise scale")
right.legend(frameon=False, fontsize=7)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(HERE / "batches.png", dpi=110)
