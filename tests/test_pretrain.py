"""`keras-dinov3 pretrain`, from a folder of images to a backbone, as a user runs it."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image

import keras_dinov3 as kd
from keras_dinov3 import cli, pretrain, recipes

ROOT = pathlib.Path(__file__).parents[1]
EPOCHS, BATCH_SIZE = 3, 8


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


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """A recipe for images of 24 pixels that trains in a moment."""
    recipe = recipes.get("tiny").changed(
        backbone={"num_layers": 1, "hidden_dim": 24, "intermediate_dim": 32, "patch_size": 8},
        augmentation={"global_crop_size": 16, "local_crop_size": 8, "num_local_crops": 1},
        model={"num_prototypes": 12, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
    )
    path = tmp_path_factory.mktemp("recipe") / "mine.json"
    path.write_text(json.dumps(recipe.get_config()))
    return path


@pytest.fixture
def command(images, recipe_file):
    def command(*flags, **options):
        options = {
            "images": images,
            "recipe": recipe_file,
            "image_size": 24,
            "batch_size": BATCH_SIZE,
            "epochs": EPOCHS,
            **options,
        }
        pairs = [
            (f"--{name.replace('_', '-')}", str(value))
            for name, value in options.items()
            if value is not None
        ]
        return ["pretrain", *(part for pair in pairs for part in pair), *flags]

    return command


def resuming(output, **options):
    fixed = dict.fromkeys(("images", "recipe", "image_size", "batch_size", "epochs"))
    return {**fixed, "output": output, **options}


def run(arguments, capsys):
    assert cli.main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def read_log(folder):
    """By epoch; one that was cut off between the log and the checkpoint is there twice."""
    log = {}
    with open(folder / "log.csv", newline="") as file:
        for row in csv.DictReader(file):  # Keras adds a `val_` column for each, without values
            row = {name: float(text) for name, text in row.items() if text not in ("NA", "")}
            log[int(row["epoch"])] = row
    return log


@pytest.fixture(scope="module")
def finished(images, recipe_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    recipe = recipes.get(str(recipe_file))
    recipe = pretrain.plan_run(pretrain.Source(images), recipe, BATCH_SIZE, EPOCHS, 24)
    found = pretrain.pretrain(images, folder, recipe, seed=5, command="the command", verbose=0)
    return folder, found


def test_a_run_says_and_writes_its_results(finished, images):
    folder, found = finished
    assert found["images"] == 38 and found["unreadable"] == 2  # 4 of 42 are held out
    assert 0 <= found["raw_pixels"] <= 1
    assert [epoch for epoch, _ in found["knn"]] == [0, 1, 2, 3]
    log = read_log(folder)
    assert list(log) == [0, 1, 2]
    names = ("loss", "knn", "rankme", "dino_global_loss", "target_entropy", "learning_rate")
    for row in log.values():
        assert {*names, "dino_local_loss", "ibot_loss", "koleo_loss"} <= row.keys()
        assert np.isfinite(list(row.values())).all()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["command"] == "the command" and settings["seed"] == 5
    assert settings["unreadable"] == 2
    assert settings["environment"]["backend"] == keras.config.backend()
    assert settings["environment"]["keras"] == keras.__version__
    recipe = recipes.Recipe.from_config(settings["recipe"])
    assert recipe.plan == {
        "num_images": 38,
        "batch_size": BATCH_SIZE,
        "epochs": EPOCHS,
        "image_size": [24, 24],
    }
    data = kd.data.image_folder(images, 24, 1, labels="folders", verbose=0)
    pixels = np.concatenate([image for image, _ in data.split(0.1, seed=5)[0]]) / 255
    for name in ("mean", "std"):
        expected = getattr(np, name)(pixels, axis=(0, 1, 2))
        assert recipe.settings["augmentation"][name] == pytest.approx(expected, abs=1e-4)


def test_a_run_draws_pictures_and_its_page(finished):
    folder, _ = finished
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert "crops.png" in names
    assert {f"{k}_{e:06d}.png" for k in ("patch_pca", "attention") for e in range(4)} < names
    page = (folder / "report.html").read_text()
    assert "the command" in page and "data:image/webp" in page


def test_a_run_exports_the_teacher_as_a_preset(finished):
    folder, _ = finished
    backbone = keras_hub.models.DINOV3Backbone.from_preset(str(folder / "backbone"))
    model = keras.saving.load_model(folder / "checkpoint.keras")
    assert int(model.step) == EPOCHS * (38 // BATCH_SIZE)
    pixels = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(kd.encode(model.teacher, pixels).cls)
    features = keras.ops.convert_to_numpy(backbone(pixels))[:, 0]
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert np.abs(features - keras.ops.convert_to_numpy(model.student(pixels))[:, 0]).max() > 1e-4


def test_the_command_trains_and_repeats_a_run(finished, command, tmp_path, capsys):
    """By the recipe in another run's settings, with the same seed: the same numbers."""
    folder, _ = finished
    options = resuming(tmp_path / "run", recipe=folder / "settings.json", seed=5)
    output = run(command(**{**options, "images": command()[2]}), capsys)
    for name in ("raw pixels", "after 0 epochs", "after 3 epochs"):
        assert re.search(rf"k-NN.* {name}: [\d.]+%", output), output
    assert "38 images, 2 unreadable" in output and "num_prototypes" in output
    again, expected = read_log(tmp_path / "run"), read_log(folder)
    for epoch, row in expected.items():
        for name, value in row.items():
            assert again[epoch][name] == pytest.approx(value, rel=1e-4, abs=1e-4), (epoch, name)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["command"].startswith("keras-dinov3 pretrain --images")


