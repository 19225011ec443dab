import json
import os
import subprocess
import sys

import keras
import keras_hub
import meta
import numpy as np
import pytest
import tiny
from golden import close, numpy
from golden_model import golden_model
from keras import ops

import keras_dinov3 as kd

TERMS = {"loss", "dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss"}
BACKEND = keras.config.backend()


def weights_of(layers):
    return [numpy(w).copy() for layer in layers for w in layer.weights]


def student_weights(model):
    return weights_of(student for student, _ in model.student_and_teacher)


def teacher_weights(model):
    return weights_of(teacher for _, teacher in model.student_and_teacher)


class Counting(kd.DINOv3):
    """Counts how often Python runs through the model: once per trace."""

    traces = 0

    def call(self, inputs, training=False):
        Counting.traces += 1
        return super().call(inputs, training)


# The reference's whole step


@pytest.mark.parametrize("name", ["fb_step", "fb_step_variant"])
def test_golden_step(name):
    golden, model, crops = golden_model(name)
    crops = {name: ops.convert_to_tensor(array) for name, array in crops.items()}
    outputs = model(crops, training=True)
    crop_major = {
        "student_global/cls_pre_head": "student_cls",
        "student_global/cls_after_head": "student_global",
        "student_local/cls_after_head": "student_local",
        "teacher_global/cls_after_head": "teacher_global",
    }
    for key, output in crop_major.items():
        golden.check(ops.swapaxes(outputs[output], 0, 1), f"mid/{key}")
    # Our masked patches are ordered by image, the reference's by crop.
    masks = golden["in/masks"]
    crop, image = np.divmod(np.nonzero(masks)[0], masks.shape[0] // 2)
    order = np.lexsort((np.nonzero(masks)[1], crop, image))
    num_masked = len(order)
    reference = golden["mid/student_global/masked_patch_after_head"][order]
    close(outputs["student_patches"][:num_masked], reference, 1e-4, 1e-6)
    temperature = golden.hyperparameters["teacher_temp"]
    targets = model.class_targets(outputs["teacher_global"], temperature)
    golden.check(ops.swapaxes(targets, 0, 1), "mid/teacher_global/cls_centered")
    valid = outputs["slots"].valid
    targets = model.patch_targets(outputs["teacher_patches"], temperature, weights=valid)
    reference = golden["mid/teacher_global/masked_patch_centered"][order]
    close(targets[:num_masked], reference, 1e-4, 1e-6)

    def loss():
        # A scope of its own: on JAX the terms' means may not leave the traced function.
        total, _ = model.loss_and_terms(model(crops, training=True))
        return total

    names = golden.case["grad_norm_names"]
    total, gradients = meta.gradients_of(loss, meta.model_weights(model), names)
    golden.check(total, "out/total_loss")
    norms = {name: np.linalg.norm(gradients[name].astype("float64")) for name in names}
    golden.check(np.array(list(norms.values())), "out/grad_norms")
    for part in ("backbone", "dino_head", "ibot_head"):
        squares = [norm**2 for name, norm in norms.items() if name.startswith(part)]
        golden.check(np.sqrt(np.sum(squares)), f"out/grad_norm_{part}")
    golden.check(np.sqrt(np.sum(np.square(list(norms.values())))), "out/global_grad_norm")
    stored = [key.removeprefix("grad/") for key in golden.keys() if key.startswith("grad/")]
    for name in stored:
        golden.check(gradients[name], f"grad/{name}")
    assert len(stored) >= 10


@pytest.mark.parametrize("name", ["fb_step", "fb_step_variant"])
def test_golden_step_logs_each_term(name):
    golden, model, crops = golden_model(name)
    model.compile(keras.optimizers.SGD(0.0))
    logs = model.train_on_batch(crops, return_dict=True)
    assert set(logs) == TERMS
    for ours, reference in (
        ("dino_global_loss", "dino_global_crops_loss"),
        ("dino_local_loss", "dino_local_crops_loss"),
        ("ibot_loss", "ibot_loss"),
        ("koleo_loss", "koleo_loss"),
    ):
        golden.check(np.float32(logs[ours]), f"out/loss_dict/{reference}")
    golden.check(np.float32(logs["loss"]), "out/total_loss")


# `fit`


@pytest.fixture(scope="module")
def trained():
    """A model after two epochs of `fit`, its history, and how often the step was traced."""
    Counting.traces = 0
    kd_model, kd.DINOv3 = kd.DINOv3, Counting
    try:
        model = tiny.model(
            teacher_temperature=kd.WarmupCosine(0.07, 20, warmup_steps=10, start=0.04, end=0.07),
            teacher_ema=kd.callbacks.TeacherEMA(kd.WarmupCosine(0.9, 20, end=1.0)),
            # A large epsilon: else Adam makes whole steps of the rounding noise in gradients
            # that are 0 (key biases), and no two runs agree.
            optimizer=keras.optimizers.AdamW(
                kd.WarmupCosine(1e-3, 20, warmup_steps=2), epsilon=1e-3
            ),
            drop_path_rate=0.3,
        )
    finally:
        kd.DINOv3 = kd_model
    before = student_weights(model), teacher_weights(model)
    data = tiny.images(11)  # two full batches and a rest
    history = model.fit(data, batch_size=tiny.B, epochs=2, verbose=0).history
    return model, before, history, Counting.traces


def test_fit_trains_student_and_teacher(trained):
    model, (student, teacher), history, _ = trained
    assert set(history) == TERMS
    assert all(np.all(np.isfinite(values)) for values in history.values())
    assert int(model.step) == 4
    for before, after in zip(student, student_weights(model), strict=True):
        assert not np.array_equal(before, after)
    for before, after in zip(teacher, teacher_weights(model), strict=True):
        assert not np.array_equal(before, after)


@pytest.mark.skipif(BACKEND == "torch", reason="torch runs eagerly: there is no trace to count")
def test_the_step_is_traced_once(trained):
    assert trained[3] == 1


def test_save_and_load_give_the_same_next_loss_and_teacher(trained, tmp_path):
    model = trained[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(
        tmp_path / "model.keras", custom_objects={"Counting": Counting}
    )
    assert int(loaded.step) == int(model.step)
    assert int(loaded.optimizer.iterations) == int(model.optimizer.iterations)
    batch = tiny.images(seed=5)
    expected = model.train_on_batch(batch, return_dict=True)
    assert loaded.train_on_batch(batch, return_dict=True) == expected
    for _ in range(2):  # optimizer, schedules, teacher and random state go on as well
        expected = model.train_on_batch(batch, return_dict=True)
        actual = loaded.train_on_batch(batch, return_dict=True)
        assert actual == pytest.approx(expected, rel=2e-3)
    for side in (student_weights, teacher_weights):
        for a, b in zip(side(model), side(loaded), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_loads_under_another_backend_with_equal_features(tmp_path):
    model = tiny.model()
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, *tiny.GLOBAL, 3)).astype("float32")
    features = numpy(kd.encode(model.teacher, ops.convert_to_tensor(x)).cls)
    np.savez(tmp_path / "features.npz", x=x, features=features)
    other = {"torch": "jax", "jax": "tensorflow", "tensorflow": "torch"}[BACKEND]
    code = """
import keras, numpy as np, keras_dinov3 as kd
from keras import ops
model = keras.models.load_model("model.keras")
saved = np.load("features.npz")
cls = kd.encode(model.teacher, ops.convert_to_tensor(saved["x"])).cls
print(keras.config.backend(), np.max(np.abs(ops.convert_to_numpy(cls) - saved["features"])))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    name, error = result.stdout.split()[-2:]
    assert name == other and float(error) < 1e-5


def test_parts_that_are_frozen_stay_so(tmp_path):
    model = tiny.model()
    model.student.embeddings.trainable = False
    model.student.encoder.layers[0].layer_scale1.trainable = False
    model.train_on_batch(tiny.images())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    flags = [[w.trainable for w in m.student.weights] for m in (model, loaded)]
    assert flags[0] == flags[1] and not all(flags[0])
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    frozen = [numpy(w).copy() for w in loaded.student.embeddings.weights]
    loaded.train_on_batch(tiny.images())
    for before, after in zip(frozen, loaded.student.embeddings.weights, strict=True):
        np.testing.assert_array_equal(before, numpy(after))


def test_every_argument_is_in_the_config():
    arguments = {
        "num_prototypes": 9,
        "num_patch_prototypes": 6,
        "head_hidden_dim": 11,
        "head_bottleneck_dim": 13,
        "head_num_layers": 2,
        "student_temperature": 0.2,
        "teacher_temperature": kd.WarmupCosine(0.07, 10, warmup_steps=5, start=0.04, end=0.07),
        "dino_weight": 0.5,
        "ibot_weight": kd.WarmupCosine(1.0, 10, end=0.5),
        "koleo_weight": 0.3,
        "koleo_top_k": 2,
        "drop_path_rate": 0.1,
        "remat": "full",
        "centering": kd.SoftmaxCentering(0.8),
        "sinkhorn_iterations": 2,
        "augmentation": tiny.multi_crop(num_local_crops=1),
        "masking": kd.RandomMasking(0.4),
        "max_masked_patches": 5,
        "ignore_diagonal": False,
        "local_weight": 0.7,
        "ibot_average": "patches",
        "koleo_crops": 1,
        "koleo_distance": "cosine",
        "extras": kd.EncoderExtras(untie_cls_norm=True, rope_rescale=2.0),
        "lora": kd.LoRA(3, 2.0, ["output"]),
        "teacher": tiny.backbone(),
        "teacher_heads": None,
        "teacher_ema": kd.callbacks.TeacherEMA(0.5),
        "gram": kd.GramAnchor(start_step=3, weight=kd.WarmupCosine(2.0, 9), negatives="remove"),
        "alignment": kd.PatchAlignment(kd.WarmupCosine(1.5, 9), pairs="all", min_patches=5),
        "preserve": kd.Preserve(weight=kd.WarmupCosine(0.5, 9), distance="squared"),
        "prototype_chunk_size": 3,
        "seed": 8,
    }
    assert set(arguments) == set(kd.DINOv3.arguments())
    model = kd.DINOv3(tiny.backbone(), **arguments)
    config = json.loads(json.dumps(model.get_config()))
    copy = kd.DINOv3.from_config(config)
    assert json.loads(json.dumps(copy.get_config())) == config
    assert copy.teacher_ema.momentum == 0.5
    assert copy.teacher_temperature.start == 0.04
    assert copy.student.num_layers == 2


def test_export_is_a_plain_backbone(trained, tmp_path):
    model = trained[0]
    exported = model.export_backbone()
    assert type(exported) is keras_hub.models.DINOV3Backbone
    exported.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert loaded.trainable
    x = ops.convert_to_tensor(tiny.images(2, *tiny.GLOBAL, dtype="float32"))
    tokens = kd.encode(model.teacher, x)
    close(loaded({"pixel_values": x})[:, 0], numpy(tokens.cls), 0, 1e-5)


def test_extras_train_move_and_are_saved(tmp_path):
    extras = kd.EncoderExtras(
        untie_cls_norm=True,
        untie_local_cls_norm=True,
        norm="rms",
        layer_scale=False,
        rope_periods=(0.5, 50.0),
        rope_shift=0.1,
    )
    model = tiny.model(extras=extras)
    before = [weights_of([side]) for side in (model.student_extras, model.teacher_extras)]
    model.train_on_batch(tiny.images())
    after = [weights_of([side]) for side in (model.student_extras, model.teacher_extras)]
    for old, new in zip(before, after, strict=True):
        moved = {len(w) for w, v in zip(old, new, strict=True) if not np.array_equal(w, v)}
        assert len(new) == 4 and moved == {32}  # two norms, of which gamma trains
        assert sum(np.array_equal(w, v) for w, v in zip(old, new, strict=True)) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    batch = tiny.images(seed=5)
    expected = model.train_on_batch(batch, return_dict=True)
    assert loaded.train_on_batch(batch, return_dict=True) == expected
    with pytest.raises(ValueError, match="untied norm of class tokens, RMSNorm, rope_periods"):
        model.export_backbone()


def test_export_without_layer_scale():
    """The Hub's class always has layer scales: those of the export are 1."""
    extras = kd.EncoderExtras(layer_scale=False, rope_shift=0.1)
    model = tiny.model(backbone=tiny.backbone(layer_scale_init_value=0.5), extras=extras)
    scales = [layer.layer_scale1.lambda1 for layer in model.student.encoder.layers]
    assert not any(scale.trainable for scale in scales)
    x = tiny.images(2, *tiny.GLOBAL, dtype="float32")
    expected = kd.encode(model.teacher, ops.convert_to_tensor(x), extras=model.teacher_extras).cls
    close(model.export_backbone()({"pixel_values": x})[:, 0], numpy(expected), 0, 1e-5)


def test_evaluate_changes_nothing(trained):
    model = trained[0]
    before = [*student_weights(model), *teacher_weights(model), numpy(model.step)]
    logs = model.evaluate(tiny.images(9), batch_size=tiny.B, return_dict=True, verbose=0)
    assert set(logs) == TERMS
    for a, b in zip(
        before, [*student_weights(model), *teacher_weights(model), numpy(model.step)], strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("every_batch", [False, True])
def test_non_finite_loss_stops_before_weights_are_written(every_batch, tmp_path):
    model = tiny.model()
    head = model.student_ibot_head
    head.set_weights([np.full(w.shape, np.nan, "float32") for w in head.get_weights()])
    path = tmp_path / "last.keras"
    callbacks = [keras.callbacks.ModelCheckpoint(path)]
    if every_batch:
        callbacks.append(keras.callbacks.ModelCheckpoint(path, save_freq=1))
    else:  # it would say that features are not finite, and not why
        labelled = (tiny.images(5), np.arange(5))
        callbacks.append(kd.callbacks.KNN(labelled, labelled, k=1))
    with pytest.raises(FloatingPointError, match=r"first: ibot_loss, at step 1\..*learning rate"):
        model.fit(
            tiny.images(2 * tiny.B),
            batch_size=tiny.B,
            epochs=3,
            verbose=0,
            callbacks=callbacks,
        )
    assert not path.exists()


# The teacher


class Recorder(keras.callbacks.Callback):
    """Student weights after every batch."""

    def __init__(self):
        super().__init__()
        self.students = []

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        self.students.append(student_weights(self.model))


@pytest.mark.parametrize("accumulation", [None, 2])
def test_teacher_equals_its_recurrence_after_20_updates(accumulation):
    momentum = kd.WarmupCosine(0.9, 20, warmup_steps=5, start=0.5, end=1.0)
    optimizer = keras.optimizers.AdamW(1e-2, gradient_accumulation_steps=accumulation)
    model = tiny.model(optimizer)
    expected = [w.astype("float64") for w in teacher_weights(model)]
    recorder = Recorder()
    micro_steps = accumulation or 1
    model.fit(
        tiny.images(2 * tiny.B),
        batch_size=tiny.B,
        epochs=10 * micro_steps,
        verbose=0,
        callbacks=[kd.callbacks.TeacherEMA(momentum), recorder],
    )
    updates = recorder.students[micro_steps - 1 :: micro_steps]
    assert len(updates) == 20 and int(model.step) == 20
    for t, students in enumerate(updates):
        m = float(momentum(t))
        expected = [m * e + (1 - m) * s for e, s in zip(expected, students, strict=True)]
    for e, teacher in zip(expected, teacher_weights(model), strict=True):
        np.testing.assert_allclose(teacher, e, rtol=0, atol=1e-6)
    if accumulation:  # micro-steps in between left the student alone
        for a, b in zip(recorder.students[0::2][1:], recorder.students[1::2], strict=False):
            assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on torch")
def test_teacher_under_steps_per_execution():
    results = []
    for steps in (1, 4):
        model = tiny.model(compile={"steps_per_execution": steps})
        model.fit(
            tiny.images(20 * tiny.B),
            batch_size=tiny.B,
            verbose=0,
            shuffle=False,
            callbacks=[kd.callbacks.TeacherEMA(kd.WarmupCosine(0.9, 20, end=1.0))],
        )
        assert int(model.step) == 20
        results.append((teacher_weights(model), student_weights(model)))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_without_teacher_ema_the_teacher_stays():
    model = tiny.model(teacher_ema=None)
    student, teacher = student_weights(model), teacher_weights(model)
    model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0)
    assert int(model.step) == 2
    for a, b in zip(teacher, teacher_weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not all(
        np.array_equal(a, b) for a, b in zip(student, student_weights(model), strict=True)
    )


def test_no_gradient_reaches_the_teacher():
    model = tiny.model()
    assert not any(layer.trainable_weights for _, layer in model.student_and_teacher)
    trained = {id(v) for v in model.trainable_variables}
    assert trained == {id(w) for layer, _ in model.student_and_teacher for w in layer.weights}


# Masks that a user brings


def test_padded_slots_change_no_loss():
    """Exactly, given the logits: how a product of matrices rounds may depend on its rows."""
    ready = tiny.crops(masked=0.3)
    num_masked = int(ready["masks"].sum())
    model = tiny.model(masking=None, augmentation=None)  # a slot for every patch
    outputs = model({name: ops.convert_to_tensor(array) for name, array in ready.items()})
    slots = outputs["slots"]
    losses = {}
    for count in (num_masked, num_masked + 7, len(ready["masks"].ravel())):
        cut = {name: outputs[name][:count] for name in ("student_patches", "teacher_patches")}
        cut["slots"] = type(slots)(*(array[:count] for array in slots))
        total, terms = model.loss_and_terms({**outputs, **cut})
        losses[count] = [float(total)] + [float(terms[name]) for name in sorted(terms)]
        np.testing.assert_array_equal(losses[count], losses[num_masked])
    assert len(losses) == 3


def test_padded_slots_change_no_step():
    """Exactly; but XLA may sum arrays of other lengths in another order, to the last bit."""
    ready = tiny.crops(masked=0.3)
    logs = []
    for slots in (int(ready["masks"].sum()), None):
        model = tiny.model(masking=None, augmentation=None, max_masked_patches=slots)
        logs.append(model.train_on_batch(ready, return_dict=True))
    rtol = 0 if keras.config.backend() == "torch" else 1e-6
    for name, value in logs[0].items():
        np.testing.assert_allclose(logs[1][name], value, rtol=rtol, atol=0, err_msg=name)


def test_too_many_masked_patches_are_never_dropped_in_silence():
    ready = tiny.crops(masked=0.3)
    num_masked = int(ready["masks"].sum())
    model = tiny.model(masking=None, augmentation=None, max_masked_patches=num_masked - 1)
    with pytest.raises(ValueError, match=f"{num_masked} hidden patches"):
        model.train_on_batch(ready)
    tensors = {name: ops.convert_to_tensor(array) for name, array in ready.items()}
    _, terms = model.loss_and_terms(model(tensors))
    assert np.isnan(float(terms["ibot_loss"]))


# Variants


def test_mixed_bfloat16_trains_with_float32_losses():
    model = tiny.model(backbone=tiny.backbone(dtype="mixed_bfloat16"))
    assert model.student_dino_head.compute_dtype == "bfloat16"
    outputs = model(ops.convert_to_tensor(tiny.images()))
    assert keras.backend.standardize_dtype(outputs["student_global"].dtype) == "bfloat16"
    total, terms = model.loss_and_terms(outputs)
    for value in (total, *terms.values()):
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
    before = teacher_weights(model)
    history = model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    for a, b in zip(before, teacher_weights(model), strict=True):
        assert b.dtype == "float32" and not np.array_equal(a, b)


def test_softmax_centering_moves_in_training_and_is_saved(tmp_path):
    model = tiny.model(
        centering=kd.SoftmaxCentering(0.5), masking=kd.RandomMasking(0.4, seed=1), koleo_weight=0
    )
    centres = [model.class_targets.weights[0], model.patch_targets.weights[0]]
    assert [c.shape[-1] for c in centres] == [tiny.K, tiny.K_PATCH]
    history = model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0).history
    assert set(history) == TERMS - {"koleo_loss"}
    assert all(np.any(numpy(c) != 0) for c in centres)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded.class_targets.weights[0]), numpy(centres[0]))
    batch = tiny.images(seed=2)
    expected = model.train_on_batch(batch, return_dict=True)
    assert loaded.train_on_batch(batch, return_dict=True) == expected


