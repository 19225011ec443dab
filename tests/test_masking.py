import itertools
import math

import keras
import numpy as np
import pytest
from golden import MANIFEST, Golden, numpy
from keras import ops

from keras_dinov3.masking import BlockMasking, RandomMasking, _complete, _roll

BACKEND = keras.config.backend()
JITS = {"torch": [False], "jax": [True], "tensorflow": [False, True]}[BACKEND]
B, G, GRID = 5, 2, (6, 9)


def compiled(layer, function, jit=True):
    """`function()`, which draws from the layer, compiled as a train step would be."""
    if BACKEND == "jax":
        import jax

        state = layer.seed_generator.state

        @jax.jit
        def stateless(value):
            with keras.StatelessScope([(state, value)]) as scope:
                result = function()
            return result, scope.get_current_value(state)

        def call():
            result, value = stateless(state.value)
            state.assign(value)
            return result

        return call
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=jit)
    return function


def compiled_attempt(layer):
    if BACKEND == "jax":
        import jax

        return jax.jit(layer._try_rectangle)
    return layer._try_rectangle


def draw(layer, targets, grid=GRID):
    """The loop of `sample` in Python, with a record of every try: `(tries, 5, B*G)`."""
    attempt = compiled_attempt(layer)
    masks = ops.zeros((len(targets), *grid), "float32")
    missing, failures = ops.cast(targets, "float32"), ops.zeros(len(targets), "int32")
    records = []
    while True:
        active = (numpy(missing) > 0) & (numpy(failures) < layer.num_tries)
        if not active.any():
            return masks, missing, np.array(records)
        noise = keras.random.uniform((len(targets), 3), seed=layer.seed_generator)
        masks, missing, failures, rectangle = attempt(masks, missing, failures, noise)
        records.append([*map(numpy, rectangle), active])


# ---------------------------------------------------------------- the reference's statistics


def same(name, ours, reference):
    """`|difference| <= 5 * sqrt(se1**2 + se2**2)` for (mean, standard error), of any shape."""
    (mean, error), (expected, expected_error) = ours, reference
    bound = 5 * np.sqrt(np.square(error) + np.square(expected_error))
    difference = np.abs(np.asarray(mean) - np.asarray(expected))
    assert difference.shape == bound.shape, name
    assert np.all(difference <= bound), (name, np.max(difference / bound) * 5)


def mean_and_error(values, axis=0):
    values = np.asarray(values, "float64")
    return values.mean(axis), values.std(axis, ddof=1) / math.sqrt(values.shape[axis])


def same_shares(name, counts, expected):
    """Two histograms: each bin's share, with the binomial error of the pooled share."""
    counts = np.pad(counts, (0, max(0, len(expected) - len(counts))))
    expected = np.pad(expected, (0, max(0, len(counts) - len(expected))))
    total, expected_total = counts.sum(), expected.sum()
    share = (counts + expected) / (total + expected_total)
    error = np.sqrt(share * (1 - share) / total), np.sqrt(share * (1 - share) / expected_total)
    same(name, (counts / total, error[0]), (expected / expected_total, error[1]))


@pytest.fixture(scope="module")
def golden():
    return Golden("mask_statistics")


def golden_layer(golden):
    h = golden.hyperparameters
    return BlockMasking(
        mask_probability=h["prob"],
        mask_ratio=h["ratio"],
        min_num_patches=h["min_num_patches"],
        min_aspect_ratio=h["min_aspect"],
        random_circular_shift=h["shift"],
        seed=11,
    )


def test_target_counts_of_the_reference(golden):
    h = golden.hyperparameters
    sizes = (h["Bimg"], 2, (h["H"], h["W"]))
    counts = golden_layer(golden).target_counts(*sizes)
    np.testing.assert_array_equal(np.sort(counts), golden["sorted_target_counts"])
    total = golden.case["statistics"]["upperbound(total masked patches per batch)"]
    assert golden_layer(golden).num_masked(*sizes) == total == counts.sum()


