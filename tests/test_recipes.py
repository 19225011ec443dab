import json

import keras
import keras_hub
import meta
import numpy as np
import pytest
import tiny
from golden import Golden, close, numpy
from keras import ops

import keras_dinov3 as kd
from keras_dinov3 import encoder, families, recipes

VARIANTS = ("local16", "local32", "nolocal")


def seed_method(total_steps, num_register_tokens=4, seed=None):
    recipe = recipes.get("seed_method")
    if num_register_tokens != 4:
        recipe = recipe.changed(extras={"num_register_tokens": num_register_tokens})
    return recipe.arguments(total_steps, seed)


def seed_model(golden):
    h = golden.hyperparameters
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(h["img"], h["img"], 3),
        patch_size=h["patch"],
        num_layers=h["depth"],
        num_heads=h["heads"],
        hidden_dim=h["dim"],
        mlp_dim=4 * h["dim"],
    )
    settings = seed_method(total_steps=10, num_register_tokens=h["regs"])
    assert settings["masking"].mask_ratio == h["mask_ratio"]
    model = kd.DINOv3(
        backbone,
        num_prototypes=h["Kc"],
        num_patch_prototypes=h["Kp"],
        head_hidden_dim=h["hid"],
        head_bottleneck_dim=h["bot"],
        augmentation=None,
        **{**settings, "masking": None},  # the case brings its mask
    )
    weights = {}
    for side in ("student", "teacher"):
        parts = {
            f"backbone.{side}": meta.vit_weights(
                getattr(model, side), getattr(model, f"{side}_extras")
            ),
            f"cls_head.{side}": meta.head_weights(getattr(model, f"{side}_dino_head")),
            f"patch_head.{side}": meta.head_weights(getattr(model, f"{side}_ibot_head")),
        }
        for part, names in parts.items():
            for name, weight in names.items():
                name = name.removeprefix("mlp.").replace("last_layer", "6")
                weights[f"{part}.{name}"] = weight
    weights["mask_token"] = meta.vector(model.student_extras.mask_token)
    meta.load(weights, golden.arrays, "weights/")
    return model, weights


def seed_crops(golden, variant):
    def images_first(keys):
        views = [golden[key].transpose(0, 2, 3, 1) for key in keys]
        return ops.convert_to_tensor(np.stack(views, axis=1))

    masks = golden["in/mask"].reshape(2, -1, golden["in/mask"].shape[-1])
    crops = {
        "global_crops": images_first(["in/global_view0", "in/global_view1"]),
        "masks": ops.convert_to_tensor(np.moveaxis(masks, 0, 1)),
    }
    if variant != "nolocal":
        crops["local_crops"] = images_first([f"in/{variant}/local_view{i}" for i in (0, 1)])
    return crops


def test_golden_seed_method_at_inference():
    """Features of images are the teacher's class tokens. The case gave it the first views."""
    golden = Golden("seed_method_forward")
    model, _ = seed_model(golden)
    x = ops.convert_to_tensor(golden["in/global_view0"].transpose(0, 2, 3, 1))
    tokens = kd.encode(model.teacher, x, extras=model.teacher_extras)
    golden.check(tokens.cls, "out/eval_images/embedding")


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_seed_method(variant):
    golden = Golden("seed_method_forward")
    model, weights = seed_model(golden)
    crops = seed_crops(golden, variant)

    def loss():
        total, _ = model.loss_and_terms(model(crops, training=True))
        return total

    names = golden.case["grad_norm_names"]
    total, gradients = meta.gradients_of(loss, weights, names)
    golden.check(total, f"out/{variant}/loss")
    norms = [np.linalg.norm(gradients[name].astype("float64")) for name in names]
    golden.check(np.array(norms), f"grad_norms/{variant}")
    prefix = f"grad/{variant}/"
    stored = [key for key in golden.keys() if key.startswith(prefix)]
    assert len(stored) >= 10
    for key in stored:
        golden.check(gradients[key.removeprefix(prefix)], key)

    outputs = model(crops, training=True)
    _, terms = model.loss_and_terms(outputs)
    golden.check(terms["ibot_loss"], f"out/{variant}/loss_patch")
    golden.check(terms["koleo_loss"], f"out/{variant}/loss_koleo")
    pairs = {"dino_global_loss": 2, "dino_local_loss": 4}
    pairs = {name: count for name, count in pairs.items() if name in terms}
    cls = sum(terms[name] * count for name, count in pairs.items()) / sum(pairs.values())
    golden.check(cls, f"out/{variant}/loss_cls")
    views = ops.reshape(ops.swapaxes(crops["global_crops"], 0, 1), (8, 32, 32, 3))
    tokens = kd.encode(model.teacher, views, extras=model.teacher_extras)
    golden.check(tokens.cls, f"out/{variant}/embedding")