def test_images_that_are_bad_later_stop_the_run():
    """Given as tensors of the backend or in a pipeline, so that nothing looks at them before."""
    images = tiny.images(4 * tiny.B, dtype="float32")
    images[2 * tiny.B :] *= 255
    if BACKEND == "tensorflow":
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices(images).batch(tiny.B, drop_remainder=True)
        expected = tf.errors.InvalidArgumentError, "must be from 0 to 1"
    else:
        torch = pytest.importorskip("torch")
        data = torch.utils.data.TensorDataset(torch.tensor(images))
        data = torch.utils.data.DataLoader(data, batch_size=tiny.B, drop_last=True)
        expected = FloatingPointError, "far outside of 0 to 1"
        if BACKEND == "torch":
            expected = ValueError, "must be from 0 to 1"
    model = tiny.model()
    with pytest.raises(expected[0], match=expected[1]):
        model.fit(data, verbose=0)


def test_nan_in_a_later_image_names_the_term_and_step():
    images = tiny.images(3 * tiny.B, dtype="float32")
    images[2 * tiny.B] = np.nan
    model = tiny.model()
    with pytest.raises(FloatingPointError, match="Not finite first: dino_.*, at step 3"):
        model.fit(images, batch_size=tiny.B, shuffle=False, verbose=0)


