"""Pictures of what is trained and learned: arrays in, arrays and figures out.

Figures are drawn without pyplot, so nothing is left open and no display is needed.
"""

import math

import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.curves import training_curves
from keras_dinov3.families import patch_size_of
from keras_dinov3.figures import (
    attention_figure,
    figure_class,
    map_figure,
    norms_figure,
    save,
    show,
    similarity_figure,
)
from keras_dinov3.maps import (
    attention_maps,
    feature_map,
    foreground,
    patch_features,
    patch_similarity,
    token_norms,
)

__all__ = [
    "attention_figure",
    "attention_maps",
    "crops",
    "crops_figure",
    "feature_map",
    "foreground",
    "map_figure",
    "norms_figure",
    "patch_features",
    "patch_pca",
    "patch_pca_figure",
    "patch_similarity",
    "pca_colors",
    "save",
    "similarity_figure",
    "token_norms",
    "training_curves",
]


def patch_pca(
    backbone,
    images,
    mean=None,
    std=None,
    image_size=None,
    path=None,
    batch_size=16,
    extras=None,
    only_foreground=False,
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
        only_foreground: Whether the background (see `foreground`) is black, so that the colours
            tell apart the parts of what the images show.

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
    features = patch_features(
        backbone, images, batch_size, mean=mean, std=std, image_size=image_size, extras=extras
    )
    colors = pca_colors(features, foreground(features) if only_foreground else None)
    if path is not None:
        save(patch_pca_figure(images, colors), path)
    return colors


def pca_colors(features, chosen=None):
    """Colours of features: principal components, stretched to 0-1 and cut at the extremes.

    Args:
        features: Float array of shape `(..., D)`, at least 3 wide.
        chosen: Bool array of shape `(...)`: the others are black, and do not count in the
            components. `None`: all, as if none are true.

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
    everything = np.asarray(features, "float64").reshape(-1, features.shape[-1])
    kept = np.full(len(everything), True)
    if chosen is not None and np.any(chosen):
        kept = np.ravel(chosen)
    rows = everything[kept]
    rows = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(rows.T @ rows)  # ascending
    directions = directions[:, :-4:-1]
    largest = np.abs(directions).argmax(axis=0)
    components = rows @ (directions * np.sign(directions[largest, range(3)]))
    low, high = np.percentile(components, (1, 99), axis=0)
    varies = high - low > 1e-6 * np.abs(rows).max()
    colors = np.zeros((len(everything), 3), "float32")
    stretched = np.where(varies, (components - low) / np.where(varies, high - low, 1.0), 0.5)
    colors[kept] = np.clip(stretched, 0.0, 1.0)
    return colors.reshape(*features.shape[:-1], 3)


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
