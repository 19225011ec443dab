import keras
import numpy as np
import pytest
from golden import Golden, close, numpy, value_and_gradients
from keras import ops

from keras_dinov3.losses import (
    DINOLoss,
    GramLoss,
    IBOTLoss,
    KoLeoLoss,
    dino_loss,
    gram_loss,
    ibot_loss,
    koleo_loss,
    l2_normalize,
)
from keras_dinov3.targets import pairwise_sum

B, T, S, K = 3, 2, 5, 7
N, D, TEACHER_D = 4, 6, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def slow_softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def probabilities(*shape, seed=1):
    return slow_softmax(2 * normal(*shape, seed=seed))


def crops_second(x):
    """Goldens have the crops first, we have the images first."""
    return np.swapaxes(x, 0, 1)


def compiled(function):
    """The function as the backend's trainers run it, once per way of compiling."""
    if keras.config.backend() == "jax":
        import jax

        return [jax.jit(function)]
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return [
            tf.function(function, autograph=False),
            tf.function(function, autograph=False, jit_compile=True),
        ]
    return [function]


# DINO


@pytest.mark.parametrize("case", ["s2t2", "s8t2"])
@pytest.mark.parametrize("ignore", [0, 1])
def test_dino_equals_the_reference(case, ignore):
    golden = Golden("fb_dino_loss")
    targets = ops.convert_to_tensor(crops_second(golden[f"{case}/teacher_probs"]))
    temperature = golden.hyperparameters["student_temp"]

    def value(logits):
        return ops.mean(dino_loss(targets, logits, temperature, bool(ignore)))

    loss, (gradient,) = value_and_gradients(value, crops_second(golden[f"{case}/student_logits"]))
    golden.check(loss, f"{case}/ignore{ignore}/loss")
    golden.check(crops_second(gradient), f"{case}/ignore{ignore}/grad_student_logits")


@pytest.mark.parametrize("case", ["sq", "rect"])
def test_dino_equals_the_seed_method(case):
    golden = Golden("seed_losses")
    targets = ops.convert_to_tensor(crops_second(golden[f"{case}/sinkhorn/temp0.07/iters3"]))

    def value(logits):
        return ops.mean(dino_loss(targets, logits, golden.hyperparameters["temp"], True))

    loss, (gradient,) = value_and_gradients(value, crops_second(golden[f"{case}/student_logits"]))
    golden.check(loss, f"{case}/dino_v1/loss")
    golden.check(crops_second(gradient), f"{case}/dino_v1/grad_student_logits")


@pytest.mark.parametrize("num_teacher, num_student", [(T, S), (S, T), (T, T), (1, S), (1, 1)])
def test_dino_equals_slow_loops(num_teacher, num_student):
    y_true, y_pred = probabilities(B, num_teacher, K), normal(B, num_student, K)
    for ignore in (False, True):
        expected = np.zeros(B)
        for b in range(B):
            pairs = []
            for t in range(num_teacher):
                for s in range(num_student):
                    log_probs = np.log(slow_softmax(y_pred[b, s].astype("float64") / 0.2))
                    if not (ignore and s == t):
                        pairs.append(-np.sum(y_true[b, t] * log_probs))
            expected[b] = np.mean(pairs) if pairs else np.nan
        if np.isfinite(expected).all():
            close(dino_loss(y_true, y_pred, 0.2, ignore), expected, 1e-6, 0)


def test_dino_does_not_stop_gradients_to_the_teacher():
    y_pred = ops.convert_to_tensor(normal(B, S, K))
    _, (gradient,) = value_and_gradients(
        lambda y_true: ops.sum(dino_loss(y_true, y_pred)), probabilities(B, T, K)
    )
    assert np.abs(gradient).min() > 0


# iBOT


