import json

import keras
import numpy as np
import pytest
import tiny
from golden import close, numpy, value_and_gradients, variable_gradients
from keras import ops

import keras_dinov3 as kd
from keras_dinov3 import backend
from keras_dinov3.losses import dino_loss, ibot_loss
from keras_dinov3.prototypes import (
    FactoredLogits,
    FactoredTargets,
    dino_losses,
    ibot_losses,
    project,
    project_all,
)
from keras_dinov3.targets import SoftmaxCentering, sinkhorn_knopp

B, G, L, M, D, K = 3, 2, 4, 7, 5, 24
CHUNKS = [6, 24]  # prototypes in each: four chunks, and one
FIRST_BATCH = {"initial": "first_batch"}


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype("float32")


def kernel(seed=0, scale=0.5):
    return (scale * np.random.default_rng(100 + seed).normal(size=(D, K))).astype("float32")


def factored(vectors, kernel, chunk):
    kernel = ops.reshape(ops.convert_to_tensor(kernel), (kernel.shape[0], -1, chunk))
    return FactoredLogits(ops.convert_to_tensor(vectors), kernel)


def whole(factors):
    """All chunks of logits or of probabilities, side by side."""
    logits = factors.logits if isinstance(factors, FactoredTargets) else factors
    chunks = [numpy(factors.chunk(i)) for i in range(logits.kernel.shape[1])]
    return np.concatenate(chunks, axis=-1)


def matmul(vectors, kernel):
    return ops.matmul(ops.convert_to_tensor(vectors), ops.convert_to_tensor(kernel))


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


def ways_to_run(function):
    """As it is and compiled; on JAX only compiled, since there each single operation would be."""
    is_jax = keras.config.backend() == "jax"
    return compiled(function) if is_jax else {function, *compiled(function)}


