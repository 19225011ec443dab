"""`CollapseMonitor`: its values by hand."""

import keras
import numpy as np
import pytest
import tiny
from golden import numpy
from keras import ops

import keras_dinov3 as kd
from keras_dinov3.callbacks import CollapseMonitor
from keras_dinov3.collapse import parts_of_loss, share_used


def entropy(p):
    return -np.sum(p * np.log(p), axis=-1)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def test_parts_of_a_loss_by_hand():
    targets = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], "float32")[:, None]  # (B, 1, K)
    predictions = softmax(np.array([[1.0, 0.0, 2.0], [0.5, 0.2, 0.1]]))[:, None]
    losses = -np.sum(targets * np.log(predictions), axis=-1)
    parts = parts_of_loss(*(ops.convert_to_tensor(x, "float32") for x in (targets, losses)))
    parts = {name: float(numpy(part)) for name, part in parts.items()}
    divergence = np.mean(np.sum(targets * np.log(targets / predictions), axis=-1))
    mean = targets.mean(axis=(0, 1))
    assert parts == pytest.approx(
        {
            "target_entropy": entropy(targets).mean(),
            "target_kl": divergence,
            "target_information": entropy(mean) - entropy(targets).mean(),
        },
        rel=1e-4,
    )


def test_extremes_of_information_and_use():
    def information(targets):
        targets = ops.convert_to_tensor(targets)
        return float(numpy(parts_of_loss(targets, targets[..., 0])["target_information"]))

    one_hot = np.eye(6, dtype="float32").reshape(3, 2, 6)
    same = np.repeat(one_hot[:1, :1], 3, axis=0)
    assert information(one_hot) == pytest.approx(np.log(6), rel=1e-5)
    assert information(same) == pytest.approx(0, abs=1e-6)
    assert information(np.full((3, 2, 6), 1 / 6, "float32")) == pytest.approx(0, abs=1e-6)
    winners = ops.convert_to_tensor([[0, 3], [3, 3], [1, 0]])
    assert float(numpy(share_used(winners, 20))) == pytest.approx(3 / 6)  # of six crops
    assert float(numpy(share_used(winners, 4))) == pytest.approx(3 / 4)  # of four prototypes


def look(model, **arguments):
    monitor = CollapseMonitor(tiny.images(5, seed=1), patience=999, **arguments)
    model.fit(tiny.images(), batch_size=tiny.B, verbose=0, callbacks=monitor)
    return monitor


@pytest.mark.parametrize("config", [{}, {"prototype_chunk_size": 2}])
def test_values_are_those_of_student_and_teacher(config):
    model = tiny.model(masking=kd.RandomMasking(0.4), **config)
    monitor = look(model, seed=7)
    record = monitor.records[-1]

    crops = numpy(
        tiny.multi_crop(num_local_crops=0, seed=7)(tiny.images(5, seed=1))["global_crops"]
    )
    np.testing.assert_array_equal(monitor._crops["global_crops"], crops)
    masks = monitor._crops["masks"]
    assert masks.shape == (5, tiny.G, tiny.N) and 0 < masks.sum() < masks.size
    flat, masks = crops.reshape(-1, *crops.shape[2:]), masks.reshape(10, -1)
    teacher = kd.encode(model.teacher, flat)
    student = kd.encode(model.student, flat, masks=masks)

    def logits(head, tokens):
        return numpy(head(tokens)).astype("float64")

    targets = logits(model.teacher_dino_head, teacher.cls).reshape(5, 2, -1)
    targets = numpy(kd.sinkhorn_knopp(targets, 0.07)).astype("float64")
    predicted = softmax(logits(model.student_dino_head, student.cls).reshape(5, 2, -1) / 0.1)
    divergence = np.mean(  # of a crop from the other one's target
        [
            np.sum(targets[:, t] * np.log(targets[:, t] / predicted[:, 1 - t]), axis=-1)
            for t in range(2)
        ]
    )
    cross = np.mean(entropy(targets)) + divergence
    assert record["target_entropy"] == pytest.approx(entropy(targets).mean(), rel=1e-3)
    assert record["target_entropy"] + record["target_kl"] == pytest.approx(cross, rel=1e-4)
    winners = targets.argmax(-1)
    assert record["prototypes_used"] == pytest.approx(len(np.unique(winners)) / 10)
    assert record["prototype_agreement"] == pytest.approx(np.mean(predicted.argmax(-1) == winners))

    patches = [numpy(t.patches)[masks] for t in (teacher, student)]  # (M, D)
    targets = numpy(kd.sinkhorn_knopp(logits(model.teacher_ibot_head, patches[0]), 0.07))
    predicted = softmax(logits(model.student_ibot_head, patches[1]) / 0.1)
    cross = -np.mean(np.sum(targets * np.log(predicted), axis=-1))
    assert record["patch_target_entropy"] + record["patch_target_kl"] == pytest.approx(
        cross, rel=1e-4
    )

    units = [
        numpy(t.cls) / np.linalg.norm(numpy(t.cls), axis=-1, keepdims=True)
        for t in (teacher, student)
    ]
    deviation = units[0].std(axis=0).mean() * np.sqrt(units[0].shape[-1])
    assert record["feature_std"] == pytest.approx(deviation, rel=1e-3)
    assert record["feature_agreement"] == pytest.approx(np.mean(np.sum(units[0] * units[1], -1)))

    weights = [
        np.concatenate([numpy(w).ravel() for w in side.weights])
        for side in (model.student, model.teacher)
    ]
    norm = np.linalg.norm(weights[0])
    assert record["weight_norm"] == pytest.approx(norm, rel=1e-4)
    distance = np.linalg.norm(weights[0] - weights[1]) / norm
    assert record["teacher_distance"] == pytest.approx(distance, rel=1e-3) and distance > 0


