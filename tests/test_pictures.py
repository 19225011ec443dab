import random
import sys

import keras_hub
import numpy as np
import pytest
import tiny
from PIL import Image

from keras_dinov3 import EncoderExtras, backend, pictures
from keras_dinov3.callbacks import Pictures
from keras_dinov3.features import FeatureExtractor
from keras_dinov3.maps import token_norms
from keras_dinov3.pictures import KINDS


def vit():
    return keras_hub.models.ViTBackbone(
        image_shape=(*tiny.GLOBAL, 3),
        patch_size=tiny.PATCH,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=48,
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Five epochs with pictures of every kind, also for TensorBoard."""
    folder = tmp_path_factory.mktemp("pictures")
    images = tiny.images(3, 32, 24)
    callback = Pictures(images, folder / "run", every=2, kinds=KINDS, log_dir=folder / "board")
    model = tiny.model()
    model.fit(tiny.images(), batch_size=tiny.B, epochs=5, verbose=0, callbacks=[callback])
    return folder, model


def test_pictures_at_their_times(drawn):
    folder, _ = drawn
    times = ("000000", "000002", "000004", "000005")
    expected = {f"{kind}_{time}.png" for kind in KINDS for time in times} | {"crops.png"}
    assert {path.name for path in (folder / "run").iterdir()} == expected
    for path in (folder / "run").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    first, last = ((folder / "run" / f"attention_{time}.png").read_bytes() for time in times[::3])
    assert first != last


def test_tensorboard_shows_them_too(drawn):
    import tensorflow as tf

    folder, _ = drawn
    (log,) = (folder / "board").glob("events.out.tfevents.*")
    found = {}
    for record in tf.data.TFRecordDataset(str(log)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "images"
            found[value.tag, event.step] = value.tensor.string_val
    assert set(found) == {(kind, step) for kind in KINDS for step in (0, 2, 4, 5)}
    width, height, png = found["patch_pca", 5]
    path = folder / "run" / "patch_pca_000005.png"
    assert png == path.read_bytes()
    with Image.open(path) as picture:
        assert picture.size == (int(width), int(height))


def test_pictures_do_not_touch_the_training(drawn):
    _, model = drawn
    plain = tiny.model()
    plain.fit(tiny.images(), batch_size=tiny.B, epochs=5, verbose=0)
    for a, b in zip(model.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(backend.numpy_of(a), backend.numpy_of(b), a.path)


def test_pictures_do_not_touch_pythons_random_state(tmp_path):
    backbone, images = tiny.backbone(), tiny.images(2, 32, 24)
    state = random.getstate()
    FeatureExtractor(backbone)(images)
    assert random.getstate() == state


def test_the_teacher_is_seen_as_it_was_trained(tmp_path, monkeypatch):
    """Its registers and the crops' normalization change what is drawn."""
    seen = []

    def recorded(backbone, images, **settings):
        seen.append((backbone, settings))
        return token_norms(backbone, images, **settings)

    monkeypatch.setattr(pictures, "token_norms", recorded)
    augmentation = tiny.multi_crop(mean=0.25, std=0.125)
    extras = EncoderExtras(num_register_tokens=2)
    model = tiny.model(backbone=vit(), augmentation=augmentation, extras=extras)
    callback = Pictures(tiny.images(2, 32, 24), tmp_path, kinds=["norms"], image_size=(64, 48))
    model.fit(tiny.images(), batch_size=tiny.B, verbose=0, callbacks=[callback])
    for backbone, settings in seen:
        assert backbone is model.teacher and settings["extras"] is model.teacher_extras
        assert settings["extras"] is not None
        assert (settings["mean"], settings["std"]) == (0.25, 0.125)
        assert settings["image_size"] == (64, 48)
    assert len(seen) == 2


def test_ready_crops_have_no_picture_of_crops(tmp_path):
    model = tiny.model(augmentation=None)
    callback = Pictures(tiny.images(2, 32, 24), tmp_path, kinds=["norms"], image_size=(64, 48))
    model.fit(tiny.crops(), batch_size=tiny.B, verbose=0, callbacks=[callback])
    assert {path.name for path in tmp_path.iterdir()} == {"norms_000000.png", "norms_000001.png"}


def test_errors(tmp_path, monkeypatch):
    images = tiny.images(2)
    for wrong in ({"kinds": ["pca"]}, {"images": images[:0]}, {"images": images[0]}):
        with pytest.raises(ValueError, match="`kinds` must be among.*images of shape"):
            Pictures(**{"images": images, "path": tmp_path, **wrong})
    with pytest.raises(ValueError, match="`every`"):
        Pictures(images, tmp_path, every=0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", None)
        with pytest.raises(ImportError, match="leave out `log_dir`"):
            Pictures(images, tmp_path, log_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="Matplotlib"):
        Pictures(images, tmp_path)
    assert list(tmp_path.iterdir()) == []