def test_golden_seed_momentum():
    golden = Golden("seed_ema")
    total = golden.hyperparameters["total_epochs"]
    momentum = seed_method(total)["teacher_ema"].momentum
    coefficients = [float(momentum(step)) for step in range(total + 1)]
    golden.check(np.array(coefficients, "float32"), "coefficients")


def test_seed_method_has_the_registers_of_the_golden():
    settings = seed_method(total_steps=10)
    expected = Golden("seed_method_forward").hyperparameters["regs"]
    assert settings["extras"].num_register_tokens == expected == 4
    model = tiny.model(backbone=tiny.backbone(num_register_tokens=0), **settings)
    assert tuple(model.student_extras.register_tokens.shape) == (1, 4, 32)
    own = tiny.backbone(num_register_tokens=3)
    with pytest.raises(ValueError, match="has 3 of its own. Give `num_register_tokens=0`"):
        tiny.model(backbone=own, **settings)
    tiny.model(backbone=own, **seed_method(total_steps=10, num_register_tokens=0))


def test_golden_seed_positions_on_a_small_grid():
    golden = Golden("seed_method_forward")
    model, _ = seed_model(golden)
    positions = encoder.resize_positions(families.parts_of(model.student), (2, 2))
    golden.check(positions, "aux/pos_embed_student_resampled_small_grid")


def test_seed_method_trains_a_vit_and_saves_it(tmp_path):
    """With crops and masks of its own; what the Hub class lacks is saved with the model."""
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 24, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=48
    )
    settings = seed_method(total_steps=10, num_register_tokens=3, seed=1)
    model = tiny.model(backbone=backbone, **settings)
    before = [w.copy() for w in map(numpy, model.teacher_extras.weights)]
    logs = model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0).history
    assert np.isfinite(logs["loss"][0]) and int(model.step) == 2
    for old, new in zip(before, model.teacher_extras.weights, strict=True):
        assert not np.array_equal(old, numpy(new))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = ops.convert_to_tensor(tiny.images(2, *tiny.GLOBAL, dtype="float32"))
    ours, theirs = (kd.encode(m.teacher, x, extras=m.teacher_extras).cls for m in (model, loaded))
    close(theirs, numpy(ours), 0, 1e-6)
    with pytest.raises(ValueError, match="`ViTBackbone` has no place for: register tokens"):
        model.export_backbone()


def test_dinov2_trains_and_exports(tmp_path):
    backbone = keras_hub.models.DINOV2Backbone(
        patch_size=8,
        num_layers=2,
        hidden_dim=32,
        num_heads=2,
        intermediate_dim=48,
        num_register_tokens=3,
        image_shape=(32, 32, 3),
        position_embedding_shape=(32, 32, 3),
    )
    model = tiny.model(
        keras.optimizers.AdamW(1e-2), backbone=backbone, teacher_ema=kd.callbacks.TeacherEMA(0.5)
    )
    model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0)
    model.save(tmp_path / "before.keras")
    model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0)  # saving leaves it trainable
    x = tiny.images(2, 32, 32, dtype="float32")
    expected = numpy(kd.encode(model.teacher, ops.convert_to_tensor(x)).cls)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    close(kd.encode(loaded.teacher, ops.convert_to_tensor(x)).cls, expected, 0, 1e-6)
    model.export_backbone().save_to_preset(str(tmp_path / "preset"))
    preset = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    close(preset({"images": x})[:, 0], expected, 0, 1e-5)
    # The student is the user's own. The Hub alone saves positions only if their sum has fallen.
    positions = backbone.embeddings.interpolated_position_embeddings
    for change in (1.0, -2.0):
        positions.assign(numpy(positions) + change)
        model.train_on_batch(tiny.images())
        expected = numpy(kd.encode(backbone, ops.convert_to_tensor(x)).cls)
        backbone.save_to_preset(str(tmp_path / f"student {change}"))
        preset = keras_hub.models.Backbone.from_preset(str(tmp_path / f"student {change}"))
        close(preset({"images": x})[:, 0], expected, 0, 1e-5)


