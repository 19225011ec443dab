"""Curves of a run, from what `fit` returned or from its CSV file."""

import csv
import math
import pathlib

import numpy as np

from keras_dinov3.figures import figure_class, plot, save

# Panels: a title, what of the logs is in it, and what the values are multiplied by.
PANELS = (
    ("Loss and its terms", lambda name: name.endswith("loss") and "probe" not in name, 1),
    ("Accuracy (%)", lambda name: "knn" in name or name == "linear_probe", 100),
    ("Effective rank", lambda name: name in ("rankme", "lidar"), 1),
    ("Targets (nats)", lambda name: name in TARGETS, 1),
    ("Agreement and spread", lambda name: name in SPREAD, 1),
)
TARGETS = ("target_entropy", "target_kl", "target_information")
SPREAD = ("feature_std", "feature_agreement", "prototype_agreement", "patch_drift")


def training_curves(history, path=None, references=None):
    """The loss and its terms, and what the monitors have logged, over epochs.

    Args:
        history: What `fit` returned, its dict, or the path of a `CSVLogger` file. A row that was
            cut off is left out; of several rows for an epoch, as a resumed run writes, the last
            counts.
        path: Where to write the picture. `None` writes none.
        references: Dict from names to accuracies in 0-1, drawn as dashed lines beside k-NN;
            for instance `{"raw pixels": 0.5, "untrained": 0.3}`.

    Returns:
        `matplotlib.figure.Figure`: losses first, then a panel for each kind that was logged, of
        accuracies, ranks, targets, and agreement.

    Raises:
        ValueError: If there is no loss, or a value is missing in some epochs.
        ImportError: If Matplotlib is missing.
    """
    epochs, series = read_history(history)
    panels = [
        (title, {name: factor * y for name, y in series.items() if belongs(name)})
        for title, belongs, factor in PANELS
    ]
    if not panels[0][1]:
        raise ValueError(f"`history` must hold a loss. Received: values {sorted(series)}.")
    references = references or {}
    drawn = [
        (title, lines)
        for title, lines in panels
        if lines or (references and title.startswith("Accuracy"))
    ]
    columns = min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    figure = figure_class()(figsize=(4.5 * columns, 3.2 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(drawn) :]:
        axes.set_axis_off()
    for axes, (title, lines) in zip(grid, drawn, strict=False):
        for name, y in lines.items():
            style = {"color": "black", "linewidth": 2} if name == "loss" else {}
            is_loss = title == drawn[0][0]
            plot(axes, epochs, y, name, style if is_loss else {"marker": "o", "markersize": 3})
        if title.startswith("Accuracy"):
            for index, (name, value) in enumerate(references.items(), len(lines)):
                axes.axhline(100 * value, label=name, linestyle="--", color=f"C{index}")
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    if path is not None:
        save(figure, path)
    return figure


def read_history(history):
    """Epochs counted from 1, and a float array of the same length by name; NaN where missing."""
    if isinstance(history, (str, pathlib.Path)):
        rows = [r for r in read_rows(history) if None not in r and None not in r.values()]
        rows = list({row.get("epoch", index): row for index, row in enumerate(rows)}.values())
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
        epochs = columns.pop("epoch", None)
    else:
        columns = getattr(history, "history", history)
        epochs = getattr(history, "epoch", None)
    series = {name: np.array([number(x) for x in values]) for name, values in columns.items()}
    # CSVLogger also writes columns for validation that never took place.
    series = {name: values for name, values in series.items() if np.isfinite(values).any()}
    lengths = {name: len(values) for name, values in series.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "Each value must be logged in every epoch (NaN where it is not known), since its "
            f"epochs cannot be guessed. Received: numbers of epochs {lengths}."
        )
    length = max(lengths.values(), default=0)
    return np.array([int(e) + 1 for e in epochs or range(length)]), series


def read_rows(path):
    """The rows of a CSV file as dicts; what is in excess or missing is under or is `None`."""
    try:
        with open(path, newline="", errors="replace") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def number(text):
    try:
        return float(text)
    except (TypeError, ValueError):  # CSVLogger writes "NA"
        return math.nan
