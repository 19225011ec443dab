import keras
import numpy as np
import pytest
import tiny
from golden import numpy
from keras import ops

from keras_dinov3 import backend


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


def test_in_cache_equals_all_at_once(monkeypatch):
    """Three images at a time, the last ones fewer, and two rows of `more` to each image."""
    images, more = np.random.default_rng(0).random((8, 5), "float32"), np.arange(16.0)
    images, more = ops.convert_to_tensor(images), ops.convert_to_tensor(more, "float32")
    counts = []

    def function(images, more):
        counts.append(len(images))
        return images * ops.reshape(more, (-1, 2))[:, 1:]

    monkeypatch.setattr(backend, "CACHED_NUMBERS", 18)
    result = numpy(backend.in_cache(function, images, more, size=5))
    np.testing.assert_array_equal(result, numpy(images) * np.arange(1, 16, 2, "float32")[:, None])
    assert counts == ([3, 3, 2] if keras.config.backend() == "torch" else [8])
    assert len(numpy(backend.in_cache(function, images[:2], more[:4], size=50))) == 2
    assert counts[-1] == (1 if keras.config.backend() == "torch" else 2)