def test_ibot_equals_the_reference_on_masked_patches():
    golden = Golden("fb_ibot_loss")
    masks, targets = golden["masks"], golden["masked/teacher_probs"]
    in_crop = np.repeat(masks.sum(axis=1), masks.sum(axis=1))
    np.testing.assert_allclose(golden["masked/masks_weight"], 1 / in_crop, rtol=1e-6)
    for case, weights in {
        "given": golden["masked/masks_weight"],
        "none": (1 / in_crop).astype("float32"),
        "arbitrary": golden["masked/masks_weight_arbitrary"],
    }.items():

        def value(logits, weights=weights):
            losses = ibot_loss(targets, logits, golden.hyperparameters["student_temp"])
            return ops.sum(losses * ops.convert_to_tensor(weights)) / len(masks)

        loss, (gradient,) = value_and_gradients(value, golden["masked/student_logits"])
        golden.check(loss, f"masked/weight_{case}/loss")
        golden.check(gradient, f"masked/weight_{case}/grad_student_logits")


def test_ibot_equals_the_reference_on_all_patches():
    golden = Golden("fb_ibot_loss")
    masks = golden["masks"].astype("float32")
    weights = masks / np.maximum(masks.sum(axis=1, keepdims=True), 1)
    weights = ops.convert_to_tensor(weights / len(masks))
    targets = golden["full/teacher_probs"]

    def value(logits):
        losses = ibot_loss(targets, logits, golden.hyperparameters["student_temp"])
        return ops.sum(losses * weights)

    loss, (gradient,) = value_and_gradients(value, golden["full/student_logits"])
    golden.check(loss, "full/loss")
    golden.check(gradient, "full/grad_student_logits")


def test_ibot_and_the_sum_with_dino_equal_the_seed_method():
    golden = Golden("seed_losses")
    settings = golden.hyperparameters
    class_targets = crops_second(golden["rect/sinkhorn/temp0.07/iters3"])
    patch_targets = golden["patch/sinkhorn/temp0.07/iters3"]

    def ibot(logits):
        return ops.mean(ibot_loss(patch_targets, logits, settings["ts"]))

    loss, (gradient,) = value_and_gradients(ibot, golden["patch/student_logits"])
    golden.check(loss, "patch/ibot/loss")
    golden.check(gradient, "patch/ibot/grad_student_logits")

    def dino(logits):
        return settings["wd"] * ops.mean(dino_loss(class_targets, logits, settings["temp"], True))

    def both(class_logits, patch_logits):
        return dino(class_logits) + settings["wi"] * ibot(patch_logits)

    class_logits = crops_second(golden["rect/student_logits"])
    loss, gradients = value_and_gradients(both, class_logits, golden["patch/student_logits"])
    golden.check(loss, "dino_v2/loss")
    golden.check(crops_second(gradients[0]), "dino_v2/grad_cls_logits")
    golden.check(gradients[1], "dino_v2/grad_patch_logits")
    golden.check(dino(ops.convert_to_tensor(class_logits)), "dino_v2/loss_cls_only")


def test_ibot_equals_slow_loops_for_any_leading_axes():
    y_true, y_pred = probabilities(B, N, K), normal(B, N, K)
    expected = np.zeros((B, N))
    for b in range(B):
        for n in range(N):
            log_probs = np.log(slow_softmax(y_pred[b, n].astype("float64") / 0.2))
            expected[b, n] = -np.sum(y_true[b, n] * log_probs)
    close(ibot_loss(y_true, y_pred, 0.2), expected, 1e-6, 0)
    close(ibot_loss(y_true[0], y_pred[0], 0.2), expected[0], 1e-6, 0)
    close(ibot_loss(y_true[0, 0], y_pred[0, 0], 0.2), expected[0, 0], 1e-6, 0)


def test_padded_slots_change_nothing_in_ibot():
    y_true, y_pred = probabilities(N, K), normal(N, K)
    weights = np.linspace(0.1, 0.7, N, dtype="float32")

    def value(y_true, y_pred, weights):
        losses = ibot_loss(y_true, y_pred) * weights
        return pairwise_sum(losses[:, None])[0]

    alone = numpy(value(*map(ops.convert_to_tensor, (y_true, y_pred, weights))))
    _, (grad_alone,) = value_and_gradients(
        lambda y: value(ops.convert_to_tensor(y_true), y, ops.convert_to_tensor(weights)), y_pred
    )
    for num_padded in (1, 3, 9):
        more_true = np.concatenate([y_true, np.zeros((num_padded, K), "float32")])
        more_pred = np.concatenate([y_pred, 1e4 * normal(num_padded, K, seed=5)])
        more_weights = np.concatenate([weights, np.zeros(num_padded, "float32")])

        def padded(y, more_true=more_true, more_weights=more_weights):
            return value(ops.convert_to_tensor(more_true), y, ops.convert_to_tensor(more_weights))

        loss, (gradient,) = value_and_gradients(padded, more_pred)
        assert np.array_equal(loss, alone)
        close(gradient[:N], grad_alone, 1e-6, 0)
        assert not gradient[N:].any()
        assert not numpy(ibot_loss(more_true, more_pred))[N:].any()


