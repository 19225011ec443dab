"""Preservation: class tokens near those of a frozen backbone, which never changes and is saved."""

import keras
import numpy as np
import pytest
import tiny
from golden import close, numpy, value_and_gradients
from keras import ops

import keras_dinov3 as kd
from keras_dinov3.preservation import class_token_distance


def weights_of(layer):
    return [numpy(w).copy() for w in layer.weights]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_distances(distance):
    rng = np.random.default_rng(0)
    frozen, student = rng.normal(size=(2, 3, 5)).astype("float32")
    frozen[0] = student[0]
    if distance == "cosine":
        norms = np.linalg.norm(frozen, axis=1) * np.linalg.norm(student, axis=1)
        expected = 1 - np.sum(frozen * student, axis=1) / norms
    else:
        expected = np.mean((frozen - student) ** 2, axis=1)
    tensors = [ops.convert_to_tensor(x) for x in (frozen, student)]
    close(class_token_distance(*tensors, distance), expected, 1e-5, 1e-6)
    half = [ops.cast(x, "bfloat16") for x in tensors]
    found = class_token_distance(*half, distance)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    close(found, class_token_distance(*(ops.cast(x, "float32") for x in half), distance), 0, 1e-7)
    _, (gradient,) = value_and_gradients(
        lambda x: ops.sum(class_token_distance(tensors[0], x, distance)), 0 * student
    )
    assert np.isfinite(gradient).all()


@pytest.fixture(scope="module")
def trained():
    """A model of both frozen copy and schedule after some steps, and the copy before them."""
    schedule = kd.WarmupCosine(2.0, 8, start=1.0, warmup_steps=2)
    extras = kd.EncoderExtras(untie_cls_norm=True)
    model = tiny.model(preserve=kd.Preserve(weight=schedule), extras=extras)
    before = [weights_of(x) for x in (model.student, model.preserve.backbone)]
    history = model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, epochs=2, verbose=0).history
    return model, before, history


def test_the_copy_is_of_the_student_at_the_start_and_stays(trained):
    model, (student, copy), _ = trained
    assert same(student, copy) and same(copy, weights_of(model.preserve.backbone))
    assert not same(student, weights_of(model.student))
    kept = {id(v) for v in model.preserve.weights}
    assert kept and not kept & {id(v) for v in model.trainable_variables}
    assert kept <= {id(v) for v in model.weights}
    assert len(model.preserve.extras.weights) == len(model.student_extras.weights) > 0


def test_it_is_a_term_of_the_loss(trained):
    """The student's masked crops against the frozen backbone's whole ones."""
    model, _, history = trained
    assert all(0 < loss < 2 for loss in history["preservation_loss"])
    crops = tiny.crops(masked=0.5)
    images = ops.convert_to_tensor(crops["global_crops"].reshape(-1, *tiny.GLOBAL, 3))
    masks = ops.convert_to_tensor(crops["masks"].reshape(-1, tiny.N))
    own = model.preserve
    frozen = numpy(kd.encode(own.backbone, images, extras=own.extras).cls)
    student = numpy(kd.encode(model.student, images, masks, extras=model.student_extras).cls)
    cosines = np.sum(frozen * student, axis=1)
    cosines /= np.linalg.norm(frozen, axis=1) * np.linalg.norm(student, axis=1)
    weight = float(model.preserve.weight(int(model.step)))
    logs = model.test_on_batch(crops, return_dict=True)
    assert logs["preservation_loss"] == pytest.approx(np.mean(1 - cosines), rel=1e-4)
    local = 2 * tiny.L / (2 + 2 * tiny.L)
    rest = (1 - local) * logs["dino_global_loss"] + local * logs["dino_local_loss"]
    rest += logs["ibot_loss"] + 0.1 * tiny.G * logs["koleo_loss"]
    assert logs["loss"] - rest == pytest.approx(weight * logs["preservation_loss"], abs=1e-4)
    assert weight > 1


def test_the_frozen_backbone_is_saved(trained, tmp_path):
    model, (_, copy), _ = trained
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert same(copy, weights_of(loaded.preserve.backbone))
    assert same(weights_of(model.preserve.extras), weights_of(loaded.preserve.extras))
    assert loaded.preserve.get_config() == model.preserve.get_config()
    assert not loaded.preserve.trainable_variables
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), a.path)


def test_a_backbone_of_its_own(tmp_path):
    """From a preset: of another depth, registers and patch size, but of the student's width."""
    source = tiny.backbone(num_layers=1, num_register_tokens=1, patch_size=4)
    source.save_to_preset(str(tmp_path / "preset"))
    preserve = kd.Preserve(str(tmp_path / "preset"), weight=50.0, distance="squared")
    model = tiny.model(keras.optimizers.AdamW(1e-3), preserve=preserve)
    assert same(weights_of(source), weights_of(preserve.backbone))
    copy = kd.Preserve.from_config(preserve.get_config())
    assert copy.source.num_layers == 1 and copy.source.hidden_dim == 32
    assert copy.get_config() == preserve.get_config() and copy.weight == 50
    crops = tiny.crops()
    logs = [model.train_on_batch(crops, return_dict=True) for _ in range(6)]
    assert logs[-1]["preservation_loss"] < logs[0]["preservation_loss"]
    assert same(weights_of(source), weights_of(preserve.backbone))


def test_at_weight_0_there_is_nothing():
    model = tiny.model(preserve=kd.Preserve(weight=0))
    assert model.preserve.backbone is None and not model.preserve.weights
    assert "preservation_loss" not in [mean.name for mean in model.term_means]
    assert len(model.weights) == len(tiny.model().weights)


def test_wrong_arguments():
    for options, message in (
        ({"weight": -1.0}, "`weight`"),
        ({"distance": "euclidean"}, "`distance` must be one of"),
        ({"source": 3}, "must be one of Keras Hub's"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            kd.Preserve(**options)


def test_what_does_not_fit_the_model():
    with pytest.raises(ValueError, match="`preserve` must be a `Preserve`"):
        tiny.model(preserve=tiny.backbone())
    with pytest.raises(ValueError, match="the student's width.*widths 48 and 32"):
        tiny.model(preserve=kd.Preserve(tiny.backbone(hidden_dim=48)))
    with pytest.raises(ValueError, match="needs their channels.*1 and 3"):
        tiny.model(preserve=kd.Preserve(tiny.backbone(image_shape=(*tiny.GLOBAL, 1))))
    with pytest.raises(ValueError, match="`global_crops` must be multiples"):
        tiny.model(preserve=kd.Preserve(tiny.backbone(patch_size=16, image_shape=(32, 32, 3))))
    preserve = kd.Preserve()
    tiny.model(preserve=preserve)
    with pytest.raises(ValueError, match="`Preserve` belongs to one model"):
        tiny.model(preserve=preserve)
