"""Low-rank adapters: start, products, merging, what trains and moves, saving, resuming."""

import keras
import keras_hub
import numpy as np
import pytest
import tiny
from golden import close, numpy
from keras import ops

import keras_dinov3 as kd
from keras_dinov3 import backend
from keras_dinov3.block import dense
from keras_dinov3.collapse import look_at
from keras_dinov3.families import parts_of
from keras_dinov3.gram import GramAnchor
from keras_dinov3.maps import attention_maps

R = 4
PLAIN = ("query", "key", "value", "output", "up", "down")
GATED = (*PLAIN, "gate")


def dinov2(**config):
    return keras_hub.models.DINOV2Backbone(
        image_shape=(24, 24, 3),
        patch_size=8,
        num_layers=2,
        hidden_dim=32,
        num_heads=2,
        intermediate_dim=48,
        position_embedding_shape=(24, 24, 3),
        **config,
    )


def vit():
    return keras_hub.models.ViTBackbone(
        image_shape=(*tiny.GLOBAL, 3),
        patch_size=tiny.PATCH,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=48,
    )


FAMILIES = {
    "dinov3": (tiny.backbone, PLAIN),
    "dinov3_gated": (lambda: tiny.backbone(use_gated_mlp=True, num_layers=4), GATED),
    "dinov2": (dinov2, PLAIN),
    "dinov2_gated": (lambda: dinov2(use_swiglu_ffn=True), GATED),
    "vit": (vit, PLAIN),
}


def randomize(weights, seed=0):
    rng = np.random.default_rng(seed)
    for weight in weights:
        weight.assign(0.1 * rng.normal(size=weight.shape).astype("float32"))


def values(weights):
    return [np.array(numpy(weight)) for weight in weights]


def equal(some, others):
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def features(backbone, images, extras=None):
    """All tokens of images, `(B, 1 + R + N, D)`."""
    cls, registers, patches = map(numpy, kd.encode(backbone, images, extras=extras))
    return np.concatenate([cls[:, None], registers, patches], axis=1)


def images(size=tiny.GLOBAL):
    return np.random.default_rng(5).normal(size=(3, *size, 3)).astype("float32")


# The adapters


