"""Distillation from a frozen teacher: the reference's step, trained heads, several students."""

from types import SimpleNamespace

import keras
import keras_hub
import meta
import numpy as np
import pytest
import tiny
from golden import Golden, numpy
from golden_model import golden_model
from keras import ops

import keras_dinov3 as kd
import keras_dinov3.model
import keras_dinov3.targets
from keras_dinov3.families import swiglu_width


def reference():
    h = Golden("fb_distill_step").hyperparameters
    settings = h["teacher"]
    width = settings["embed_dim"]
    teacher = keras_hub.models.DINOV3Backbone(
        patch_size=h["patch"],
        num_layers=settings["depth"],
        hidden_dim=width,
        num_heads=settings["num_heads"],
        intermediate_dim=swiglu_width(width, 3),
        use_gated_mlp=True,
        hidden_activation="silu",
        num_register_tokens=settings["storage"],
        image_shape=(h["gs"], h["gs"], 3),
        layer_norm_eps=1e-5,
    )
    heads = [
        kd.DINOHead(count, settings["head_hidden"], settings["head_bottleneck"])
        for count in (h["K"], h["Kp"])
    ]
    return golden_model("fb_distill_step", teacher=teacher, teacher_heads=heads, teacher_ema=None)


def test_the_references_step():
    golden, model, crops = reference()
    crops = {name: ops.convert_to_tensor(array) for name, array in crops.items()}
    outputs = model(crops, training=True)
    for key, output in {
        "student_global/cls_pre_head": "student_cls",
        "student_global/cls_after_head": "student_global",
        "student_local/cls_after_head": "student_local",
        "teacher_global/cls_after_head": "teacher_global",
    }.items():
        golden.check(ops.swapaxes(outputs[output], 0, 1), f"mid/{key}")

    def loss():
        total, _ = model.loss_and_terms(model(crops, training=True))
        return total

    names = golden.case["grad_norm_names"]
    total, gradients = meta.gradients_of(loss, meta.model_weights(model), names)
    golden.check(total, "out/total_loss")
    norms = [np.linalg.norm(gradients[name].astype("float64")) for name in names]
    golden.check(np.array(norms), "out/grad_norms")
    stored = [key.removeprefix("grad/") for key in golden.keys() if key.startswith("grad/")]
    assert len(stored) >= 10
    for name in stored:
        golden.check(gradients[name], f"grad/{name}")
    assert not np.any(gradients["backbone.mask_token"])  # the student is not masked


def test_the_references_terms_are_logged():
    golden, model, crops = reference()
    model.compile(keras.optimizers.SGD(0.0))
    logs = model.train_on_batch(crops, return_dict=True)
    for ours, theirs in (
        ("dino_global_loss", "dino_global_crops_loss"),
        ("dino_local_loss", "dino_local_crops_loss"),
        ("ibot_loss", "ibot_loss"),
        ("koleo_loss", "koleo_loss"),
    ):
        golden.check(np.float32(logs[ours]), f"out/loss_dict/{theirs}")
    golden.check(np.float32(logs["loss"]), "out/total_loss")


def distilled(trained, **config):
    """A small student of a trained model's teacher, with its heads."""
    heads = trained.teacher_dino_head, trained.teacher_ibot_head
    heads = [kd.DINOHead.from_config(head.get_config()) for head in heads]
    config = {"teacher": tiny.backbone(hidden_dim=48), "teacher_heads": heads, **config}
    model = tiny.model(teacher_ema=None, head_hidden_dim=20, head_bottleneck_dim=10, **config)
    for head, old in zip(
        (model.teacher_dino_head, model.teacher_ibot_head),
        (trained.teacher_dino_head, trained.teacher_ibot_head),
        strict=True,
    ):
        head.set_weights(old.get_weights())
    model.teacher.set_weights(trained.teacher.get_weights())
    return model


