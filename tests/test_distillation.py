"""Distillation from a frozen teacher: the reference's step, heads trained before, saving."""

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