def test_patch_drift_is_from_the_early_copy():
    model, similarities = tiny.model(kd.AdamW(1e-2), teacher_ema=kd.callbacks.TeacherEMA(0.6)), []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            patches = numpy(kd.encode(model.teacher, monitor._crops["global_crops"][:, 0]).patches)
            patches = patches / np.linalg.norm(patches, axis=-1, keepdims=True)
            similarities.append(patches @ patches.transpose(0, 2, 1))

    monitor = CollapseMonitor(tiny.images(3), reference_epoch=2, patience=999)
    history = model.fit(
        tiny.images(), batch_size=tiny.B, epochs=3, verbose=0, callbacks=[monitor, Keep()]
    ).history
    assert history["patch_drift"][:2] == [0.0, 0.0]
    expected = np.sqrt(np.mean((similarities[2] - similarities[1]) ** 2))
    assert history["patch_drift"][2] == pytest.approx(expected, rel=1e-3) and expected > 1e-4


def test_centers_stay_where_they_are():
    model = tiny.model(centering=kd.SoftmaxCentering(momentum=0.5), teacher_ema=None)
    model.class_targets.center.assign(np.linspace(-1, 1, tiny.K))
    probe = look(model)
    center = numpy(model.class_targets.center)
    probe.measure()
    np.testing.assert_array_equal(numpy(model.class_targets.center), center)


def test_ready_crops_and_methods_without_patches():
    crops = tiny.crops(6, masked=0.3)
    model = tiny.model(augmentation=None)
    monitor = CollapseMonitor(crops, patience=999)
    history = model.fit(crops, batch_size=3, verbose=0, callbacks=monitor).history
    np.testing.assert_array_equal(monitor._crops["masks"], crops["masks"])
    assert "patch_target_entropy" in history

    model = tiny.model(ibot_weight=0, masking=None, teacher_ema=None)
    logs = look(model).records[-1]
    assert "patch_target_entropy" not in logs and "teacher_distance" not in logs
    assert logs["target_entropy"] > 0 and "patch_drift" in logs


def test_batches_give_their_first():
    batches = [tiny.images(4, seed=seed) for seed in range(2)]
    monitor = CollapseMonitor(batches, patience=999)
    tiny.model().fit(tiny.images(), batch_size=tiny.B, verbose=0, callbacks=monitor)
    assert monitor._crops["global_crops"].shape[0] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_steps": 0}, "`every_steps`.*every_steps=0"),
        ({"patience": 0}, "`patience`.*at least 1.*patience=0"),
        ({"reference_epoch": -1}, "`reference_epoch`.*-1"),
        ({"seed": 0.5}, "`seed`.*0.5"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CollapseMonitor(tiny.images(), **arguments)


def test_says_before_training_what_does_not_fit():
    model = tiny.model(augmentation=None)
    with pytest.raises(ValueError, match="dicts of ready crops"):
        model.fit(tiny.crops(), callbacks=CollapseMonitor(tiny.images()), verbose=0)
    with pytest.raises(ValueError, match="3 channels"):
        tiny.model().fit(tiny.images(), callbacks=CollapseMonitor(tiny.images(channels=1)))
    assert int(model.step) == 0
