import keras
import numpy as np
import pytest
from golden import Golden, close, numpy, value_and_gradients
from keras import ops

from keras_dinov3.targets import SoftmaxCentering, pairwise_sum, sinkhorn_knopp


def logits(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def slow_sinkhorn(logits, temperature, num_iterations):
    """The docstring's formula in float64 with one prototype and one sample at a time."""
    shares = np.exp(logits.astype("float64") / temperature)
    for _ in range(num_iterations):
        for k in range(shares.shape[1]):
            shares[:, k] /= shares[:, k].sum()
        for i in range(shares.shape[0]):
            shares[i] /= shares[i].sum()
    return shares


def slow_softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


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


# Sinkhorn-Knopp


@pytest.mark.parametrize("name", ["fb_sinkhorn_cls", "fb_sinkhorn_patch"])
def test_sinkhorn_equals_the_reference(name):
    golden = Golden(name)
    for key in [key for key in golden.keys() if key.endswith("/probs")]:
        shape, temperature, iterations, _ = key.split("/")
        probabilities = sinkhorn_knopp(
            golden[f"{shape}/teacher_logits"], float(temperature[4:]), int(iterations[5:])
        )
        golden.check(probabilities, key)


def test_sinkhorn_equals_the_seed_method():
    golden = Golden("seed_losses")
    keys = [key for key in golden.keys() if "/sinkhorn/" in key]
    assert len(keys) == 9
    for key in keys:
        name, _, temperature, iterations = key.split("/")
        probabilities = sinkhorn_knopp(
            golden[f"{name}/teacher_logits"], float(temperature[4:]), int(iterations[5:])
        )
        golden.check(probabilities, key)


def test_sinkhorn_survives_large_logits_and_dead_prototypes():
    golden = Golden("fb_sinkhorn_large_logits")
    keys = [key for key in golden.keys() if key.endswith("/probs_exact_f64")]
    assert len(keys) == 24
    for key in keys:
        tag, temperature, iterations, _ = key.split("/")
        probabilities = sinkhorn_knopp(
            golden[f"{tag}/teacher_logits"], float(temperature[4:]), int(iterations[5:])
        )
        golden.check(probabilities, key)


def test_sinkhorn_equals_slow_loops_and_flattens_leading_axes():
    x = logits(3, 5, 7)
    expected = slow_sinkhorn(x.reshape(15, 7), 0.5, 4).reshape(3, 5, 7)
    close(sinkhorn_knopp(x, 0.5, num_iterations=4), expected, 1e-5, 0)
    close(sinkhorn_knopp(x.reshape(15, 7), 0.5, num_iterations=4), expected.reshape(15, 7), 1e-5, 0)
    close(sinkhorn_knopp(x[0, 0], 0.5), np.full(7, 1 / 7), 1e-6, 0)  # one sample uses all equally


def test_sinkhorn_marginals():
    probabilities = numpy(sinkhorn_knopp(logits(12, 5), 0.3, num_iterations=50))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=0), 12 / 5, rtol=1e-4)


def test_sinkhorn_is_invariant_to_moving_samples_and_prototypes():
    x = logits(6, 5)
    moved = x + logits(1, 5, seed=1)  # prototypes: the first division undoes it
    close(sinkhorn_knopp(moved, 0.2), numpy(sinkhorn_knopp(x, 0.2)), 1e-4, 0)


@pytest.mark.parametrize(
    "num_samples, num_prototypes, num_padded", [(1, 7, 3), (5, 33, 1), (57, 21, 16), (30, 512, 34)]
)
def test_padded_slots_change_nothing_in_sinkhorn(num_samples, num_prototypes, num_padded):
    """Bit for bit; with `ops.sum`, (57, 21, 16) fails on JAX."""
    x = logits(num_samples, num_prototypes)
    alone = numpy(sinkhorn_knopp(x, 0.04))
    weights = np.r_[np.ones(num_samples), np.zeros(num_padded)]
    for garbage in (0.0, np.nan, np.inf, -np.inf, 3e38):
        padding = np.full((num_padded, num_prototypes), garbage, "float32")
        padded = numpy(sinkhorn_knopp(np.concatenate([x, padding]), 0.04, weights=weights))
        assert np.array_equal(padded[:num_samples], alone)
        assert np.array_equal(padded[num_samples:], np.zeros_like(padding))