def test_a_teacher_with_the_heads_it_was_trained_with(tmp_path):
    trained = tiny.model(backbone=tiny.backbone(hidden_dim=48))
    model = distilled(trained)
    tokens = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(5, 48)), "float32")
    for head, old in (
        (model.teacher_dino_head, trained.teacher_dino_head),
        (model.teacher_ibot_head, trained.teacher_ibot_head),
    ):
        np.testing.assert_array_equal(numpy(head(tokens)), numpy(old(tokens)))
    frozen = [numpy(w).copy() for w in (*model.teacher.weights, *model.teacher_dino_head.weights)]
    model.fit(tiny.images(), batch_size=tiny.B, verbose=0)
    after = [numpy(w) for w in (*model.teacher.weights, *model.teacher_dino_head.weights)]
    for a, b in zip(frozen, after, strict=True):
        np.testing.assert_array_equal(a, b)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for side in (model, loaded):
        assert not [v.path for v in side.trainable_variables if "teacher" in v.path]
    batch = tiny.images(seed=9)
    expected = model.train_on_batch(batch, return_dict=True)
    assert loaded.train_on_batch(batch, return_dict=True) == expected
    assert loaded.teacher_dino_head.hidden_dim == 28 and loaded.student_dino_head.hidden_dim == 20


def test_what_is_measured_and_exported_is_the_student():
    teacher = tiny.backbone(hidden_dim=48)
    model = tiny.model(teacher=teacher, teacher_ema=None)
    data = tiny.images(2 * tiny.B), np.arange(2 * tiny.B) % 2
    knn = kd.callbacks.KNN(data, data, k=1, feature="cls")
    model.fit(data[0], batch_size=tiny.B, verbose=0, callbacks=[knn])
    assert knn._extractor.backbone is model.student
    exported = model.export_backbone()
    assert exported.hidden_dim == 32 and all(w.trainable for w in exported.weights)
    images = ops.convert_to_tensor(tiny.crops()["global_crops"][:, 0])
    expected = numpy(kd.encode(model.student, images).cls)
    np.testing.assert_array_equal(numpy(kd.encode(exported, images).cls), expected)


def test_wrong_heads():
    wide = tiny.backbone(hidden_dim=48)
    heads = [kd.DINOHead(count, 28, 18) for count in (tiny.K, tiny.K_PATCH)]
    with pytest.raises(ValueError, match="of a teacher that is distilled"):
        tiny.model(teacher_heads=heads)
    settings = {"teacher": wide, "teacher_ema": None}
    with pytest.raises(ValueError, match="must be two `DINOHead` layers"):
        tiny.model(**settings, teacher_heads=heads[:1])
    with pytest.raises(ValueError, match="the same prototypes.*14 and 20 of them"):
        tiny.model(**settings, teacher_heads=heads[::-1])
    heads[0].build((None, 32))
    with pytest.raises(ValueError, match="a head for width 32, and a teacher of width 48"):
        tiny.model(**settings, teacher_heads=heads)


# ---- several students ----


def teaching():
    """A frozen teacher and its heads, as arguments of `DINOv3`."""
    keras.utils.set_random_seed(5)
    heads = [kd.DINOHead(count, 28, 18) for count in (tiny.K, tiny.K_PATCH)]
    return {"teacher": tiny.backbone(hidden_dim=48), "teacher_heads": heads, "teacher_ema": None}


def student(name, shared, **config):
    keras.utils.set_random_seed(6)
    settings = {
        "small": {"drop_path_rate": 0.3, "koleo_weight": 0.3},
        "base": {"backbone": tiny.backbone(hidden_dim=40), "head_hidden_dim": 20},
    }
    config = {**shared, **settings[name], **config}
    return tiny.model(kd.AdamW(1e-3, part_clipnorm=0.5), **config)


def students(shared=None, **config):
    shared = teaching() if shared is None else shared
    return {name: student(name, shared, **config) for name in ("small", "base")}


def count_calls(patch, counts, owner, name, kind=None):
    """Counts the calls of a function or method."""
    function, kind = getattr(owner, name), kind or name
    counts[kind] = 0

    def call(*args, **kwargs):
        counts[kind] += 1
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


@pytest.fixture(scope="module")
def together():
    """Two students that were trained together, how that went, their teacher, and what it did."""
    shared, counts = teaching(), {}
    model = kd.MultiDistillation(students(shared))
    with pytest.MonkeyPatch.context() as patch:
        count_calls(patch, counts, model, "compute_loss", "step")
        # The student's forward pass is another function, `encode_views`.
        count_calls(patch, counts, keras_dinov3.model, "encode", "teacher")
        count_calls(patch, counts, keras_dinov3.targets, "sinkhorn_knopp")
        for head in shared["teacher_heads"]:
            count_calls(patch, counts, head, "call", "heads")
        history = train(model)
    return model, history, shared, counts