def test_a_dense_layer_with_an_adapter():
    rng = np.random.default_rng(0)
    shapes = (5, 7), (7, 3), (3,), (7, 2), (2, 3)
    x, kernel, bias, a, b = (rng.normal(size=shape).astype("float32") for shape in shapes)
    tensors = [ops.convert_to_tensor(array) for array in (x, kernel, bias, a, b)]
    close(dense(tensors[0], tensors[1:]), x @ kernel + bias + (x @ a) @ b, 1e-5, 1e-6)
    close(dense(tensors[0], tensors[1:3]), x @ kernel + bias, 1e-5, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_kernels_are_those_of_the_formula(family):
    """In the names and layouts in which the encoder reads them, whatever the Hub's class."""
    make, projections = FAMILIES[family]
    backbone, alpha = make(), 6
    lora = kd.LoRA(R, alpha, projections).build_for(backbone)
    randomize(lora.weights)
    before = values(backbone.weights)
    merged = lora.merged(backbone)
    assert equal(values(backbone.weights), before)
    assert [w.trainable for w in merged.weights] == [w.trainable for w in make().weights]
    sides = [parts_of(backbone), parts_of(merged)]
    for index in range(backbone.num_layers):
        old, new = (side.block_weights(side.blocks[index], "float32") for side in sides)
        for name in projections:
            a, b = map(numpy, lora.factors[index][name])
            assert a.shape[1] == b.shape[0] == R
            change = np.zeros((a.shape[0], b.shape[1]))
            for r in range(R):
                change += alpha / R * np.outer(a[:, r], b[r])
            close(new[name][0], numpy(old[name][0]) + change, 1e-5, 1e-6)
            assert np.abs(change).max() > 0.01
            if old[name][1] is not None:
                assert np.array_equal(numpy(old[name][1]), numpy(new[name][1]))


@pytest.mark.parametrize("family", ["dinov3_gated", "dinov2_gated", "vit"])
def test_features_at_the_start_adapted_and_merged(family, tmp_path):
    make, projections = FAMILIES[family]
    backbone = make()
    size = backbone.image_shape[:2]
    lora = kd.LoRA(R, 2 * R, projections)
    extras = kd.EncoderExtras(lora=lora).build_for(backbone)
    start = features(backbone, images(size), extras)
    plain = features(backbone, images(size))
    assert np.array_equal(start, plain)
    randomize(lora.weights)
    adapted = features(backbone, images(size), extras)
    assert np.abs(adapted - plain).max() > 0.1
    merged = lora.merged(backbone)
    np.testing.assert_allclose(features(merged, images(size)), adapted, atol=1e-5)
    merged.save_to_preset(str(tmp_path / "preset"))
    loaded = keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))
    assert type(loaded) is type(backbone) and equal(values(loaded.weights), values(merged.weights))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "`rank` must be an integer of at least 1. Received: rank=0"),
        ({"rank": 2.5}, "`rank` must be an integer"),
        ({"alpha": 0}, "`alpha` must be.*Received: alpha=0"),
        ({"projections": ("query", "qkv")}, r"some of \('query',.*Received.*'qkv'"),
        ({"projections": ()}, "each once. Received"),
        ({"projections": ("up", "up")}, "each once. Received"),
        ({"projections": "query"}, "must be a list.*Received: projections='query'"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        kd.LoRA(**{"rank": R, **options})


def test_adapters_that_fit_no_matrix():
    with pytest.raises(ValueError, match="Received: gate, and a `DINOV3Backbone` that has query"):
        tiny.model(lora=kd.LoRA(R, projections=("query", "gate")))
    with pytest.raises(ValueError, match="rank=33, and a side of 32"):
        tiny.model(lora=kd.LoRA(33))
    with pytest.raises(
        ValueError, match="`lora` must be a `LoRA` layer, or None. Received: lora=8"
    ):
        tiny.model(lora=8)
    with pytest.raises(ValueError, match="`lora` must be a `LoRA` layer"):
        kd.EncoderExtras(lora="yes")
    lora = kd.LoRA(R).build_for(tiny.backbone())
    with pytest.raises(ValueError, match="the adapters of one backbone.*from_config"):
        lora.build_for(tiny.backbone())


def test_settings_without_their_weights_are_not_used():
    with pytest.raises(ValueError, match="no weights yet"):
        kd.encode(tiny.backbone(), images(), extras=kd.EncoderExtras(lora=kd.LoRA(R)))


def test_config():
    lora = kd.LoRA(R, 6.5, ["up"])
    assert kd.LoRA.from_config(lora.get_config()).get_config() == lora.get_config()
    extras = kd.EncoderExtras(lora=lora)
    copy = kd.EncoderExtras.from_config(extras.get_config())
    assert copy.lora is not lora and copy.lora.get_config() == lora.get_config()
    assert copy.get_config() == extras.get_config()


# In a model


def test_what_trains_and_its_roles():
    """Of the backbone the adapters, with the depths of their blocks, and the mask token, which
    released weights may lack; all else as ever."""
    own = tiny.backbone()
    model = tiny.model(backbone=own, lora=kd.LoRA(R))
    assert model.student is own and not own.trainable_variables
    heads = model.student_dino_head.weights + model.student_ibot_head.weights
    adapters = model.student_extras.lora.weights
    assert len(adapters) == own.num_layers * 2 * 2
    trained = [*heads, *adapters, model.student_extras.mask_token]
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in trained}
    optimizer = kd.AdamW(layerwise_decay=0.5)
    optimizer.build(model.trainable_variables)
    multipliers = [optimizer.multipliers(v) for v in adapters]
    assert [m.rate for m in multipliers] == [0.25] * 4 + [0.5] * 4
    assert all(m.decay == 1 and not m.is_last_layer for m in multipliers)
    assert {v.role.part for v in adapters} == {"backbone"}
    assert equal(values(model.teacher_extras.weights), values(model.student_extras.weights))


