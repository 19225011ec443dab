import math

import keras
import numpy as np
import pytest
from golden import Golden, close, numpy, value_and_gradients
from keras import ops

from keras_dinov3.heads import DINOHead

B, M, D, K = 3, 5, 12, 7


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def small_head(**kwargs):
    return DINOHead(K, hidden_dim=10, bottleneck_dim=4, **kwargs)


def reference_names(num_layers):
    """Names of a reference head's arrays, in the order of our weights."""
    layers = ["mlp"] if num_layers == 1 else [f"mlp.{2 * i}" for i in range(num_layers)]
    names = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    return [*names, "last_layer.weight"]


def transposed(name, array):
    return array.T if name.endswith("weight") else array


@pytest.mark.parametrize("case", ["n1", "n2", "n3"])
def test_equals_the_reference(case):
    golden = Golden("fb_dino_head")
    sizes = golden.hyperparameters[case]
    head = DINOHead(
        sizes["out_dim"], sizes["hidden_dim"], sizes["bottleneck_dim"], sizes["nlayers"]
    )
    head.build((None, sizes["in_dim"]))
    names = reference_names(sizes["nlayers"])
    weights = [transposed(name, golden[f"{case}/weights/{name}"]) for name in names]
    head.set_weights(weights)
    golden.check(head(golden[f"{case}/x"]), f"{case}/y")
    golden.check(head(golden[f"{case}/x"], return_bottleneck=True), f"{case}/y_no_last_layer")

    cotangent = ops.convert_to_tensor(golden[f"{case}/cotangent"])

    def value(x, *weights):
        outputs, _ = head.stateless_call(list(weights), [], x)
        return ops.sum(outputs * cotangent)

    _, (grad_x, *gradients) = value_and_gradients(value, golden[f"{case}/x"], *weights)
    # The file holds the input's gradient summed over two equal backward passes, see the next test.
    golden.check(2 * grad_x, f"{case}/grad_x")
    for name, gradient in zip(names, gradients, strict=True):
        golden.check(transposed(name, gradient), f"{case}/grad/{name}")


def slow_head(x, weights):
    """The docstring in NumPy, in float64."""
    w1, b1, w2, b2, w3, b3, prototypes = (w.astype("float64") for w in weights)
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
    h = gelu(gelu(x @ w1 + b1) @ w2 + b2) @ w3 + b3
    unit = h / np.sqrt(np.sum(h * h, axis=-1, keepdims=True))
    return unit, unit @ prototypes


def test_equals_the_formula_with_its_gradient():
    head = small_head()
    x = tokens(B, D)
    head.build(x.shape)
    head.set_weights([tokens(*w.shape, seed=i) for i, w in enumerate(head.weights)])
    weights = head.get_weights()
    unit, logits = slow_head(x, weights)
    close(head(x, return_bottleneck=True), unit, 1e-5, 0)
    close(head(x), logits, 1e-5, 0)

    cotangent = tokens(B, K, seed=9)

    def value(x):
        logits, _ = head.stateless_call([ops.convert_to_tensor(w) for w in weights], [], x)
        return ops.sum(logits * ops.convert_to_tensor(cotangent))

    _, (gradient,) = value_and_gradients(value, x)
    expected = np.zeros((B, D))
    for index in np.ndindex(B, D):
        step = np.zeros((B, D))
        step[index] = 1e-6
        change = slow_head(x + step, weights)[1] - slow_head(x - step, weights)[1]
        expected[index] = np.sum(change * cotangent) / 2e-6
    close(gradient, expected, 1e-5, 0)


def test_takes_any_leading_axes():
    head = small_head()
    x = tokens(B, M, D)
    y = numpy(head(x))
    assert y.shape == (B, M, K)
    for b in range(B):
        close(head(x[b]), y[b], 1e-6, 0)
    assert head(x, return_bottleneck=True).shape == (B, M, 4)


def test_symbolic_shapes():
    for shape in [(None, None, D), (None, D), (B, M, D)]:
        inputs = keras.KerasTensor(shape)
        head = small_head()
        assert tuple(head(inputs).shape) == (*shape[:-1], K)
        assert tuple(head(inputs, return_bottleneck=True).shape) == (*shape[:-1], 4)


