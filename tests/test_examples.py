"""The scripts in `examples/`, cut short and run as a user runs them."""

import csv
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image

import keras_dinov3 as kd

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
TINY = {
    "--image-size": 24,
    "--crop-size": 16,
    "--local-crop-size": 8,
    "--batch-size": 8,
    "--epochs": 3,
    "--prototypes": 12,
    "--width": 24,
    "--depth": 1,
    "--heads": 2,
}


def write_image(path, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (30, 26, 3), dtype="uint8")).save(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """42 images in two classes, and two files that are no images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in {"cat": 22, "dog": 20}.items():
        for index in range(count):
            write_image(folder / name / f"{index}.png", rng)
        (folder / name / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return folder


def command(*arguments, **options):
    options = {**TINY, **{f"--{k.replace('_', '-')}": v for k, v in options.items()}}
    flat = [str(part) for pair in options.items() for part in pair]
    return [str(EXAMPLES / "pretrain_folder.py"), *flat, *arguments]


def start(arguments):
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def run(arguments):
    process = start(arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def read_log(folder):
    """By epoch; one that was cut off between the log and the checkpoint is there twice."""
    log = {}
    with open(folder / "log.csv", newline="") as file:
        for row in csv.DictReader(file):  # Keras adds a `val_` column for each, without values
            row = {name: float(text) for name, text in row.items() if text != "NA"}
            log[int(row["epoch"])] = row
    return log


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(command(images=images, output=folder))


def test_pretrain_folder_prints_and_writes_its_results(finished):
    folder, output = finished
    assert "42 images" in output and "2 unreadable" in output
    for name in ("raw pixels", "before training", "after training"):
        percent = re.search(rf"k-NN.* {name}: ([\d.]+)%", output)
        assert 0 <= float(percent[1]) <= 100
    log = read_log(folder)
    assert list(log) == [0, 1, 2]
    for row in log.values():
        assert {"knn", "loss", "dino_global_loss", "dino_local_loss", "ibot_loss"} <= row.keys()
        assert np.isfinite(list(row.values())).all()
    for name in ("curves.png", "patch_pca.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100


def test_pretrain_folder_exports_the_teacher_as_a_preset(finished):
    folder, _ = finished
    backbone = keras_hub.models.DINOV3Backbone.from_preset(str(folder / "backbone"))
    model = keras.saving.load_model(folder / "checkpoint.keras")
    assert int(model.step) == 3 * (38 // 8)  # 42 images, of which 4 are held out
    pixels = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(kd.encode(model.teacher, pixels).cls)
    features = keras.ops.convert_to_numpy(backbone(pixels))[:, 0]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert np.abs(features - keras.ops.convert_to_numpy(model.student(pixels))[:, 0]).max() > 1e-4


def test_pretrain_folder_resumes_as_if_never_killed(finished, images, tmp_path):
    arguments = command(images=images, output=tmp_path / "run")
    process = start(arguments)
    for line in process.stdout:
        if "Epoch 2/3" in line:
            break
    process.kill()
    process.communicate()
    assert 2 not in read_log(tmp_path / "run")
    output = run([*arguments, "--resume"])
    assert "Epoch 1/3" not in output and "Epoch 3/3" in output
    assert "before training" not in output and "after resuming" in output
    resumed, expected = read_log(tmp_path / "run"), read_log(finished[0])
    assert resumed.keys() == expected.keys()
    for epoch, row in expected.items():
        for name, value in row.items():
            assert resumed[epoch][name] == pytest.approx(value, rel=1e-5, abs=1e-5), (epoch, name)


def test_demo(tmp_path):
    """The demo on few images; it raises if the preset that it writes gives other features."""
    output = run(
        [str(EXAMPLES / "demo_digits.py")] + f"--epochs 1 --digits 40 --output {tmp_path}".split()
    )
    for name in ("raw pixels", "untrained backbone", "trained teacher"):
        assert 0 <= float(re.search(rf"{name} +([\d.]+)%", output)[1]) <= 100
    for name in ("curves.png", "patch_pca.png", "crops.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    assert (tmp_path / "backbone" / "config.json").exists()


def script():
    spec = importlib.util.spec_from_file_location("script", EXAMPLES / "pretrain_folder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "options, message",
    [
        ({"images": "missing"}, "existing folder"),
        ({"images": "empty"}, "No readable image"),
        ({"image_size": 30}, "`image_size`.*Nearest to 30: 24, 32"),
        ({"crop_size": 20}, "`global_crop_size`.*Nearest to 20: 16, 24"),
        ({"width": 20}, "multiple of 4"),
        ({"batch_size": 64}, "at least one batch"),
        ({"test": "other"}, "class subfolders"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"heads": 0}, "--heads must be at least 1"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"learning_rate": "nan"}, "--learning-rate must be above 0"),
    ],
)
def test_pretrain_folder_explains_wrong_input(
    options, message, images, tmp_path, monkeypatch, capsys
):
    (tmp_path / "empty").mkdir()
    for name in ("cat", "horse"):
        write_image(tmp_path / "other" / name / "0.png", np.random.default_rng(0))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", command(**{"images": images, "output": "run", **options}))
    with pytest.raises(SystemExit):
        script().main()
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_pretrain_folder_takes_images_without_classes(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", command(images=images / "cat", output=tmp_path / "run", epochs=1)
    )
    script().main()
    assert "k-NN" not in capsys.readouterr().out
    assert (tmp_path / "run" / "patch_pca.png").exists()
    assert "knn" not in read_log(tmp_path / "run")[0]


def test_pretrain_folder_neither_overwrites_nor_mixes_runs(
    finished, images, tmp_path, monkeypatch, capsys
):
    folder, _ = finished
    for arguments, options, message in (
        ([], {"output": folder}, "holds a run"),
        (["--resume"], {"output": folder}, "has had its 3 epochs"),
        (["--resume"], {"output": folder, "width": 16}, r"Changed: \['--width'\]"),
        (["--resume"], {"output": tmp_path}, "no checkpoint"),
    ):
        monkeypatch.setattr(sys, "argv", command(*arguments, images=images, **options))
        with pytest.raises(SystemExit):
            script().main()
        assert re.search(message, capsys.readouterr().err), message
    assert json.loads((folder / "settings.json").read_text())["width"] == 24


def test_pretrain_folder_exports_a_run_that_was_killed_at_its_end(
    finished, images, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "backbone")
    monkeypatch.setattr(sys, "argv", command("--resume", images=images, output=folder))
    script().main()
    first, second = (
        keras_hub.models.DINOV3Backbone.from_preset(str(path / "backbone")).get_weights()
        for path in (finished[0], folder)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
