"""Figures of arrays, drawn without pyplot: nothing is left open and no display is needed."""

import pathlib

import numpy as np


def similarity_figure(images, similarity, patch):
    """Each image above how similar its patches are to the chosen one, which is marked.

    Args:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        similarity: `(B, h, w)`, as `patch_similarity` returns it.
        patch: As there.

    Returns:
        `matplotlib.figure.Figure`.
    """
    index, row, column = tuple(patch) if len(patch) == 3 else (0, *patch)
    figure, grid = two_rows(images)
    height, width = images.shape[1] / similarity.shape[1], images.shape[2] / similarity.shape[2]
    for top, bottom, image, values in zip(*grid, images, similarity, strict=True):
        show(top, image)
        picture = bottom.imshow(values, cmap="magma", vmin=-1, vmax=1, interpolation="nearest")
    grid[0, index].plot(
        (column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5, "+", color="red", markersize=12
    )
    figure.colorbar(picture, ax=list(grid[1]), shrink=0.7)
    figure.suptitle("Cosine with the marked patch", fontsize=10)
    return figure


def attention_figure(images, maps, token=0):
    """A row for each image: itself and the attention of one token, head by head.

    Args:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        maps: `(B, 1 + R, heads, h, w)`, as `attention_maps` returns them.
        token: Int. 0: the class token, from 1: the registers.

    Returns:
        `matplotlib.figure.Figure`.
    """
    count, heads = len(images), maps.shape[2]
    figure = figure_class()(figsize=(1.5 * (heads + 1), 1.5 * count + 0.4))
    grid = figure.subplots(count, heads + 1, squeeze=False)
    for axes, image, by_head in zip(grid, images, maps[:, token], strict=True):
        show(axes[0], image)
        for head, (place, values) in enumerate(zip(axes[1:], by_head, strict=True)):
            place.imshow(values, cmap="magma", vmin=0, interpolation="nearest")
            place.set(xticks=[], yticks=[])
            if axes is grid[0]:
                place.set_title(f"head {head}", fontsize=8)
    name = f"register {token}" if token else "the class token"
    figure.suptitle(f"Attention of {name} to the patches", fontsize=10)
    return figure


def norms_figure(images, norms):
    """Each image above the lengths of its patches, outliers marked; beside, all lengths.

    Args:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        norms: Dict as `token_norms` returns it; its last layer is drawn.

    Returns:
        `matplotlib.figure.Figure`.
    """
    patches, outliers = norms["patches"][:, -1], norms["outliers"][:, -1]
    prefix = norms["prefix"][:, -1]
    figure, grid = two_rows(images, columns=len(images) + 2)
    for top, bottom, image, values, marks in zip(
        *grid[:, : len(images)], images, patches, outliers, strict=True
    ):
        show(top, image)
        bottom.imshow(values, cmap="viridis", vmin=0, vmax=patches.max(), interpolation="nearest")
        bottom.plot(*np.nonzero(marks)[::-1], "x", color="red", markersize=4)
    for axes in grid[:, len(images) :].flat:
        axes.remove()
    axes = figure.add_subplot(grid[0, 0].get_gridspec()[:, len(images) :])
    axes.hist(patches.ravel(), bins=30, color="0.6", label="patches")
    axes.axvline(prefix[:, 0].mean(), color="C3", label="class token")
    for register, length in enumerate(prefix[:, 1:].mean(axis=0)):
        axes.axvline(length, color=f"C{register}", linestyle="--", label=f"register {register + 1}")
    axes.set_yscale("log")
    axes.set_xlabel("length before the final norm", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    figure.suptitle(
        f"Lengths of tokens; {outliers.mean():.1%} of the patches stand out", fontsize=9
    )
    return figure


def map_figure(points, labels=None, names=None):
    """Points in a plane, coloured by their labels.

    Args:
        points: `(n, 2)`, as `feature_map` returns them.
        labels: `n` class labels, or `None`.
        names: Names of the classes in the order of the labels, or `None` for the labels.

    Returns:
        `matplotlib.figure.Figure`.
    """
    figure = figure_class()(figsize=(5.5, 4.2))
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    classes = [None] if labels is None else np.unique(labels)
    for index, label in enumerate(classes):
        chosen = slice(None) if label is None else np.ravel(labels) == label
        name = None if label is None else str(label if names is None else names[index])
        axes.scatter(*points[chosen].T, s=4, color=f"C{index % 10}", label=name, linewidths=0)
    if labels is not None:
        axes.legend(fontsize=7, frameon=False, markerscale=3, bbox_to_anchor=(1, 1))
    return figure


def two_rows(images, columns=None):
    """A figure with a column for each image, and its axes `(2, columns)` without ticks."""
    columns = columns or len(images)
    height = 1.6 * images.shape[1] / images.shape[2]
    figure = figure_class()(figsize=(1.6 * columns + 0.6, 2 * height + 0.6))
    grid = figure.subplots(2, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure, grid


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
