"""The linear classifier beside a run."""

import numpy as np
import pytest
import tiny
from golden import numpy
from test_callbacks import labelled
from test_monitors import fit

import keras_dinov3 as kd
from keras_dinov3.callbacks import KNN, LiDAR, LinearProbe, ScheduleLogger


def weights_of(model):
    return [numpy(weight) for weight in [*model.weights, *model.optimizer.variables]]


def test_a_linear_probe_learns_and_does_not_touch_the_run():
    """The same weights, optimizer and random states to the last bit, with it and without."""
    images = tiny.images(6 * tiny.B)
    monitors = [
        LinearProbe(labelled(40, 1), labelled(12, 2), batch_size=8, every_steps=5),
        KNN(labelled(9, 3), labelled(6, 4), k=3, every_steps=7),
        LiDAR(labelled(7, 5)[0], num_views=2, every_steps=9),
        kd.callbacks.CollapseMonitor(images[:5], every_steps=4, patience=999),
        ScheduleLogger(every_steps=1),
    ]
    alone, watched = (tiny.model(kd.AdamW(1e-3)) for _ in range(2))
    fit(alone, [], images, epochs=2)
    history = fit(watched, monitors, images, epochs=2).history
    for expected, weight in zip(weights_of(alone), weights_of(watched), strict=True):
        np.testing.assert_array_equal(weight, expected)

    probe = monitors[0]
    assert probe.history[0][1] == 0.5  # knows nothing: one of two classes
    assert history["linear_probe"][-1] > 0.9  # dark and bright
    assert history["linear_probe_loss"][-1] < np.log(2)
    assert probe.records[0]["linear_probe_loss"] == pytest.approx(np.log(2))


def test_a_linear_probe_sees_all_images_in_a_new_order_and_takes_batches():
    images, labels = labelled(10, 1)
    images[:, 0, 0, 0] = np.arange(10)
    probe = LinearProbe((images, labels), labelled(4, 2), batch_size=4)
    batches = probe.endless_batches()
    orders = [[next(batches)[0][:, 0, 0, 0].tolist() for _ in range(2)] for _ in range(2)]
    assert orders[0] != orders[1]
    assert len(set(sum(orders[0], []))) == 8  # two full batches, no image twice

    listed = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    probe = LinearProbe(listed, labelled(4, 2), train_every=2)
    fit(tiny.model(), probe)
    assert len(probe.records) == 2 and probe.classes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": labelled(4, 0)[0]}, "label for each image.*`train`"),
        ({"val": labelled(4, 0)[0]}, "label for each image.*`val`"),
        ({"val": (labelled(2, 0)[0], np.array([1, 7]))}, r"labels that `train` holds.*\[7\]"),
    ],
)
def test_a_linear_probe_says_before_training_what_is_missing(arguments, message):
    model = tiny.model()
    probe = LinearProbe(**{"train": labelled(6, 0), "val": labelled(4, 0), **arguments})
    with pytest.raises(ValueError, match=message):
        fit(model, probe)
    assert int(model.step) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_every": 0}, "`train_every`"),
        ({"train": iter([])}, "`train`.*generator only once"),
        ({"feature": "patches"}, "`feature`"),
    ],
)
def test_linear_probe_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearProbe(**{"train": labelled(4, 0), "val": labelled(4, 0), **arguments})
