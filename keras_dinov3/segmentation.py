"""What patch features know of the places in an image: a linear probe per patch."""

import numpy as np

from keras_dinov3 import backend
from keras_dinov3.features import checked_features
from keras_dinov3.probes import chosen_strength, fitted

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NO_CLASS = -1


def segmentation_probe(
    train_features,
    train_masks,
    test_features,
    test_masks,
    num_classes,
    ignore=None,
    strengths=STRENGTHS,
    val_fraction=0.25,
    max_steps=300,
    seed=0,
):
    """A linear classifier of single patches, scored at every pixel.

    A patch's label is that of most of its pixels, if half of them or more have one. Logistic
    regression on standardised patch features, of the strength that is best on training images held
    out as a whole, is fitted to all training patches. What it says of a patch counts for each
    pixel of it.

    Args:
        train_features: Float array of shape `(n, h, w, D)`: a grid of patches for each image, which
            covers it.
        train_masks: Int array of shape `(n, H, W)`: the class of each pixel, in any resolution.
        test_features: Float array of shape `(m, h, w, D)`.
        test_masks: Int array of shape `(m, H, W)`.
        num_classes: Int. Classes are numbered from 0.
        ignore: Int or several: numbers in the masks that are no class. Such pixels do not count.
        strengths: Positive floats, scikit-learn's `C`.
        val_fraction: Float between 0 and 1. Training images that are held out to choose by.
        max_steps: Int. Steps of L-BFGS.
        seed: Int, for the images held out.

    Returns:
        Dict: `miou` (the mean over classes that test masks or predictions have), `pixel_accuracy`,
        `iou` (a list by class, `None` where there is none) and `C`.

    Raises:
        ValueError: If arrays do not fit each other or masks hold other numbers.
        ImportError: If scikit-learn is missing.

    Reference:
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), section 7.4 (linear segmentation).
    """
    train_features, train_masks = checked_grids("train", train_features, train_masks)
    test_features, test_masks = checked_grids("test", test_features, test_masks)
    train_masks, test_masks = (
        checked_masks(name, masks, num_classes, ignore)
        for name, masks in (("train_masks", train_masks), ("test_masks", test_masks))
    )
    grid_size = train_features.shape[1:3]
    labels = np.stack([patch_labels(mask, grid_size, num_classes) for mask in train_masks])
    count = len(train_features)
    if count < 2:
        raise ValueError(f"There must be two training images at least. Received: {count}.")
    held_out = np.zeros(count, bool)
    chosen = min(max(round(val_fraction * count), 1), count - 1)
    held_out[np.random.default_rng(seed).permutation(count)[:chosen]] = True

    def rows(images):
        known = labels[images] != NO_CLASS
        return train_features[images][known], labels[images][known]

    strength, _ = chosen_strength(rows(~held_out), rows(held_out), strengths, max_steps)
    model = fitted(*rows(np.full(count, True)), strength, max_steps)
    confusion = np.zeros((num_classes, num_classes), "int64")
    for features, mask in zip(test_features, test_masks, strict=True):
        predicted = model.predict(features.reshape(-1, features.shape[-1]))
        predicted = enlarged(predicted.reshape(features.shape[:2]), mask.shape)
        confusion += confusion_matrix(mask, predicted, num_classes)
    return {**overlap(confusion), "C": strength}


def patch_labels(mask, grid_size, num_classes):
    """The class of most pixels of each patch `(h, w)`; -1 where fewer than half have one."""
    height, width = mask.shape
    rows = np.arange(height) * grid_size[0] // height
    columns = np.arange(width) * grid_size[1] // width
    cells = rows[:, None] * grid_size[1] + columns
    bins = cells * (num_classes + 1) + (mask + 1)  # the first of each cell: no class
    size = grid_size[0] * grid_size[1]
    counts = np.bincount(bins.ravel(), minlength=size * (num_classes + 1))
    counts = counts.reshape(size, num_classes + 1)
    found = counts[:, 1:].argmax(axis=1)
    found[2 * counts[:, 0] > counts.sum(axis=1)] = NO_CLASS
    return found.reshape(grid_size)


def enlarged(grid, size):
    """A value per patch `(h, w)` as one per pixel `(H, W)`, that of the patch it lies in."""
    rows = np.arange(size[0]) * grid.shape[0] // size[0]
    columns = np.arange(size[1]) * grid.shape[1] // size[1]
    return grid[rows[:, None], columns]


def confusion_matrix(labels, predicted, num_classes):
    """How many pixels of each class (rows) were said to be each (columns); -1 does not count."""
    known = labels != NO_CLASS
    bins = labels[known] * num_classes + predicted[known]
    return np.bincount(bins, minlength=num_classes**2).reshape(num_classes, num_classes)


def overlap(confusion):
    """Intersection over union and accuracy from a confusion matrix.

    Args:
        confusion: Int array of shape `(K, K)`.

    Returns:
        Dict: `miou`, `pixel_accuracy`, `iou`, as in `segmentation_probe`.
    """
    both = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    iou = [float(b / u) if u else None for b, u in zip(both, union, strict=True)]
    return {
        "miou": float(np.mean([value for value in iou if value is not None])),
        "pixel_accuracy": float(both.sum() / max(confusion.sum(), 1)),
        "iou": iou,
    }


def checked_grids(side, features, masks):
    features, masks = backend.numpy_of(features), backend.numpy_of(masks)
    if features.ndim != 4 or masks.ndim != 3 or len(features) != len(masks):
        raise ValueError(
            f"`{side}_features` must have shape (images, h, w, width) and `{side}_masks` "
            f"(images, H, W), for the same images. Received: shapes {features.shape} and "
            f"{masks.shape}."
        )
    if masks.shape[1] < features.shape[1] or masks.shape[2] < features.shape[2]:
        raise ValueError(
            f"`{side}_masks` must have as many pixels a side as there are patches, at least. "
            f"Received: masks of {masks.shape[1:]}, features of {features.shape[1:3]}."
        )
    rows = checked_features(f"{side}_features", features.reshape(-1, features.shape[-1]))
    return rows.reshape(features.shape), masks


def checked_masks(name, masks, num_classes, ignore):
    """Masks as int64 with -1 for all that is ignored."""
    masks = masks.astype("int64")
    for number in () if ignore is None else np.ravel(ignore):
        masks = np.where(masks == number, NO_CLASS, masks)
    outside = np.unique(masks[(masks < NO_CLASS) | (masks >= num_classes)])
    if len(outside):
        raise ValueError(
            f"`{name}` must hold numbers from 0 to {num_classes - 1}, or those of `ignore`. "
            f"Received: {outside[:5].tolist()}."
        )
    return masks