def test_padded_slots_at_the_end_of_each_image_change_nothing():
    x = logits(3, 2, 4, 9)  # images, crops, slots, prototypes
    alone = numpy(sinkhorn_knopp(x, 0.1))
    padding = np.full((3, 2, 3, 9), np.nan, "float32")
    weights = np.concatenate([np.ones((3, 2, 4), bool), np.zeros((3, 2, 3), bool)], axis=2)
    padded = numpy(sinkhorn_knopp(np.concatenate([x, padding], axis=2), 0.1, weights=weights))
    assert np.array_equal(padded[:, :, :4], alone)
    assert not padded[:, :, 4:].any()


def test_padded_slots_anywhere_change_nothing_but_rounding():
    x = logits(11, 8)
    weights = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], bool)
    padded = numpy(sinkhorn_knopp(x, 0.1, weights=ops.convert_to_tensor(weights)))
    close(padded[weights], numpy(sinkhorn_knopp(x[weights], 0.1)), 1e-5, 0)
    assert not padded[~weights].any()


def test_a_weight_of_two_is_a_sample_twice():
    x = logits(4, 6)
    weights = np.array([1.0, 2.0, 1.0, 3.0], "float32")
    repeated = sinkhorn_knopp(np.repeat(x, weights.astype(int), axis=0), 0.2)
    close(sinkhorn_knopp(x, 0.2, weights=weights), numpy(repeated)[[0, 1, 3, 4]], 1e-5, 0)


def test_sinkhorn_without_any_sample_is_zero():
    x = np.full((4, 6), np.nan, "float32")
    assert np.array_equal(numpy(sinkhorn_knopp(x, 0.2, weights=np.zeros(4))), np.zeros((4, 6)))


def test_a_bad_logit_is_not_hidden():
    x = logits(4, 6)
    x[1, 2] = np.nan
    assert np.isnan(numpy(sinkhorn_knopp(x, 0.2, weights=np.ones(4)))).any()


def test_sinkhorn_is_the_same_compiled():
    x, weights = logits(9, 16), np.r_[np.ones(7), np.zeros(2)].astype("float32")
    expected = numpy(sinkhorn_knopp(x[:7], 0.07))
    x[7:] = np.nan

    def function(x, temperature, weights):
        return sinkhorn_knopp(x, temperature, weights=weights)

    arguments = [ops.convert_to_tensor(a) for a in (x, np.float32(0.07), weights)]
    for run in compiled(function):
        actual = numpy(run(*arguments))
        close(actual[:7], expected, 1e-5, 0)
        assert not actual[7:].any()


def test_no_gradient_flows_through_targets():
    layer = SoftmaxCentering()
    layer.build((None, 5))
    for targets in (sinkhorn_knopp, layer):
        weights = ops.convert_to_tensor(logits(4, 5, seed=1))

        def value(x, targets=targets, weights=weights):
            return ops.sum(weights * targets(x, 0.5)) + ops.sum(x)

        _, (gradient,) = value_and_gradients(value, logits(4, 5))
        np.testing.assert_array_equal(gradient, np.ones((4, 5)))


def test_targets_are_float32_from_bfloat16():
    x = ops.cast(logits(6, 5), "bfloat16")
    exact = ops.cast(x, "float32")
    layer = SoftmaxCentering(dtype="mixed_bfloat16")
    for targets in (sinkhorn_knopp, layer):
        actual = targets(x, 0.1)
        assert keras.backend.standardize_dtype(actual.dtype) == "float32"
        expected = targets(exact, 0.1) if targets is sinkhorn_knopp else ops.softmax(exact / 0.1)
        close(actual, numpy(expected), 1e-6, 0)
    assert layer.center.dtype == "float32"
    reference = SoftmaxCentering(dtype="float32")
    reference(exact, 0.1)
    close(layer(x, 0.1), numpy(reference(exact, 0.1)), 1e-6, 0)  # with the moved center


# Softmax centering