def test_what_the_extras_add_trains_as_well():
    extras = kd.EncoderExtras(num_register_tokens=2, untie_cls_norm=True)
    model = tiny.model(backbone=vit(), extras=extras, lora=kd.LoRA(R))
    added = model.student_extras
    trained = {id(weight) for weight in model.trainable_variables}
    for weight in (added.register_tokens, added.mask_token, added.cls_norm.gamma):
        assert id(weight) in trained
    assert not model.student.trainable_variables


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model before and after its first step, and the loaded file of it."""
    path = tmp_path_factory.mktemp("lora") / "model.keras"
    ema = kd.callbacks.TeacherEMA(0.75)
    lora = kd.LoRA(R, 8, ("query", "value", "down"))
    optimizer = kd.AdamW(1e-2, part_clipnorm=3.0)
    backbone = tiny.backbone()
    randomize([backbone.embeddings.mask_token])  # a norm's gradient at zero outweighs all others
    settings = {"lora": lora, "teacher_ema": ema, "remat": "blocks", "drop_path_rate": 0.3}
    model = tiny.model(optimizer, backbone=backbone, **settings)
    mask_token = values([backbone.embeddings.mask_token, model.student_extras.mask_token])
    assert equal(*([x.ravel()] for x in mask_token))
    before = {"student": model.student, "lora": model.student_extras.lora}
    before = {name: values(part.weights) for name, part in before.items()}
    model.fit(tiny.images(), batch_size=tiny.B, verbose=0)
    model.save(path)
    return model, before, keras.saving.load_model(path)


def test_a_step_moves_the_adapters_alone(trained):
    model, before, _ = trained
    assert equal(values(model.student.weights), before["student"])
    for teacher, start in zip(model.teacher.weights, before["student"], strict=True):
        np.testing.assert_allclose(numpy(teacher), start, rtol=1e-6)
    lora = model.student_extras.lora
    for factors in lora.factors:  # `A` has no gradient while `B` is zero, only its decay
        assert all(np.abs(numpy(b)).max() > 1e-3 for _, b in factors.values())
    sides = values(lora.weights), values(model.teacher_extras.lora.weights)
    for student, teacher, start in zip(*sides, before["lora"], strict=True):
        np.testing.assert_allclose(teacher, 0.75 * start + 0.25 * student, rtol=1e-5, atol=1e-7)
    mask_token = values([model.student.embeddings.mask_token, model.student_extras.mask_token])
    assert 1e-3 < np.abs(mask_token[0] - mask_token[1].reshape(mask_token[0].shape)).max() < 0.02


def test_the_export_has_the_features_of_what_was_learned(trained):
    model, _, _ = trained
    backbone, extras = model.learned
    learned = features(backbone, images(), extras)
    exported = model.export_backbone()
    assert all(weight.trainable for weight in exported.weights)
    np.testing.assert_allclose(features(exported, images()), learned, atol=1e-5)
    hub = numpy(exported({"pixel_values": ops.convert_to_tensor(images())}))
    np.testing.assert_allclose(hub, learned, atol=1e-4)
    assert np.abs(features(backbone, images()) - learned).max() > 1e-3
    mask_token = values([extras.mask_token, exported.embeddings.mask_token])
    assert equal(*([x.ravel()] for x in mask_token))
    assert not equal(*(values([b.embeddings.mask_token]) for b in (exported, backbone)))
    pictures = np.random.default_rng(0).integers(0, 256, (2, *tiny.GLOBAL, 3), "uint8")
    maps = attention_maps(exported, pictures), attention_maps(backbone, pictures, extras=extras)
    np.testing.assert_allclose(*maps, atol=1e-5)


def test_a_run_goes_on_from_a_file(trained):
    model, _, loaded = trained
    assert loaded.lora.get_config() == model.lora.get_config()
    assert equal(values(loaded.weights), values(model.weights))
    assert not loaded.student.trainable_variables
    roles = [[v.role for v in m.trainable_variables] for m in (loaded, model)]
    assert roles[0] == roles[1]
    first = values(model.student_extras.weights)
    logs = [m.train_on_batch(tiny.images(seed=4), return_dict=True) for m in (model, loaded)]
    assert logs[0] == logs[1]
    assert equal(values(loaded.weights), values(model.weights))
    assert not any(map(np.array_equal, first, values(model.student_extras.weights)))


def test_monitors_see_the_adapters():
    """Else the teacher would seem to be the student, which is an alarm."""
    model = tiny.model(lora=kd.LoRA(R))
    crops = {"global_crops": ops.convert_to_tensor(tiny.crops()["global_crops"])}
    randomize(model.teacher_extras.lora.weights)
    found = backend.compiled(lambda crops: look_at(model, crops))(crops)
    sides = [
        np.concatenate([x.ravel() for x in values([*backbone.weights, *extras.weights])])
        for backbone, extras in (
            (model.student, model.student_extras),
            (model.teacher, model.teacher_extras),
        )
    ]
    distance = np.linalg.norm(sides[0] - sides[1]) / np.linalg.norm(sides[0])
    assert distance > 1e-3
    assert float(numpy(found["teacher_distance"])) == pytest.approx(distance, rel=1e-3)
    assert float(numpy(found["feature_agreement"])) < 0.9999


def test_a_gram_teacher_copies_adapters():
    anchor = GramAnchor()
    model = tiny.model(lora=kd.LoRA(R), gram=anchor)
    randomize(model.teacher_extras.lora.weights)
    anchor.copy(model.teacher, model.teacher_extras)
    assert not any(weight.trainable for weight in anchor.extras.weights)
    expected = features(model.teacher, images(), model.teacher_extras)
    assert np.array_equal(features(anchor.backbone, images(), anchor.extras), expected)


def test_distillation_adapts_the_student_alone():
    teacher = tiny.backbone(hidden_dim=48)
    model = tiny.model(teacher=teacher, teacher_ema=None, lora=kd.LoRA(R))
    assert model.teacher_extras.lora is None and len(model.student_extras.lora.weights) == 8
    randomize(model.student_extras.lora.weights)
    expected = features(model.student, images(), model.student_extras)
    np.testing.assert_allclose(features(model.export_backbone(), images()), expected, atol=1e-5)
    with pytest.raises(ValueError, match="do not apply, nor its `lora`"):
        model.teacher_ema = kd.callbacks.TeacherEMA()


def test_mixed_precision():
    backbone = tiny.backbone(dtype="mixed_bfloat16")
    model = tiny.model(backbone=backbone, lora=kd.LoRA(R, projections=PLAIN))
    extras = model.teacher_extras
    randomize(extras.lora.weights)
    assert {keras.backend.standardize_dtype(w.dtype) for w in extras.weights} == {"float32"}
    tokens = kd.encode(model.teacher, images(), extras=extras)
    assert keras.backend.standardize_dtype(tokens.cls.dtype) == "bfloat16"
    plain = numpy(ops.cast(kd.encode(model.teacher, images()).patches, "float32"))
    exported = kd.encode(model.export_backbone(), images())
    exported, adapted = (numpy(ops.cast(x.patches, "float32")) for x in (exported, tokens))
    error = np.linalg.norm(exported - adapted) / np.linalg.norm(adapted)
    assert error < 0.02 < np.linalg.norm(plain - adapted) / np.linalg.norm(adapted)