def test_masks_have_the_statistics_of_the_reference(golden):
    h, statistics = golden.hyperparameters, golden.case["statistics"]
    height, width, images, batches = h["H"], h["W"], h["Bimg"], h["nb"]
    layer = golden_layer(golden)
    sample = compiled(layer, lambda: layer.sample(images, 2, (height, width)), jit=False)
    masks = np.array([numpy(sample()) for _ in range(batches)])  # (batches, B, G, N)
    assert masks.dtype == bool and masks.shape == (batches, images, 2, height * width)

    counts = masks.sum(-1)
    for batch in counts.reshape(batches, -1):
        np.testing.assert_array_equal(np.sort(batch), golden["sorted_target_counts"])

    masked = counts > 0
    num_masked_crops = statistics["n_masked_crops_per_batch"]
    position = masks.sum((1, 2)).reshape(batches, height, width) / num_masked_crops
    same(
        "positions",
        mean_and_error(position),
        (golden["position_mask_probability_mean"], golden["position_mask_probability_se"]),
    )
    error = np.full(2 * images, 0.5 / math.sqrt(batches))
    crops_first = masked.transpose(0, 2, 1).reshape(batches, -1)  # the reference's row order
    rows = golden["masked_fraction_per_batch_row"]
    same("rows", (crops_first.mean(0), error), (rows, error))
    per_image = np.stack([(masked.sum(-1) == n).sum(-1) for n in range(3)], -1)
    reference = np.array(statistics["images_with_0_1_2_masked_crops_mean_se"])
    same("images", mean_and_error(per_image), reference.T)

    grids = masks.reshape(-1, height, width)[counts.ravel() > 0]
    target = counts[masked]
    pairs = (grids[:, 1:] & grids[:, :-1]).sum((1, 2)) + (grids[:, :, 1:] & grids[:, :, :-1]).sum(
        (1, 2)
    )
    key = "masked_cells_adjacency_ratio (adjacent pairs/target) mean_se"
    same("adjacency", mean_and_error(pairs / target), statistics[key])
    by_target = np.array([pairs[target == value] for value in golden["target_values"]])
    expected_error = golden["adjacent_pairs_std"] / np.sqrt(golden["adjacent_pairs_n"])
    same("pairs", mean_and_error(by_target, 1), (golden["adjacent_pairs_mean"], expected_error))
    assert np.all(by_target.mean(1) > 1.5 * golden["adjacent_pairs_if_uniform_random"])
    key = "connected_components(4-neigh)_mean_se_first_40_batches"
    num_components = components(grids[: 40 * num_masked_crops])
    same("components", mean_and_error(num_components), statistics[key])


def components(grids):
    """4-connected components per grid: labels spread until nothing changes."""
    labels = np.where(grids, np.arange(1, grids[0].size + 1).reshape(grids[0].shape), 0)
    while True:
        padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        around = [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2]]
        spread = np.where(grids, np.max([labels, *around, padded[:, 1:-1, 2:]], axis=0), 0)
        if np.array_equal(spread, labels):
            return [len(np.unique(grid[grid > 0])) for grid in labels]
        labels = spread


