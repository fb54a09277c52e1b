"""Draws loss.png from results.csv: `pip install matplotlib`, then run this file."""

import csv
import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent

rows = list(csv.DictReader((HERE / "results.csv").open()))
figure, axes = plt.subplots(figsize=(7, 4))
for name, group in itertools.groupby(rows, key=lambda row: row["variant"]):
    group = list(group)
    (line,) = axes.plot(
        [int(r["tokens"]) / 1e6 for r in group], [float(r["train_loss"]) for r in group], label=name
    )
    scored = [r for r in group if r["held_out_loss"]]
    axes.plot([int(r["tokens"]) / 1e6 for r in scored], [float(r["held_out_loss"]) for r in scored], "o",
              color=line.get_color())  # fmt: skip
axes.set(
    xlabel="million tokens", ylabel="nats per token", title="Base run: training loss (lines), held-out (dots)"
)
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(HERE / "loss.png", dpi=110)
