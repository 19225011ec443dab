"""Patch kernel alignment: CKA by hand, its invariances, overlaps by brute force, in training."""

import itertools
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tiny
from golden import close, numpy, value_and_gradients
from keras import ops
from test_augment import PLAIN

import keras_dinov3 as kd
from keras_dinov3.alignment import Place, patch_kernel_alignment_loss, read_off

P, N, D, TEACHER_D = 3, 7, 5, 4  # pairs, patches, widths


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


TEACHER, STUDENT = normal(P, N, TEACHER_D, seed=1), normal(P, N, D)


def loss_of(y_true, y_pred, weights=None):
    arrays = [None if x is None else ops.convert_to_tensor(x) for x in (y_true, y_pred, weights)]
    return numpy(patch_kernel_alignment_loss(*arrays))


def hsic(a, b):
    """Kornblith et al., equation 3, for linear kernels."""
    count = len(a)
    centring = np.eye(count) - 1 / count
    return np.trace(a @ a.T @ centring @ b @ b.T @ centring) / (count - 1) ** 2


def slow_loss(teacher, student):
    teacher, student = teacher.astype("float64"), student.astype("float64")
    scale = np.sqrt(hsic(teacher, teacher) * hsic(student, student))
    return 1 - hsic(teacher, student) / scale


# The loss


def test_the_loss_equals_the_definition():
    expected = [slow_loss(t, s) for t, s in zip(TEACHER, STUDENT, strict=True)]
    close(loss_of(TEACHER, STUDENT), expected, 1e-5, 1e-6)
    assert 0.05 < min(expected) < max(expected) < 0.95
    # of two patterns that have nothing in common, by hand
    one, two = np.array([1, 1, -1, -1]), np.array([1, -1, 1, -1])
    patterns = np.stack([one, one + 3 * two, two]).astype("float32")[..., None]
    found = loss_of(np.repeat(patterns[:1], 3, axis=0), patterns)
    close(found, [0, 1 - 1 / 10, 1], 0, 1e-6)  # the squared correlation of each with `one`