def test_a_killed_run_goes_on_as_if_it_had_not_been(finished, command, tmp_path, capsys):
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    arguments = command(output=tmp_path / "run", seed=5)
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_dinov3.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    for line in process.stdout:
        if "Epoch 2/3" in line:
            break
    process.kill()
    process.communicate()
    assert 2 not in read_log(tmp_path / "run")
    output = run(command("--resume", **resuming(tmp_path / "run")), capsys)
    assert "Epoch 1/3" not in output and "Epoch 3/3" in output
    resumed, expected = read_log(tmp_path / "run"), read_log(finished[0])
    assert resumed.keys() == expected.keys()
    for epoch, row in expected.items():
        for name, value in row.items():
            if name != "patch_drift":  # from a copy taken anew
                close = pytest.approx(value, rel=1e-4, abs=1e-4)
                assert resumed[epoch][name] == close, (epoch, name)


def test_a_run_killed_at_its_end_is_exported(finished, command, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    shutil.rmtree(folder / "backbone")
    run(command("--resume", **resuming(folder)), capsys)
    first, second = (
        keras_hub.models.DINOV3Backbone.from_preset(str(path / "backbone")).get_weights()
        for path in (finished[0], folder)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tar_file_without_classes_in_bfloat16(images, command, tmp_path, capsys):
    with tarfile.open(tmp_path / "cats.tar", "w") as tar:
        tar.add(images / "cat", "cat")
    options = {"images": tmp_path / "cats.tar", "epochs": 1, "dtype": "mixed_bfloat16"}
    output = run(command(output=tmp_path / "run", **options), capsys)
    assert "k-NN" not in output and "22 images" in output
    assert "knn" not in read_log(tmp_path / "run")[0]
    model = keras.saving.load_model(tmp_path / "run" / "checkpoint.keras")
    assert model.student.dtype_policy.name == "mixed_bfloat16"


def test_test_images_leave_all_others_to_training(images, command, tmp_path, capsys):
    rng = np.random.default_rng(3)
    for name in ("cat", "dog"):
        for index in range(3):
            write_image(tmp_path / "test" / name / f"{index}.png", rng)
    output = run(command(output=tmp_path / "run", test=tmp_path / "test", epochs=1), capsys)
    assert "42 images" in output and "k-NN after 1 epochs" in output


def test_a_dry_run_prints_and_writes_nothing(command, tmp_path, capsys):
    output = run(command("--dry-run", output=tmp_path / "run"), capsys)
    assert "num_prototypes" in output and "updates" in output
    assert "num_images               40" in output  # 44 files, a tenth held out
    text = run(command("--dry-run", "--json"), capsys)
    recipe = recipes.Recipe.from_config(json.loads(text))
    assert recipe.plan["image_size"] == [24, 24] and recipe.plan["epochs"] == EPOCHS
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_given_comes_from_the_images_and_the_recipe(images):
    source = pretrain.Source(images)
    recipe = pretrain.plan_run(source, recipes.get("tiny"))
    assert recipe.plan["image_size"] == [24, 24]  # 26 pixels wide, in eights
    assert (recipe.plan["batch_size"], recipe.plan["epochs"]) == (10, 100)
    planned = recipes.get("tiny").suggest(40, batch_size=5, epochs=7, image_size=32)
    assert pretrain.plan_run(source, planned).plan == planned.plan
    assert pretrain.plan_run(source, planned, epochs=2).plan == {**planned.plan, "epochs": 2}
    assert pretrain.plan_run(source, planned, has_test=True).plan["num_images"] == 44


def test_a_backbone_goes_on_under_a_guard(finished, command, tmp_path, capsys):
    """One look before and one after: what is far from the start is warned of, and put back."""
    folder = finished[0]
    options = {"recipe": None, "backbone": folder, "epochs": 1}
    output = run(command("--dry-run", **options), capsys)
    for text in ("freeze_backbone_steps", "[gram]", "[preserve]", "head_multiplier"):
        assert text in output
    output = run(command(**options, output=tmp_path / "run", seed=1), capsys)
    log = read_log(tmp_path / "run")[0]
    assert "guard_knn" in log and (tmp_path / "run" / "guard.npz").is_file()
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["guard"] == "restore"
    kept = json.loads((folder / "settings.json").read_text())["recipe"]["settings"]
    new = settings["recipe"]["settings"]
    assert new["augmentation"]["mean"] == kept["augmentation"]["mean"]
    assert new["backbone"]["preset"] == str((folder / "backbone").resolve())
    with open(tmp_path / "run" / "alarms.jsonl", "a") as file:
        file.write(json.dumps({"kind": "unlearns", "message": "k-NN fell"}) + "\n")
    assert cli.main(["pretrain", "--resume", "--output", str(tmp_path / "run")]) == 2
    assert "The guard has ended the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"images": "missing"}, "existing folder"),
        ({"images": "empty"}, "No readable image"),
        ({"image_size": 30}, "`image_size` must be a multiple.*30: 24, 32"),
        ({"batch_size": 64}, "at least one whole batch"),
        ({"test": "other"}, "class subfolders"),
        ({"epochs": -1}, "`epochs`.*at least 1"),
        ({"batch_size": 1}, "`batch_size`.*at least 2"),
        ({"recipe": "tniy"}, "Did you mean 'tiny'"),
        ({"recipe": "none.json"}, "none.json"),
        ({"dtype": "float31"}, "float31"),
        ({"images": None}, "`--images` is needed"),
        ({"recipe": "continue"}, "no `preset`.*give the command a `--backbone`"),
        ({"backbone": "missing"}, "`--backbone` has the recipe `continue`. Received: --recipe"),
        ({"guard": "stop"}, "Received: --guard stop without `--backbone`"),
        ({"output": None}, "`--output` is needed"),
    ],
)
def test_wrong_input_is_explained(options, message, command, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("cat", "horse"):
        write_image(tmp_path / "other" / name / "0.png", np.random.default_rng(0))
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(**{"output": "run", **options})) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_runs_are_neither_overwritten_nor_mixed(finished, images, command, tmp_path, capsys):
    folder, _ = finished
    for arguments, message in (
        (command(output=folder), "holds a run"),
        (command("--resume", **resuming(folder)), "has had its 3 epochs"),
        (command("--resume", **resuming(folder, epochs=9)), "keeps its settings.*--epochs"),
        (command("--resume", **resuming(tmp_path)), "no checkpoint"),
        (command("--resume", **resuming(None)), "needs `--output`"),
    ):
        assert cli.main(arguments) == 2
        assert re.search(message, capsys.readouterr().err), message
    assert list(tmp_path.iterdir()) == []
    unfinished = tmp_path / "run"
    shutil.copytree(folder, unfinished)
    shutil.rmtree(unfinished / "backbone")
    options = resuming(unfinished, images=images / "cat")
    assert cli.main(command("--resume", **options)) == 2
    assert "22 images, where there were 38" in capsys.readouterr().err
