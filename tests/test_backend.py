import keras
import numpy as np
import pytest
import tiny
from golden import close, numpy, variable_gradients
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.backend import compiling, kernels


class Model(keras.Model):
    """One weight, its loss, and a count that `update` keeps."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, use_bias=False)
        self.dense.build((None, 3))
        self.count = self.add_weight((), "zeros", "int32", trainable=False)
        self.seen = self.add_weight((3, 1), "zeros", trainable=False)
        self.built = True

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(y_pred)

    def train_step(self, *args):
        return backend.step_then(self, super().train_step, args, self.update)

    def update(self, ticks):
        self.count.assign_add(ops.cast(ticks, "int32"))
        self.seen.assign(ops.convert_to_tensor(self.dense.kernel))


@pytest.mark.parametrize(("accumulation", "updates"), [(None, 6), (3, 2)])
@pytest.mark.parametrize("loss_scaling", [False, True])
def test_update_runs_after_the_optimizer(accumulation, updates, loss_scaling):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulation)
    if loss_scaling:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
    model = Model()
    model.compile(optimizer)
    start = numpy(model.dense.kernel).copy()
    model.fit(np.ones((12, 3), "float32"), batch_size=2, verbose=0)
    assert int(model.count) == updates
    kernel = numpy(model.dense.kernel)
    np.testing.assert_array_equal(numpy(model.seen), kernel)  # the weights after the update
    np.testing.assert_allclose(kernel, start - 0.1 * updates, atol=1e-6)


def test_gradients_of_weights_with_equal_paths_do_not_pile_up():
    """On torch Keras clears gradients by path; `step_then` clears them by variable."""
    model = Model()
    other = Model()
    model.twin = other.dense  # as student and teacher after `load_model`
    for layer in (model.dense, model.twin):
        layer.kernel._path = "same/kernel"
    if hasattr(model, "_track_variables"):
        model._track_variables()
    model.compile(keras.optimizers.SGD(0.1))
    start = numpy(model.dense.kernel).copy()
    model.fit(np.ones((8, 3), "float32"), batch_size=2, verbose=0)
    np.testing.assert_allclose(numpy(model.dense.kernel), start - 0.4, atol=1e-6)


def test_batch_size_is_declared():
    shapes = []
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(input_signature=[tf.TensorSpec((None, 5))])
        def function(x):
            shapes.append(tuple(backend.declare_shapes({"x": x}, [(4, 5)])["x"].shape))
            return x

        function(tf.zeros((4, 5)))
    else:
        x = ops.zeros((4, 5))
        shapes.append(tuple(backend.declare_shapes({"x": x}, [(4, 5)])["x"].shape))
    assert shapes == [(4, 5)]


@pytest.mark.parametrize("labels", [False, True])
def test_full_tf_batches(labels):
    import tensorflow as tf

    images = tiny.images(7)
    arrays = (images, np.arange(7)) if labels else images
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(3)
    full = backend.full_tf_batches(data, next(iter(data)))
    specs = tf.nest.flatten(full.element_spec)
    assert [tuple(s.shape) for s in specs] == [(3, 40, 36, 3), (3,)][: len(specs)]
    kept = [tf.nest.flatten(batch)[0].numpy() for batch in full]
    np.testing.assert_array_equal(np.concatenate(kept), images[:6])


BACKEND = keras.config.backend()
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="what only PyTorch does")


def affine_blocks(count):
    rng = np.random.default_rng(count)
    return [
        {"kernel": rng.normal(size=(3, 3)).astype("float32"), "bias": (None, np.float32([i, 1, 2]))}
        for i in range(count)
    ]


def affine(x, inputs):
    return ops.tanh(ops.matmul(x, inputs["kernel"]) + inputs["bias"][1])


@pytest.mark.parametrize("remat", ["none", "blocks", "full"])
@pytest.mark.parametrize("count", [1, 3, 6])  # from 4 on, JAX scans
def test_fold_equals_a_loop(count, remat):
    x = expected = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    for inputs in affine_blocks(count):
        expected = np.tanh(expected @ inputs["kernel"] + inputs["bias"][1])
    actual = backend.fold(affine, ops.convert_to_tensor(x), affine_blocks(count), remat)
    np.testing.assert_allclose(numpy(actual), expected, atol=1e-5)


def test_segments_are_near_the_square_root():
    assert [compiling.segment_size(n) for n in (1, 2, 7, 12, 24, 32, 40)] == [1, 1, 1, 3, 4, 4, 5]


def test_what_jit_compile_means():
    meanings = {
        "torch": {"auto": (False, False), True: (False, True), False: (False, False)},
        "tensorflow": {"auto": (False, True), True: (True, False), False: (False, False)},
        "jax": {"auto": ("auto", False), True: (True, False), False: (False, False)},
    }
    for given, meaning in meanings[BACKEND].items():
        assert backend.compilation(given) == meaning


def test_pieces_are_compiled_within_their_context_only():
    calls = []

    @backend.compiled
    def double(x):
        calls.append(x)
        return 2.0 * x

    with backend.compiled_pieces(True):
        for _ in range(3):
            y = double(ops.convert_to_tensor([1.0, 2.0]))
    np.testing.assert_array_equal(numpy(y), [2.0, 4.0])
    assert len(calls) == (3 if BACKEND == "torch" else 1)  # traced once
    assert not compiling.pieces_are_compiled()
    double(ops.convert_to_tensor([1.0, 2.0]))
    assert len(calls) == {"torch": 4, "tensorflow": 2, "jax": 1}[BACKEND]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averages_move_in_float32(dtype):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype("float32") for shape in ((3, 5), (2,))]
    averages = [keras.Variable(array, dtype=dtype) for array in arrays]
    values = [keras.Variable(2.0 - array, dtype="float32") for array in arrays]
    backend.move_towards(averages, values, ops.convert_to_tensor(0.75, "float32"))
    for average, array in zip(averages, arrays, strict=True):
        start = numpy(ops.cast(ops.cast(array, dtype), "float32"))
        tolerance = 1e-6 if dtype == "float32" else 2e-2
        result = numpy(ops.cast(average, "float32"))
        np.testing.assert_allclose(result, 0.75 * start + 0.25 * (2.0 - array), atol=tolerance)


@torch_only
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_by_onednn(with_bias):
    import torch

    from keras_dinov3.backend.torch_kernels import Dense

    rng = np.random.default_rng(0)
    x, kernel, bias, cotangent = (
        torch.tensor(rng.normal(size=shape), dtype=torch.float32, requires_grad=True)
        for shape in ((4, 7, 5), (5, 3), (3,), (4, 7, 3))
    )
    inputs, results = [x, kernel, bias] if with_bias else [x, kernel], []
    bias = bias if with_bias else None
    for y in (x @ kernel + bias if with_bias else x @ kernel, Dense.apply(x, kernel, bias)):
        results.append([y, *torch.autograd.grad(y, inputs, cotangent)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch_only
def test_without_a_compiler_blocks_run_uncompiled_with_one_warning(monkeypatch):
    import torch

    def compile_nothing(function, **kwargs):
        def run(*args):
            raise torch._inductor.exc.InductorError(RuntimeError("no g++ here"), None)

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    blocks, x = affine_blocks(2), ops.convert_to_tensor(np.ones((5, 3), "float32"))
    expected = numpy(backend.fold(affine, x, blocks))
    with (
        backend.compiled_pieces(True),
        pytest.warns(UserWarning, match="could not compile") as seen,
    ):
        actual = backend.fold(lambda x, inputs: affine(x, inputs), x, blocks)
    assert len(seen) == 1
    np.testing.assert_array_equal(numpy(actual), expected)


def test_in_cache_equals_all_at_once(monkeypatch):
    """Three images at a time, the last ones fewer, and two rows of `more` to each image."""
    images, more = np.random.default_rng(0).random((8, 5), "float32"), np.arange(16.0)
    images, more = ops.convert_to_tensor(images), ops.convert_to_tensor(more, "float32")
    counts = []

    def function(images, more):
        counts.append(len(images))
        return images * ops.reshape(more, (-1, 2))[:, 1:]

    monkeypatch.setattr(kernels, "CACHED_NUMBERS", 18)
    result = numpy(backend.in_cache(function, images, more, size=5))
    np.testing.assert_array_equal(result, numpy(images) * np.arange(1, 16, 2, "float32")[:, None])
    assert counts == ([3, 3, 2] if keras.config.backend() == "torch" else [8])
    assert len(numpy(backend.in_cache(function, images[:2], more[:4], size=50))) == 2
    assert counts[-1] == (1 if keras.config.backend() == "torch" else 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_attention_and_its_gradient(dtype, tolerance):
    """Against the formula in NumPy; the gradient against finite differences of it."""
    rng = np.random.default_rng(0)
    query, key, value, weights = (rng.normal(size=(2, 5, 3, 8)) for _ in range(4))

    def expected(query, key, value):
        scores = np.einsum("blhd,bmhd->bhlm", query, key) / np.sqrt(8)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bhlm,bmhd->blhd", scores / scores.sum(-1, keepdims=True), value)

    variables = [
        keras.Variable(x.astype("float32"), name=name)
        for x, name in ((query, "query"), (key, "key"), (value, "value"))
    ]

    def function():
        x = backend.attention(*(ops.cast(v, dtype) for v in variables))
        assert keras.backend.standardize_dtype(x.dtype) == dtype
        return ops.sum(ops.cast(x, "float32") * ops.convert_to_tensor(weights, "float32"))

    total, gradients = variable_gradients(function, variables)
    close(total, np.sum(expected(query, key, value) * weights), 20 * tolerance, tolerance)
    for index, gradient in enumerate(gradients):
        step, direction = 1e-4, rng.normal(size=query.shape)
        sides = []
        for sign in (1, -1):
            moved = [query, key, value]
            moved[index] = moved[index] + sign * step * direction
            sides.append(np.sum(expected(*moved) * weights))
        slope = (sides[0] - sides[1]) / (2 * step)
        close(np.sum(numpy(gradient) * direction), slope, 20 * tolerance, 20 * tolerance)