# KoLeo


@pytest.mark.parametrize("case", ["x1", "x2"])
@pytest.mark.parametrize(
    "variant, top_k", [("koleo", 1), ("dist_topk1", 1), ("dist_topk2", 2), ("dist_topk2_group", 2)]
)
def test_koleo_equals_the_reference(case, variant, top_k):
    golden = Golden("fb_koleo")
    loss, (gradient,) = value_and_gradients(
        lambda x: ops.mean(koleo_loss(x, top_k=top_k)), golden[case]
    )
    golden.check(loss, f"{case}/{variant}/loss")
    golden.check(gradient, f"{case}/{variant}/grad")


def test_koleo_of_duplicates_is_finite():
    golden = Golden("fb_koleo")
    loss, (gradient,) = value_and_gradients(lambda x: ops.mean(koleo_loss(x)), golden["dup"])
    golden.check(loss, "dup/koleo/loss", rtol=1e-4)
    assert np.isfinite(gradient).all()


def test_koleo_equals_the_seed_method():
    golden = Golden("seed_losses")
    loss, (gradient,) = value_and_gradients(
        lambda x: ops.mean(koleo_loss(x, distance="cosine")), golden["koleo/z"]
    )
    golden.check(loss, "koleo/loss")
    golden.check(gradient, "koleo/grad_z")


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_koleo_equals_slow_loops(distance, top_k):
    x = normal(7, D)
    z = x.astype("float64") / np.linalg.norm(x.astype("float64"), axis=1, keepdims=True)
    expected = np.zeros(7)
    for i in range(7):
        others = sorted((j for j in range(7) if j != i), key=lambda j: -(z[i] @ z[j]))[:top_k]
        for j in others:
            if distance == "euclidean":
                separation = np.linalg.norm(z[i] - z[j] + 1e-8) + 1e-8
            else:
                separation = np.sqrt(max(2 - 2 * z[i] @ z[j], 1e-8))
            expected[i] -= np.log(separation) / top_k
    close(koleo_loss(x, top_k, distance), expected, 1e-5, 1e-6)
    close(koleo_loss(100 * x, top_k, distance), expected, 1e-5, 1e-6)  # only directions count


def test_koleo_gradient_moves_both_ends():
    """Image 2 is nobody's neighbour but has one; image 0 is the neighbour of both others."""
    x = np.array([[1.0, 0.2, 0.0], [1.0, 0.1, 0.1], [0.9, 0.9, 0.1]], "float32")
    _, (gradient,) = value_and_gradients(lambda x: koleo_loss(x)[2], x)
    assert np.abs(gradient[2]).max() > 0.1
    assert np.abs(gradient[0]).max() > 0.1
    assert not gradient[1].any()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_koleo_never_takes_an_image_as_its_own_neighbour(distance):
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]], "float32")  # cosine -1, the least possible
    close(koleo_loss(opposite, distance=distance), np.full(2, -np.log(2)), 1e-6, 0)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_koleo_of_equal_or_zero_features_is_finite(distance):
    for x in (np.ones((3, D), "float32"), np.zeros((3, D), "float32")):
        loss, (gradient,) = value_and_gradients(
            lambda x: ops.mean(koleo_loss(x, distance=distance)), x
        )
        assert np.isfinite(loss)
        assert np.isfinite(gradient).all()