def train(model):
    """Three epochs of one step."""
    data = tiny.images(), np.arange(tiny.B) % 2
    callbacks = []
    if isinstance(model, kd.MultiDistillation):
        model.compile(kd.AdamW(1e-3, part_clipnorm=0.5))
        knn = kd.callbacks.KNN(data, data, k=1, feature="cls")
        callbacks = [kd.callbacks.OfStudent("base", knn)]
    settings = {"batch_size": tiny.B, "epochs": 3, "verbose": 0}
    return model.fit(data[0], **settings, callbacks=callbacks).history


@pytest.mark.parametrize("name", ["small", "base"])
def test_each_student_learns_what_it_would_alone(together, name):
    model, history, shared, _ = together
    alone = student(name, shared)
    expected = train(alone)
    assert len(expected) == 5
    for term, values in expected.items():
        np.testing.assert_allclose(history[f"{name}_{term}"], values, rtol=2e-5, err_msg=term)
    weights = model.students[name].weights
    assert len(weights) == len(alone.weights)
    for ours, theirs in zip(weights, alone.weights, strict=True):
        if ours.name not in ("order_seed", "seed_generator_state"):
            np.testing.assert_allclose(numpy(ours), numpy(theirs), 1e-4, 2e-5, err_msg=ours.path)
    images = ops.convert_to_tensor(tiny.crops()["global_crops"][:, 0])
    exported = [x.export_backbone(*args) for x, args in ((model, [name]), (alone, []))]
    assert exported[0].hidden_dim == alone.student.hidden_dim
    close = [numpy(kd.encode(backbone, images).cls) for backbone in exported]
    np.testing.assert_allclose(*close, rtol=1e-3, atol=1e-4)


def test_the_logs_of_several_students(together):
    model, history, *_ = together
    total = np.add(history["small_loss"], history["base_loss"])
    np.testing.assert_allclose(history["loss"], total, rtol=1e-6)
    assert len(history["base_knn"]) == 3 and "small_knn" not in history
    assert int(model.step) == 3 == int(model.students["base"].step)
    with pytest.raises(ValueError, match="must be one of .'small', 'base'.*'large'"):
        model.export_backbone("large")


def test_a_callback_of_one_student_sees_it_as_if_alone():
    seen = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, self.model.learned, self.model.optimizer, dict(logs)))
            logs.update(loss=-1.0, knn=0.5)
            self.model.stop_training = True

    whole = SimpleNamespace(optimizer="adamw", stop_training=False)
    whole.students = {"a": SimpleNamespace(learned="a's"), "b": SimpleNamespace(learned="b's")}
    callback = kd.callbacks.OfStudent("b", Note())
    callback.set_model(whole)
    logs = {"loss": 3.0, "a_loss": 1.0, "b_loss": 2.0, "val_b_loss": 4.0, "val_loss": 5.0}
    before = dict(logs)
    callback.on_epoch_end(7, logs)
    assert seen == [(7, "b's", "adamw", {"loss": 2.0, "val_loss": 4.0})]
    assert logs == {**before, "b_loss": -1.0, "b_knn": 0.5}
    assert whole.stop_training


def test_several_students_go_on_after_loading(together, tmp_path):
    model, *_ = together
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    small, base = loaded.students.values()
    assert small.teacher is base.teacher and small.teacher_dino_head is base.teacher_dino_head
    assert len(loaded.variables) == len(model.variables)
    batch = tiny.images(seed=9)
    before = [numpy(w).copy() for w in model.weights]
    expected = model.train_on_batch(batch, return_dict=True)
    found = loaded.train_on_batch(batch, return_dict=True)
    assert found.keys() == expected.keys()
    for term, value in expected.items():
        np.testing.assert_allclose(found[term], value, rtol=1e-6, err_msg=term)
    for weight, value in zip(model.weights, before, strict=True):  # as the other tests want them
        weight.assign(value)


def test_the_teacher_runs_once(together):
    *_, counts = together
    steps = counts.pop("step")  # as often as they were traced
    assert steps > 0
    # Class tokens and patches each go through one head.
    assert counts == {"teacher": steps, "heads": 2 * steps, "sinkhorn_knopp": 2 * steps}