def test_blocks_have_the_statistics_of_the_reference(golden):
    h, statistics = golden.hyperparameters, golden.case["statistics"]
    layer = golden_layer(golden)
    target = np.repeat(golden["target_values"], h["nb"])  # crops are drawn independently
    _, missing, records = draw(layer, ops.convert_to_tensor(target), (h["H"], h["W"]))
    heights, widths, new, fits, active = records.transpose(1, 0, 2)
    fits, active = fits > 0, active > 0
    assert not np.any(fits & ~active)

    height, width, new = heights[fits], widths[fits], new[fits]
    area = height * width
    same_shares("height", np.bincount(height.astype(int)), golden["block_height_hist"])
    same_shares("width", np.bincount(width.astype(int)), golden["block_width_hist"])
    same_shares("area", np.bincount(area.astype(int)), golden["block_area_hist"])
    log_aspect = np.log(height / width)
    same("log aspect", mean_and_error(log_aspect), statistics["log_aspect_mean_se"])
    spread = statistics["log_aspect_std"]
    error = spread / math.sqrt(2 * len(log_aspect))
    same("spread of log aspect", (log_aspect.std(), error), (spread, error))
    same("area", mean_and_error(area), statistics["block_area_mean_se"])
    same("new", mean_and_error(new), statistics["new_cells_per_block_mean_se"])
    for values, key in [
        (height, "block_height_min_max"),
        (width, "block_width_min_max"),
        (height / width, "block_aspect_h_over_w_min_max"),
        ((height / width)[area >= 16], "block_aspect_min_max_for_area>=16"),
    ]:
        np.testing.assert_allclose([values.min(), values.max()], statistics[key], rtol=1e-6)

    blocks, attempts, completion = fits.sum(0), active.sum(0), numpy(missing)
    total = statistics["n_blocks_total"]
    same("all blocks", mean_and_error(blocks), statistics["blocks_per_mask_mean_se"])
    assert total / len(target) == pytest.approx(statistics["blocks_per_mask_mean_se"][0])
    same_shares("blocks", np.bincount(blocks), np.array(statistics["blocks_per_mask_hist"]))
    same("attempts", mean_and_error(attempts), statistics["attempts_per_mask_mean_se"])
    same("completion", mean_and_error(completion), statistics["completion_cells_mean_se"])
    key = "fraction_of_masks_with_random_completion"
    same("completed", mean_and_error(completion > 0), statistics[key])
    edges = statistics["target_quartile_edges"]
    for quarter, (low, high) in enumerate(itertools.pairwise(edges)):
        chosen = (target >= low) & (target < high)
        for values, name in [(blocks, "blocks_per_mask"), (completion, "completion_cells")]:
            reference = statistics[f"{name}_mean_se_by_target_quartile"][quarter]
            same(f"{name} {quarter}", mean_and_error(values[chosen]), reference)

    by_target = blocks.reshape(-1, h["nb"])
    mean, error = mean_and_error(by_target, 1)
    same("blocks per target", (mean, error), (golden["blocks_per_mask_mean"], error))
    by_target = completion.reshape(-1, h["nb"])
    mean = golden["completion_cells_mean"]
    error = golden["completion_cells_std"] / math.sqrt(h["nb"])
    same("completion per target", mean_and_error(by_target, 1), (mean, error))


# ------------------------------------------------------------------------------- the rule


def test_sample_is_the_loop_that_the_statistics_are_taken_from():
    layer, twin = BlockMasking(seed=5), BlockMasking(seed=5)
    sampled = numpy(compiled(layer, lambda: layer.sample(B, G, GRID), jit=False)())
    shape = (B * G, 3 + math.prod(GRID))
    noise = keras.random.uniform(shape, seed=twin.seed_generator)
    targets = twin.target_counts(B, G, GRID)[np.argsort(numpy(noise)[:, 0])]
    targets = ops.convert_to_tensor(targets)
    masks = ops.reshape(draw(twin, targets)[0], (B * G, -1))
    masks = _complete(masks, targets, noise[:, 3:])
    np.testing.assert_array_equal(sampled.reshape(B * G, -1), numpy(masks))
    np.testing.assert_array_equal(
        numpy(layer.seed_generator.state), numpy(twin.seed_generator.state)
    )


def test_try_rectangle_matches_slow_loops():
    layer = BlockMasking(min_num_patches=3, max_num_patches=9, min_aspect_ratio=0.2, num_tries=4)
    rng = np.random.default_rng(0)
    crops, height, width = 1000, 6, 4
    masks = (rng.random((crops, height, width)) < rng.random((crops, 1, 1))).astype("float32")
    missing = np.minimum(rng.integers(0, 20, crops), masks[0].size - masks.sum((1, 2)))
    failures = rng.integers(0, 6, crops).astype("int32")
    noise = rng.random((crops, 3)).astype("float32")
    results = compiled_attempt(layer)(
        *map(ops.convert_to_tensor, (masks, missing.astype("float32"), failures, noise))
    )
    new_masks, new_missing, new_failures = map(numpy, results[:3])
    heights, widths, added, fits = map(numpy, results[3])
    for c in range(crops):
        space = min(missing[c], 9)
        area = 3 + noise[c, 0] * (space - 3)
        aspect = math.exp(math.log(0.2) + (math.log(1 / 0.2) - math.log(0.2)) * noise[c, 1])
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        expected, new = masks[c].copy(), 0
        if h < height and w < width:
            places = list(itertools.product(range(height - h + 1), range(width - w + 1)))
            top, left = places[int(noise[c, 2] * len(places))]
            expected[top : top + h, left : left + w] = 1
            new = int((expected - masks[c]).sum())
        placed = 1 <= new <= space and failures[c] < 4
        np.testing.assert_array_equal(
            new_masks[c], expected if placed else masks[c], str((c, h, w))
        )
        assert new_missing[c] == missing[c] - new * placed
        assert new_failures[c] == (0 if placed else failures[c] + 1)
        assert (heights[c], widths[c], fits[c]) == (h, w, placed)
        assert added[c] == new or not placed
    assert 0.1 * crops < fits.sum() < 0.9 * crops