def test_weights_leave_out_and_repeat_patches():
    weights = np.array([0, 2, 1, 0, 3, 1, 1], "float32")
    expected = [
        slow_loss(*(np.repeat(x, weights.astype(int), axis=0) for x in pair))
        for pair in zip(TEACHER, STUDENT, strict=True)
    ]
    found = loss_of(TEACHER, STUDENT, np.tile(weights, (P, 1)))
    close(found, expected, 1e-5, 1e-6)
    close(loss_of(TEACHER, STUDENT, np.tile(0.25 * weights, (P, 1))), found, 0, 1e-6)
    nonsense = np.where(weights[:, None] > 0, STUDENT, 50.0)
    close(loss_of(TEACHER, nonsense, np.tile(weights, (P, 1))), found, 1e-5, 1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_rotated_scaled_and_shifted_features_are_aligned(scale):
    rotation, _ = np.linalg.qr(normal(D, D, seed=5))
    changed = scale * (STUDENT @ rotation + normal(D, seed=6))
    close(loss_of(STUDENT, changed), np.zeros(P), 0, 2e-6)
    close(loss_of(TEACHER, changed), loss_of(TEACHER, STUDENT), 0, 1e-5)


def test_what_cannot_be_compared_has_a_finite_gradient():
    """No overlap, one patch, and features that are all the same: loss 1, gradient 0."""
    weights = np.ones((P, N), "float32")
    weights[0], weights[1, 1:] = 0, 0
    student = np.concatenate([STUDENT[:2], np.ones((1, N, D), "float32")])

    def loss(student):
        values = [ops.convert_to_tensor(x) for x in (TEACHER, weights)]
        return ops.sum(patch_kernel_alignment_loss(values[0], student, values[1]))

    value, (gradient,) = value_and_gradients(loss, student)
    assert float(value) == P and not gradient.any()
    _, (gradient,) = value_and_gradients(loss, STUDENT)
    assert np.isfinite(gradient).all() and gradient[2].any()


def test_the_loss_is_computed_in_float32():
    half = [ops.cast(ops.convert_to_tensor(x), "bfloat16") for x in (TEACHER, STUDENT)]
    found = patch_kernel_alignment_loss(*half)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    close(found, loss_of(*(numpy(ops.cast(x, "float32")) for x in half)), 0, 1e-6)


@pytest.mark.parametrize(
    "arrays",
    [
        (normal(P, N, D), normal(P, N + 1, D)),
        (normal(N, D), normal(N, D)),
        (normal(P, N, D), normal(P, N, D), normal(P, 1)),
    ],
)
def test_shapes_that_do_not_fit(arrays):
    with pytest.raises(ValueError, match=r"must have shapes \(P, N, D'\).*Received: y_true"):
        loss_of(*arrays)


# The overlap


def slow_read_off(patches, grid, box, flip, other_grid, other_box, other_flip):
    """One pair of crops, patch by patch; `grid` is (rows, columns), the box top, left, ..."""
    patches = patches.reshape(*grid, -1).astype("float64")
    features, seen = [], []
    for row, column in itertools.product(*(range(n) for n in other_grid)):
        y, x = (row + 0.5) / other_grid[0], (column + 0.5) / other_grid[1]
        if other_flip:
            x = 1 - x
        y, x = other_box[0] + y * other_box[2], other_box[1] + x * other_box[3]  # in the image
        y, x = (y - box[0]) / box[2], (x - box[1]) / box[3]
        seen.append(0 < y < 1 and 0 < x < 1)
        if flip:
            x = 1 - x
        total = 0
        y, x = (np.clip(v * n - 0.5, 0, n - 1) for v, n in ((y, grid[0]), (x, grid[1])))
        for i, j in itertools.product(range(grid[0]), range(grid[1])):
            share = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
            total = total + share * patches[i, j]
        features.append(total)
    return np.array(features), np.array(seen)


def test_overlaps_equal_brute_force():
    rng, count = np.random.default_rng(0), 24
    grid, other_grid = (4, 3), (2, 5)
    boxes, others = (
        np.concatenate([rng.uniform(0, 30, (count, 2)), rng.uniform(20, 50, (count, 2))], axis=1)
        for _ in range(2)
    )
    others[0, :2] = 90.0  # no overlap
    others[1], boxes[1] = (5, 6, 20, 30), (0, 0, 40, 50)  # all within
    flips, other_flips = rng.random((2, count)) < 0.5
    patches = normal(count, 12, D)
    pairs = zip(patches, boxes, flips, others, other_flips, strict=True)
    expected = [slow_read_off(p, grid, b, f, other_grid, ob, of) for p, b, f, ob, of in pairs]
    features, seen = (np.stack(x) for x in zip(*expected, strict=True))
    places = [
        Place(size, *(ops.convert_to_tensor(x, "float32") for x in place))
        for size, *place in ((grid, boxes, flips), (other_grid, others, other_flips))
    ]
    found, weights = read_off(ops.convert_to_tensor(patches), *places)
    np.testing.assert_array_equal(numpy(weights), seen)
    close(found, features, 1e-4, 1e-5)
    assert not seen[0].any() and seen[1].all() and 0.2 < seen.mean() < 0.8
    assert {(True, True), (True, False), (False, True)} <= set(zip(flips, other_flips, strict=True))


def patch_means(crops):
    """`(B, G, h, w, C)` to `(B * G, N, C)`."""
    rows, columns = (side // tiny.PATCH for side in tiny.GLOBAL)
    x = crops.reshape(-1, rows, tiny.PATCH, columns, tiny.PATCH, crops.shape[-1])
    return x.mean(axis=(2, 4)).reshape(-1, tiny.N, crops.shape[-1])


def tokens(patches):
    patches = ops.convert_to_tensor(patches)
    return kd.Tokens(patches[:, 0], None, patches)


def seen_by(crops, student, teacher, masks=None, sizes=(tiny.PATCH, tiny.PATCH), **options):
    term = kd.PatchAlignment(**options)
    term.patch_sizes = sizes
    crops = {name: ops.convert_to_tensor(array) for name, array in crops.items()}
    return [numpy(x) for x in term.see(crops, tokens(student), tokens(teacher), masks, 0)]


def test_boxes_and_flips_of_multi_crop_say_what_the_crops_show():
    """Images whose pixels are their own coordinates: both sides of a pair then are the same."""
    height, width = 60, 80
    y, x = (np.arange(n, dtype="float32")[:, None] + 0.5 for n in (height, width))
    image = np.stack([y + 0 * x.T, 0 * y + x.T, 0 * y + 0 * x.T], axis=-1) / 100
    settings = {**PLAIN, "flip_probability": 0.5, "num_local_crops": 0, "num_global_crops": 3}
    crops = tiny.multi_crop(**settings)(np.stack([image] * 6), boxes=True)
    crops = {name: numpy(array) for name, array in crops.items()}
    boxes, flips = crops["global_boxes"], crops["global_flips"]
    assert boxes.shape == (6, 3, 4) and flips.shape == (6, 3) and flips.dtype == bool
    assert 0 < flips.sum() < flips.size and len(np.unique(boxes[..., 1])) > 6
    patches = patch_means(crops["global_crops"])
    teacher, student, weights = seen_by(crops, patches, patches)
    assert teacher.shape == student.shape == (6 * 6, tiny.N, 3)
    # Beyond the teacher's outermost centres features stay the same: only those between are exact.
    rows, columns = (side // tiny.PATCH for side in tiny.GLOBAL)
    corner = boxes[..., :2] + boxes[..., 2:] * (0.5 / np.array([rows, columns]))
    far = boxes[..., :2] + boxes[..., 2:] * (1 - 0.5 / np.array([rows, columns]))
    pairs = [(t, s) for t in range(3) for s in range(3) if t != s]
    corner, far = (
        np.stack([x[:, t] for t, _ in pairs], 1).reshape(-1, 1, 2) for x in (corner, far)
    )
    position = 100 * student[..., :2]
    between = np.all((position > corner) & (position < far), axis=-1)
    assert between.sum() > 50 and weights[between].all() and 0.3 < weights.mean() < 0.95
    np.testing.assert_allclose(100 * teacher[between], 100 * student[between], atol=0.6)


def test_pairs_tokens_and_grids():
    crops = tiny.crops()
    patches, others = normal(tiny.B * tiny.G, tiny.N, D), normal(tiny.B * tiny.G, 48, D, seed=1)
    teacher, student, weights = seen_by(crops, patches, patches, pairs="same")
    close(teacher, patches, 1e-5, 1e-6)
    np.testing.assert_array_equal(student, patches)
    assert weights.all()
    # A teacher of half the patch size: each of the student's patches is four of its own.
    teacher, _, weights = seen_by(crops, patches, others, pairs="same", sizes=(4, 8))
    grid = others.reshape(-1, 4, 2, 3, 2, D)
    close(teacher, grid.mean(axis=(2, 4)).reshape(-1, tiny.N, D), 1e-5, 1e-6)
    masks = np.random.default_rng(0).random((tiny.B, tiny.G, tiny.N)) < 0.4
    rng = np.random.default_rng(1)
    corners, sides = rng.uniform(0, 9, (tiny.B, tiny.G, 2)), rng.uniform(9, 20, (tiny.B, tiny.G, 2))
    crops["global_boxes"] = np.concatenate([corners, sides], axis=-1).astype("float32")
    crops["global_flips"] = rng.random((tiny.B, tiny.G)) < 0.5
    arguments = crops, patches, patches, ops.convert_to_tensor(masks)
    *_, everywhere = seen_by(*arguments, pairs="all")
    *_, hidden = seen_by(*arguments, pairs="all", tokens="masked")
    *_, shown = seen_by(*arguments, pairs="all", tokens="unmasked")
    chosen = np.stack([masks[:, s] for _, s in itertools.product(range(2), range(2))], axis=1)
    np.testing.assert_array_equal(hidden, everywhere * chosen.reshape(-1, tiny.N))
    np.testing.assert_array_equal(hidden + shown, everywhere)


def test_pairs_with_little_overlap_do_not_count():
    term = kd.PatchAlignment(min_patches=4, weight=kd.WarmupCosine(3.0, 10, end=1.0))
    weights = np.ones((P, N), "float32")
    weights[0, 3:], weights[1, 4:] = 0, 0
    arrays = [ops.convert_to_tensor(x) for x in (TEACHER, STUDENT, weights)]
    terms, shares = term.losses_of(*arrays, step=ops.convert_to_tensor(10, "int32"))
    expected = loss_of(TEACHER, STUDENT, weights)[1:].mean()
    assert float(terms["alignment_loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(shares["alignment_loss"]) == 1.0
    terms, _ = term.losses_of(*arrays[:2], 0 * arrays[2], step=0)
    assert float(terms["alignment_loss"]) == 0


# In a model; `test_terms.py` trains one


def test_ready_crops_bring_their_boxes():
    model = tiny.model(alignment=kd.PatchAlignment(min_patches=3), augmentation=None)
    crops = tiny.multi_crop()(tiny.images(), boxes=True)
    crops = {name: numpy(array) for name, array in crops.items()}
    assert 0 < model.test_on_batch(crops, return_dict=True)["alignment_loss"] < 1
    for changes, message in (
        ({"global_boxes": crops["global_boxes"][:, :1]}, "`global_boxes` must have shape"),
        ({"global_boxes": 0 * crops["global_boxes"]}, "`global_boxes` must be finite"),
        ({"global_flips": crops["global_flips"] + 1}, "`global_flips` must be bool"),
    ):
        with pytest.raises(ValueError, match=f"{message}.*Received"):
            model.test_on_batch({**crops, **changes})
    with pytest.raises(ValueError, match=r"\"global_boxes\".*needed: \['global_boxes'"):
        model.test_on_batch(tiny.crops())
    with pytest.raises(ValueError, match="Received: keys"):  # for no one
        tiny.model(augmentation=None).test_on_batch(crops)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": -1.0}, "`weight`"),
        ({"pairs": "other"}, "`pairs` must be one of"),
        ({"tokens": "hidden"}, "`tokens` must be one of"),
        ({"min_patches": 2}, "`min_patches` must be an integer of at least 3"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=f"{message}.*Received"):
        kd.PatchAlignment(**options)


def test_what_does_not_fit_the_model():
    with pytest.raises(ValueError, match="`alignment` must be a `PatchAlignment`"):
        tiny.model(alignment=kd.GramAnchor())
    one_crop = tiny.multi_crop(num_global_crops=1)
    with pytest.raises(ValueError, match="needs two global crops"):
        tiny.model(alignment=kd.PatchAlignment(), augmentation=one_crop)
    term = kd.PatchAlignment(tokens="masked")
    model = tiny.model(alignment=term, masking=None, ibot_weight=0)
    with pytest.raises(ValueError, match="needs masks.*`alignment`"):
        model.train_on_batch(tiny.images())
    with pytest.raises(ValueError, match="`PatchAlignment` belongs to one model"):
        term.build_for(SimpleNamespace(student=model.student, teacher=model.teacher))
    off = tiny.model(alignment=kd.PatchAlignment(weight=0), augmentation=None)
    assert "alignment_loss" not in off.test_on_batch(tiny.crops(masked=0.4), return_dict=True)