def test_without_a_seed_a_resumed_run_keeps_the_order(tmp_path):
    images = tiny.images(4 * tiny.B)
    config = {"seed": None, "augmentation": tiny.multi_crop(), "masking": kd.RandomMasking(seed=2)}
    model = tiny.model(**config)
    model.fit(images, batch_size=tiny.B, epochs=1, verbose=0)
    model.save(tmp_path / "model.keras")
    model.fit(images, batch_size=tiny.B, epochs=1, verbose=0)
    resumed = keras.models.load_model(tmp_path / "model.keras")
    resumed.fit(images, batch_size=tiny.B, epochs=1, verbose=0)
    for a, b in zip(student_weights(model), student_weights(resumed), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_extras_leave_a_foreign_teacher_alone(tmp_path):
    teacher = tiny.backbone(hidden_dim=48, layer_scale_init_value=0.1)
    images = ops.convert_to_tensor(tiny.crops()["global_crops"][:, 0])
    before = numpy(kd.encode(teacher, images).cls)
    extras = kd.EncoderExtras(layer_scale=False, norm="rms", rope_periods=(0.5, 9.0))
    model = tiny.model(teacher=teacher, teacher_ema=None, extras=extras)
    after = kd.encode(model.teacher, images, extras=model.teacher_extras).cls
    np.testing.assert_array_equal(numpy(after), before)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    after = kd.encode(loaded.teacher, images, extras=loaded.teacher_extras).cls
    np.testing.assert_allclose(numpy(after), before, atol=1e-6)
    assert loaded.student_extras.norm == "rms"


@pytest.mark.parametrize(
    "settings", [{"norm": "rms"}, {"layer_scale": False}, {"untie_cls_norm": True}]
)
def test_a_foreign_teacher_without_the_extras_cannot_follow(settings):
    extras = kd.EncoderExtras(**settings)
    model = tiny.model(teacher=tiny.backbone(), teacher_ema=None, extras=extras)
    with pytest.raises(ValueError, match="same function.*`extras` do not apply"):
        model.fit(tiny.images(), batch_size=tiny.B, callbacks=[kd.callbacks.TeacherEMA()])
    assert model.teacher_ema is None
    tiny.model(teacher=tiny.backbone(), extras=extras)  # from the start it can


def test_a_frozen_copy_keeps_its_extras(tmp_path):
    model = tiny.model(teacher_ema=None, extras=kd.EncoderExtras(norm="rms"))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.teacher_extras.norm == "rms"