def test_koleo_gradient_of_near_duplicates():
    """1e-5 apart, `"euclidean"` still pushes; `"cosine"` is below its smallest distance."""
    x = np.array([[1.0, 0.0], [1.0, 1e-5], [-1.0, 0.5]], "float32")
    for distance, least, most in [("euclidean", 1e4, 1e6), ("cosine", 0, 10)]:
        _, (gradient,) = value_and_gradients(
            lambda x, distance=distance: ops.sum(koleo_loss(x, distance=distance)), x
        )
        assert least <= np.abs(gradient).max() <= most


# Gram


NEGATIVES = {"none": "keep", "remove_neg": "remove", "remove_only_teacher_neg": "remove_teacher"}


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("per_image", [0, 1])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_gram_equals_the_reference(normalize, per_image, negatives):
    golden = Golden("fb_gram_loss")
    teacher = golden["teacher_feats"]

    def value(student):
        return ops.mean(
            gram_loss(teacher, student, bool(normalize), bool(per_image), NEGATIVES[negatives])
        )

    loss, (gradient,) = value_and_gradients(value, golden["student_feats"])
    golden.check(loss, f"norm{normalize}_img{per_image}_{negatives}/loss")
    golden.check(gradient, f"norm{normalize}_img{per_image}_{negatives}/grad_student_feats")


def test_gram_equals_the_reference_on_a_list_of_patches():
    golden = Golden("fb_gram_loss")
    width = golden["teacher_feats"].shape[-1]
    teacher = golden["teacher_feats"].reshape(-1, width)
    loss, (gradient,) = value_and_gradients(
        lambda student: gram_loss(teacher, student, per_image=False),
        golden["student_feats"].reshape(-1, width),
    )
    golden.check(loss, "flat2d/loss")
    golden.check(gradient, "flat2d/grad_student_feats")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher"])
def test_gram_equals_slow_loops_also_for_another_width(normalize, negatives):
    y_true, y_pred = normal(B, N, TEACHER_D, seed=1), normal(B, N, D)

    def similarity(a, b, remove):
        value = a @ b
        if normalize:
            value /= np.linalg.norm(a) * np.linalg.norm(b)
        return max(value, 0) if remove else value

    def mean_square(teacher, student):
        squares = [
            (
                similarity(student[i], student[j], negatives == "remove")
                - similarity(teacher[i], teacher[j], negatives != "keep")
            )
            ** 2
            for i in range(len(teacher))
            for j in range(len(teacher))
        ]
        return np.mean(squares)

    expected = [mean_square(t, s) for t, s in zip(y_true, y_pred, strict=True)]
    close(gram_loss(y_true, y_pred, normalize, True, negatives), np.array(expected), 1e-5, 0)
    expected = mean_square(y_true.reshape(-1, TEACHER_D), y_pred.reshape(-1, D))
    close(gram_loss(y_true, y_pred, normalize, False, negatives), np.array(expected), 1e-5, 0)


@pytest.mark.parametrize("per_image", [True, False])
def test_gram_of_chosen_patches_is_that_of_these_alone(per_image):
    y_true, y_pred = normal(B, N, D, seed=1), normal(B, N, D)
    chosen = np.zeros((B, N), "float32")
    chosen[:, 1:4] = 1
    found = gram_loss(y_true, y_pred, per_image=per_image, weights=chosen)
    expected = gram_loss(y_true[:, 1:4], y_pred[:, 1:4], per_image=per_image)
    close(found, numpy(expected), 1e-5, 1e-7)
    none = gram_loss(y_true, y_pred, per_image=per_image, weights=0 * chosen)
    close(none, 0 * numpy(expected), 0, 0)
    close(
        gram_loss(y_true, y_pred, per_image=per_image, weights=3 + 0 * chosen),
        numpy(gram_loss(y_true, y_pred, per_image=per_image)),
        1e-5,
        1e-7,
    )


def test_gram_of_equal_or_rotated_features_is_zero():
    x = normal(B, N, D)
    rotation = np.linalg.qr(normal(D, D, seed=2))[0]
    close(gram_loss(x, x @ rotation), np.zeros(B), 0, 1e-12)


# What all share


