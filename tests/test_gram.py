"""Gram anchoring: the reference's steps, the resize, when copies are made, saving and resuming."""

import keras
import keras_hub
import meta
import numpy as np
import pytest
import tiny
from golden import Golden, close, numpy
from golden_model import golden_model, image_major
from keras import ops

import keras_dinov3 as kd
from keras_dinov3.gram import resize_grid, resize_weights

VARIANTS = {
    "A_img_all": {},
    "B_batch_masked_removeneg_stats": {
        "per_image": False,
        "tokens": "masked",
        "negatives": "remove",
        "log_parts": True,
        # The manifest's schedule: 4 updates up to 5, then down (here up) to 20 over the rest of 16.
        "weight": kd.WarmupCosine(5.0, 16, warmup_steps=4, start=0.0, end=20.0),
    },
    "C_batch_unmasked_teacherneg": {
        "per_image": False,
        "tokens": "unmasked",
        "negatives": "remove_teacher",
    },
    "D_img_all_antialias": {"antialias": True},
    "E_img_all_samesize_nonorm": {"normalize": False, "resolution_scale": 1},
    "F_img_all_ema_teacher": {"source": "ema_teacher"},
}


def anchored_model(variant):
    """The reference's step with a Gram teacher."""
    golden = Golden("fb_gram_step")
    settings = golden.hyperparameters["variants"][variant]
    options = {"source": gram_backbone(golden), **VARIANTS[variant]}
    options.setdefault("weight", settings.get("loss_weight"))
    golden, model, crops = golden_model("fb_gram_step", gram=kd.GramAnchor(**options))
    if not model.gram.is_live:
        suffix = "_samesize" if variant.startswith("E") else ""
        gram_crops = golden[f"in/gram_teacher_crops{suffix}"].transpose(0, 2, 3, 1)
        crops["gram_crops"] = image_major(gram_crops, 2)
    model.step.assign(golden.hyperparameters["iteration"])
    return golden, model, crops


def gram_backbone(golden):
    h = golden.hyperparameters
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=h["patch"],
        num_layers=h["depth"],
        hidden_dim=h["embed_dim"],
        num_heads=h["num_heads"],
        intermediate_dim=4 * h["embed_dim"],
        num_register_tokens=h["storage"],
        image_shape=(h["gs"], h["gs"], 3),
        layer_norm_eps=1e-6,
    )
    meta.load(meta.backbone_weights(backbone), golden.arrays, "gram_teacher/backbone.")
    return backbone


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_references_step(variant):
    golden, model, crops = anchored_model(variant)
    crops = {name: ops.convert_to_tensor(array) for name, array in crops.items()}
    outputs = model(crops, training=True)
    _, terms = model.loss_and_terms(outputs)
    golden.check(terms["gram_loss"], f"{variant}/out/loss_dict/gram_loss")
    if variant.startswith("B"):
        for part in ("masked", "unmasked"):
            key = f"{variant}/out/loss_dict/stats_only/{part}_gram_loss"
            golden.check(terms[f"gram_{part}_loss"], key)
    key = f"{variant}/mid/teacher_patches_resized"
    if key in golden.keys():
        targets = ops.reshape(outputs["gram"][1], (4, 2, *outputs["gram"][1].shape[1:]))
        close(targets, image_major(golden[key], 2), 1e-4, 1e-6)

    def loss():
        total, _ = model.loss_and_terms(model(crops, training=True))
        return total

    names = golden.case["grad_norm_names"]
    total, gradients = meta.gradients_of(loss, meta.model_weights(model), names)
    golden.check(total, f"{variant}/out/total_loss")
    norms = [np.linalg.norm(gradients[name].astype("float64")) for name in names]
    golden.check(np.array(norms), f"{variant}/out/grad_norms")
    prefix = f"{variant}/grad/"
    stored = [key.removeprefix(prefix) for key in golden.keys() if key.startswith(prefix)]
    assert len(stored) >= 6
    for name in stored:
        golden.check(gradients[name], prefix + name)


def test_the_weight_follows_its_schedule():
    golden = Golden("fb_gram_step")
    variant = "B_batch_masked_removeneg_stats"
    schedule = VARIANTS[variant]["weight"]
    found = schedule(golden.hyperparameters["iteration"])
    golden.check(np.float32(numpy(found)), f"{variant}/out/loss_dict/gram_loss_weight")


@pytest.mark.parametrize("antialias", [False, True])
def test_the_references_resize(antialias):
    golden = Golden("fb_gram_step")
    before = golden["A_img_all/mid/gram_teacher_patches_before_resize"]
    variant = "D_img_all_antialias" if antialias else "A_img_all"
    after = resize_grid(ops.convert_to_tensor(before), (8, 8), (4, 4), antialias)
    golden.check(after, f"{variant}/mid/teacher_patches_resized")


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("old, new", [(7, 3), (3, 7), (5, 5), (1, 4), (4, 1)])
def test_resize_keeps_constants_and_symmetry(old, new, antialias):
    weights = resize_weights(old, new, antialias)
    assert weights.shape == (new, old)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)


