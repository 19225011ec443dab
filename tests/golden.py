"""Reference numbers in `tests/goldens`: loading, comparing, gradients on any backend."""

import json
import pathlib

import keras
import numpy as np
from keras import ops

FOLDER = pathlib.Path(__file__).parent / "goldens"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())["cases"]


class Golden:
    """The arrays of one case, with its hyperparameters and its tolerance."""

    def __init__(self, name):
        self.case = MANIFEST[name]
        self.arrays = dict(np.load(FOLDER / self.case["file"]))
        self.hyperparameters = self.case.get("hyperparameters", {})

    def __getitem__(self, key):
        return self.arrays[key]

    def keys(self):
        return self.arrays.keys()

    def part(self, prefix):
        """The arrays whose keys start with `prefix`, without it."""
        return {k.removeprefix(prefix): a for k, a in self.arrays.items() if k.startswith(prefix)}

    def check(self, actual, key, rtol=None, atol=None):
        """Asserts `max|x - ref| <= atol + rtol * max|ref|`, the manifest's rule."""
        tolerance = self.case["tolerance"]
        close(
            actual,
            self.arrays[key],
            tolerance["rtol"] if rtol is None else rtol,
            tolerance["atol"] if atol is None else atol,
            key,
        )


def close(actual, expected, rtol, atol, what=""):
    actual, expected = numpy(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    bound = atol + rtol * np.max(np.abs(expected))
    error = np.max(np.abs(actual.astype("float64") - expected))
    assert error <= bound, f"{what}: error {error:.3g} above {bound:.3g}"  # NaN fails too


def numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def value_and_gradients(function, *arrays):
    """`function(*tensors) -> scalar`; returns its value and one gradient per array (NumPy)."""
    backend = keras.config.backend()
    if backend == "torch":
        tensors = [ops.convert_to_tensor(a).requires_grad_() for a in arrays]
        value = function(*tensors)
        value.backward()
        gradients = [t.grad for t in tensors]
    elif backend == "jax":
        import jax

        tensors = [ops.convert_to_tensor(a) for a in arrays]
        value, gradients = jax.value_and_grad(function, argnums=tuple(range(len(arrays))))(*tensors)
    else:
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(a) for a in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        gradients = tape.gradient(value, tensors)
    return numpy(value), [None if g is None else numpy(g) for g in gradients]


def variable_gradients(function, variables):
    """`function() -> scalar` of Keras variables; returns its value and one gradient for each."""
    backend = keras.config.backend()
    if backend == "torch":
        for variable in variables:
            variable.value.grad = None
        value = function()
        value.backward()
        gradients = [v.value.grad for v in variables]
        value = value.detach()
    elif backend == "jax":
        import jax

        def stateless(values):
            with keras.StatelessScope(zip(variables, values, strict=True)):
                return function()

        value, gradients = jax.jit(jax.value_and_grad(stateless))([v.value for v in variables])
    else:
        import tensorflow as tf

        @tf.function
        def compiled():
            with tf.GradientTape() as tape:
                value = function()
            return value, tape.gradient(value, [v.value for v in variables])

        value, gradients = compiled()
    return numpy(value), [None if g is None else numpy(g) for g in gradients]
