"""A teacher's tokens on disk: values, going on after an interruption, and what is refused."""

import os

import keras
import numpy as np
import pytest
import tiny
from golden import numpy
from keras import ops

import keras_dinov3 as kd
from keras_dinov3 import teacher_cache

COUNT, VIEWS = 7, 2
CROP = (*tiny.GLOBAL, 3)


def make_teacher(seed=5):
    keras.utils.set_random_seed(seed)
    return tiny.backbone(hidden_dim=48)


def make_cache(directory, teacher=None, images=None, **config):
    config = {
        "augmentation": tiny.multi_crop(),
        "views": VIEWS,
        "seed": 4,
        "dtype": "float32",
        "batch_size": 3,
        "verbose": 0,
        **config,
    }
    teacher = make_teacher() if teacher is None else teacher
    images = tiny.images(COUNT) if images is None else images
    return kd.cache_teacher(teacher, images, directory, **config)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("teacher"))


def test_tokens_are_the_teachers(cache):
    assert cache.crops.shape == (COUNT, VIEWS, tiny.G, *CROP) and cache.crops.dtype == "uint8"
    assert cache.cls.shape == (COUNT, VIEWS, tiny.G, 48) and cache.cls.dtype == "float32"
    assert cache.patches.shape == (COUNT, VIEWS, tiny.G, tiny.N, 48)
    crops = tiny.multi_crop().normalize(cache.crops[[0, 6]].reshape(-1, *CROP))
    tokens = kd.encode(make_teacher(), crops)
    np.testing.assert_allclose(numpy(tokens.cls), cache.cls[[0, 6]].reshape(-1, 48), 1e-4, 1e-5)
    patches = cache.patches[[0, 6]].reshape(-1, tiny.N, 48)
    np.testing.assert_allclose(numpy(tokens.patches), patches, 1e-4, 1e-5)


def test_crops_are_those_of_the_augmentation(cache):
    flat = cache.crops.reshape(COUNT * VIEWS * tiny.G, -1)
    assert len(np.unique(flat, axis=0)) == len(flat)  # each is a draw of its own
    assert 0 <= flat.min() < 40 and 215 < flat.max() <= 255
    plain = {"global_crop_scale": (1.0, 1.0), "crop_aspect_ratio": (0.9, 0.9)}
    plain |= {f"{name}_probability": 0 for name in ("flip", "color_jitter", "grayscale")}
    plain |= {"global_blur_probability": 0, "global_solarize_probability": 0}
    layer = tiny.multi_crop(**plain, mean=0.0, std=1.0)
    images = tiny.images(2)
    drawn = teacher_cache.drawn(layer, images, seed=0, number=0)
    np.testing.assert_allclose(drawn[:, 0], drawn[:, 1])  # nothing is left to chance
    kept = np.rint(drawn * 255).astype("uint8")
    assert np.abs(numpy(layer.normalize(kept)) - drawn).max() <= 0.5 / 255 + 1e-6


def test_an_interrupted_one_goes_on(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "KEEP_EVERY", 1)
    drawn, numbers = teacher_cache.drawn, []

    def interrupted(layer, images, seed, number):
        numbers.append(number)
        if len(numbers) == 4:  # in the second batch, after its first view
            raise KeyboardInterrupt
        return drawn(layer, images, seed, number)

    monkeypatch.setattr(teacher_cache, "drawn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, dtype="float16")
    with pytest.raises(ValueError, match="is read when it is finished.*without teacher.json"):
        kd.TeacherCache(tmp_path)
    again = make_cache(tmp_path, dtype="float16")
    assert numbers == [0, 1, 6, 7, 6, 7, 12, 13]  # the first batch was not made twice
    assert sorted(os.listdir(tmp_path)) == ["cls.npy", "crops.npy", "patches.npy", "teacher.json"]
    np.testing.assert_array_equal(again.crops, cache.crops)
    assert again.patches.dtype == "float16"
    np.testing.assert_allclose(again.cls, cache.cls, 1e-3, 1e-3)
    np.testing.assert_allclose(again.patches, cache.patches, 1e-3, 1e-3)


def test_one_that_was_begun_otherwise_starts_over(tmp_path, monkeypatch):
    calls = []

    def stopped(layer, images, seed, number):
        calls.append((seed, number))
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache, "drawn", stopped)
    about = {"about": "another", "done": 6}
    teacher_cache.write_json(os.path.join(tmp_path, "teacher.json.part"), about)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path, seed=8)
    assert calls == [(8, 0)]
    assert os.listdir(tmp_path) and "teacher.json.part" not in os.listdir(tmp_path)


def test_a_finished_one_is_used_again(cache, monkeypatch):
    monkeypatch.setattr(teacher_cache, "fill", None)
    teacher = make_teacher()  # whose name is another
    again = make_cache(cache.directory, teacher, batch_size=2)
    np.testing.assert_array_equal(again.cls, cache.cls)
    cache.check_teacher(teacher)
    # What local crops are does not matter.
    make_cache(cache.directory, augmentation=tiny.multi_crop(num_local_crops=1, seed=9))


def test_others_are_refused(cache):
    images = tiny.images(COUNT)
    images[3] += 1
    others = {
        "weights": {"teacher": make_teacher(6)},
        "seed: 5, cached: 4": {"seed": 5},
        "views: 3, cached: 2": {"views": 3},
        "dtype: float16": {"dtype": "float16"},
        "images": {"images": images},
        "augmentation": {"augmentation": tiny.multi_crop(global_crop_scale=(0.5, 1.0))},
    }
    for name, config in others.items():
        with pytest.raises(ValueError, match=f"made from others .{name}"):
            make_cache(cache.directory, **config)
    with pytest.raises(ValueError, match="made from others .weights"):
        cache.check_teacher(make_teacher(6))
    with pytest.raises(ValueError, match="made from others .images"):
        cache.batches(images, 2, tiny.multi_crop())


def test_damaged_ones_are_refused(cache, tmp_path):
    for name in ("crops", "cls", "patches"):
        np.save(tmp_path / f"{name}.npy", getattr(cache, name))
    teacher_cache.write_json(tmp_path / "teacher.json", cache.about)
    kd.TeacherCache(tmp_path)
    np.save(tmp_path / "cls.npy", cache.cls[:-1])
    with pytest.raises(ValueError, match="cls.npy must be as teacher.json beside it says"):
        kd.TeacherCache(tmp_path)
    os.remove(tmp_path / "cls.npy")
    with pytest.raises(ValueError, match="no such file"):
        kd.TeacherCache(tmp_path)


def test_wrong_arguments(tmp_path):
    broken = make_teacher()
    broken.layernorm.gamma.assign(ops.ones(48) * 1e6)
    for config, message in (
        ({"teacher": broken, "dtype": "float16"}, "must be finite in float16"),
        ({"augmentation": None}, "`augmentation` must be a `MultiCrop`"),
        ({"augmentation": kd.MixedCrops([(16, 8), (24, 8)])}, "crops of one size. Received: .* 2"),
        ({"views": 0}, "`views`"),
        ({"dtype": "bfloat16"}, "`dtype` must be"),
        (
            {"images": tiny.images(COUNT, channels=1)},
            r"`images` must be a NumPy array \(n, H, W, 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_cache(tmp_path, **config)
