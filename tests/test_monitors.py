"""The callbacks that measure features and schedules during `fit`."""

import keras
import numpy as np
import pytest
import tiny
from golden import numpy
from test_callbacks import labelled

import keras_dinov3 as kd
from keras_dinov3.callbacks import KNN, LiDAR, RankMe, ScheduleLogger
from keras_dinov3.monitors import Monitor


class Counter(Monitor):
    """Logs how often it has measured."""

    def measure(self):
        return {"count": len(self.records)}


def fit(model, callbacks, images=None, **kwargs):
    images = tiny.images(3 * tiny.B) if images is None else images
    return model.fit(images, batch_size=tiny.B, verbose=0, callbacks=callbacks, **kwargs)


def test_a_monitor_measures_at_its_steps_and_epochs():
    counter = Counter(every=2, every_steps=5)
    seen = []
    after = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(logs["count"])
    )
    history = fit(tiny.model(), [counter, after], epochs=4).history
    # Three batches in an epoch: before training, at batches 5 and 10, after epochs 2 and 4.
    assert [(r["epoch"], r["step"]) for r in counter.records] == [
        (0, 0),
        (1, 5),
        (2, 6),
        (3, 10),
        (4, 12),
    ]
    assert history["count"] == [0, 2, 2, 4]
    assert seen == [0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_several_steps_in_one_execution_skip_no_measurement():
    counter = Counter(every=9, every_steps=2)
    counter.set_model(type("Model", (), {"step": 0}))
    counter.on_train_begin()
    counter.on_epoch_begin(0)
    counter.on_train_batch_end(2)  # three batches at once
    counter.on_train_batch_end(5)
    counter.on_epoch_begin(1)
    counter.on_train_batch_end(0)
    counter.on_train_batch_end(1)
    assert len(counter.records) == 1 + 2 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every": 0}, "`every`.*every=0"), ({"every_steps": 1.5}, "`every_steps`.*1.5")],
)
def test_monitor_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ScheduleLogger(**arguments)


def test_knn_with_several_k():
    knn = KNN(labelled(13, 1), labelled(7, 2), k=(3, 5))
    history = fit(tiny.model(), knn).history
    single = KNN(labelled(13, 1), labelled(7, 2), k=3)
    expected = fit(tiny.model(), single).history
    assert {"knn_3", "knn_5"} <= set(history) and "knn" not in history
    assert history["knn_3"] == expected["knn"] and knn.history == single.history
    with pytest.raises(ValueError, match="`k`.*k=0"):
        KNN(labelled(4, 1), labelled(4, 2), k=(3, 0))


def test_rankme_is_that_of_the_teachers_features():
    images, labels = labelled(9, 1)
    monitor, same = RankMe((images, labels)), RankMe(images, feature="mean_patch", name="other")
    model = tiny.model()
    history = fit(model, [monitor, same]).history
    for name, feature in (("rankme", "cls"), ("other", "mean_patch")):
        features = kd.evaluation.extract_features(model.teacher, images, feature=feature)
        np.testing.assert_allclose(history[name][-1], kd.evaluation.rankme(features), rtol=1e-5)
    assert monitor.history[-1] == (1, history["rankme"][-1])


def test_lidar_is_that_of_views_that_stay_the_same():
    images, labels = labelled(7, 1)
    lidar = LiDAR((images, labels), num_views=3, batch_size=4)
    model = tiny.model(teacher_ema=None)  # a frozen teacher: what changes is the views'
    before = numpy(model.augmentation.seed_generator.state)
    history = fit(model, lidar, epochs=2).history
    assert lidar.history[0][1] == lidar.history[1][1] == history["lidar"][-1]
    assert np.any(before != numpy(model.augmentation.seed_generator.state))  # `fit` moved it

    views = tiny.multi_crop(num_global_crops=3, num_local_crops=0, seed=0)
    crops = [numpy(views(part)["global_crops"]) for part in (images[:4], images[4:])]
    crops = np.concatenate(crops)  # (7, 3, S, S, C)
    tokens = kd.encode(model.teacher, crops.reshape(-1, *crops.shape[2:]))
    expected = kd.evaluation.lidar(numpy(tokens.cls).reshape(7, 3, -1))
    np.testing.assert_allclose(lidar.history[0][1], expected, rtol=1e-3)


def test_lidar_needs_views():
    model = tiny.model(augmentation=None)
    with pytest.raises(ValueError, match="augmentation to make views.*MultiCrop"):
        model.fit(tiny.crops(), callbacks=LiDAR(tiny.images()), verbose=0)
    assert int(model.step) == 0
    with pytest.raises(ValueError, match="`num_views`.*at least 2"):
        LiDAR(tiny.images(), num_views=1)
    with pytest.raises(ValueError, match="`augmentation` must be a `MultiCrop`"):
        LiDAR(tiny.images(), augmentation="multi_crop")


@pytest.mark.parametrize("own", [True, False])
def test_schedules_are_those_of_the_last_update(own, tmp_path):
    rate = kd.WarmupCosine(1e-3, 10, warmup_steps=4, start=1e-4)
    optimizer = kd.AdamW(rate, kd.WarmupCosine(0.1, 10, end=0.3), log=True)
    if not own:
        optimizer = keras.optimizers.AdamW(rate, weight_decay=0.1)
    model = tiny.model(
        optimizer,
        teacher_temperature=kd.WarmupCosine(0.07, 10, warmup_steps=5, start=0.04, end=0.07),
        teacher_ema=kd.callbacks.TeacherEMA(kd.WarmupCosine(0.9, 10, end=1.0)),
    )
    path = tmp_path / "log.csv"
    logger = ScheduleLogger(every_steps=1)
    history = fit(model, [logger, keras.callbacks.CSVLogger(path)], epochs=2).history
    assert [record["step"] for record in logger.records][:3] == [0, 1, 2]
    for record in logger.records:
        step = max(record["step"] - 1, 0)
        expected = {
            "learning_rate": float(rate(step)),
            "weight_decay": float(optimizer.weight_decay(step)) if own else 0.1,
            "teacher_temperature": float(model.teacher_temperature(step)),
            "student_temperature": 0.1,
            "teacher_momentum": float(model.teacher_ema.momentum(step)),
        }
        assert {k: v for k, v in record.items() if k not in ("epoch", "step")} == pytest.approx(
            expected, rel=1e-6
        )
    assert history["learning_rate"][-1] == pytest.approx(float(rate(5)), rel=1e-6)
    header = path.read_text().splitlines()[0].split(",")
    assert {"learning_rate", "teacher_momentum", "teacher_temperature"} <= set(header)
    assert ("backbone_gradient_norm" in header) == own


def test_a_frozen_teacher_has_no_momentum():
    logger = ScheduleLogger()
    fit(tiny.model(keras.optimizers.SGD(0.1), teacher_ema=None), logger)
    assert "teacher_momentum" not in logger.records[-1]
    assert logger.records[-1]["weight_decay"] == 0.0
