"""Data pipelines, and values and files in the host's memory."""

import sys

import keras
import numpy as np
from keras import ops


def name():
    """Which engine runs: a text for people and files, not for decisions."""
    return keras.config.backend()


def declare_shapes(inputs, shapes):
    """TensorFlow's data pipelines and retraced functions forget sizes; this puts them back."""
    if keras.config.backend() != "tensorflow" or shapes is None:
        return inputs
    import tensorflow as tf

    arrays = [
        x if x.shape.is_fully_defined() else tf.ensure_shape(x, shape)
        for x, shape in zip(tf.nest.flatten(inputs), shapes, strict=True)
    ]
    return tf.nest.pack_sequence_as(inputs, arrays)


def full_tf_batches(dataset, first):
    """Gives a `tf.data.Dataset` the static shapes of its first batch and drops short ones."""
    import tensorflow as tf

    shapes = [tuple(x.shape) for x in tf.nest.flatten(first)]

    def is_full(*batch):
        size = tf.shape(tf.nest.flatten(batch)[0])[0]
        is_small = tf.debugging.assert_less_equal(
            size,
            shapes[0][0],
            "The first batch must be a full one: smaller ones are dropped, so that the step is "
            "compiled once.",
        )
        with tf.control_dependencies([is_small]):
            return tf.equal(size, shapes[0][0])

    def declare(*batch):
        arrays = []
        for array, shape in zip(tf.nest.flatten(batch), shapes, strict=True):
            is_alike = tf.debugging.assert_equal(
                tf.shape(array),
                shape,
                "All batches must hold arrays of one size, that of the first batch, so that the "
                "step is compiled once. Resize or crop the images in the pipeline.",
            )
            with tf.control_dependencies([is_alike]):
                arrays.append(tf.ensure_shape(array, shape))
        batch = tf.nest.pack_sequence_as(batch, list(arrays))
        return batch if len(batch) > 1 else batch[0]

    return dataset.filter(is_full).map(declare)


def host_values(x):
    """The NumPy values of an array or tensor in the host's memory; `None` if they are elsewhere.

    Elsewhere is an accelerator, whose work a look would interrupt, or a traced function.
    """
    if isinstance(x, np.ndarray):
        return x
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return x.detach().float().numpy() if x.device.type == "cpu" else None
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.Array):
        is_traced = isinstance(x, jax.core.Tracer)
        is_here = not is_traced and all(device.platform == "cpu" for device in x.devices())
    else:  # TensorFlow
        is_here = hasattr(x, "numpy") and "CPU" in x.device
    return np.asarray(x) if is_here else None


def assert_in_graph(x, low, high, message):
    """`x`, whose values are checked when a compiled step runs.

    A TensorFlow graph raises (XLA leaves that out). JAX cannot: it goes on with NaN, which then
    stops the run. NaN itself passes; what it leads to is found by the loss.
    """
    if isinstance(x, jax_tracer()) and "float" in keras.backend.standardize_dtype(x.dtype):
        is_outside = ops.logical_or(ops.min(x) < low, ops.max(x) > high)
        return ops.where(is_outside, ops.cast(float("nan"), x.dtype), x)
    tf = sys.modules.get("tensorflow")
    if tf is None or not tf.is_symbolic_tensor(x) or not x.dtype.is_floating:
        return x
    least, greatest = tf.reduce_min(x), tf.reduce_max(x)
    is_within = tf.logical_not(tf.logical_or(least < low, greatest > high))
    with tf.control_dependencies([tf.debugging.Assert(is_within, [message, least, greatest])]):
        return tf.identity(x)


def jax_tracer():
    """The class of what JAX traces; if nobody has imported it, of nothing."""
    jax = sys.modules.get("jax")
    return () if jax is None else jax.core.Tracer


def is_foreign_graph_tensor(x):
    """Whether `x` is a symbolic TensorFlow tensor while another backend runs.

    That is what `tf.data.Dataset.map` passes to its function.
    """
    tf = sys.modules.get("tensorflow")  # nobody can hold such a tensor without having it
    return tf is not None and keras.config.backend() != "tensorflow" and tf.is_symbolic_tensor(x)


def call_in_tf_graph(function, array, specs):
    """Runs a function of this backend inside a TensorFlow graph, on the host.

    Args:
        function: Function of one NumPy array that returns a dict of tensors. It may be called from
            several threads at once.
        array: Symbolic TensorFlow tensor.
        specs: Dict with a `KerasTensor` like each output; `None` in its shape is an unknown length.

    Returns:
        Dict of symbolic TensorFlow tensors.
    """
    import tensorflow as tf

    def run(array):
        with keras.device("cpu"):
            outputs = function(array)
        return [ops.convert_to_numpy(outputs[name]) for name in specs]

    outputs = tf.numpy_function(run, [array], [spec.dtype for spec in specs.values()])
    return {
        name: tf.ensure_shape(output, spec.shape)
        for (name, spec), output in zip(specs.items(), outputs, strict=True)
    }


def numpy_of(x):
    """The values of an array or tensor of any library as a NumPy array of the same dtype."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return np.asarray(x)
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return x.view(torch.int16).numpy().view("bfloat16")
    return x.numpy()


def load_torch_file(path):
    """Reads a file of `torch.save` without running code from it: tensors, numbers and containers.

    Raises:
        ImportError: If torch is not installed. It need not be Keras's backend.
    """
    return import_torch(path).load(path, weights_only=True, map_location="cpu")


def save_torch_file(arrays, path):
    """Writes a dict of name to NumPy array with `torch.save`."""
    torch = import_torch(path)

    def tensor(x):
        if x.dtype.name == "bfloat16":
            return torch.tensor(x.view("int16")).view(torch.bfloat16)
        return torch.tensor(x)

    torch.save({name: tensor(array) for name, array in arrays.items()}, path)


def import_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a file of torch, and torch is not installed. Install it (the CPU build is "
            "enough, Keras can keep its backend), or use a .safetensors file."
        ) from error
    return torch


def image_writer(log_dir):
    """A function `(name, path of a PNG file, step)` that puts a picture into a TensorBoard log.

    Args:
        log_dir: Path of the folder.

    Raises:
        ImportError: If TensorFlow, which writes such logs under any backend, is missing.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "Pictures for TensorBoard are written by TensorFlow. Install it: "
            "`pip install tensorflow`; or leave out `log_dir`."
        ) from error
    from PIL import Image

    writer = tf.summary.create_file_writer(log_dir)
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "images"

    def write(name, path, step):
        with Image.open(path) as picture:
            size = [str(n).encode() for n in picture.size]
        with open(path, "rb") as file:
            value = tf.constant([*size, file.read()])
        with writer.as_default():
            tf.summary.write(name, value, step, metadata)
        writer.flush()

    return write
