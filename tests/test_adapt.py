"""`keras-dinov3 adapt`, from a run or preset to a backbone that knows larger crops."""

import csv
import json
import re

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image

from keras_dinov3 import adapt, cli, pretrain, recipes

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
SIZES = "24:16:32,32:8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 images in two classes, a run that a backbone comes from, and the backbone alone."""
    folder, rng = tmp_path_factory.mktemp("adapt"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(18):
            image = rng.integers(0, 256, (40, 36, 3), dtype="uint8")
            Image.fromarray(image).save(folder / "images" / name / f"{index}.png")
    recipe = recipes.get("tiny").changed(
        backbone={"num_layers": 1, "hidden_dim": 24, "intermediate_dim": 32, "patch_size": 8},
        augmentation={"global_crop_size": 16, "local_crop_size": 8, "num_local_crops": 1},
        model={"num_prototypes": 12, "head_hidden_dim": 16, "head_bottleneck_dim": 8},
        optimizer={"weight_decay": {"peak": 0.04, "end": 0.2}},
        gram={"weight": 1.0},  # which the adapted backbone's own anchor replaces
    )
    recipe = recipe.changed(augmentation={"mean": MEAN, "std": STD}).suggest(32, 8, 3, 24)
    model = recipe.build(seed=1)
    rng = np.random.default_rng(2)
    for _, teacher in model.student_and_teacher:  # as if it had been trained
        weights = [w + rng.normal(0, 0.02, w.shape) for w in teacher.get_weights()]
        teacher.set_weights(weights)
    run = folder / "run"
    run.mkdir()
    model.save(run / "checkpoint.keras")
    model.export_backbone().save_to_preset(str(run / "backbone"))
    (run / "settings.json").write_text(json.dumps({"recipe": recipe.get_config()}))
    return folder


@pytest.fixture
def command(folder):
    def command(*flags, **options):
        options = {
            "backbone": folder / "run",
            "images": folder / "images",
            "sizes": SIZES,
            "batch_size": 8,
            "epochs": 2,
            "seed": 4,
            **options,
        }
        pairs = [
            (f"--{name.replace('_', '-')}", str(value))
            for name, value in options.items()
            if value is not None
        ]
        return ["adapt", *(part for pair in pairs for part in pair), *flags]

    return command


def resuming(output, **options):
    return {
        **dict.fromkeys(("backbone", "images", "sizes", "batch_size", "epochs", "seed")),
        "output": output,
        **options,
    }


def plan(folder, backbone="run", sizes=SIZES, **options):
    source = pretrain.Source(folder / "images")
    return adapt.plan_adaptation(source, folder / backbone, adapt.parse_sizes(sizes), **options)


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v not in ("", "NA")} for row in rows]