def test_resize_of_grids_that_are_not_square():
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(2, 6, 10, 5)).astype("float32")
    found = resize_grid(ops.convert_to_tensor(grid.reshape(2, 60, 5)), (6, 10), (3, 4))
    rows, columns = resize_weights(6, 3), resize_weights(10, 4)
    expected = np.einsum("yh,bhwd,xw->byxd", rows, grid, columns).reshape(2, 12, 5)
    close(found, expected, 1e-5, 1e-6)


# In training


def anchored(**options):
    config = {name: options.pop(name) for name in ("augmentation", "masking") if name in options}
    optimizer = keras.optimizers.AdamW(1e-3, epsilon=1e-3)
    return tiny.model(optimizer, gram=kd.GramAnchor(**options), **config)


def gram_weights(model):
    return [numpy(w).copy() for w in model.gram.backbone.weights]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


class Record(keras.callbacks.Callback):
    """After which updates the Gram teacher was another, and whether it was the EMA teacher then."""

    def __init__(self):
        super().__init__()
        self.changes = []

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        now = gram_weights(self.model)
        if not same(now, self.before):
            teacher = [numpy(w) for w in self.model.teacher.weights]
            self.changes.append((int(self.model.step), same(now, teacher)))
        self.before = now

    def on_train_begin(self, logs=None):
        self.before = gram_weights(self.model)


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, [0]),
        ({"start_step": 2}, [2]),
        ({"start_step": 1, "refresh_every": 2}, [1, 3, 5, 7]),
        ({"start_step": 1, "refresh_every": 2, "max_refreshes": 2}, [1, 3, 5]),
        ({"refresh_every": 3, "max_refreshes": 0}, [0]),
    ],
)
def test_when_copies_are_due(options, steps):
    rule = kd.callbacks.GramTeacher(**options)
    due = [rule.is_due(ops.convert_to_tensor(step, "int32")) for step in range(8)]
    assert [step for step, is_due in enumerate(due) if numpy(is_due)] == steps
    assert kd.callbacks.GramTeacher(**rule.get_config()).get_config() == rule.get_config()


def test_copies_are_made_when_they_are_due():
    model = anchored(start_step=2, refresh_every=2, max_refreshes=1)
    record = Record()
    data = tiny.images(2 * tiny.B)
    logs = model.fit(data, batch_size=tiny.B, epochs=3, verbose=0, callbacks=[record]).history
    assert record.changes == [(2, True), (4, True)]
    # The mean over an epoch's two updates: the loss counts from the start on.
    assert [loss > 0 for loss in logs["gram_loss"]] == [False, True, True]


def test_a_callback_changes_the_rule():
    model, record = anchored(start_step=1), Record()
    rule = kd.callbacks.GramTeacher(start_step=2, refresh_every=1, max_refreshes=1)
    model.fit(tiny.images(4 * tiny.B), batch_size=tiny.B, verbose=0, callbacks=[rule, record])
    assert record.changes == [(2, True), (3, True)] and model.gram.refresh is rule
    for other in (tiny.model(), anchored(source=tiny.backbone())):
        with pytest.raises(ValueError, match="`GramTeacher` copies the EMA teacher.*Received"):
            other.fit(tiny.images(), batch_size=tiny.B, verbose=0, callbacks=[rule])


def test_the_first_copy_is_of_the_teacher_that_training_begins_with():
    model = anchored()
    model.teacher.set_weights([w + 1 for w in model.teacher.get_weights()])
    expected = [w.copy() for w in model.teacher.get_weights()]
    model.fit(tiny.images(), batch_size=tiny.B, verbose=0)
    assert same(gram_weights(model), expected)


def test_a_run_stopped_after_a_refresh_goes_on_as_if_it_had_not(tmp_path):
    options = {"start_step": 1, "refresh_every": 2, "weight": kd.WarmupCosine(3.0, 9, end=1.0)}
    data = tiny.images(3 * tiny.B)
    whole = anchored(**options)
    expected = whole.fit(data, batch_size=tiny.B, epochs=3, verbose=0).history
    first = anchored(**options)
    first.fit(data, batch_size=tiny.B, epochs=2, verbose=0)  # after the copies at 1, 3 and 5
    first.save(tmp_path / "model.keras")
    second = keras.saving.load_model(tmp_path / "model.keras")
    assert same(gram_weights(second), gram_weights(first))
    found = second.fit(data, batch_size=tiny.B, epochs=3, initial_epoch=2, verbose=0).history
    assert {name: values[-1] for name, values in expected.items()} == {
        name: values[0] for name, values in found.items()
    }
    for a, b in zip(whole.weights, second.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), a.path)


