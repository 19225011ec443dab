"""What differs between the engines; no other file asks which one is running."""

import contextlib
import sys

import keras
import numpy as np
from keras import ops

CACHED_NUMBERS = 250_000  # 1 MB: several such arrays fit in the cache of a core


def step_then(model, train_step, args, update):
    """Runs Keras's train step, then `update`, inside the same compiled function.

    Args:
        model: The `keras.Model` that trains.
        train_step: Bound `train_step` of the Keras trainer.
        args: Its positional arguments: `(data,)`, or `(state, data)` on JAX.
        update: Function of one int tensor, 1 when the optimizer has changed the weights in
            this step and 0 on a micro-step of gradient accumulation. It may assign
            any weight of the model.

    Returns:
        What `train_step` returns, with `update`'s assignments in the JAX state and the values of
        `optimizer_logs` in the logs.
    """
    if keras.config.backend() == "jax":
        return _jax_step_then(model, train_step, *args, update)
    if keras.config.backend() == "torch":
        import torch

        before = optimizer_updates(model) + 0  # a copy: torch updates in place
        # Keras clears gradients by variable path, and of variables that share a path, as those
        # of student and teacher may, it clears only one.
        for variable in model.trainable_variables:
            variable.value.grad = None
        result = train_step(*args)
        with torch.no_grad():
            update(optimizer_updates(model) - before)
        return {**result, **optimizer_logs(model)}
    with after(args):
        before = optimizer_updates(model) + 0
        result = train_step(*args)
        update(optimizer_updates(model) - before)
        return {**result, **optimizer_logs(model)}


def _jax_step_then(model, train_step, state, data, update):
    with keras.StatelessScope(zip(model.optimizer.variables, state[2], strict=True)):
        before = optimizer_updates(model)
    logs, (trainable, non_trainable, optimizer, metrics) = train_step(state, data)
    variables = [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
    ]
    values = [*trainable, *non_trainable, *optimizer]
    with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
        update(optimizer_updates(model) - before)
        logs = {**logs, **optimizer_logs(model)}
    non_trainable = [scope.get_current_value(v) for v in model.non_trainable_variables]
    return logs, (trainable, non_trainable, optimizer, metrics)


def after(data):
    """A context whose operations wait for `data` in a TensorFlow graph.

    A `tf.data.Dataset` of unknown length ends in the middle of Keras's step function. What needs
    no data (step counts, weight decay, teacher, the denominators of metrics) would run once more
    by then.
    """
    if keras.config.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([x for x in tf.nest.flatten(data) if x is not None])


