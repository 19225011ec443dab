"""`keras-dinov3 evaluate`; the other commands have their own files."""

import json
import re

import keras
import numpy as np
import pytest
import tiny
from PIL import Image

import keras_dinov3 as kd
from keras_dinov3 import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Red and blue images of two classes on each side, and a preset."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    for side, count in (("train", 14), ("test", 6)):
        for label, channel in (("blue", 2), ("red", 0)):
            (folder / side / label).mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 90, (36, 30, 3), dtype="uint8")
                image[..., channel] += 150
                Image.fromarray(image).save(folder / side / label / f"{index}.png")
    (folder / "other" / "green").mkdir(parents=True)
    Image.fromarray(image).save(folder / "other" / "green" / "0.png")
    keras.utils.set_random_seed(0)
    tiny.backbone().save_to_preset(str(folder / "preset"))
    return folder


def command(folder, *flags, **options):
    options = {"backbone": "preset", "train": "train", "test": "test", **options}
    pairs = [(f"--{name}", str(folder / value)) for name, value in options.items()]
    return ["evaluate", *(part for pair in pairs for part in pair), *flags]


def test_evaluate_prints_a_table_and_writes_json(folder, tmp_path, capsys):
    path = tmp_path / "results.json"
    flags = ["--k", "1", "3", "--few", "2", "--feature", "mean_patch", "--layers", "2"]
    assert cli.main(command(folder, *flags, "--output", str(path))) == 0
    output = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["images"] == {"train": 28, "test": 12} and found["classes"] == 2
    assert found["width"] == 64 and found["image_size"] == list(tiny.GLOBAL)
    for name, value in (
        ("k-NN, k = 1", found["knn"]["1"]),
        ("k-NN, k = 3", found["knn"]["3"]),
        ("linear probe, learning_rate = .*", found["linear_probe"]["accuracy"]),
        ("logistic regression, C = .*", found["logistic_regression"]["accuracy"]),
        ("2 per class, std .*", found["few_shot"]["2"]["mean"]),
        ("retrieval, map", found["retrieval"]["map"]),
    ):
        printed = re.search(rf"^  {name} +([\d.]+)$", output, re.MULTILINE)
        assert float(printed[1]) == pytest.approx(100 * value, abs=0.006), name
    assert found["logistic_regression"]["accuracy"] > 0.9  # colour is easy
    data = [
        kd.data.image_folder(
            folder / side, tiny.GLOBAL, 9, labels="folders", shuffle=False, drop_remainder=False
        )
        for side in ("train", "test")
    ]
    backbone = kd.convert.keras_hub.models.Backbone.from_preset(str(folder / "preset"))
    sides = (
        kd.evaluation.extract_features(backbone, side, feature="mean_patch", layers=2)
        for side in data
    )
    assert found["knn"]["3"] == kd.evaluation.knn_accuracy(*(x for s in sides for x in s), k=3)


def test_evaluate_knows_how_a_run_normalised_its_images(folder, tmp_path, capsys):
    run = tmp_path / "run"
    augmentation = {"mean": [0.3, 0.4, 0.5], "std": [0.1, 0.2, 0.3]}
    (folder / "preset").rename(folder / "moved")
    try:
        run.mkdir()
        (run / "backbone").symlink_to(folder / "moved")
        (run / "settings.json").write_text(
            json.dumps({"recipe": {"settings": {"augmentation": augmentation}}})
        )
        flags = ["--few", "1", "--output", str(tmp_path / "r.json"), "--std", "0.2"]
        assert cli.main(command(folder, *flags, backbone=run)) == 0
    finally:
        (folder / "moved").rename(folder / "preset")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["mean"] == [0.3, 0.4, 0.5] and found["std"] == 0.2
    assert "mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, flags, message",
    [
        ({"test": "other"}, [], "same classes.*blue, green, red"),
        ({"test": "nothing"}, [], "existing folder"),
        ({"backbone": "train"}, [], "train"),
        ({}, ["--output", "exists.json"], "is not overwritten"),
        ({}, ["--k", "99"], "from 1 to the number"),
        ({}, ["--image-size", "30"], "`image_size`"),
    ],
)
def test_evaluate_explains_wrong_input(
    options, flags, message, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists.json").write_text("{}")
    assert cli.main(command(folder, *flags, **options)) == 2
    assert re.search(message, capsys.readouterr().err)
