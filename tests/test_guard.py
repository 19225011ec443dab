"""`Guard`: what it measures by hand, when it stops, what it puts back, and resumed runs."""

import json
import warnings

import keras
import numpy as np
import pytest
import tiny
from golden import numpy

import keras_dinov3 as kd
from keras_dinov3.evaluation import knn_accuracy
from keras_dinov3.guard import neighbours_of, values_of

IMAGES = tiny.images(24, seed=4)
LABELS = np.arange(24) // 2 % 3


def rates(*rates):
    """The learning rate of each epoch: 0 leaves the teacher as it is, 1 ruins it."""
    return keras.callbacks.LearningRateScheduler(lambda epoch: rates[epoch])


@pytest.fixture(scope="module")
def model():
    return tiny.model(teacher_ema=kd.callbacks.TeacherEMA(0.0))


@pytest.fixture(autouse=True)
def same_weights(request):
    """Every test begins with the weights of the first."""
    if "model" not in request.fixturenames:
        yield
        return
    model = request.getfixturevalue("model")
    weights = model.get_weights()
    yield
    model.set_weights(weights)


def test_neighbours_by_hand():
    angles = np.array([0.0, 0.1, 0.3, 3.0, 3.05, 3.2])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("float32") * 2
    assert neighbours_of(features, 1).ravel().tolist() == [1, 0, 1, 4, 3, 4]
    assert [set(row) for row in neighbours_of(features, 2).tolist()] == [
        {1, 2},
        {0, 2},
        {0, 1},
        {4, 5},
        {3, 5},
        {3, 4},
    ]
    twins = np.ones((5, 2), "float32")
    rows = neighbours_of(twins, 3)
    assert rows.shape == (5, 3)


def test_values_by_hand():
    rng = np.random.default_rng(3)
    first = rng.normal(size=(40, 6)).astype("float32")
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype("float32")
    values = values_of(3 * first @ rotation, first, None, 4)
    assert values["guard_agreement"] == 1.0  # neighbours do not know of rotation and scale
    assert values["guard_rankme"] == pytest.approx(kd.evaluation.rankme(first), rel=1e-4)
    other = rng.normal(size=(40, 6)).astype("float32")
    shared = []
    for row in range(40):
        sets = []
        for x in (first, other):
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            cosines = unit @ unit[row]
            cosines[row] = -2
            sets.append(set(np.argsort(-cosines)[:4]))
        shared.append(len(sets[0] & sets[1]) / 4)
    assert values_of(other, first, None, 4)["guard_agreement"] == pytest.approx(np.mean(shared))
    labels = np.arange(40) % 3
    found = values_of(other, first, labels, 4)
    order = np.random.default_rng(0).permutation(40)
    bank, queries = order[:20], order[20:]
    expected = knn_accuracy(other[bank], labels[bank], other[queries], labels[queries], k=4)
    assert found == {"guard_knn": expected}
    other[3, 2] = np.nan
    assert np.isnan(list(values_of(other, first, None, 4).values())).all()
    assert np.isnan(values_of(other, first, labels, 4)["guard_knn"])


def test_a_healthy_run_is_left_alone(model):
    guard = kd.callbacks.Guard(IMAGES, "restore", k=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = model.fit(
            IMAGES[:4], batch_size=4, epochs=2, callbacks=[rates(0.0, 0.0), guard], verbose=0
        )
    assert guard.alarm is None and int(model.step) == 2
    assert history.history["guard_agreement"] == [1.0, 1.0]
    assert guard.history == [(0, 1.0), (1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_run_that_unlearns_is_stopped_and_taken_back(model, labels, monkeypatch):
    data = IMAGES if labels is None else (IMAGES, labels)
    guard = kd.callbacks.Guard(data, "restore", k=3, min_agreement=0.9)
    if labels is not None:  # what untrained features say of these labels means nothing
        accuracies = iter([0.5, 0.5, 0.6, 0.4])  # of the start twice: as it is, and to compare
        monkeypatch.setattr("keras_dinov3.guard.knn_accuracy", lambda *_, **__: next(accuracies))
    before = [*model.student.get_weights(), *model.teacher.get_weights()]
    with pytest.warns(UserWarning, match=r"\[unlearns\].*it began with.*step 2.*continue_from"):
        model.fit(
            IMAGES[:4],
            batch_size=4,
            epochs=3,
            callbacks=[rates(0.0, 1.0, 0.0), guard],
            verbose=0,
        )
    assert guard.alarm["step"] == 2 and guard.alarm["since_step"] == 1
    assert [record["epoch"] for record in guard.records] == [0, 1, 2]
    assert int(model.step) == 2
    after = [*model.student.get_weights(), *model.teacher.get_weights()]
    for weight, value in zip(after, before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_stop_leaves_the_weights_and_need_not_wait_for_the_epoch(model):
    guard = kd.callbacks.Guard(IMAGES, every_steps=2, k=3, min_agreement=0.9, max_rank_drop=0.99)
    before = numpy(model.teacher.weights[0]).copy()
    with pytest.warns(UserWarning, match="guard_agreement is 0.* may fall to 0.9, at step 2"):
        model.fit(IMAGES, batch_size=4, epochs=2, callbacks=[rates(1.0, 1.0), guard], verbose=0)
    assert int(model.step) == 2 and len(guard.records) == 2
    assert np.max(np.abs(numpy(model.teacher.weights[0]) - before)) > 0.1


def test_a_resumed_run_is_compared_with_the_start(model, tmp_path):
    path = tmp_path / "run" / "start.npz"
    settings = {"batch_size": 4, "verbose": 0}
    guard = kd.callbacks.Guard(IMAGES, k=3, start_path=path)
    model.fit(IMAGES[:4], **settings, callbacks=[rates(0.0), guard])
    assert list(path.parent.iterdir()) == [path]
    for weight in model.teacher.weights:
        weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    alarms = tmp_path / "alarms.jsonl"
    again = kd.callbacks.Guard(IMAGES, k=3, path=alarms, start_path=path, min_agreement=0.9)
    with pytest.warns(UserWarning, match="guard_agreement"):
        model.fit(
            IMAGES[:4], **settings, epochs=2, initial_epoch=1, callbacks=[rates(0, 0.0), again]
        )
    assert again.records[0]["guard_agreement"] < 0.9
    assert json.loads(alarms.read_text()) == again.alarm and again.alarm["kind"] == "unlearns"
    other = kd.callbacks.Guard(IMAGES[:20], k=3, start_path=path)
    with pytest.raises(ValueError, match=r"features of this run at its start.*Received: \(24"):
        model.fit(IMAGES[:4], **settings, callbacks=[rates(0.0), other])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"action": "halt"}, r"one of \('stop', 'restore'\). Received: action='halt'"),
        ({"max_drop": 1.0}, "`max_drop`.*Received: max_drop=1.0"),
        ({"max_rank_drop": -0.1}, "`max_rank_drop`"),
        ({"min_agreement": 2}, "`min_agreement`"),
        ({"k": 0}, "`k`"),
        ({"feature": "best"}, "`feature`"),
        ({"every_steps": 0}, "`every_steps`"),
    ],
)
def test_errors_teach(arguments, message):
    with pytest.raises(ValueError, match=message):
        kd.callbacks.Guard(IMAGES, **arguments)


def test_too_few_images(model):
    with pytest.raises(ValueError, match="at least 22 images for k=10. Received: 20"):
        model.fit(IMAGES, batch_size=4, callbacks=[kd.callbacks.Guard(IMAGES[:20])], verbose=0)
