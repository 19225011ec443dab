"""Crops of several sizes: what a step sees, what is drawn, compiled, saved and resumed."""

import types

import keras
import numpy as np
import pytest
import tiny
from golden import close, numpy

import keras_dinov3 as kd
from keras_dinov3.augment import as_pair
from keras_dinov3.encoder import merge
from keras_dinov3.mixed import MixedSteps, batches_seen
from keras_dinov3.monitors import changed

SIZES = [(tiny.GLOBAL, tiny.LOCAL), ((16, 40), 8, (40, 80)), (24, (8, 24), None)]
GRIDS = [(4, 3), (2, 5), (3, 3)]
TRACES = keras.config.backend() != "torch"  # whether a step runs in Python only to be traced


def mixed_crops(sizes=SIZES, **config):
    config = {"num_local_crops": tiny.L, "seed": 1, **config}
    return kd.MixedCrops(sizes, **config)


def mixed_model(**config):
    """Small, and of two sizes, since each takes its time to compile."""
    keras.utils.set_random_seed(0)  # the backbone is made before `tiny.model` does so
    return tiny.model(
        backbone=tiny.backbone(num_layers=1),
        augmentation=mixed_crops([size[:2] for size in SIZES[:2]]),
        compile={"jit_compile": keras.config.backend() == "jax"},
        **config,
    )


def watched(model, name="train_step"):
    """The list in which each run of a step in Python puts the size of its global crops."""
    seen, step = [], getattr(model, name)

    def counted(*args):
        seen.append(model.augmentation.global_crop_size)
        return step(*args)

    setattr(model, name, counted)
    return seen


def drawn(model, batches):
    return [model.augmentation.draw(model.data_seed, batch) for batch in batches]


def test_crops_have_the_size_of_the_step():
    layer, images = mixed_crops(), tiny.images()
    expected = [
        (tiny.GLOBAL, tiny.LOCAL, (64, 48)),
        ((16, 40), (8, 8), (40, 80)),  # its own Gram crops
        ((24, 24), (8, 24), (48, 48)),
    ]
    for index, sizes in enumerate(expected):
        with layer.at(index):
            crops = layer(images, gram_scale=2)
            shapes = layer.compute_output_shape(images.shape, gram_scale=2)
        for name, count, size in zip(
            ("global", "local", "gram"), (tiny.G, tiny.L, tiny.G), sizes, strict=True
        ):
            assert crops[f"{name}_crops"].shape == (tiny.B, count, *size, 3), (index, name)
            assert shapes[f"{name}_crops"] == (tiny.B, count, *size, 3)
    with pytest.raises(RuntimeError), layer.at(1):
        raise RuntimeError
    assert layer(images).keys() == {"global_crops", "local_crops"}
    assert layer(images)["global_crops"].shape[2:4] == tiny.GLOBAL  # outside: the first


def test_crops_of_a_size_are_those_of_a_multi_crop():
    layer, images = mixed_crops(), tiny.images()
    for index, (global_size, local_size, *_) in enumerate(SIZES):
        alone = tiny.multi_crop(global_crop_size=global_size, local_crop_size=local_size)
        with layer.at(index):
            layer.seed_generator.state.assign(alone.seed_generator.state)
            found = layer(images)
        for name, crops in alone(images).items():
            np.testing.assert_array_equal(numpy(found[name]), numpy(crops))


def test_draws_repeat_and_follow_the_probabilities():
    layer = mixed_crops(probabilities=[3, 1, 4])
    draws = [layer.draw(7, batch) for batch in range(2000)]
    assert draws[:50] == [layer.draw(7, batch) for batch in range(50)]
    np.testing.assert_allclose(np.bincount(draws) / 2000, [3 / 8, 1 / 8, 4 / 8], atol=0.04)
    assert draws[:50] != [layer.draw(8, batch) for batch in range(50)]
    layer = mixed_crops()
    draws = [layer.draw(7, batch) for batch in range(2000)]
    np.testing.assert_allclose(np.bincount(draws) / 2000, 1 / 3, atol=0.04)


