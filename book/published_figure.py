"""Draw the README's figure from the paper's own counts: `python book/published_figure.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from tomlib import alignment, plots, published

plots.style()
comparison = alignment.compare(published.roles())
rows = {split: side.reset_index(drop=True) for split, side in comparison.groupby("split")}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
for ax, split in zip(axes, ("in_sample", "new_contexts"), strict=True):
    training = None if split == "in_sample" else rows["in_sample"]
    plots.scores(alignment.scorecard(rows[split], training=training), ax=ax)
    ax.set_title(f"{split.replace('_', ' ')} (published)")
figure.savefig(Path(__file__).parent / "_static" / "published.png", metadata={"Software": None})