def test_what_differs_is_not_shared():
    shared = teaching()

    def shares(**config):
        parts = {"small": student("small", shared), "base": student("base", shared, **config)}
        model = kd.MultiDistillation(parts)
        keys = model.logit_keys, model.target_keys
        return tuple(side["small"] == side["base"] for side in keys)

    ramp = kd.WarmupCosine(0.07, 9, warmup_steps=3, start=0.04, end=0.07)
    assert shares(student_temperature=0.2) == (True, True)
    assert shares(teacher_temperature=ramp) == (True, False)
    assert shares(sinkhorn_iterations=2) == (True, False)
    assert shares(centering=kd.SoftmaxCentering()) == (True, False)
    assert shares(prototype_chunk_size=2) == (False, False)
    assert shares(teacher_heads=None) == (False, False)
    assert shares(teacher_heads=teaching()["teacher_heads"]) == (False, False)
    centered = kd.MultiDistillation(students(shared, centering=kd.SoftmaxCentering()))
    assert len(set(centered.target_keys.values())) == 2  # each moves its own center


def test_students_may_share_the_layers_that_make_views(tmp_path):
    layers = {"augmentation": tiny.multi_crop(), "masking": kd.RandomMasking(0.3)}
    model = kd.MultiDistillation(students({**teaching(), **layers}))
    model.save(tmp_path / "model.keras")
    assert list(keras.saving.load_model(tmp_path / "model.keras").students) == ["small", "base"]


def test_the_backbones_of_all_students_wait_for_their_heads():
    model = kd.MultiDistillation(students())
    optimizer = kd.AdamW(1e-3, freeze_backbone_steps=5)
    optimizer.build(model.trainable_variables)
    for name, one in model.students.items():
        for part, waits in ((one.student, True), (one.student_dino_head, False)):
            for weight in part.trainable_variables:
                assert optimizer.multipliers(weight).is_backbone == waits, (name, weight.path)


def test_patch_sizes_may_differ_without_patch_losses():
    shared = {**teaching(), "ibot_weight": 0, "masking": None}
    fine = tiny.model(backbone=tiny.backbone(patch_size=4), **shared)
    model = kd.MultiDistillation({"small": student("small", shared), "fine": fine})
    crops = {name: keras.KerasTensor(x.shape, "float32") for name, x in tiny.crops().items()}
    outputs = model(crops, training=True)
    assert tuple(outputs["fine"]["student_global"].shape) == (tiny.B, tiny.G, tiny.K)


def test_students_that_cannot_be_trained_together():
    shared = teaching()
    small = student("small", shared)
    others = {
        "the same teacher": student("base", teaching()),
        "different augmentation": student(
            "base", shared, augmentation=tiny.multi_crop(num_local_crops=1)
        ),
        "different masking": student("base", shared, masking=kd.RandomMasking(0.3)),
        "different ibot_weight": student("base", shared, ibot_weight=0),
        "the frozen `teacher`": tiny.model(),
        "backbone and heads of its own": tiny.model(backbone=small.student, **shared),
    }
    for message, base in others.items():
        with pytest.raises(ValueError, match=message):
            kd.MultiDistillation({"small": small, "base": base})
    for name in ("val", "a b", 3):
        with pytest.raises(ValueError, match="must be a Python identifier"):
            kd.MultiDistillation({"small": small, name: student("base", shared)})
    with pytest.raises(ValueError, match="at least two"):
        kd.MultiDistillation({"small": small})
    with pytest.raises(TypeError, match="must be a `DINOv3`"):
        kd.MultiDistillation({"small": small, "base": small.student})


def test_what_several_students_do_not_take():
    model = kd.MultiDistillation(students())
    with pytest.raises(ValueError, match="part_clipnorm=3.0"):
        model.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=3.0))
    model.compile()
    data = tiny.images(), np.arange(tiny.B) % 2
    fit = {"batch_size": tiny.B, "verbose": 0}
    with pytest.raises(ValueError, match='OfStudent."small", callback'):
        model.fit(data[0], **fit, callbacks=[kd.callbacks.KNN(data, data, k=1)])
    with pytest.raises(ValueError, match="is frozen"):
        model.fit(data[0], **fit, callbacks=[kd.callbacks.TeacherEMA()])
    with pytest.raises(ValueError, match="with students .'small', 'base'"):
        model.fit(
            data[0], **fit, callbacks=[kd.callbacks.OfStudent("large", keras.callbacks.Callback())]
        )
    with pytest.raises(ValueError, match="`local_crops` must have the backbone's 3 channels"):
        model.fit({**tiny.crops(), "local_crops": tiny.crops()["local_crops"][..., :1]}, **fit)
    with pytest.raises(ValueError, match="each one's own"):
        model.predict(data[0])