def same(module, other):
    pairs = zip(module.get_weights(), other.get_weights(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_runs_settings_go_on(folder):
    found = plan(folder)
    assert found.plan == {"num_images": 32, "batch_size": 8, "epochs": 10, "image_size": [32, 32]}
    settings = found.settings
    assert settings["model"]["num_prototypes"] == 12
    assert settings["optimizer"]["weight_decay"] == 0.2  # where its schedule ended
    assert settings["optimizer"]["freeze_last_layer_steps"] == 0
    fresh = recipes.get("tiny").suggest(32, 8, 10, 32).settings
    for name in ("peak", "end"):
        rate = fresh["optimizer"]["learning_rate"][name]
        assert settings["optimizer"]["learning_rate"][name] == pytest.approx(rate / 10, rel=1e-3)
    assert settings["teacher"]["momentum"]["peak"] > fresh["teacher"]["momentum"]["peak"]
    # The run's heads go on, so that they are treated as the backbone is.
    assert settings["optimizer"]["freeze_backbone_steps"] == 0
    assert settings["optimizer"]["head_multiplier"] == 1.0
    assert settings["augmentation"]["mean"] == MEAN
    assert not {"global_crop_size", "local_crop_size"} & settings["augmentation"].keys()
    assert (found.sizes, found.probabilities) == ([[24, 16, 32], [32, 8]], None)
    other = plan(folder, learning_rate=0.5, image_size=(40, 48), epochs=3, has_test=True)
    rate = {"peak": 0.5, "warmup": 0.1, "end": 0.005}
    assert other.settings["optimizer"]["learning_rate"] == rate
    assert other.plan["image_size"] == [40, 48] and other.plan["num_images"] == 36
    # Settings that are suggested again, for the images that can be read, stay what they are.
    assert found.suggest(**found.plan) == found
    assert adapt.Adaptation.from_config(json.loads(json.dumps(found.get_config()))) == found


def test_the_model_begins_with_the_runs_teacher(folder):
    found = plan(folder, probabilities=[0.75, 0.25], gram_weight=3.0)
    model = found.build(seed=4)
    trained = keras.saving.load_model(folder / "run" / "checkpoint.keras")
    for sides, (_, teacher) in zip(
        model.student_and_teacher, trained.student_and_teacher, strict=True
    ):
        assert same(sides[0], teacher) and same(sides[1], teacher)
    assert same(model.gram.backbone, trained.teacher)
    assert model.gram.weight == 3.0 and not any(w.trainable for w in model.gram.backbone.weights)
    layer = model.augmentation
    assert layer.crop_sizes == [((24, 24), (16, 16), (32, 32)), ((32, 32), (8, 8), None)]
    assert (layer.probabilities, layer.mean) == ([0.75, 0.25], MEAN)
    assert plan(folder, sizes="24:16", gram_weight=0).build(seed=4).gram is None


def test_a_presets_heads_begin_anew(folder):
    found = plan(folder, "run/backbone", dtype="mixed_bfloat16")
    assert found.checkpoint is None and found.settings["optimizer"]["weight_decay"] == 0.04
    assert found.settings["backbone"] == {
        "preset": str((folder / "run" / "backbone").resolve()),
        "patch_size": 8,
        "hidden_dim": 24,
        "dtype": "mixed_bfloat16",
    }
    assert found.settings["optimizer"]["freeze_backbone_steps"] == 4
    small = {"head_hidden_dim": 16, "head_bottleneck_dim": 8}
    model = found.changed(model=small).build(seed=4)
    trained = keras_hub.models.Backbone.from_preset(str(folder / "run" / "backbone"))
    assert same(model.student, trained) and same(model.teacher, trained)
    assert same(model.gram.backbone, trained)
    assert model.gram.backbone.dtype_policy.name == "mixed_bfloat16"
    assert model.student_dino_head.num_prototypes == 64


def test_other_families_and_backbones_without_a_mask_token(folder, tmp_path):
    """Learned positions stay those of the preset; `encode` resizes them."""
    config = {"patch_size": 8, "num_layers": 1, "hidden_dim": 24, "num_heads": 2}
    vit = keras_hub.models.ViTBackbone(image_shape=(16, 16, 3), mlp_dim=32, **config)
    vit.save_to_preset(str(tmp_path / "vit"))
    found = plan(folder, tmp_path / "vit").changed(model={"head_hidden_dim": 16})
    model = found.build(seed=4)
    assert tuple(model.student.image_shape) == (16, 16, 3) and same(model.student, vit)
    unmasked = keras_hub.models.DINOV3Backbone(
        intermediate_dim=32, use_mask_token=False, image_shape=(16, 16, 3), **config
    )
    unmasked.save_to_preset(str(tmp_path / "unmasked"))
    model = plan(folder, tmp_path / "unmasked").changed(model={"head_hidden_dim": 16}).build()
    assert model.student.use_mask_token and model.masking is not None


@pytest.fixture(scope="module")
def finished(folder):
    """A whole run; its settings and log."""
    output = folder / "finished"
    arguments = ["adapt", "--backbone", folder / "run", "--images", folder / "images"]
    arguments += ["--sizes", SIZES, "--batch-size", 8, "--epochs", 2, "--seed", 4]
    assert cli.main([*map(str, arguments), "--output", str(output)]) == 0
    return output


def test_the_command_writes_a_run(finished, folder):
    settings = json.loads((finished / "settings.json").read_text())
    assert settings["command"].startswith("keras-dinov3 adapt --backbone")
    assert settings["recipe"]["sizes"] == [[24, 16, 32], [32, 8]]
    assert settings["recipe"]["settings"]["augmentation"]["std"] == STD
    log = read_log(finished)
    assert len(log) == 2
    for row in log:
        assert {"loss", "knn", "rankme", "gram_loss", "dino_local_loss"} <= row.keys()
        assert np.isfinite(list(row.values())).all() and row["gram_loss"] > 0
    assert {"report.html", "pictures", "checkpoint.keras"} <= {p.name for p in finished.iterdir()}
    model = keras.saving.load_model(finished / "checkpoint.keras")
    assert int(model.step) == 8 and len(model.augmentation.crop_sizes) == 2
    before, after = (
        keras_hub.models.DINOV3Backbone.from_preset(str(run / "backbone"))
        for run in (folder / "run", finished)
    )
    assert same(model.gram.backbone, before) and same(model.teacher, after)
    assert not same(after, before) and tuple(after.image_shape) == (32, 32, 3)


def test_a_finished_run_is_known_to_be(finished, command, capsys):
    for arguments, message in (
        (command("--resume", **resuming(finished)), "has had its 2 epochs"),
        (["pretrain", "--resume", "--output", str(finished)], "has had its 2 epochs"),
        (command("--resume", **resuming(finished, sizes=SIZES)), "keeps its settings.*--sizes"),
        (command("--resume", **resuming(None)), "needs `--output`"),
        (command(output=finished), "holds a run"),
    ):
        assert cli.main(arguments) == 2
        assert re.search(message, capsys.readouterr().err), message


def test_an_interrupted_run_goes_on(finished, command, tmp_path, monkeypatch, capsys):
    whole, on_epoch_end = pretrain.Checkpoint, pretrain.Checkpoint.on_epoch_end

    class Cut(whole):
        def on_epoch_end(self, epoch, logs=None):
            on_epoch_end(self, epoch, logs)
            raise ValueError("cut off")

    monkeypatch.setattr(pretrain, "Checkpoint", Cut)
    assert cli.main(command(output=tmp_path / "run")) == 2
    monkeypatch.setattr(pretrain, "Checkpoint", whole)
    assert len(read_log(tmp_path / "run")) == 1
    assert "cut off" in capsys.readouterr().err
    assert cli.main(command("--resume", **resuming(tmp_path / "run"))) == 0
    output = capsys.readouterr().out
    assert "Epoch 2/2" in output and "Epoch 1/2" not in output
    found, expected = read_log(tmp_path / "run"), read_log(finished)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            if name != "patch_drift":  # from a copy taken anew
                assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_dry_run_prints_and_writes_nothing(command, tmp_path, capsys):
    arguments = command("--dry-run", output=tmp_path / "run", probabilities="3,1")
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    for line in (
        r"sizes +\[\[24, 16, 32\], \[32, 8\]\]",
        r"probabilities +\[3.0, 1.0\]",
        r"gram_weight +2.0",
        r"num_images +32",
        "0.0001 at 128 images",
    ):
        assert re.search(line, output), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backbone": None}, "`--backbone` is needed"),
        ({"sizes": None}, "`--sizes` is needed"),
        ({"images": None}, "`--images` is needed"),
        ({"output": None}, "`--output` is needed"),
        ({"sizes": "24"}, "`--sizes` must be pixels.*'24'"),
        ({"sizes": "24:x"}, "`--sizes` must be pixels"),
        ({"sizes": "24:16:32:48"}, "`--sizes` must be pixels"),
        ({"sizes": "24:16,28:16"}, "`global crops` must be.*28"),
        ({"sizes": "24:16:36"}, "`gram crops` must be.*36"),
        ({"sizes": "24:16:32", "gram_weight": 0}, "Gram teacher of its own"),
        ({"gram_weight": -1}, "`weight`"),
        ({"probabilities": "1"}, "`probabilities` must be 2"),
        ({"probabilities": "a,b"}, "`--probabilities` must be numbers"),
        ({"image_size": 30}, "`image_size` must be a multiple"),
        ({"images": "missing"}, "existing folder"),
        ({"backbone": "missing"}, "missing"),
        ({"dtype": "float31"}, "float31"),
    ],
)
def test_wrong_input_is_explained(options, message, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(**{"output": "run", **options})) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
