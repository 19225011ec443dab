import keras
import numpy as np
import pytest
from PIL import Image

from keras_dinov3.curves import read_history, training_curves

LOGS = {
    "loss": [3.0, 2.0, 1.5],
    "ibot_loss": [2.0, 1.0, 0.5],
    "knn": [float("nan"), 0.25, 0.5],
    "learning_rate": [0.1, 0.1, 0.1],
}


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


EXPECTED_LOSSES = {
    "loss": [[1, 3.0], [2, 2.0], [3, 1.5]],
    "ibot_loss": [[1, 2.0], [2, 1.0], [3, 0.5]],
}


def history_of(kind, tmp_path):
    if kind == "dict":
        return LOGS
    if kind == "History":
        history = keras.callbacks.History()
        history.history, history.epoch = LOGS, [0, 1, 2]
        return history
    path = tmp_path / "log.csv"
    rows = ["epoch,ibot_loss,knn,learning_rate,loss"]
    rows += ["0,2.0,NA,0.1,3.0", "1,1.0,0.25,0.1,2.0", "2,0.5,0.5,0.1,1.5"]
    path.write_text("\n".join(rows) + "\n")
    return str(path) if kind == "str" else path


@pytest.mark.parametrize("kind", ["dict", "History", "str", "Path"])
def test_training_curves(tmp_path, kind):
    path = tmp_path / "curves.png"
    figure = training_curves(history_of(kind, tmp_path), path, {"raw pixels": 0.4})
    losses, accuracy = figure.axes  # the rate is no curve of its own
    assert lines(losses) == EXPECTED_LOSSES
    assert lines(accuracy)["knn"] == [[2, 25.0], [3, 50.0]]
    assert lines(accuracy)["raw pixels"] == [[0, 40.0], [1, 40.0]]  # across the panel
    with Image.open(path) as picture:
        assert min(picture.size) > 100


def test_training_curves_of_keras_callbacks(tmp_path):
    """`fit` itself writes the file; a resumed run starts at its own epoch."""
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    path = tmp_path / "log.csv"
    x = np.ones((4, 2))
    history = model.fit(
        x,
        x[:, :1],
        epochs=5,
        initial_epoch=3,
        verbose=0,
        callbacks=[keras.callbacks.CSVLogger(path)],
    )
    expected = [[4.0, history.history["loss"][0]], [5.0, history.history["loss"][1]]]
    for source in (history, path):
        (losses,) = training_curves(source).axes  # no k-NN, one panel
        np.testing.assert_allclose(lines(losses)["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "history, message",
    [
        ({"accuracy": [1.0]}, r"must hold a loss.*\['accuracy'\]"),
        ({}, "must hold a loss"),
        ({"loss": [1.0, 2.0], "knn": [0.5]}, "every epoch.*'loss': 2, 'knn': 1"),
    ],
)
def test_training_curves_errors(history, message):
    with pytest.raises(ValueError, match=message):
        training_curves(history)


def test_what_the_monitors_log_has_its_panels(tmp_path):
    logs = {"loss": [1.0, 2.0], "linear_probe": [0.1, 0.2], "linear_probe_loss": [3.0, 1.0]}
    logs |= {"rankme": [5.0, 6.0], "lidar": [2.0, 3.0], "target_entropy": [1.0, 0.5]}
    logs |= {"feature_std": [0.9, 0.8], "teacher_temperature": [0.1, 0.1]}
    panels = {axes.get_title(): lines(axes) for axes in training_curves(logs).axes if axes.lines}
    assert {title: set(drawn) for title, drawn in panels.items()} == {
        "Loss and its terms": {"loss"},
        "Accuracy (%)": {"linear_probe"},
        "Effective rank": {"rankme", "lidar"},
        "Targets (nats)": {"target_entropy"},
        "Agreement and spread": {"feature_std"},
    }
    assert panels["Accuracy (%)"]["linear_probe"] == [[1, 10.0], [2, 20.0]]


def test_a_file_that_was_cut_off_or_resumed(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("epoch,knn,loss\n0,0.1,3.0\n1,0.2,2.0\n1,0.3,1.5\n2,0.")
    epochs, series = read_history(path)
    assert epochs.tolist() == [1, 2]
    assert series["loss"].tolist() == [3.0, 1.5] and series["knn"].tolist() == [0.1, 0.3]