def test_a_backbone_of_its_own_never_changes(tmp_path):
    """It may be of another width and patch size, and comes from a preset too."""
    source = tiny.backbone(hidden_dim=48, num_layers=1, patch_size=16, image_shape=(64, 48, 3))
    source.save_to_preset(str(tmp_path / "preset"))
    model = anchored(source=str(tmp_path / "preset"))
    history = model.fit(tiny.images(), batch_size=tiny.B, verbose=0).history
    assert history["gram_loss"][0] > 0
    assert same(gram_weights(model), [numpy(w) for w in source.weights])
    assert not any(w.trainable for w in model.gram.backbone.weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert same(gram_weights(loaded), gram_weights(model))
    assert loaded.gram.get_config() == model.gram.get_config()
    batch = tiny.images(seed=7)
    expected = model.test_on_batch(batch, return_dict=True)
    assert loaded.test_on_batch(batch, return_dict=True) == expected


def test_registers_that_the_extras_add_are_the_gram_teachers_too():
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(*tiny.GLOBAL, 3),
        patch_size=tiny.PATCH,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=48,
    )
    extras = kd.EncoderExtras(num_register_tokens=2)
    anchor = kd.GramAnchor(start_step=2, resolution_scale=2)
    model = tiny.model(backbone=backbone, extras=extras, gram=anchor)
    model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0)
    for copy, teacher in zip(anchor.extras.weights, model.teacher_extras.weights, strict=True):
        np.testing.assert_array_equal(numpy(copy), numpy(teacher))
    assert anchor.extras.register_tokens.shape == (1, 2, 32)


def test_the_step_runs_with_parts_logged():
    model = anchored(source="ema_teacher", log_parts=True, tokens="masked", per_image=False)
    logs = model.fit(tiny.images(), batch_size=tiny.B, verbose=0).history
    assert logs["gram_loss"] == pytest.approx(logs["gram_masked_loss"], rel=1e-5)
    assert logs["gram_unmasked_loss"][0] > 0


def test_the_loss_pulls_towards_the_gram_teacher():
    """Alone with a large weight it falls; the term is what the weights of the total say."""
    model = anchored(weight=100.0)
    model.dino_weight = model.ibot_weight = model.koleo_weight = 0.0
    crops = model.augmentation(tiny.images(), gram_scale=2)
    crops = {name: numpy(array) for name, array in crops.items()}
    losses = [model.train_on_batch(crops, return_dict=True) for _ in range(6)]
    assert losses[-1]["gram_loss"] < losses[0]["gram_loss"]
    assert losses[0]["loss"] == pytest.approx(100 * losses[0]["gram_loss"], rel=1e-5)


def test_mixed_precision_keeps_the_loss_in_float32():
    anchor = kd.GramAnchor()
    model = tiny.model(backbone=tiny.backbone(dtype="mixed_bfloat16"), gram=anchor)
    outputs = model(tiny.images(), training=True)
    assert keras.backend.standardize_dtype(outputs["gram"][1].dtype) == "float32"
    _, terms = model.loss_and_terms(outputs)
    assert keras.backend.standardize_dtype(terms["gram_loss"].dtype) == "float32"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": 3}, "must be one of Keras Hub's"),
        ({"tokens": "some"}, "`tokens` must be one of"),
        ({"tokens": "masked"}, "Add `per_image=False`"),
        ({"negatives": "drop"}, "`negatives` must be"),
        ({"resolution_scale": 0.5}, "`resolution_scale`"),
        ({"start_step": -1}, "`start_step`"),
        ({"refresh_every": 0}, "`refresh_every`"),
        ({"max_refreshes": 3}, "refresh_every=None"),
        ({"weight": -1.0}, "`weight`"),
        ({"source": "ema_teacher", "refresh_every": 3}, "are for copies of the teacher"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kd.GramAnchor(**options)


def test_what_does_not_fit_the_model():
    with pytest.raises(ValueError, match="`gram` must be a `GramAnchor`"):
        tiny.model(gram="teacher")
    with pytest.raises(ValueError, match="`gram_crops` must be multiples"):
        anchored(resolution_scale=1.1)
    anchor = kd.GramAnchor()
    tiny.model(gram=anchor)
    with pytest.raises(ValueError, match="`GramAnchor` belongs to one model"):
        tiny.model(gram=anchor)
    with pytest.raises(ValueError, match="needs masks.*`gram`"):
        model = tiny.model(gram=kd.GramAnchor(log_parts=True), masking=None, ibot_weight=0)
        model.fit(tiny.images(), batch_size=tiny.B, verbose=0)
    model = tiny.model(gram=kd.GramAnchor(), augmentation=None)
    with pytest.raises(ValueError, match=r"needed: \['global_crops', 'gram_crops'\]"):
        model.train_on_batch(tiny.crops())
    crops = {**tiny.crops(), "gram_crops": np.zeros((tiny.B, 1, 64, 48, 3), "float32")}
    with pytest.raises(ValueError, match="one crop for each global crop"):
        model.train_on_batch(crops)
