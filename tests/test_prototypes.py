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
)
from keras_dinov3.targets import SoftmaxCentering, sinkhorn_knopp

B, G, L, M, D, K = 3, 2, 4, 7, 5, 24
CHUNKS = [1, 6, 24]  # prototypes in each
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
    close(whole(targets), numpy(expected), 1e-6, 0)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_sinkhorn_in_chunks_survives_large_logits_and_dead_prototypes(chunk):
    vectors, columns = unit(M, D), kernel(scale=300)
    columns[:, 3] *= 40  # every sample's scores here are far from all others
    columns[:, 5] = 1e-3
    columns[:, 6:9] -= 900 * vectors[0][:, None]
    expected = sinkhorn_knopp(matmul(vectors, columns), 0.05)
    targets = sinkhorn_knopp(factored(vectors, columns, chunk), 0.05)
    # Scores reach 1e5, whose rounding alone changes shares by a hundredth.
    np.testing.assert_allclose(whole(targets), numpy(expected), rtol=0, atol=0.05)
    np.testing.assert_allclose(whole(targets).sum(axis=-1), 1, rtol=1e-5)
    assert np.isfinite(whole(targets)).all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_padded_slots_change_nothing_in_chunks(chunk):
    vectors, columns = unit(M, D), kernel()
    expected, expected_layer = whole(sinkhorn_knopp(factored(vectors, columns, chunk), 0.06)), []
    for garbage in (None, 0.0, np.nan, np.inf, 3e38):
        layer = SoftmaxCentering()
        layer.build((None, K))
        padding = np.full((4 if garbage is not None else 0, D), garbage or 0.0, "float32")
        padded = factored(np.concatenate([vectors, padding]), columns, chunk)
        weights = np.r_[np.ones(M), np.zeros(len(padding))]
        for _ in range(2):
            centered = whole(layer(padded, 0.06, weights=weights))
        for actual, wanted in (
            (whole(sinkhorn_knopp(padded, 0.06, weights=weights)), expected),
            (centered, expected_layer[0] if expected_layer else centered[:M]),
            (numpy(layer.center)[None], expected_layer[1:] or numpy(layer.center)[None]),
        ):
            close(actual[: len(wanted)], np.asarray(wanted), 1e-6, 0)
            assert not actual[len(wanted) :].any()
        expected_layer = expected_layer or [centered[:M], numpy(layer.center)]
    nothing = sinkhorn_knopp(factored(vectors, columns, chunk), 0.06, weights=np.zeros(M))
    assert not whole(nothing).any()


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
        close(whole(targets), numpy(expected), 1e-6, 0)
        close(layer.center, numpy(alike.center), 1e-6, 0)
    before = numpy(layer.center)
    layer(factored(unit(B, G, D, seed=9), columns, chunk), 0.06, training=False)
    np.testing.assert_array_equal(numpy(layer.center), before)


# Losses, with gradients of everything that goes in


def targets_of(kind, logits, **kwargs):
    if kind == "sinkhorn":
        return sinkhorn_knopp(logits, 0.05, **kwargs)
    layer = SoftmaxCentering()
    layer.build((None, logits.shape[-1]))
    layer.center.assign(np.linspace(-0.1, 0.2, logits.shape[-1]))
    return layer(logits, 0.05, training=False, **kwargs)


def check_gradients(chunked, unchunked, arrays, num_student):
    """Same value; same gradients of the first arrays, and none of the others."""
    for function in (chunked, unchunked):
        for run in compiled(function):
            value, gradients = value_and_gradients(run, *arrays)
            if function is unchunked:
                expected = value, gradients
                break
            results = [*results, (value, gradients)] if run is not None and "results" in dir() else [
                (value, gradients)
            ]
    for value, gradients in results:
        close(value, expected[0], 1e-6, 0)
        for actual, wanted in zip(gradients[:num_student], expected[1][:num_student], strict=True):
            close(actual, wanted, 1e-5, 0)
            assert np.abs(wanted).max() > 1e-4
        assert not any(g is not None and g.any() for g in gradients[num_student:])