def test_initial_weights():
    keras.utils.set_random_seed(0)
    head = DINOHead(300, hidden_dim=200, bottleneck_dim=100)
    head.build((None, 150))
    kernels = [w for w in head.weights if len(w.shape) == 2]
    biases = [w for w in head.weights if len(w.shape) == 1]
    assert (len(kernels), len(biases)) == (4, 3)
    for kernel in kernels:
        kernel = numpy(kernel)
        # truncating a normal distribution at two deviations leaves 0.88 of its deviation
        assert 0.016 < kernel.std() < 0.021
        assert np.mean(np.abs(kernel) > 0.0401) < 1e-3  # on torch, Keras lets a few through
        assert abs(kernel.mean()) < 1e-3
    assert all(not numpy(bias).any() for bias in biases)
    assert all(w.trainable for w in head.weights)


def test_equal_layers_start_differently():
    head = DINOHead(K, hidden_dim=D, bottleneck_dim=D)
    head.build((None, D))
    first, second, third = (numpy(w) for w in head.weights if w.shape == (D, D))
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_a_zero_vector_has_finite_values_and_gradients():
    head = small_head()
    head.build((None, D))
    weights = [ops.convert_to_tensor(w) for w in head.get_weights()]

    def value(x):
        return ops.sum(head.stateless_call(weights, [], x)[0])

    y, (gradient,) = value_and_gradients(value, np.zeros((B, D), "float32"))
    assert y == 0
    assert np.isfinite(gradient).all()


def test_mixed_precision_normalises_in_float32():
    head = small_head(dtype="mixed_bfloat16")
    x = tokens(B, D)
    y = head(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert all(w.dtype == "float32" for w in head.weights)
    # an untrained bottleneck this small has squares that a shorter float would lose
    for weight in (head.bottleneck.kernel, head.bottleneck.bias):
        weight.assign(weight * 1e-12)
    unit = head(x, return_bottleneck=True)
    assert keras.backend.standardize_dtype(unit.dtype) == "bfloat16"
    exact = small_head()
    exact.build((None, D))
    exact.set_weights(head.get_weights())
    expected = numpy(exact(x, return_bottleneck=True))
    close(ops.cast(unit, "float32"), expected, 0.03, 0)
    close(ops.cast(head(x), "float32"), numpy(exact(x)), 0.05, 0)


def test_config_lists_every_argument():
    arguments = dict(num_prototypes=K, hidden_dim=10, bottleneck_dim=4, num_layers=2)
    head = DINOHead(**arguments, name="patches", dtype="mixed_bfloat16")
    config = head.get_config()
    assert {name: config[name] for name in arguments} == arguments
    again = DINOHead.from_config(config)
    assert again.get_config() == config
    assert (again.name, again.compute_dtype) == ("patches", "bfloat16")
    defaults = DINOHead(K)
    assert (defaults.hidden_dim, defaults.bottleneck_dim, defaults.num_layers) == (2048, 256, 3)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_is_saved_inside_a_model(num_layers, tmp_path):
    inputs = keras.Input((M, D))
    model = keras.Model(inputs, small_head(num_layers=num_layers)(inputs))
    model.set_weights([tokens(*w.shape, seed=i) for i, w in enumerate(model.weights)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = tokens(B, M, D)
    assert np.array_equal(numpy(loaded(x)), numpy(model(x)))
    assert len(loaded.weights) == 2 * num_layers + 1


@pytest.mark.parametrize("name", ["num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers"])
@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_bad_sizes_are_explained(name, size):
    with pytest.raises(ValueError) as error:
        DINOHead(**{"num_prototypes": K, name: size})
    expected = f"`{name}` must be an integer of at least 1. Received: {name}={size!r}."
    assert str(error.value) == expected


def test_an_unknown_width_is_explained():
    with pytest.raises(ValueError, match=r"tokens of known width.*Received: shape \(None, None\)"):
        small_head().build((None, None))
