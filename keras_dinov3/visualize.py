"""Pictures of what is trained and learned: arrays in, arrays and figures out.

Figures are drawn without pyplot, so nothing is left open and no display is needed.
"""

import csv
import math
import pathlib

import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.families import patch_size_of
from keras_dinov3.features import FeatureExtractor


def patch_pca(
    backbone,
    images,
    mean=None,
    std=None,
    image_size=None,
    path=None,
    batch_size=16,
    extras=None,
):
    """Patch features as colours: their three main directions as red, green and blue.

    The directions are those of all patches of all images, so equal colours mean similar
    features across images too.

    Args:
        backbone: As in `encode`.
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        mean: As in `FeatureExtractor`, as are `std` and `image_size`.
        std: Number, one per channel, or `None`.
        image_size: Int or `(height, width)` in pixels, or `None` for the images' own size. A
            larger one gives finer pictures.
        path: Where to write the picture (`.png`, `.pdf`, ...): each image above its colours.
            `None` writes none, and does not need Matplotlib.
        batch_size: Int, images per step.
        extras: `EncoderExtras` that the backbone was trained with (`model.teacher_extras`).
            `None`: none.

    Returns:
        float32 NumPy array of shape `(B, h, w, 3)` from 0 to 1, a colour per patch.

    Raises:
        ValueError: As `FeatureExtractor` and its `extract`.
        ImportError: If `path` is given and Matplotlib is missing.

    Reference:
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), figure 1.
    """
    if path is not None:
        figure_class()  # if it is missing, say so before the work
    images = backend.numpy_of(images)
    extractor = FeatureExtractor(backbone, "patches", mean, std, image_size, extras)
    patches = extractor.extract(images, min(batch_size, max(len(images), 1)))
    height, width = (n // patch_size_of(backbone) for n in extractor.input_size(images.shape[1:3]))
    colors = pca_colors(patches).reshape(len(patches), height, width, 3)
    if path is not None:
        save(patch_pca_figure(images, colors), path)
    return colors


def pca_colors(features):
    """Colours of features: principal components, stretched to 0-1 and cut at the extremes.

    Args:
        features: Float array of shape `(..., D)`, at least 3 wide.

    Returns:
        float32 NumPy array of shape `(..., 3)`. A component that does not vary is 0.5.

    Raises:
        ValueError: If the features are too narrow or not finite.
    """
    if features.shape[-1] < 3 or not np.isfinite(features).all():
        raise ValueError(
            "`features` must be finite and at least 3 wide, one direction for each of red, green "
            f"and blue. Received: shape {features.shape}, {np.isnan(features).sum()} NaN."
        )
    rows = np.asarray(features, "float64").reshape(-1, features.shape[-1])
    rows = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(rows.T @ rows)  # ascending
    directions = directions[:, :-4:-1]
    largest = np.abs(directions).argmax(axis=0)
    components = rows @ (directions * np.sign(directions[largest, range(3)]))
    low, high = np.percentile(components, (1, 99), axis=0)
    varies = high - low > 1e-6 * np.abs(rows).max()
    colors = np.where(varies, (components - low) / np.where(varies, high - low, 1.0), 0.5)
    return np.clip(colors, 0.0, 1.0).reshape(*features.shape[:-1], 3).astype("float32")


def patch_pca_figure(images, colors, columns=8):
    """Each image above its patch colours.

    Args:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        colors: `(B, h, w, 3)` from 0 to 1, as `patch_pca` returns them.
        columns: Int, images side by side; more go below.

    Returns:
        `matplotlib.figure.Figure`.
    """
    images = backend.numpy_of(images)
    columns = min(columns, len(images))
    rows = 2 * math.ceil(len(images) / columns)
    height = 1.8 * images.shape[1] / images.shape[2]
    figure = figure_class()(figsize=(1.8 * columns + 0.4, (height + 0.05) * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (image, color) in enumerate(zip(images, colors, strict=True)):
        row, column = 2 * (index // columns), index % columns
        show(grid[row, column], image, "image" if column == 0 else None)
        show(grid[row + 1, column], color, "patch features" if column == 0 else None)
    figure.suptitle("Patch features: first three principal components as RGB", fontsize=10)
    return figure


def crops(model, images, masks=None, path=None):
    """What the augmentation makes of some images, and which patches are masked.

    Args:
        model: `DINOv3`, which also draws masks, or a `MultiCrop` layer.
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        masks: Bool array `(B, G, N)`, drawn in gray over the global crops. `None`: those of
            the model, if any.
        path: Where to write the picture: per image, itself and its crops. `None` writes none.

    Returns:
        Dict of float32 NumPy arrays from 0 to 1 as they are drawn: `"global_crops"`
        `(B, G, S, S, C)` and `"local_crops"` `(B, L, s, s, C)`.

    Raises:
        ValueError: As `MultiCrop`, or if `masks` do not fit the crops.
        ImportError: If `path` is given and Matplotlib is missing.
    """
    if path is not None:
        figure_class()
    augmentation, images = getattr(model, "augmentation", model), backend.numpy_of(images)
    ends = np.array([[0.0], [1.0]], "float32").repeat(images.shape[-1], axis=1)
    black, white = ops.convert_to_numpy(augmentation.normalize(ends))
    drawn = {
        name: np.clip((ops.convert_to_numpy(crop) - black) / (white - black), 0.0, 1.0)
        for name, crop in augmentation(images).items()
    }
    count, num_crops, height, width = drawn["global_crops"].shape[:4]
    if masks is None and getattr(model, "masking", None) is not None:
        patch_size = patch_size_of(model.student)
        grid_size = (height // patch_size, width // patch_size)
        masks = model.masking.sample(count, num_crops, grid_size)
    if masks is not None:
        drawn["global_crops"] = gray_out(drawn["global_crops"], ops.convert_to_numpy(masks))
    if path is not None:
        save(crops_figure(images, drawn), path)
    return drawn


def gray_out(images, masks):
    """Covers the true of `masks` `(..., N)` in images `(..., H, W, C)` from 0 to 1."""
    height, width = images.shape[-3:-1]
    patch_size = math.isqrt(height * width // masks.shape[-1])
    grid = (height // patch_size, width // patch_size)
    if masks.shape != (*images.shape[:-3], math.prod(grid)) or grid[0] * patch_size != height:
        raise ValueError(
            "`masks` must have one value per square patch of each global crop. Received: "
            f"masks.shape={masks.shape}, global crops of shape {images.shape}."
        )
    masks = masks.reshape(*masks.shape[:-1], *grid).astype(bool)
    masks = masks.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)[..., None]
    return np.where(masks, 0.15 * images + 0.85 * 0.5, images)


def crops_figure(images, crops):
    """One row per image: itself, its global and its local crops.

    Args:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        crops: Dict of arrays from 0 to 1, as `crops` returns it.

    Returns:
        `matplotlib.figure.Figure`.
    """
    images, global_crops = backend.numpy_of(images), crops["global_crops"]
    local_crops = crops.get("local_crops", global_crops[:, :0])
    local_columns = math.ceil(local_crops.shape[1] / 2)  # two rows of half the size
    widths = [max(images.shape[2] / images.shape[1], 1.0)] + [1.0] * global_crops.shape[1]
    widths += [local_columns / 2] * (local_columns > 0)
    figure = figure_class()(figsize=(1.7 * sum(widths), 1.7 * len(images) + 0.2))
    rows = figure.add_gridspec(len(images), len(widths), width_ratios=widths)
    for row, image in enumerate(images):
        for column, picture in enumerate([image, *global_crops[row]]):
            axes = figure.add_subplot(rows[row, column])
            show(axes, picture)
            if row == 0:
                axes.set_title(f"global crop {column}" if column else "image", fontsize=8)
        if local_columns:
            corner = rows[row, -1].subgridspec(2, local_columns)
            for index, picture in enumerate(local_crops[row]):
                axes = figure.add_subplot(corner[divmod(index, local_columns)])
                show(axes, picture)
                if row == index == 0:
                    axes.set_title("local crops", fontsize=8, loc="left")
    return figure


def training_curves(history, path=None, references=None):
    """The loss, its terms and the k-NN accuracy over epochs.

    Args:
        history: What `fit` returned, its dict, or the path of a `CSVLogger` file.
        path: Where to write the picture. `None` writes none.
        references: Dict from names to accuracies in 0-1, drawn as dashed lines beside k-NN;
            for instance `{"raw pixels": 0.5, "untrained": 0.3}`.

    Returns:
        `matplotlib.figure.Figure`: losses on the left, values named `knn...` on the right.

    Raises:
        ValueError: If there is no loss, or a value is missing in some epochs.
        ImportError: If Matplotlib is missing.
    """
    epochs, series = read_history(history)
    losses = {name: y for name, y in series.items() if name.endswith("loss")}
    accuracies = {name: y for name, y in series.items() if "knn" in name}
    if not losses:
        raise ValueError(f"`history` must hold a loss. Received: values {sorted(series)}.")
    panels = 2 if accuracies or references else 1
    figure = figure_class()(figsize=(4.5 * panels, 3.2))
    grid = figure.subplots(1, panels, squeeze=False)[0]
    for name, y in losses.items():
        style = {"color": "black", "linewidth": 2} if name == "loss" else {}
        plot(grid[0], epochs, y, name, style)
    grid[0].set_title("Loss and its terms")
    if panels == 2:
        for name, y in accuracies.items():
            plot(grid[1], epochs, 100 * y, name, {"marker": "o", "markersize": 3})
        for index, (name, value) in enumerate((references or {}).items(), len(accuracies)):
            grid[1].axhline(100 * value, label=name, linestyle="--", color=f"C{index}")
        grid[1].set_title("Weighted k-NN accuracy (%)")
    for axes in grid:
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
        with open(history, newline="") as file:
            rows = list(csv.DictReader(file))
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


def number(text):
    try:
        return float(text)
    except (TypeError, ValueError):  # CSVLogger writes "NA"
        return math.nan


def plot(axes, x, y, label, style):
    known = np.isfinite(y)
    axes.plot(x[known], y[known], label=label, **style)


def show(axes, image, label=None):
    """Draws one image `(H, W, C)`: its first three channels, or gray if it has fewer."""
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
    top = 255 if image.dtype == "uint8" else 1.0
    axes.set_axis_on()
    axes.imshow(image, cmap="gray", vmin=0, vmax=top, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(linewidth=0.5, color="0.8")
    if label:
        axes.set_ylabel(label, fontsize=9)


def figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "Pictures need Matplotlib. Install it: `pip install keras-dinov3[plots]`."
        raise ImportError(message) from error
    return lambda **kwargs: Figure(layout="constrained", **kwargs)


def save(figure, path):
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