def test_default_max_num_patches_is_half_of_the_rows():
    layer = BlockMasking(mask_ratio=(1, 1), mask_probability=1.0, seed=3)
    targets = ops.convert_to_tensor(np.full(2000, 56, "int32"))
    new, fits = draw(layer, targets, (7, 8))[2][0, 2:4]
    assert np.max(new * fits) == 24  # not 28: half of 7 rows are 3


@pytest.mark.parametrize("jit", JITS)
def test_counts_are_exact_on_any_grid(jit):
    cases = [
        ((2, 7), {"mask_probability": 1.0, "mask_ratio": (0.0, 1.0)}),
        ((8, 3), {"max_num_patches": 4, "num_tries": 1, "mask_ratio": (0.6, 0.9)}),
    ]
    for grid, arguments in cases:
        layer = BlockMasking(**arguments, seed=7)
        masks = numpy(compiled(layer, lambda n=layer, g=grid: n.sample(B, 3, g), jit)())
        assert masks.shape == (B, 3, grid[0] * grid[1]) and masks.dtype == bool
        counts = layer.target_counts(B, 3, grid)
        assert sorted(masks.sum(-1).ravel()) == sorted(counts)
        assert masks.sum() == layer.num_masked(B, 3, grid) > 0


def test_extreme_ratios():
    assert not numpy(BlockMasking(mask_probability=0).sample(B, G, GRID)).any()
    assert not numpy(RandomMasking(mask_ratio=0).sample(B, G, GRID)).any()
    assert numpy(BlockMasking(mask_probability=1, mask_ratio=(1, 1)).sample(B, G, GRID)).all()
    assert numpy(RandomMasking(mask_ratio=1).sample(B, G, GRID)).all()


def test_completion_keeps_masked_patches_and_is_uniform_over_the_others():
    start = np.tile([0, 1, 0, 0, 1, 0], (4000, 1)).astype("float32")
    targets = np.tile([4, 2, 6, 0], 1000).astype("int32")
    start[3::4] = 0
    noise = np.random.default_rng(0).random(start.shape, "float32")
    masks = numpy(_complete(*map(ops.convert_to_tensor, (start, targets, noise))))
    np.testing.assert_array_equal(masks.sum(1), targets)
    assert np.all(masks >= start)
    pairs, counts = np.unique(masks[::4][:, [0, 2, 3, 5]], axis=0, return_counts=True)
    assert len(pairs) == 6  # 4 choose 2, each with probability 1 / 6
    assert np.max(np.abs(counts / 1000 - 1 / 6)) < 5 * math.sqrt(5 / 36 / 1000)


def test_roll_moves_each_mask_by_its_own_uniform_shift():
    grid = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    rolled = {
        np.roll(grid, shift, (0, 1)).tobytes(): shift
        for shift in itertools.product(range(3), range(4))
    }
    masks = ops.convert_to_tensor(np.tile(grid.ravel(), (3000, 1)))
    noise = np.random.default_rng(1).random((3000, 2), "float32")
    masks = numpy(_roll(masks, grid.shape, ops.convert_to_tensor(noise)))
    shifts = [rolled[mask.tobytes()] for mask in masks]
    shares = np.array([shifts.count(shift) for shift in rolled.values()]) / 3000
    assert np.max(np.abs(shares - 1 / 12)) < 5 * math.sqrt(1 / 12 * 11 / 12 / 3000)


def test_random_circular_shift_evens_out_the_positions():
    layer = BlockMasking(random_circular_shift=True, seed=1)  # without, the first row has 0.7
    sample = compiled(layer, lambda: layer.sample(40, G, GRID), jit=False)
    masks = np.concatenate([numpy(sample()) for _ in range(15)]).reshape(-1, *GRID)
    np.testing.assert_allclose(masks.mean((0, 2)) / masks.mean(), np.ones(GRID[0]), atol=0.1)
    np.testing.assert_allclose(masks.mean((0, 1)) / masks.mean(), np.ones(GRID[1]), atol=0.1)


# -------------------------------------------------------------------------- random masking


