import numpy as np
import pytest

from keras_dinov3 import segmentation
from keras_dinov3.segmentation import NO_CLASS, segmentation_probe


def scene(count, seed, height=12, width=20):
    """Masks of rectangles of three classes and of no class (7); patch features tell the class."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), int)
    for mask in masks:
        top, left = rng.integers(1, 6), rng.integers(1, 12)
        mask[top : top + 6, left : left + 8] = 1
        mask[:4, :8] = 2
        mask[-1:] = 7
    return masks


def features_of(masks, seed, noise=0.05):
    rng = np.random.default_rng(seed)
    grid = np.stack([segmentation.patch_labels(np.where(m == 7, -1, m), (3, 5), 3) for m in masks])
    features = np.eye(4)[grid] @ rng.normal(size=(4, 6))
    return features + noise * np.random.default_rng(seed + 1).normal(size=features.shape), grid


def test_patch_labels_by_hand():
    mask = np.array(
        [
            [0, 0, 1, 1, -1, -1],
            [0, 2, 1, 2, -1, 2],
            [-1, -1, 1, 1, 2, 2],
            [-1, 1, 1, 1, 0, 2],
        ]
    )
    expected = [[0, 1, NO_CLASS], [NO_CLASS, 1, 2]]  # half labelled is enough, a quarter is not
    np.testing.assert_array_equal(segmentation.patch_labels(mask, (2, 3), 3), expected)
    mask[2, 0] = 0
    assert segmentation.patch_labels(mask, (2, 3), 3)[1, 0] == 0  # of two labels, the first
    # Patches that do not divide the mask: each pixel is in one, and all count.
    uneven = segmentation.patch_labels(np.arange(5)[None].repeat(3, 0), (1, 2), 5)
    np.testing.assert_array_equal(uneven, [[0, 3]])


def test_enlarged_is_the_inverse():
    grid = np.arange(6).reshape(2, 3)
    large = segmentation.enlarged(grid, (5, 7))
    assert large.shape == (5, 7)
    np.testing.assert_array_equal(segmentation.patch_labels(large, (2, 3), 6), grid)


def test_overlap_by_hand_and_by_scikit_learn():
    from sklearn.metrics import confusion_matrix, jaccard_score

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(-1, 3, (4, 9)), rng.integers(0, 3, (4, 9))
    confusion = segmentation.confusion_matrix(labels, predicted, 4)
    known = labels >= 0
    truth, said = labels[known], predicted[known]
    np.testing.assert_array_equal(confusion, confusion_matrix(truth, said, labels=range(4)))
    found = segmentation.overlap(confusion)
    scores = jaccard_score(truth, said, average=None, labels=range(3))
    assert found["iou"][:3] == pytest.approx(list(scores)) and found["iou"][3] is None
    assert found["miou"] == pytest.approx(scores.mean())
    assert found["pixel_accuracy"] == pytest.approx(np.mean(truth == said))
    by_hand = segmentation.overlap(np.array([[3, 1], [2, 4]]))
    assert by_hand == {
        "miou": pytest.approx((3 / 6 + 4 / 7) / 2),
        "pixel_accuracy": pytest.approx(0.7),
        "iou": [pytest.approx(0.5), pytest.approx(4 / 7)],
    }


def test_features_that_tell_the_class_reach_the_ceiling():
    """What is left to lose is that a patch has one label: no more and no less."""
    train, test = scene(8, 1), scene(5, 2)
    (train_features, _), (test_features, grid) = features_of(train, 3), features_of(test, 3)
    found = segmentation_probe(train_features, train, test_features, test, 3, ignore=7)
    confusion = sum(
        segmentation.confusion_matrix(
            np.where(mask == 7, -1, mask),
            segmentation.enlarged(np.where(labels == NO_CLASS, 0, labels), mask.shape),
            3,
        )
        for mask, labels in zip(test, grid, strict=True)
    )
    ceiling = segmentation.overlap(confusion)
    assert found["miou"] == pytest.approx(ceiling["miou"], abs=0.02)
    assert found["pixel_accuracy"] == pytest.approx(ceiling["pixel_accuracy"], abs=0.02)
    noise = np.random.default_rng(0).normal(size=train_features.shape)
    blind = segmentation_probe(noise, train, noise[:5], test, 3, ignore=7)
    assert blind["miou"] < found["miou"] - 0.2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_masks": np.full((4, 6, 6), 5)}, "`train_masks`.*from 0 to 1.*5"),
        ({"test_masks": np.zeros((3, 6, 6), int)}, "`test_features`.*same images"),
        ({"train_features": np.ones((4, 9))}, "images, h, w, width"),
        ({"train_masks": np.zeros((4, 1, 6), int)}, "as many pixels a side as there are patches"),
        ({"test_features": np.full((2, 2, 3, 5), np.inf)}, "finite"),
        (
            {"train_features": np.ones((1, 2, 3, 5)), "train_masks": np.zeros((1, 6, 6), int)},
            "two training images",
        ),
    ],
)
def test_errors(change, message):
    arguments = {
        "train_features": np.ones((4, 2, 3, 5)),
        "train_masks": np.zeros((4, 6, 6), int),
        "test_features": np.ones((2, 2, 3, 5)),
        "test_masks": np.zeros((2, 6, 6), int),
        "num_classes": 2,
    }
    with pytest.raises(ValueError, match=message):
        segmentation_probe(**{**arguments, **change})
