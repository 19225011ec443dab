import keras
import numpy as np
import pytest
import tiny
from golden import Golden, numpy
from keras import ops

import keras_dinov3 as kd
from keras_dinov3.batches import full_batches
from keras_dinov3.callbacks import KNN, DataOrder, StopOnNonFinite, TeacherEMA


class Lines(keras.layers.Layer):
    """One dense layer's weights, for averages by hand."""

    def __init__(self, weights):
        super().__init__()
        self.values = [self.add_weight(w.shape, "zeros") for w in weights]
        self.set_weights(weights)


class Pair:
    """The least that `DINOv3.update_teacher` works on."""

    gram = None

    def __init__(self, momentum, student, teacher):
        self.teacher_ema = TeacherEMA(momentum)
        self.student, self.teacher = Lines(student), Lines(teacher)
        self.student_and_teacher = [(self.student, self.teacher)]
        self.step = keras.Variable(0, dtype="int32", trainable=False)

    def update(self, ticks=1):
        kd.DINOv3.update_teacher(self, ops.convert_to_tensor(ticks))


def test_golden_seed_ema():
    """From the first stored teacher on: `initial/` is not what the first update started from."""
    golden = Golden("seed_ema")
    names = ("weight", "bias")
    first = [golden[f"update0/teacher_{name}"] for name in names]
    pair = Pair(0.9, first, first)
    (student, teacher), *_ = pair.student_and_teacher
    for update in (1, 2):
        student.set_weights([golden[f"update{update}/student_{name}"] for name in names])
        pair.update()
        for name, weight in zip(names, teacher.weights, strict=True):
            golden.check(weight, f"update{update}/teacher_{name}")
    assert int(pair.step) == 2


def test_golden_seed_ema_coefficients():
    golden = Golden("seed_ema")
    h = golden.hyperparameters
    schedule = kd.WarmupCosine(h["base"], h["total_epochs"] + 1, end=h["final"])
    golden.check(np.array([float(schedule(e)) for e in range(21)], "float32"), "coefficients")


def test_a_micro_step_moves_nothing():
    pair = Pair(0.5, [np.ones(3, "float32")], [np.zeros(3, "float32")])
    pair.update(ticks=0)
    assert int(pair.step) == 0
    np.testing.assert_array_equal(numpy(pair.student_and_teacher[0][1].weights[0]), 0)
    pair.update()
    np.testing.assert_array_equal(numpy(pair.student_and_teacher[0][1].weights[0]), 0.5)


@pytest.mark.parametrize("momentum", [-0.1, 1.5, kd.WarmupCosine(0.9, 10, end=1.2), "0.9"])
def test_momentum_outside_0_1(momentum):
    with pytest.raises(ValueError, match=r"momentum.*Received"):
        TeacherEMA(momentum)


def test_teacher_ema_config():
    schedule = kd.WarmupCosine(0.9, 10, end=1.0)
    config = keras.saving.serialize_keras_object(TeacherEMA(schedule))
    copy = keras.saving.deserialize_keras_object(config)
    assert float(copy.momentum(4)) == float(schedule(4))


