"""Training on a cached teacher's tokens: the same losses without its forward pass; refusals."""

import keras
import numpy as np
import pytest
import tiny
from golden import numpy
from test_teacher_cache import COUNT, VIEWS, make_cache, make_teacher

import keras_dinov3 as kd
import keras_dinov3.model
from keras_dinov3.checks import check_batch
from keras_dinov3.known_tokens import KNOWN, local_crops_alone


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("teacher"))


def batches_of(cache, **config):
    config = {"batch_size": 3, "augmentation": tiny.multi_crop(), "seed": 2, **config}
    return cache.batches(tiny.images(COUNT), **config)


def student(teacher, **config):
    return tiny.model(teacher=teacher, teacher_ema=None, **config)


def test_losses_are_the_same_and_the_teacher_does_not_run(cache, monkeypatch):
    passes, encode = [], keras_dinov3.model.encode
    monkeypatch.setattr(
        keras_dinov3.model, "encode", lambda *args, **kw: passes.append(1) or encode(*args, **kw)
    )
    batch = {**batches_of(cache)[0], "masks": tiny.crops(3, masked=0.4)["masks"]}
    model = student(cache.stand_in())
    found = model.test_on_batch(batch, return_dict=True)
    history = model.fit(batches_of(cache), epochs=2, verbose=0).history
    assert not passes and np.isfinite(history["loss"]).all()

    model = student(make_teacher())
    without = {name: array for name, array in batch.items() if name not in KNOWN}
    expected = model.test_on_batch(without, return_dict=True)
    assert passes and found.keys() == expected.keys()
    for term, value in expected.items():
        np.testing.assert_allclose(found[term], value, rtol=1e-5, err_msg=term)


def test_batches_hold_what_was_cached(cache):
    batches = batches_of(cache, shuffle=False)
    assert len(batches) == COUNT // 3
    for epoch in range(VIEWS + 1):
        batch, view = batches[1], epoch % VIEWS
        np.testing.assert_array_equal(batch["teacher_cls"], cache.cls[3:6, view])
        np.testing.assert_array_equal(batch["teacher_patches"], cache.patches[3:6, view])
        crops = numpy(tiny.multi_crop().normalize(cache.crops[3:6, view]))
        np.testing.assert_array_equal(batch["global_crops"], crops)
        batches.on_epoch_end()


def test_batches_follow_from_seed_and_step(cache):
    batches = batches_of(cache)
    first = [batches[0], batches[1]]
    shape = (3, tiny.L, *tiny.LOCAL, 3)
    assert first[0]["local_crops"].shape == shape
    batches.on_epoch_end()
    second = batches[0]
    resumed = batches_of(cache)
    resumed.position = 2  # as `fit` sets it
    other = batches_of(cache, seed=3)
    for name in first[0]:
        np.testing.assert_array_equal(resumed[0][name], second[name])
        np.testing.assert_array_equal(batches_of(cache)[1][name], first[1][name])
        assert np.any(second[name] != first[0][name]) and np.any(other[1][name] != first[1][name])


def test_local_crops_are_those_of_the_augmentation():
    plain = {"local_crop_scale": (1.0, 1.0), "crop_aspect_ratio": (0.9, 0.9)}
    plain |= {f"{name}_probability": 0 for name in ("flip", "color_jitter", "grayscale")}
    plain |= {"local_blur_probability": 0, "local_solarize_probability": 1.0}
    augmentation, images = tiny.multi_crop(**plain), tiny.images(2)
    alone = local_crops_alone(augmentation)(images)
    expected = numpy(augmentation(images)["local_crops"])
    np.testing.assert_array_equal(numpy(alone["global_crops"]), expected)
    assert alone["local_crops"].shape[1] == 0
    assert local_crops_alone(tiny.multi_crop(num_local_crops=0)) is None


def test_without_local_crops(cache):
    batches = batches_of(cache, augmentation=tiny.multi_crop(num_local_crops=0))
    assert set(batches[0]) == {"global_crops", *KNOWN}


def test_the_stand_in_is_saved_with_the_model(cache, tmp_path):
    stand_in = cache.stand_in()
    assert stand_in.hidden_dim == 48 and stand_in.patch_size == tiny.PATCH
    assert all(np.isnan(numpy(weight)).all() for weight in stand_in.weights)
    student(stand_in).save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.teacher) is type(stand_in) and loaded.teacher.hidden_dim == 48
    assert check_batch(batches_of(cache)[0], loaded) == 3


def test_tokens_that_do_not_fit(cache):
    batch, model = batches_of(cache)[0], student(cache.stand_in())
    check_batch(batch, model)
    without = {name: array for name, array in batch.items() if name not in KNOWN}
    for data in (without, tiny.images()):
        with pytest.raises(ValueError, match="is in a cache, so batches must bring its tokens"):
            check_batch(data, model)
    with pytest.raises(ValueError, match="a model whose teacher moves"):
        check_batch(batch, tiny.model())
    wide = student(tiny.backbone(hidden_dim=56))
    for other, message in (
        ({"teacher_cls": batch["teacher_cls"]}, "must be those of the global crops"),
        ({**batch, "teacher_cls": batch["teacher_cls"][:, :1]}, "must be those of the global"),
        ({**batch, "teacher_cls": batch["teacher_cls"] * np.nan}, "must be finite floats"),
    ):
        with pytest.raises(ValueError, match=message):
            check_batch({**without, **other}, model)
    with pytest.raises(ValueError, match=r"needed: .*\(3, 2, 56\)"):
        check_batch(batch, wide)
    with pytest.raises(ValueError, match="at least one batch"):
        batches_of(cache, batch_size=COUNT + 1)


def test_several_students_hear_a_cached_teacher(cache):
    teacher = cache.stand_in()
    parts = {"small": student(teacher), "base": student(teacher, head_hidden_dim=20)}
    model = kd.MultiDistillation(parts)
    batch = {**batches_of(cache)[0], "masks": tiny.crops(3, masked=0.4)["masks"]}
    model.check(batch)
    specs = {name: keras.KerasTensor(x.shape, x.dtype.name) for name, x in batch.items()}
    outputs = model(specs, training=True)
    for name in parts:
        assert outputs[name]["teacher_tokens"].patches.shape == (3 * tiny.G, tiny.N, 48)