@contextlib.contextmanager
def weights_kept(model):
    """A context in which a first training step that fails does not cost the weights.

    On JAX `fit` takes the values out of the model before its first step, and if that step raises,
    because of the data for instance, does not put them back.
    """
    if keras.config.backend() != "jax":
        yield
        return
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    values = [variable.value for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            if variable._value is None:
                variable.assign(value)


def optimizer_updates(model):
    """How often the optimizer has changed the weights, an int tensor."""
    return ops.convert_to_tensor(bare_optimizer(model).iterations)


def optimizer_logs(model):
    """What the optimizer says about its last update, a dict of scalar tensors; often empty."""
    optimizer = bare_optimizer(model)
    return optimizer.logs() if hasattr(optimizer, "logs") else {}


def bare_optimizer(model):
    """The model's optimizer, taken out of loss scaling."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def global_norm(gradients):
    """The length of a list of tensors taken as one vector, a float32 scalar."""
    if keras.config.backend() == "torch":
        import torch

        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    gradients = [ops.cast(gradient, "float32") for gradient in gradients]
    return ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))


def scaled(tensors, factor):
    """A list of tensors times a scalar tensor; the tensors keep their dtypes."""
    if keras.config.backend() == "torch":
        import torch

        return list(torch._foreach_mul(tensors, factor))
    return [tensor * ops.cast(factor, tensor.dtype) for tensor in tensors]


def update_together(optimizer, gradients, variables, rates):
    """`AdamW.update_step` for many weights at once, where the backend has operations for that.

    On torch each operation then runs over all weights in a few kernels, instead of in several
    for each.

    Args:
        optimizer: `AdamW`.
        gradients: List of tensors.
        variables: List of their `keras.Variable`s.
        rates: The optimizer's `Rates`.

    Returns:
        Whether the weights have been updated. If not, the caller updates them one by one.
    """
    if keras.config.backend() != "torch":
        return False
    import torch

    with torch.no_grad():
        weights = [variable.value for variable in variables]
        gradients = [g.to(w.dtype) for g, w in zip(gradients, weights, strict=True)]
        groups = {}  # positions of weights that share rate and decay
        for position, variable in enumerate(variables):
            groups.setdefault(optimizer.multipliers(variable), []).append(position)
        moments = [optimizer.moments(variable) for variable in variables]
        means, squares = ([m.value for m in column] for column in zip(*moments, strict=True))
        torch._foreach_lerp_(means, gradients, 1 - optimizer.beta_1)
        torch._foreach_mul_(squares, optimizer.beta_2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - optimizer.beta_2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, optimizer.epsilon * rates.square_correction)
        moves = torch._foreach_div(means, scales)
        # The factors of all groups at once: on a GPU, single numbers cost as much as arrays.
        factors = torch.tensor(list(groups), dtype=torch.float32, device=weights[0].device)
        is_last_layer = factors[:, 2] > 0
        rate = torch.where(is_last_layer, rates.last_layer_rate, rates.rate) * factors[:, 0]
        kept = (1 - rate * rates.decay * factors[:, 1]).unbind()
        moved = (rate * (rates.square_correction / rates.mean_correction)).unbind()
        for (multipliers, members), keep, move in zip(groups.items(), kept, moved, strict=True):
            if multipliers.decay:
                torch._foreach_mul_([weights[i] for i in members], keep)
            torch._foreach_mul_([moves[i] for i in members], move)
        torch._foreach_sub_(weights, moves)
    return True


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
    """`x`, whose values a TensorFlow graph checks when it runs (XLA leaves that out)."""
    tf = sys.modules.get("tensorflow")
    if tf is None or not tf.is_symbolic_tensor(x) or not x.dtype.is_floating:
        return x
    least, greatest = tf.reduce_min(x), tf.reduce_max(x)
    is_within = tf.logical_and(least >= low, greatest <= high)
    with tf.control_dependencies([tf.debugging.Assert(is_within, [message, least, greatest])]):
        return tf.identity(x)


def is_foreign_graph_tensor(x):
    """Whether `x` is a symbolic TensorFlow tensor while another backend runs.

    That is what `tf.data.Dataset.map` passes to its function.
    """
    tf = sys.modules.get("tensorflow")  # nobody can hold such a tensor without having it
    return tf is not None and keras.config.backend() != "tensorflow" and tf.is_symbolic_tensor(x)


def call_in_tf_graph(function, array, shapes):
    """Runs a function of this backend inside a TensorFlow graph, on the host.

    Args:
        function: Function of one NumPy array that returns a dict of float32 tensors. It may be
            called from several threads at once.
        array: Symbolic TensorFlow tensor.
        shapes: Dict with the shape of each output; `None` is an unknown length.

    Returns:
        Dict of symbolic TensorFlow tensors.
    """
    import tensorflow as tf

    def run(array):
        with keras.device("cpu"):
            outputs = function(array)
        return [ops.convert_to_numpy(outputs[name]) for name in shapes]

    outputs = tf.numpy_function(run, [array], [tf.float32] * len(shapes))
    return {
        name: tf.ensure_shape(output, shape)
        for (name, shape), output in zip(shapes.items(), outputs, strict=True)
    }


def compiled(function, static_argnames=()):
    """A pure function for eager use: JAX compiles it, the other backends run it as it is.

    JAX would otherwise compile each single operation on its first use, which takes minutes.
    Under a compiled step this changes nothing.
    """
    if keras.config.backend() != "jax":
        return function
    import jax

    return jax.jit(function, static_argnames=static_argnames)


def in_cache(function, images, *arrays, size):
    """`function(images, *arrays)`; eager torch on a CPU computes it for a few images at a time.

    What it makes in between then stays in the processor's cache, instead of going through memory,
    which is much slower than the arithmetic.

    Args:
        function: Function of tensors; they share their first axis, and so does its result.
        images: Tensor of shape `(B, ...)`.
        *arrays: Tensors with a multiple of `B` rows, a like number for each image.
        size: Int. Numbers in the result for one image.
    """
    at_once = max(1, CACHED_NUMBERS // size)
    is_eager = keras.config.backend() == "torch" and images.device.type == "cpu"
    if not is_eager or len(images) <= at_once:
        return function(images, *arrays)
    import torch

    parts = [x.split(at_once * (len(x) // len(images))) for x in (images, *arrays)]
    return torch.cat([function(*part) for part in zip(*parts, strict=True)])


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