def labelled(count, seed):
    """Images of two classes, dark and bright, that any backbone tells apart."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(seed).integers(0, 60, (count, 32, 24, 3))
    return (noise + 180 * labels[:, None, None, None]).astype("uint8"), labels


def test_knn_is_in_the_logs_and_other_callbacks_see_it(tmp_path):
    knn = KNN(labelled(13, 1), labelled(7, 2), every=2, k=3, batch_size=5)
    seen = []
    history = (
        tiny.model()
        .fit(
            tiny.images(tiny.B),
            batch_size=tiny.B,
            epochs=4,
            verbose=0,
            callbacks=[
                knn,
                keras.callbacks.CSVLogger(tmp_path / "log.csv"),
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda e, logs: seen.append(logs["knn"])
                ),
            ],
        )
        .history
    )
    assert [epoch for epoch, _ in knn.history] == [0, 2, 4]
    values = dict(knn.history)
    assert history["knn"] == seen == [values[0], values[2], values[2], values[4]]
    assert values[0] > 0.9  # dark and bright
    assert "knn" in (tmp_path / "log.csv").read_text().splitlines()[0]


def test_knn_of_a_resumed_run_is_that_of_the_restored_weights(tmp_path):
    """Callbacks that restore a run do so at its begin, maybe after this one."""
    sides, seen = (labelled(13, 1), labelled(7, 2)), []

    class Restore(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.teacher.embeddings.cls_token.assign(token)
            seen.extend(knn.history)

    model = tiny.model()
    token = numpy(model.teacher.embeddings.cls_token) + 1.0
    knn = KNN(*sides, every=4, k=3)
    model.fit(
        tiny.images(),
        batch_size=tiny.B,
        initial_epoch=2,
        epochs=3,
        verbose=0,
        callbacks=[knn, Restore()],
    )
    assert seen == [] and [epoch for epoch, _ in knn.history] == [2]


def test_the_order_of_data_follows_the_batches_and_not_the_updates():
    model = tiny.model(kd.AdamW(1e-3, gradient_accumulation_steps=8))
    data, _ = full_batches(tiny.images(3 * tiny.B), tiny.B, True, 0)
    order, positions = DataOrder(data), []
    order.set_model(model)
    for epoch in range(3):
        order.on_epoch_begin(epoch)
        positions.append(data.position)
        for index in range(3):
            model.train_on_batch(data[index])
    assert positions == [0, 3, 6] and int(model.step) == 1
    model.train_on_batch(data[0])
    order.on_epoch_begin(3)
    assert data.position == 9  # within a pass, the order stays


def test_short_epochs_still_see_every_image():
    images = tiny.images(4 * tiny.B)
    images[:, 0, 0, 0] = np.arange(len(images))
    seen = []

    data, _ = full_batches(images, tiny.B, True, 0)
    getitem = type(data).__getitem__

    class Counting(type(data)):
        def __getitem__(self, index):
            batch = getitem(self, index)
            seen.append(batch[:, 0, 0, 0].tolist())
            return batch

    data.__class__ = Counting
    model = tiny.model()
    model.fit(data, steps_per_epoch=2, epochs=2, verbose=0)
    # But for the two looks at the first and the last batch. TensorFlow also reads ahead.
    assert set(sum(seen[2:], [])) == set(range(len(images)))


def test_knn_sees_the_teacher_of_the_moment():
    model = tiny.model(teacher_ema=TeacherEMA(0.0))  # the teacher becomes the student
    knn = KNN(labelled(9, 1), labelled(6, 2), k=3)
    features = []

    class Keep(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            features.append(knn._extractor.extract(labelled(4, 3)[0]))

    model.fit(tiny.images(tiny.B), batch_size=tiny.B, epochs=2, verbose=0, callbacks=[knn, Keep()])
    after = kd.evaluation.extract_features(model.teacher, labelled(4, 3)[0])
    np.testing.assert_allclose(features[1], after, atol=1e-5)
    assert np.max(np.abs(features[0] - features[1])) > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "`every` must be an integer of at least 1. Received: every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ({"k": 0}, "`k`.*at least 1.*k=0"),
        ({"temperature": 0.0}, "`temperature`.*greater than 0"),
        ({"feature": "patches"}, "`feature`.*mean_patch.*'patches'"),
        ({"train": iter([])}, "`train`.*generator only once"),
    ],
)
def test_knn_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        KNN(**{"train": labelled(4, 0), "val": labelled(4, 0), **arguments})


@pytest.mark.parametrize(
    ("knn", "message"),
    [
        (KNN(labelled(9, 0)[0], labelled(4, 0), k=3), "label for each image.*`train`"),
        (KNN(labelled(9, 0), labelled(4, 0)), "`k`.*9 training features"),
    ],
)
def test_knn_says_before_training_what_is_missing(knn, message):
    model = tiny.model()
    with pytest.raises(ValueError, match=message):
        model.fit(tiny.images(), callbacks=knn, verbose=0)
    assert int(model.step) == 0


def test_knn_normalises_as_the_model_or_as_told():
    train, val = labelled(9, 1), labelled(6, 2)
    model = tiny.model(augmentation=tiny.multi_crop(mean=0.1, std=0.3))
    extractors = []
    for arguments in ({}, {"mean": 0.4, "std": 0.2}):
        knn = KNN(train, val, k=3, **arguments)
        knn.set_model(model)
        knn.on_train_begin()
        extractors.append((knn._extractor.mean, knn._extractor.std))
    assert extractors == [(0.1, 0.3), (0.4, 0.2)]


def test_non_finite_is_found_between_looks():
    callback = StopOnNonFinite(every=3)

    class Model:
        looks = 0

        def bad_terms(self):
            return ["koleo_loss"], 7

    callback.set_model(Model())
    callback.on_train_batch_end(0, {"loss": float("nan")})  # not a batch to look at
    callback.on_train_batch_end(2, {"loss": 1.0})
    with pytest.raises(FloatingPointError, match="koleo_loss, at step 7"):
        callback.on_train_batch_end(5, {"loss": float("inf")})
    with pytest.raises(FloatingPointError, match="koleo_loss"):
        callback.on_epoch_end(0, {"loss": float("nan")})