@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_centering_equals_the_reference(kind):
    golden = Golden("fb_softmax_centering")
    layer = SoftmaxCentering(golden.hyperparameters["center_momentum"])
    layer.build(golden[f"{kind}/step0/teacher_logits"].shape)
    for step, temperature in enumerate(golden.hyperparameters["temps"]):
        x = golden[f"{kind}/step{step}/teacher_logits"]
        used = numpy(layer.center).reshape(golden[f"{kind}/step{step}/center_used"].shape)
        golden.check(used, f"{kind}/step{step}/center_used")
        golden.check(layer(x, temperature, training=True), f"{kind}/step{step}/probs")
    final = numpy(layer.center).reshape(golden[f"{kind}/center_final"].shape)
    golden.check(final, f"{kind}/center_final")


def test_centering_equals_the_seed_method():
    golden = Golden("seed_softmax_centering")
    layer = SoftmaxCentering(golden.hyperparameters["center_momentum"], initial="first_batch")
    for step, temperature in enumerate(golden.hyperparameters["temps"]):
        if step > 0:
            golden.check(numpy(layer.center)[None], f"step{step}/center_used")
        golden.check(layer(golden[f"step{step}/teacher_logits"], temperature), f"step{step}/probs")
    golden.check(numpy(layer.center)[None], "center_final")


@pytest.mark.parametrize("initial", ["zeros", "first_batch"])
def test_centering_equals_the_formula(initial):
    layer, center = SoftmaxCentering(0.8, initial), np.zeros(7)
    for step in range(3):
        x = logits(3, 2, 4, 7, seed=step)
        close(layer(x, 0.5), slow_softmax((x - center) / 0.5), 1e-6, 0)
        momentum = 0.0 if initial == "first_batch" and step == 0 else 0.8
        center = momentum * center + (1 - momentum) * x.mean(axis=(0, 1, 2), dtype="float64")
        close(layer.center, center, 1e-6, 0)


@pytest.mark.parametrize("initial", ["zeros", "first_batch"])
def test_centering_rests_at_inference(initial):
    layer = SoftmaxCentering(initial=initial)
    layer(logits(4, 7), 0.5)
    before = [numpy(w) for w in layer.weights]
    probabilities = layer(logits(4, 7, seed=1), 0.5, training=False)
    close(probabilities, slow_softmax((logits(4, 7, seed=1) - before[0]) / 0.5), 1e-6, 0)
    for weight, value in zip(layer.weights, before, strict=True):
        assert np.array_equal(numpy(weight), value)


@pytest.mark.parametrize("initial", ["zeros", "first_batch"])
def test_padded_slots_change_nothing_in_centering(initial):
    for num_samples, num_padded in [(1, 1), (5, 3), (57, 16)]:
        alone, padded = SoftmaxCentering(initial=initial), SoftmaxCentering(initial=initial)
        weights = np.r_[np.ones(num_samples), np.zeros(num_padded)]
        for step in range(2):
            x = logits(num_samples, 7, seed=step)
            x_padded = np.concatenate([x, np.full((num_padded, 7), np.nan, "float32")])
            expected = numpy(alone(x, 0.5))
            actual = numpy(padded(x_padded, 0.5, weights=weights))
            assert np.array_equal(actual[:num_samples], expected)
            assert not actual[num_samples:].any()
            assert np.array_equal(numpy(padded.center), numpy(alone.center))


@pytest.mark.parametrize("initial", ["zeros", "first_batch"])
def test_a_batch_without_samples_leaves_the_center(initial):
    layer, expected = SoftmaxCentering(initial=initial), SoftmaxCentering(initial=initial)
    nothing = np.full((3, 7), np.nan, "float32")
    for step in range(2):
        layer(nothing, 0.5, weights=np.zeros(3))
        layer(logits(4, 7, seed=step), 0.5)
        expected(logits(4, 7, seed=step), 0.5)
    for actual, weight in zip(layer.weights, expected.weights, strict=True):
        assert np.array_equal(numpy(actual), numpy(weight))