def test_l2_normalize():
    x = normal(B, D)
    x[1] *= 1e-13 / np.linalg.norm(x[1])
    y = numpy(l2_normalize(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), [1, 0.1, 1], rtol=1e-5)
    _, (gradient,) = value_and_gradients(
        lambda x: ops.sum(l2_normalize(x)), np.zeros((B, D), "float32")
    )
    assert np.isfinite(gradient).all()


ALL = {
    "dino": (dino_loss, probabilities(B, T, K), normal(B, S, K), (B,)),
    "ibot": (ibot_loss, probabilities(B, N, K), normal(B, N, K), (B, N)),
    "koleo": (lambda _, y_pred: koleo_loss(y_pred), normal(B, D), normal(B, D), (B,)),
    "gram": (gram_loss, normal(B, N, D, seed=1), normal(B, N, D), (B,)),
}


@pytest.mark.parametrize("name", ALL)
def test_float32_from_bfloat16(name):
    function, y_true, y_pred, shape = ALL[name]
    y_true, y_pred = (ops.cast(y, "bfloat16") for y in (y_true, y_pred))
    loss = function(y_true, y_pred)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    assert tuple(loss.shape) == shape
    exact = function(ops.cast(y_true, "float32"), ops.cast(y_pred, "float32"))
    close(loss, numpy(exact), 1e-6, 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_same_compiled_with_a_gradient(name):
    function, y_true, y_pred, _ = ALL[name]
    loss, (gradient,) = value_and_gradients(lambda y: ops.sum(function(y_true, y)), y_pred)
    y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)

    def value(y):
        return ops.sum(function(y_true, y))

    if keras.config.backend() == "jax":
        import jax

        runs = compiled(jax.value_and_grad(value))
    elif keras.config.backend() == "tensorflow":
        import tensorflow as tf

        def with_gradient(y):
            with tf.GradientTape() as tape:
                tape.watch(y)
                loss = value(y)
            return loss, tape.gradient(loss, y)

        runs = compiled(with_gradient)
    else:
        import torch

        def with_gradient(y):
            gradient, loss = torch.func.grad_and_value(value)(y)
            return loss, gradient

        runs = [with_gradient]
    for run in runs:
        actual_loss, actual_gradient = run(y_pred)
        close(actual_loss, loss, 1e-5, 0)
        close(actual_gradient, gradient, 1e-4, 1e-6)


def test_temperatures_may_be_tensors():
    temperature = ops.convert_to_tensor(0.2)
    y_true, y_pred = probabilities(B, T, K), normal(B, T, K)
    close(dino_loss(y_true, y_pred, temperature), numpy(dino_loss(y_true, y_pred, 0.2)), 1e-6, 0)
    close(ibot_loss(y_true, y_pred, temperature), numpy(ibot_loss(y_true, y_pred, 0.2)), 1e-6, 0)


# The classes


CLASSES = [
    (DINOLoss, dict(student_temperature=0.3, ignore_diagonal=True), "dino", dino_loss),
    (IBOTLoss, dict(student_temperature=0.3), "ibot", ibot_loss),
    (KoLeoLoss, dict(top_k=2, distance="cosine"), "koleo", lambda _, y, **k: koleo_loss(y, **k)),
    (GramLoss, dict(normalize=False, per_image=True, negatives="remove"), "gram", gram_loss),
]


@pytest.mark.parametrize("cls, arguments, name, function", CLASSES)
def test_class_reduces_the_function(cls, arguments, name, function):
    _, y_true, y_pred, shape = ALL[name]
    values = numpy(function(y_true, y_pred, **arguments))
    close(cls(**arguments)(y_true, y_pred), values.mean(), 1e-6, 0)
    close(cls(**arguments, reduction="none")(y_true, y_pred), values, 1e-6, 0)
    weights = np.linspace(0.5, 2.0, values.size, dtype="float32").reshape(shape)
    weighted = cls(**arguments, reduction="sum")(y_true, y_pred, sample_weight=weights)
    close(weighted, np.sum(values * weights), 1e-6, 0)