def test_dinov3_recipe_is_the_default():
    settings = recipes.get("dinov3").arguments(total_steps=10)
    model = tiny.model()
    for name in ("student_temperature", "teacher_temperature", "koleo_weight"):
        assert getattr(model, name) == settings[name]
    momentum = settings["teacher_ema"].momentum
    assert [float(momentum(step)) for step in (0, 9)] == pytest.approx([0.992, 1.0])


# What a recipe holds


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_every_recipe_is_json_and_comes_back(name):
    recipe = recipes.get(name).suggest(5000, batch_size=50, epochs=3, image_size=64)
    config = json.loads(json.dumps(recipe.get_config()))
    assert recipes.Recipe.from_config(config) == recipe
    assert recipe.total_steps == 300
    for setting, reason in recipe.reasons.items():
        assert len(reason) > 10, setting
    text = str(recipe)
    for section, settings in recipe.settings.items():
        assert f"[{section}]" in text
        assert all(setting in text for setting in settings)
    assert all(reason in text for reason in recipe.reasons.values())


@pytest.mark.parametrize("name", sorted(set(recipes.RECIPES) - {"continue"}))
def test_every_recipe_trains(name):
    """Its own layers, but narrow and few, on images of its own size."""
    recipe = recipes.get(name).suggest(8, batch_size=4, epochs=1, image_size=32)
    narrow = {"num_layers": 1, "hidden_dim": 16, "num_heads": 2}
    mlp = "mlp_dim" if "mlp_dim" in recipe.settings["backbone"] else "intermediate_dim"
    recipe = recipe.changed(
        backbone={**narrow, mlp: 24, "patch_size": 8},
        augmentation={"global_crop_size": 24, "local_crop_size": 8, "num_local_crops": 1},
        model={"num_prototypes": 16, "head_hidden_dim": 12, "head_bottleneck_dim": 6},
    )
    model = recipe.build(seed=1)
    logs = model.fit(tiny.images(8, 32, 32), batch_size=4, verbose=0).history
    assert np.isfinite(logs["loss"][0]) and int(model.step) == recipe.total_steps == 2


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder of a run, and the backbone that it left."""
    folder = tmp_path_factory.mktemp("released")
    backbone = tiny.backbone()
    backbone.save_to_preset(str(folder / "backbone"))
    settings = {"augmentation": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "settings.json").write_text(json.dumps({"recipe": {"settings": settings}}))
    return folder, backbone


def test_continuing_warms_up_the_heads_and_then_moves_all(released):
    folder, backbone = released
    plan = {"num_images": 40, "batch_size": 4, "epochs": 2, "image_size": 32}
    recipe = recipes.continue_from(folder).suggest(**plan)
    assert recipe.settings["optimizer"]["freeze_backbone_steps"] == 2
    assert recipe.settings["augmentation"]["global_crop_size"] == 24  # three patches of 8
    assert recipes.Recipe.from_config(json.loads(json.dumps(recipe.get_config()))) == recipe
    recipe = recipe.changed(model={"head_hidden_dim": 24, "num_prototypes": 16})
    model = recipe.build(seed=1)
    assert model.augmentation.mean == [0.1, 0.2, 0.3] and model.augmentation.std == [0.4, 0.5, 0.6]
    assert model.gram.source == "teacher" and model.gram.weight == model.preserve.weight == 0.1
    assert model.lora is None
    start = [numpy(weight) for weight in backbone.weights]

    def moved():
        sides = (model.student, model.gram.backbone)
        return [
            max(np.max(np.abs(numpy(w) - x)) for w, x in zip(side.weights, start, strict=True))
            for side in sides
        ]

    heads = model.student_dino_head.get_weights()
    images = tiny.images(4, 32, 32)
    for step in range(4):
        model.train_on_batch(images)
        assert (moved()[0] > 0) == (step >= 2), step
        assert moved()[1] == 0  # the anchor
    assert not np.array_equal(heads[0], model.student_dino_head.get_weights()[0])


def test_continuing_without_an_anchor(released):
    recipe = recipes.continue_from(released[0], gram_weight=0, preservation_weight=0, lora_rank=2)
    assert not {"gram", "preserve"} & set(recipe.settings)
    model = recipe.suggest(40, 4, 2, 32).build(seed=1)
    assert model.gram is model.preserve is None and model.lora.rank == 2
    with pytest.raises(ValueError, match="`lora_rank`"):
        recipes.continue_from(released[0], lora_rank=0)
    with pytest.raises(ValueError, match="`gram_weight` must be at least 0"):
        recipes.continue_from(released[0], gram_weight=-1)
    with pytest.raises(ValueError, match=r"no `preset`.*recipes\.continue_from\(preset\)"):
        recipes.get("continue").suggest(40, 4, 2, 32).build()


def test_a_recipe_builds_what_it_says():
    recipe = recipes.get("tiny").suggest(3200, batch_size=32, epochs=4, image_size=(32, 48))
    recipe = recipe.changed(backbone={"num_layers": 1}, model={"koleo_weight": 0.25})
    model = recipe.build(seed=3)
    assert recipe.total_steps == 400
    assert tuple(model.student.image_shape) == (32, 48, 3)
    assert (model.student.patch_size, model.student.num_layers) == (4, 1)
    augmentation = recipe.settings["augmentation"]
    assert model.augmentation.global_crop_size == augmentation["global_crop_size"] == 24
    assert model.augmentation.local_crop_size == augmentation["local_crop_size"] == 12
    assert model.num_prototypes == 64 and model.koleo_weight == 0.25
    assert "model.koleo_weight" not in recipe.reasons
    assert "model.num_prototypes" in recipe.reasons
    rate, momentum = recipe.settings["optimizer"]["learning_rate"], model.teacher_ema.momentum
    schedule = model.optimizer._learning_rate
    assert float(schedule(40)) == pytest.approx(rate["peak"])  # after a tenth of the run
    assert float(schedule(399)) == pytest.approx(rate["end"])
    assert float(momentum(0)) == pytest.approx(recipe.settings["teacher"]["momentum"]["peak"])
    assert float(momentum(399)) == 1.0


def test_one_seed_gives_one_model():
    recipe = recipes.get("tiny").suggest(64, batch_size=8, epochs=1, image_size=32)
    recipe = recipe.changed(backbone={"num_layers": 1, "hidden_dim": 16, "intermediate_dim": 16})
    one, same, other = (recipe.build(seed=seed).student.get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_a_recipe_says_itself_is_not_suggested():
    recipe = recipes.get("tiny").changed(model={"num_prototypes": 77}, backbone={"patch_size": 8})
    recipe = recipe.suggest(100_000, batch_size=64, epochs=2, image_size=32)
    assert recipe.settings["model"]["num_prototypes"] == 77
    assert "model.num_prototypes" not in recipe.reasons
    assert recipe.settings["augmentation"]["global_crop_size"] == 24  # three patches of 8
    assert recipes.get("tiny").settings["model"].get("num_prototypes") is None  # left as it was


def test_recipes_from_files(tmp_path):
    recipe = recipes.get("tiny").suggest(640, batch_size=8, epochs=1, image_size=32)
    for name, content in {"r": recipe.get_config(), "s": {"recipe": recipe.get_config()}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert recipes.get(tmp_path / f"{name}.json") == recipe
    for name, content, message in (
        ("list", "[1]", "holds no recipe"),
        ("broken", "{", "holds no recipe"),
        ("part", json.dumps({"name": "a"}), "Missing: .*settings"),
        ("odd", json.dumps({**recipe.get_config(), "modle": 1}), "'modle'"),
    ):
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            recipes.get(str(tmp_path / f"{name}.json"))


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda: recipes.get("tny"), "Did you mean 'tiny'"),
        (lambda: recipes.get("xyz"), "There are: continue, dinov3, seed_method, small, tiny"),
        (lambda: recipes.get("tiny").changed(modle={}), "Did you mean 'model'"),
        (lambda: recipes.get("tiny").changed(model={"koleo": 1}), "'koleo'"),
        (lambda: recipes.get("tiny").total_steps, "Call `recipe.suggest"),
        (lambda: recipes.get("tiny").build(), "Call `recipe.suggest"),
    ],
)
def test_recipe_errors_teach(action, message):
    with pytest.raises(ValueError, match=message):
        action()
