"""Draws accuracy.png from results.csv: `pip install matplotlib`, then run this file."""

import csv
import itertools
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
# Held-out accuracy of TF-IDF with logistic regression on the same texts, from `rival.py`.
RIVAL = {"spam": 0.9878, "sentiment": 0.7666, "sentiment_zh": 0.8351}

rows = [row for row in csv.DictReader((HERE / "results.csv").open()) if row["config"] in RIVAL]
figure, panels = plt.subplots(1, len(RIVAL), figsize=(9, 3))
for (name, rival), axes in zip(RIVAL.items(), panels, strict=True):
    of_config = [row for row in rows if row["config"] == name]
    for seed, group in itertools.groupby(of_config, key=lambda row: row["seed"]):
        points = [(int(row["update"]), float(row["accuracy"])) for row in group]
        axes.plot(*zip(*points), "o-", label=f"seed {seed}", markersize=3)
    axes.axhline(rival, color="gray", linestyle="--", label="TF-IDF, logistic")
    axes.set(title=name, xlabel="updates")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("held-out accuracy")
panels[0].legend(frameon=False, fontsize=8)
figure.tight_layout()
figure.savefig(HERE / "accuracy.png", dpi=110)