def test_random_masking_has_the_count_of_the_seed_method():
    h = MANIFEST["seed_method_forward"]["hyperparameters"]
    side = h["img"] // h["patch"]
    layer = RandomMasking(mask_ratio=h["mask_ratio"])
    counts = layer.target_counts(h["B"], 2, (side, side))
    np.testing.assert_array_equal(counts, [h["n_masked_per_image"]] * 8)
    assert layer.num_masked(h["B"], 2, (side, side)) == 40
    masks = numpy(layer.sample(h["B"], 2, (side, side)))
    np.testing.assert_array_equal(masks.sum(-1), np.full((h["B"], 2), 5))


@pytest.mark.parametrize("jit", JITS)
def test_random_masking_is_uniform_and_independent(jit):
    layer = RandomMasking(mask_ratio=0.4, seed=6)
    masks = numpy(compiled(layer, lambda: layer.sample(2000, 2, (1, 5)), jit)())
    assert masks.shape == (2000, 2, 5) and np.all(masks.sum(-1) == 2)
    subsets, code = np.unique(masks.reshape(-1, 5), axis=0, return_inverse=True)
    assert len(subsets) == 10
    code = code.reshape(2000, 2)
    joint = np.histogram2d(code[:, 0], code[:, 1], bins=10)[0] / 2000
    assert np.max(np.abs(joint - 1 / 100)) < 5 * math.sqrt(0.01 * 0.99 / 2000)


# ------------------------------------------------------------------------------- contract

LAYERS = [
    (
        BlockMasking,
        dict(
            mask_probability=0.7,
            mask_ratio=(0.2, 0.6),
            min_num_patches=2,
            max_num_patches=9,
            min_aspect_ratio=0.5,
            random_circular_shift=True,
            num_tries=3,
            seed=8,
        ),
    ),
    (RandomMasking, dict(mask_ratio=0.45, seed=8)),
]


@pytest.mark.parametrize("cls, arguments", LAYERS)
def test_config_round_trip_and_seed(cls, arguments):
    layer = cls(**arguments, name="masking")
    config = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == layer.get_config()
    for name, value in arguments.items():
        assert copy.get_config()[name] == value and getattr(copy, name) == value
        assert value != cls().get_config()[name], f"{name} is tested at its default"
    samples = []
    for drawn in (layer, copy):
        sample = compiled(drawn, lambda drawn=drawn: drawn.sample(B, G, GRID), jit=False)
        samples.append([numpy(sample()) for _ in range(2)])
    np.testing.assert_array_equal(samples[0], samples[1])
    assert np.any(samples[0][0] != samples[0][1])
    others = [cls(**{**arguments, "seed": 80}), cls(), cls(), cls(**arguments)]
    states = {tuple(numpy(other.seed_generator.state)) for other in others}
    assert len(states) == 4


@pytest.mark.parametrize("cls, arguments", LAYERS)
def test_dtype_policy_changes_nothing(cls, arguments):
    masks = []
    for dtype in ("float32", "mixed_bfloat16"):
        layer = cls(**arguments, dtype=dtype)
        masks.append(numpy(compiled(layer, lambda n=layer: n.sample(B, G, GRID), jit=False)()))
    np.testing.assert_array_equal(*masks)


@keras.saving.register_keras_serializable(package="test_masking")
class Masked(keras.Model):
    """Replaces masked entries of `(B, G, N)` by a learned one."""

    def __init__(self, masking, **kwargs):
        super().__init__(**kwargs)
        self.masking = masking

    def build(self, input_shape):
        self.token = self.add_weight(shape=(), initializer="zeros", name="token")

    def call(self, x):
        masks = self.masking.sample(x.shape[0], x.shape[1], (4, 6))
        return ops.where(masks, ops.convert_to_tensor(self.token), x)

    def get_config(self):
        masking = keras.saving.serialize_keras_object(self.masking)
        return {**super().get_config(), "masking": masking}

    @classmethod
    def from_config(cls, config):
        masking = keras.saving.deserialize_keras_object(config.pop("masking"))
        return cls(masking, **config)