@pytest.mark.parametrize("cls, arguments, name, function", CLASSES)
def test_class_config_round_trip(cls, arguments, name, function):
    loss = cls(**arguments, reduction="sum", name="term")
    config = loss.get_config()
    assert config == {**arguments, "reduction": "sum", "name": "term"}
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(again) is cls
    assert again.get_config() == config
    assert {key: getattr(again, key) for key in arguments} == arguments


@pytest.mark.parametrize("cls, arguments, name, function", CLASSES)
def test_class_stays_float32(cls, arguments, name, function):
    _, y_true, y_pred, _ = ALL[name]
    floatx = keras.config.floatx()
    keras.config.set_floatx("bfloat16")
    try:
        loss = cls(**arguments)(y_true, y_pred)
    finally:
        keras.config.set_floatx(floatx)
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    close(loss, numpy(function(y_true, y_pred, **arguments)).mean(), 1e-6, 0)


def test_koleo_class_needs_no_target():
    y_pred = normal(B, D)
    close(KoLeoLoss()(None, y_pred), numpy(koleo_loss(y_pred)).mean(), 1e-6, 0)


def test_class_trains_a_model():
    inputs = keras.Input((D,))
    model = keras.Model(inputs, keras.layers.Dense(D)(inputs))
    model.compile(optimizer="sgd", loss=KoLeoLoss())
    x = normal(8, D)
    history = model.fit(x, x, batch_size=8, epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]


# Errors


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dino_loss(normal(B, 1, K), normal(B, 1, K), 0.1, True), "needs two crops on one"),
        (
            lambda: dino_loss(normal(B, K), normal(B, S, K)),
            "`y_true` must have shape (B, crops, K)",
        ),
        (
            lambda: dino_loss(normal(B, T, K), normal(2, S, K)),
            "y_true.shape=(3, 2, 7), y_pred.shape",
        ),
        (lambda: dino_loss(normal(B, T, K), normal(B, S, 6)), "the same images and prototypes"),
        (
            lambda: dino_loss(normal(B, T, K), normal(B, S, K), 0),
            "must be greater than 0. Received",
        ),
        (lambda: ibot_loss(normal(N, K), normal(B, N, K)), "`y_pred` must have shape (..., K)"),
        (lambda: ibot_loss(normal(N, K), normal(5, K)), "the same patches and prototypes"),
        (lambda: ibot_loss(normal(N, K), normal(N, K), -1.0), "Received: student_temperature=-1.0"),
        (
            lambda: koleo_loss(normal(1, D)),
            "at least 2 images. Received: features.shape=(1, 6). Tu",
        ),
        (
            lambda: koleo_loss(normal(B, D), 3),
            "needs at least 4 images. Received: features.shape=(",
        ),
        (lambda: koleo_loss(normal(B, D), 3), "Largest `top_k`: 2."),
        (
            lambda: koleo_loss(normal(B, D), 0),
            "`top_k` must be an integer of at least 1. Received:",
        ),
        (
            lambda: koleo_loss(normal(B, N, D)),
            "`features` must have shape (B, D). Received: feature",
        ),
        (lambda: koleo_loss(normal(B, D), distance="l1"), "Received: distance='l1'."),
        (lambda: gram_loss(normal(B, N, D), normal(B, 5, D)), "the same images and patches"),
        (lambda: gram_loss(normal(N, D), normal(N, D)), "`y_true` must have shape (B, N, D). Rec"),
        (
            lambda: gram_loss(normal(N, D), normal(1, N, D), per_image=False),
            "`y_pred` must have shape of the rank of `y_true`",
        ),
        (lambda: gram_loss(normal(B, N, D), normal(B, N, D), negatives="drop"), "negatives='drop'"),
        (lambda: DINOLoss(student_temperature=0), "`student_temperature` must be greater than 0"),
        (lambda: IBOTLoss(student_temperature=0), "`student_temperature` must be greater than 0"),
        (lambda: KoLeoLoss(top_k=1.5), "Received: top_k=1.5."),
        (lambda: GramLoss(negatives=None), "Received: negatives=None."),
        (
            lambda: GramLoss(per_image=False)(normal(B, N, D), normal(B, N, D), np.ones(B)),
            "it needs `GramLoss(per_image=True)`",
        ),
    ],
)
def test_bad_calls_are_explained(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