def test_the_config_has_every_argument():
    layer = mixed_crops(probabilities=[0.2, 0.3, 0.5], std=0.5, num_global_crops=1)
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == layer.get_config()
    assert again.crop_sizes == layer.crop_sizes and again.std == 0.5
    other = changed(layer, num_local_crops=0, seed=3)  # as the monitors do
    assert other(tiny.images())["local_crops"].shape[1] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sizes": []}, "`sizes` must be a list"),
        ({"sizes": [32, 16]}, "`sizes` must be a list"),
        ({"sizes": [(32,)]}, "`sizes` must be a list"),
        ({"sizes": [(32, 16, 0)]}, "`sizes` must be a list"),
        ({"sizes": [(32, 16.5)]}, "`sizes` must be a list"),
        ({"probabilities": [1, 2]}, "`probabilities` must be 3 positive"),
        ({"probabilities": [1, 2, 0]}, "`probabilities` must be 3 positive"),
        ({"global_crop_size": 32}, r"from `sizes`. Received: \['global_crop_size'\]"),
        ({"sizes": [(32, 16), (32, 4)]}, "`local_crop_size` must be more than half"),
        ({"num_local_crops": -1}, "`num_local_crops`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixed_crops(**arguments)


def test_every_size_must_fit_the_backbones():
    sizes = [(32, 16), (28, 16)]
    with pytest.raises(ValueError, match="`global_crop_size` must be.*28"):
        tiny.model(augmentation=mixed_crops(sizes))
    with pytest.raises(ValueError, match="`local_crop_size` must be.*12"):
        tiny.model(augmentation=mixed_crops([(32, 16), (24, 12)]))
    tiny.model(augmentation=mixed_crops([(32, 16), (24, 12)], num_local_crops=0))
    anchor = kd.GramAnchor.from_config(kd.GramAnchor().get_config())
    with pytest.raises(ValueError, match="`gram_crops` must be.*36"):
        tiny.model(augmentation=mixed_crops([(32, 16), (32, 16, 36)]), gram=anchor)
    for gram in (None, kd.GramAnchor("ema_teacher")):
        with pytest.raises(ValueError, match=r"Gram teacher of its own. Received: \[\(40, 80\)\]"):
            tiny.model(augmentation=mixed_crops(), gram=gram)


def test_masks_slots_and_positions_follow():
    model = tiny.model(augmentation=mixed_crops(), gram=kd.GramAnchor())
    for index, grid in enumerate(GRIDS):
        with model.augmentation.at(index):
            views = model.make_views(tiny.images(), training=True)
            crops, _, masks, slots, all_crops, _ = views
            gram_crops = all_crops["gram_crops"]
        assert masks.shape == (tiny.B, tiny.G, grid[0] * grid[1])
        num_masked = model.masking.num_masked(tiny.B, tiny.G, grid)
        assert numpy(masks).sum() == num_masked == slots.index.shape[0]
        assert gram_crops.shape[2:4] == [(64, 48), (40, 80), (48, 48)][index]
        if index == 1:
            backbone = tiny.backbone(image_shape=(16, 40, 3))  # Keras Hub's rotary positions
            backbone.set_weights(model.teacher.get_weights())
            expected = backbone({"pixel_values": merge(crops)})
            found = kd.encode(model.teacher, merge(crops))
            close(found.cls, numpy(expected)[:, 0], 1e-4, 1e-5)
            close(found.patches, numpy(expected)[:, -10:], 1e-4, 1e-5)


@pytest.fixture(scope="module")
def trained():
    """A model after 12 batches in `fit` and 3 alone; what was seen when in training and testing."""
    model = mixed_model()
    seen, tested, data = watched(model), watched(model, "test_step"), tiny.images(4 * tiny.B)
    model.fit(data, batch_size=tiny.B, epochs=2, validation_data=data[: tiny.B], verbose=0)
    counts = [len(seen)]
    model.fit(data, batch_size=tiny.B, epochs=3, initial_epoch=2, verbose=0)
    counts.append(len(seen))
    losses = [model.train_on_batch(data[: tiny.B], return_dict=True)["loss"] for _ in range(3)]
    return model, seen, tested, counts, losses


def test_each_size_is_traced_once(trained):
    model, seen, _, counts, losses = trained
    assert int(model.step) == 15 and np.isfinite(losses).all()
    expected = [SIZES[index][0] for index in drawn(model, range(15))]
    assert len(set(expected[:8])) == 2, "a seed is needed with which each size is drawn"
    if not TRACES:
        assert seen == expected and counts == [8, 12]
        return
    assert seen[:2] == list(dict.fromkeys(expected))  # when it is drawn first
    assert counts == [2, 2]  # and never again
    # JAX traces for `train_on_batch` anew, as Keras gives it other data.
    assert seen[2:] in ([], list(dict.fromkeys(expected[12:])))


def test_validation_and_all_else_have_the_first_size(trained):
    model, _, tested, *_ = trained
    assert set(tested) == {tiny.GLOBAL} == {model.augmentation.global_crop_size}


def test_a_saved_model_draws_on(trained, tmp_path):
    model = trained[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.augmentation.crop_sizes == model.augmentation.crop_sizes
    for side in (model, loaded):
        side.make_train_function()
    assert model.train_function.batch == loaded.train_function.batch == 15
    assert drawn(loaded, range(50)) == drawn(model, range(50))


def test_without_a_seed_the_model_draws_one_and_saves_it(tmp_path):
    model = mixed_model(seed=None)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.seed is None and drawn(loaded, range(50)) == drawn(model, range(50))


def test_a_run_stopped_and_resumed_is_the_uninterrupted_one(tmp_path):
    data = tiny.images(3 * tiny.B)
    whole = mixed_model()
    expected = whole.fit(data, batch_size=tiny.B, epochs=3, verbose=0).history
    first = mixed_model()
    first.fit(data, batch_size=tiny.B, epochs=2, verbose=0)
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    seen = watched(second)
    found = second.fit(data, batch_size=tiny.B, epochs=3, initial_epoch=2, verbose=0).history
    if not TRACES:
        assert list(map(as_pair, seen)) == [
            as_pair(SIZES[index][0]) for index in drawn(whole, range(6, 9))
        ]
    assert {name: values[-1] for name, values in expected.items()} == {
        name: values[0] for name, values in found.items()
    }
    for a, b in zip(whole.weights, second.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), a.path)


def test_an_execution_has_one_size():
    """Of three steps each; the next epoch begins with the batch at which the model is."""
    layer, called = mixed_crops(), []
    model = types.SimpleNamespace(augmentation=layer, steps_per_execution=3, data_seed=5)
    model.optimizer = keras.optimizers.SGD(0.1)
    model.step, model.train_step = 4, lambda *args: None

    def make(force):
        step = model.train_step
        model.train_function = lambda *args: called.append((step, layer.global_crop_size))

    steps = MixedSteps(model, make)
    steps.restart()
    for _ in range(6):
        steps("batch")
    order = [layer.draw(5, batch) for batch in range(4, 22, 3)]
    assert [size for _, size in called] == [SIZES[index][0] for index in order]
    # JAX takes one trace for equal functions.
    assert len({step for step, _ in called}) == len(set(order)) > 1
    assert steps.batch == 22
    model.step = 20  # the last execution ended with the data
    steps.restart()
    assert steps.batch == 20


def test_batches_are_counted_with_micro_steps():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model = types.SimpleNamespace(optimizer=optimizer, step=4)
    optimizer._iterations.assign(14)
    assert batches_seen(model) == 14
    model.optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    assert batches_seen(model) == 4