@pytest.mark.parametrize("jit", JITS)
@pytest.mark.parametrize("cls", [BlockMasking, RandomMasking])
def test_fit_predict_and_save_inside_a_model(cls, jit, tmp_path):
    model = Masked(cls(seed=9))
    total = model.masking.num_masked(4, 3, (4, 6))
    x = np.ones((12, 3, 24), "float32")  # three batches of B=4, G=3
    y = np.full_like(x, 2.0)
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse", jit_compile=jit)
    loss = model.fit(x, y, batch_size=4, verbose=0, shuffle=False).history["loss"][0]
    share, token, losses = total / (4 * 3 * 24), 0.0, []
    for _ in range(3):  # the loss depends on the number of masked patches only
        losses.append(share * (2 - token) ** 2 + (1 - share))
        token += 0.1 * 2 * share * (2 - token)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(numpy(model.token.value)) == pytest.approx(token, rel=1e-5)

    masks = model.predict(x, batch_size=4, verbose=0) != 1
    np.testing.assert_array_equal(masks.reshape(3, -1).sum(1), [total] * 3)
    assert np.any(masks[:4] != masks[4:8])  # drawn anew, not traced once
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert float(numpy(restored.token.value)) == pytest.approx(token, rel=1e-5)


@pytest.mark.parametrize(
    "cls, arguments, message",
    [
        (BlockMasking, {"mask_probability": 1.5}, "at most 1. Received: mask_probability=1.5"),
        (BlockMasking, {"mask_probability": -0.1}, "mask_probability=-0.1"),
        (BlockMasking, {"mask_ratio": 0.3}, "pair with 0 <= low <= high <= 1.*mask_ratio=0.3"),
        (BlockMasking, {"mask_ratio": (0.5, 0.1)}, r"mask_ratio=\(0.5, 0.1\)"),
        (BlockMasking, {"mask_ratio": (0.5, 1.1)}, r"mask_ratio=\(0.5, 1.1\)"),
        (BlockMasking, {"mask_ratio": (-0.5, 0.5)}, r"mask_ratio=\(-0.5, 0.5\)"),
        (BlockMasking, {"min_num_patches": 0}, "at least 1.*min_num_patches=0"),
        (BlockMasking, {"max_num_patches": 3}, "at least 4. Received: max_num_patches=3"),
        (BlockMasking, {"max_num_patches": 0}, "max_num_patches=0"),
        (BlockMasking, {"min_aspect_ratio": 0}, "greater than 0 and at most 1.*min_aspect_ratio=0"),
        (BlockMasking, {"min_aspect_ratio": 2}, "min_aspect_ratio=2"),
        (
            BlockMasking,
            {"num_tries": 0},
            "an integer of at least 1.*num_tries=0",
        ),
        (RandomMasking, {"mask_ratio": 1.01}, "at most 1. Received: mask_ratio=1.01"),
        (RandomMasking, {"mask_ratio": -1}, "mask_ratio=-1"),
        (RandomMasking, {"mask_ratio": None}, "must be a number.*mask_ratio=None"),
        (BlockMasking, {"min_num_patches": 2.5}, "integer.*min_num_patches=2.5"),
    ],
)
def test_constructor_errors(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


@pytest.mark.parametrize("cls", [BlockMasking, RandomMasking])
@pytest.mark.parametrize(
    "sizes", [(0, 2, (4, 4)), (None, 2, (4, 4)), (3, -1, (4, 4)), (3, 2, 4), (3, 2, (4, 0))]
)
def test_size_errors(cls, sizes):
    with pytest.raises(ValueError, match=r"known ints of at least 1. Received: batch_size="):
        cls().sample(*sizes)
    with pytest.raises(ValueError, match="grid_size="):
        cls().num_masked(*sizes)


def test_errors_when_nothing_would_be_masked():
    with pytest.raises(ValueError, match="Use more images or patches.*batch_size=1, num_crops=1"):
        BlockMasking().sample(1, 1, (4, 4))
    with pytest.raises(ValueError, match=r"grid_size=\(2, 2\), .*mask_ratio=\(0.1, 0.2\)"):
        BlockMasking(mask_ratio=(0.1, 0.2)).sample(8, 2, (2, 2))
    with pytest.raises(ValueError, match=r"two rows and two columns.*grid_size=\(1, 9\)"):
        BlockMasking().sample(8, 2, (1, 9))
    with pytest.raises(ValueError, match=r"larger ratio.*grid_size=\(1, 3\), mask_ratio=0.1"):
        RandomMasking(mask_ratio=0.1).sample(8, 2, (1, 3))
