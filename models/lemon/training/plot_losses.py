"""Draw card/losses.png from card/*.csv: `python models/lemon/training/plot_losses.py`."""

import csv
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

CARD = Path(__file__).parents[1] / "card"
CURVES = {
    "vae-losses.csv": ("autoencoder", "pixels", "mean absolute error of pixels"),
    "diffusion-losses.csv": ("UNet and text encoder", "mse", "mean squared error of the noise"),
    "classifier-losses.csv": ("marker", "loss", "cross-entropy, five attributes"),
}


def main() -> None:
    """Draw one panel per training."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    for axis, (name, (title, column, label)) in zip(axes, CURVES.items(), strict=True):
        with (CARD / name).open() as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        axis.plot(steps, [float(row[column]) for row in rows], linewidth=1)
        axis.set(title=title, xlabel="step", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(CARD / "losses.png", dpi=90)


if __name__ == "__main__":
    main()