def test_centering_is_the_same_compiled():
    weights = np.r_[np.ones(3), np.zeros(1)].astype("float32")
    expected = SoftmaxCentering()
    layer = SoftmaxCentering()
    layer.build((None, 7))

    def stateful(x, temperature, weights):
        return layer(x, temperature, weights=weights, training=True)

    def stateless(state, x, temperature, weights):
        outputs, state = layer.stateless_call([], state, x, temperature, weights, training=True)
        return outputs, state

    temperature = ops.convert_to_tensor(np.float32(0.5))
    if keras.config.backend() == "jax":
        (run,) = compiled(stateless)
        state = [v.value for v in layer.non_trainable_variables]
    for step in range(3):
        x = logits(4, 7, seed=step)
        close_to = numpy(expected(x, 0.5, weights=weights))
        arguments = [ops.convert_to_tensor(x), temperature, ops.convert_to_tensor(weights)]
        if keras.config.backend() == "jax":
            actual, state = run(state, *arguments)
            center = state[0]
        else:
            actual = compiled(stateful)[-1](*arguments)
            center = layer.center
        close(actual, close_to, 1e-5, 0)
        close(center, numpy(expected.center), 1e-5, 0)


@keras.saving.register_keras_serializable(package="test_targets")
class Teacher(keras.Model):
    def __init__(self, centering, **kwargs):
        super().__init__(**kwargs)
        self.centering = centering

    def call(self, inputs):
        return self.centering(inputs, 0.5)

    def get_config(self):
        centering = keras.saving.serialize_keras_object(self.centering)
        return {**super().get_config(), "centering": centering}

    @classmethod
    def from_config(cls, config):
        config["centering"] = keras.saving.deserialize_keras_object(config["centering"])
        return cls(**config)


@pytest.mark.parametrize("initial", ["zeros", "first_batch"])
def test_centering_is_saved_and_follows_the_mode_of_its_model(initial, tmp_path):
    model = Teacher(SoftmaxCentering(0.7, initial))
    model(logits(4, 7), training=True)
    center = numpy(model.centering.center)
    assert center.any()
    model(logits(4, 7, seed=1), training=False)
    assert np.array_equal(numpy(model.centering.center), center)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.centering.get_config() == model.centering.get_config()
    for step in range(2):  # the second call sees the center that the first has moved
        x = logits(4, 7, seed=step)
        expected = numpy(model(x, training=True))
        assert np.array_equal(numpy(loaded(x, training=True)), expected)


def test_centering_config_lists_every_argument():
    layer = SoftmaxCentering(0.7, initial="first_batch", name="patches")
    config = layer.get_config()
    assert (config["momentum"], config["initial"]) == (0.7, "first_batch")
    assert SoftmaxCentering.from_config(config).get_config() == config


# The sum


def test_pairwise_sum_is_a_sum():
    for length in (0, 1, 2, 3, 4, 5, 13):
        x = logits(2, length, 3)
        close(pairwise_sum(ops.convert_to_tensor(x)), x.sum(axis=1), 1e-6, 1e-6)


def test_pairwise_sum_of_zeros_appended_is_the_same_compiled():
    """The tree itself; what XLA makes of `exp` in front of it may depend on the shape."""
    x = logits(23, 40)
    expected = numpy(pairwise_sum(ops.convert_to_tensor(x)))
    for num_padded in (1, 4, 30):
        padded = ops.convert_to_tensor(np.pad(x, [(0, num_padded), (0, 0)]))
        for function in compiled(pairwise_sum):
            assert np.array_equal(numpy(function(padded)), expected)


# Errors


@pytest.mark.parametrize("targets", [sinkhorn_knopp, SoftmaxCentering()])
def test_bad_calls_are_explained(targets):
    with pytest.raises(ValueError, match="`temperature` must be greater than 0. Received: temp"):
        targets(logits(4, 7), 0.0)
    with pytest.raises(ValueError, match=r"weights.shape=\(3,\), logits.shape=\(4, 7\)"):
        targets(logits(4, 7), 0.5, weights=np.ones(3))


@pytest.mark.parametrize("num_iterations", [0, -1, 1.5])
def test_bad_iterations_are_explained(num_iterations):
    with pytest.raises(ValueError, match="`num_iterations` must be an integer of at least 1"):
        sinkhorn_knopp(logits(4, 7), 0.5, num_iterations)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_bad_momentum_is_explained(momentum):
    with pytest.raises(ValueError, match="`momentum` must be at least 0 and at most 1. Received"):
        SoftmaxCentering(momentum)


def test_bad_initial_is_explained():
    with pytest.raises(ValueError, match='`initial` must be "zeros" or "first_batch"'):
        SoftmaxCentering(initial="mean")