# Targets


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("num_iterations", [1, 3, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_sinkhorn_in_chunks_is_sinkhorn(chunk, num_iterations, weighted):
    vectors, columns = unit(B, G, D), kernel()
    weights = np.array([[1, 0.5], [2, 0], [1, 3]], "float32") if weighted else None
    logits = factored(vectors, columns, chunk)
    assert logits.shape == (B, G, K)
    targets = sinkhorn_knopp(logits, 0.06, num_iterations, weights)
    expected = sinkhorn_knopp(matmul(vectors, columns), 0.06, num_iterations, weights)
    close(whole(targets), numpy(expected), 5e-6, 0)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sinkhorn_in_chunks_survives_large_logits_and_dead_prototypes(chunk):
    vectors, columns = unit(M, D), kernel(scale=300)
    columns[:, 3] *= 40  # every sample's scores here are far from all others
    columns[:, 5] = 1e-3
    columns[:, 6:9] -= 900 * vectors[0][:, None]
    expected = sinkhorn_knopp(matmul(vectors, columns), 0.05)
    targets = sinkhorn_knopp(factored(vectors, columns, chunk), 0.05)
    # Scores reach 1e5, whose rounding alone changes shares by a hundredth. (XLA rounds a product
    # that is made anew in another place differently.)
    np.testing.assert_allclose(whole(targets), numpy(expected), rtol=0, atol=0.05)
    np.testing.assert_allclose(whole(targets).sum(axis=-1), 1, rtol=0, atol=0.05)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_padded_slots_change_nothing_in_chunks(chunk):
    vectors, columns = unit(M, D), kernel()
    expected = [whole(sinkhorn_knopp(factored(vectors, columns, chunk), 0.06))]
    expected += centered(factored(vectors, columns, chunk))
    weights = np.r_[np.ones(M), np.zeros(4)]
    for garbage in (0.0, np.nan, np.inf, 3e38):
        padding = np.full((4, D), garbage, "float32")
        padded = factored(np.concatenate([vectors, padding]), columns, chunk)
        actual = [whole(sinkhorn_knopp(padded, 0.06, weights=weights))]
        actual += centered(padded, weights)
        for shares, wanted in zip(actual[:2], expected[:2], strict=True):
            close(shares[:M], wanted, 5e-6, 0)
            assert not shares[M:].any()
        close(actual[2], expected[2], 1e-6, 0)
    nothing = sinkhorn_knopp(factored(vectors, columns, chunk), 0.06, weights=np.zeros(M))
    assert not whole(nothing).any()


def centered(logits, weights=None):
    """Targets around the centre that a first call has left, and the centre after the second."""
    layer = SoftmaxCentering()
    layer.build((None, K))
    layer(logits, 0.06, weights=weights)
    targets = whole(layer(logits, 0.06, weights=weights))
    return [targets, numpy(layer.center)]


def test_a_bad_vector_is_not_hidden():
    vectors = unit(M, D)
    vectors[1, 2] = np.nan
    targets = sinkhorn_knopp(factored(vectors, kernel(), 6), 0.06, weights=np.ones(M))
    assert np.isnan(whole(targets)).any()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("settings", [{}, FIRST_BATCH])
@pytest.mark.parametrize("weighted", [False, True])
def test_centering_in_chunks_is_centering(chunk, settings, weighted):
    alike, layer = SoftmaxCentering(0.8, **settings), SoftmaxCentering(0.8, **settings)
    layer.build((None, K))
    weights = np.array([[1, 0.5], [2, 0], [1, 3]], "float32") if weighted else None
    for step in range(3):
        vectors, columns = unit(B, G, D, seed=step), kernel(step)
        targets = layer(factored(vectors, columns, chunk), 0.06, weights=weights)
        expected = alike(matmul(vectors, columns), 0.06, weights=weights)
        close(whole(targets), numpy(expected), 5e-6, 0)
        close(layer.center, numpy(alike.center), 1e-6, 0)
    before = numpy(layer.center)
    layer(factored(unit(B, G, D, seed=9), columns, chunk), 0.06, training=False)
    np.testing.assert_array_equal(numpy(layer.center), before)


# Losses, with gradients of everything that goes in


def make_targets(kind):
    """A function of logits and weights; its layer is made here, outside of compiled functions."""
    layer = SoftmaxCentering()
    layer.build((None, K))
    layer.center.assign(np.linspace(-0.1, 0.2, K))

    def targets(logits, weights=None):
        if kind == "sinkhorn":
            return sinkhorn_knopp(logits, 0.05, weights=weights)
        return layer(logits, 0.05, weights=weights, training=False)

    return targets


def check_gradients(in_chunks, at_once, student, teacher):
    """Both functions have one value and one gradient of the student; the teacher has none."""
    arrays = [*student, *teacher]
    expected, gradients = value_and_gradients(compiled(at_once)[0], *arrays)
    gradients = gradients[: len(student)]
    for function in ways_to_run(in_chunks):
        actual, others = value_and_gradients(function, *arrays)
        close(actual, expected, 1e-6, 0)
        for gradient, wanted in zip(others, gradients, strict=False):
            assert np.abs(wanted).max() > 1e-3
            close(gradient, wanted, 1e-5, 0)
        assert not any(g is not None and g.any() for g in others[len(student) :])


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_dino_in_chunks_is_dino(chunk, ignore_diagonal, kind):
    image_weights = {"global": [1.0, 2.0, 4.0], "local": [0.5, -2.0, 3.0]}
    targets = make_targets(kind)

    def loss(logits_of, global_vectors, local_vectors, kernel, teacher_vectors, teacher_kernel):
        losses = dino_losses(
            targets(logits_of(teacher_vectors, teacher_kernel)),
            {
                "global": logits_of(global_vectors, kernel),
                "local": logits_of(local_vectors, kernel),
            },
            0.1,
            ignore_diagonal,
        )
        assert [tuple(losses[name].shape) for name in ("global", "local")] == [(B,), (B,)]
        return sum(
            ops.sum(losses[name] * ops.convert_to_tensor(image_weights[name])) for name in losses
        )

    check_gradients(
        lambda *arrays: loss(lambda v, k: factored(v, k, chunk), *arrays),
        lambda *arrays: loss(matmul, *arrays),
        [unit(B, G, D), unit(B, L, D, seed=1), kernel()],
        [unit(B, G, D, seed=2), kernel(2)],
    )


def test_dino_of_one_kind_of_crops_and_of_none():
    targets = sinkhorn_knopp(factored(unit(B, G, D, seed=2), kernel(2), 6), 0.05)
    local = factored(unit(B, L, D, seed=1), kernel(), 6)
    expected = dino_loss(
        sinkhorn_knopp(matmul(unit(B, G, D, seed=2), kernel(2)), 0.05),
        matmul(unit(B, L, D, seed=1), kernel()),
    )
    losses = dino_losses(targets, {"local": local}, 0.1, ignore_diagonal=True)
    close(losses["local"], numpy(expected), 1e-6, 0)
    assert dino_losses(targets, {}, 0.1, ignore_diagonal=True) == {}


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_ibot_in_chunks_is_ibot_without_its_padding(chunk, kind):
    slot_weights, num_padded = np.linspace(0.1, 0.9, M, dtype="float32"), 3
    padding = np.full((num_padded, D), np.nan, "float32")
    weights = np.r_[np.ones(M), np.zeros(num_padded)].astype("float32")
    all_weights = ops.convert_to_tensor(np.r_[slot_weights, np.zeros(num_padded, "float32")])
    targets_of = make_targets(kind)

    def in_chunks(vectors, kernel, teacher_vectors, teacher_kernel):
        logits = factored(vectors, kernel, chunk)
        teacher_logits = factored(teacher_vectors, teacher_kernel, chunk)
        targets = targets_of(teacher_logits, ops.convert_to_tensor(weights))
        return ops.sum(ibot_losses(targets, logits, 0.1) * all_weights)

    def at_once(vectors, kernel, teacher_vectors, teacher_kernel):
        targets = targets_of(matmul(teacher_vectors[:M], teacher_kernel))
        losses = ibot_loss(targets, matmul(vectors[:M], kernel))
        return ops.sum(losses * ops.convert_to_tensor(slot_weights))

    student = [np.concatenate([unit(M, D), 7 * unit(num_padded, D, seed=5)]), kernel()]
    teacher = [np.concatenate([unit(M, D, seed=2), padding]), kernel(2)]
    check_gradients(in_chunks, at_once, student, teacher)
    targets = targets_of(factored(teacher[0], kernel(2), chunk), weights)
    losses = numpy(ibot_losses(targets, factored(student[0], kernel(), chunk), 0.1))
    assert not losses[M:].any()


def test_temperatures_that_change_reach_a_compiled_step():
    vectors, columns = unit(M, D), kernel()

    def function(student_temperature, teacher_temperature):
        targets = sinkhorn_knopp(factored(vectors, columns, 6), teacher_temperature)
        return ibot_losses(targets, factored(vectors, columns, 6), student_temperature)

    for run in compiled(function):
        for temperatures in ((0.1, 0.05), (0.2, 0.07)):
            targets = sinkhorn_knopp(matmul(vectors, columns), temperatures[1])
            expected = ibot_loss(targets, matmul(vectors, columns), temperatures[0])
            actual = run(*(ops.convert_to_tensor(np.float32(t)) for t in temperatures))
            close(actual, numpy(expected), 2e-6, 0)


def test_large_student_logits_in_chunks():
    vectors, columns = unit(M, D), kernel(scale=3000)
    targets = sinkhorn_knopp(factored(unit(M, D, seed=2), kernel(2), 6), 0.05)
    expected = ibot_loss(ops.convert_to_tensor(whole(targets)), matmul(vectors, columns), 0.1)
    close(ibot_losses(targets, factored(vectors, columns, 6), 0.1), numpy(expected), 1e-6, 0)


def test_chunks_of_a_bfloat16_head_are_its_logits():
    head = kd.DINOHead(K, 11, D, 2, dtype="mixed_bfloat16")
    tokens = ops.convert_to_tensor(unit(M, 13))
    logits = head(tokens)
    chunks = project(head, tokens, 6)
    assert keras.backend.standardize_dtype(chunks.vectors.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(chunks.kernel.dtype) == "float32"
    close(whole(chunks), numpy(ops.cast(logits, "float32")), 2**-8, 0)
    targets = sinkhorn_knopp(chunks, 0.05)
    close(whole(targets), numpy(sinkhorn_knopp(logits, 0.05)), 0.02, 0)


# Memory


def sizes_of(function, *arrays):
    """The number of elements of every array that `function` and its gradient make."""
    if keras.config.backend() == "torch":
        from torch.utils._python_dispatch import TorchDispatchMode

        sizes = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                result = operation(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in keras.tree.flatten(result) if hasattr(x, "numel"))
                return result

        with Watch():
            value_and_gradients(function, *arrays)
        return sizes
    if keras.config.backend() == "jax":
        import jax

        def walk(jaxpr):
            for equation in jaxpr.eqns:
                yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
                for parameter in jax.tree.leaves([*equation.params.values()], is_leaf=is_jaxpr):
                    if is_jaxpr(parameter):
                        yield from walk(getattr(parameter, "jaxpr", parameter))

        def is_jaxpr(x):
            return hasattr(x, "eqns")

        gradient = jax.grad(function, argnums=tuple(range(len(arrays))))
        return list(walk(jax.make_jaxpr(gradient)(*arrays).jaxpr))
    import tensorflow as tf

    @tf.function(autograph=False)
    def step(*tensors):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        return [g for g in tape.gradient(value, tensors) if g is not None]

    graph = step.get_concrete_function(*map(tf.convert_to_tensor, arrays)).graph.as_graph_def(
        add_shapes=True
    )
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return [
        int(np.prod([d.size for d in shape.dim]))
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
    ]


@pytest.mark.parametrize("kind", ["sinkhorn", "centering"])
def test_no_array_of_all_logits_is_made(kind):
    num_rows, chunk = 4 * D, 2
    arrays = [unit(num_rows, D), kernel(), unit(num_rows, D, seed=1), kernel(1)]
    targets_of = make_targets(kind)

    def loss(logits_of, vectors, kernel, teacher_vectors, teacher_kernel):
        targets = targets_of(logits_of(teacher_vectors, teacher_kernel))
        return ops.sum(ibot_losses(targets, logits_of(vectors, kernel), 0.1))

    sizes = sizes_of(lambda *a: loss(lambda v, k: factored(v, k, chunk), *a), *arrays)
    assert D * K in sizes and num_rows * chunk in sizes  # it has looked into loops and gradients
    assert max(sizes) == D * K  # the kernel's gradient
    assert max(sizes_of(lambda *a: loss(matmul, *a), *arrays)) == num_rows * K


# The whole model

SAME = {"num_patch_prototypes": tiny.K}


@pytest.mark.parametrize(
    "chunk, settings",
    [
        (2, {}),
        (1, {"ignore_diagonal": False, "local_weight": 0.3}),
        (20, SAME),
        (5, {**SAME, "centering": SoftmaxCentering(0.5)}),
    ],
)
def test_losses_and_gradients_of_the_model_are_the_same(chunk, settings):
    ready = {k: ops.convert_to_tensor(x) for k, x in tiny.crops(masked=0.3).items()}
    results = {}
    for chunk_size in (None, chunk):
        model = tiny.model(
            masking=None, augmentation=None, prototype_chunk_size=chunk_size, **settings
        )
        names = [v.path for v in model.trainable_variables]

        def total(model=model):
            return model.loss_and_terms(model(ready, training=True), training=True)[0]

        results[chunk_size] = variable_gradients(total, model.trainable_variables)
    (loss, gradients), (chunk_loss, chunk_gradients) = results.values()
    close(chunk_loss, loss, 2e-6, 0)
    largest = max(np.abs(g).max() for g in gradients if g is not None)
    for name, actual, expected in zip(names, chunk_gradients, gradients, strict=True):
        assert (actual is None) == (expected is None), name
        if expected is not None:  # key biases have a gradient of rounding errors alone
            close(actual, expected, 1e-5, 1e-7 * largest, name)


def test_padded_slots_change_no_loss_of_the_model():
    ready = tiny.crops(masked=0.3)
    num_masked = int(ready["masks"].sum())
    losses = []
    for slots in (num_masked, num_masked + 7, None):
        model = tiny.model(
            masking=None, augmentation=None, max_masked_patches=slots, prototype_chunk_size=2
        )
        tensors = {name: ops.convert_to_tensor(array) for name, array in ready.items()}
        total, terms = model.loss_and_terms(model(tensors))
        losses.append([numpy(ops.stop_gradient(x)) for x in (total, *terms.values())])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_crops_through_the_head_together(chunk_size):
    head = kd.DINOHead(12, hidden_dim=16, bottleneck_dim=8)
    rng = np.random.default_rng(0)
    groups = [ops.convert_to_tensor(rng.random((5, n, 10)), "float32") for n in (2, 3, 1)]
    head(groups[0])
    for count in (1, 3):
        found = project_all(head, groups[:count], chunk_size)
        assert len(found) == count
        for logits, tokens in zip(found, groups, strict=False):
            expected = project(head, tokens, chunk_size)
            pairs = zip(keras.tree.flatten(logits), keras.tree.flatten(expected), strict=True)
            for actual, array in pairs:
                np.testing.assert_allclose(numpy(actual), numpy(array), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", SoftmaxCentering(0.5)])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_model_in_chunks_trains_as_one_without(dtype, centering):
    # KoLeo has no prototypes, and is the logarithm of distances, which bfloat16 hardly knows.
    koleo_weight = 0.1 if dtype == "float32" else 0.0
    histories = []
    for chunk_size in (None, 2):
        keras.utils.set_random_seed(0)  # for the backbone's weights
        model = tiny.model(
            keras.optimizers.SGD(0.01),
            backbone=tiny.backbone(dtype=dtype),
            centering=centering,
            koleo_weight=koleo_weight,
            prototype_chunk_size=chunk_size,
        )
        data = tiny.images(3 * tiny.B)
        history = model.fit(data, batch_size=tiny.B, verbose=0).history
        histories.append([value for name in sorted(history) for value in history[name]])
    rtol = 1e-4 if dtype == "float32" else 2e-3
    np.testing.assert_allclose(histories[1], histories[0], rtol)


def test_the_chunk_size_is_in_the_config():
    model = tiny.model(prototype_chunk_size=2)
    config = json.loads(json.dumps(model.get_config()))
    assert kd.DINOv3.from_config(config).prototype_chunk_size == 2


@pytest.mark.parametrize(
    "chunk, message",
    [
        (0, "`prototype_chunk_size` must be an integer of at least 1, or None. Received"),
        (2.0, "`prototype_chunk_size` must be an integer of at least 1, or None. Received"),
        (8, "must divide the prototypes of both heads.*num_prototypes=24.*=36. Nearest: 6, 12."),
        (100, "prototype_chunk_size=100.*Nearest: 12."),
    ],
)
def test_bad_chunk_sizes_are_explained(chunk, message):
    with pytest.raises(ValueError, match=message):
        tiny.model(num_prototypes=24, num_patch_prototypes=36, prototype_chunk_size=chunk)


# What differs between the backends


def test_loop_and_put():
    def function(x):
        def body(index, carry):
            total, array = carry
            row = ops.slice(x, (index, 0), (1, 3)) + total
            return total + 1, backend.put(array, row, (index, 0))

        return backend.loop(x.shape[0], body, (ops.zeros(()), ops.zeros(x.shape)))[1]

    for num_rows in (1, 4):
        x = np.random.default_rng(0).normal(size=(num_rows, 3)).astype("float32")
        for run in ways_to_run(function):
            actual = run(ops.convert_to_tensor(x))
            close(actual, x + np.arange(num_rows)[:, None], 1e-6, 0)
