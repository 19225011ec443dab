"""What differs between the engines; no other file asks which one is running."""

import contextlib
import functools
import math
import sys
import threading
import warnings

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

    PyTorch's fused kernel reads and writes each weight once, and all weights with one rate in one
    call.

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

    groups = {}
    for variable, gradient in zip(variables, gradients, strict=True):
        weight = variable.value
        key = (optimizer.multipliers(variable), weight.dtype)
        moments = (moment.value for moment in optimizer.moments(variable))
        groups.setdefault(key, []).append((weight, gradient.to(weight.dtype), *moments))
    with torch.no_grad():
        # The factors of all groups at once: on a GPU, single numbers cost as much as arrays.
        factors = torch.tensor([key[0] for key in groups], dtype=torch.float32)
        factors = factors.to(rates.rate.device)
        rate = torch.where(factors[:, 2] > 0, rates.last_layer_rate, rates.rate) * factors[:, 0]
        kept = (1 - rate * rates.decay * factors[:, 1]).unbind()
        step = ops.cast(optimizer.iterations + 1, "float32")
        for ((multipliers, _), members), lr, keep in zip(
            groups.items(), rate.unbind(), kept, strict=True
        ):
            weights, *others = (list(column) for column in zip(*members, strict=True))
            if multipliers.decay:
                torch._foreach_mul_(weights, keep)
            torch._fused_adamw_(
                weights,
                *others,
                [],
                [step] * len(weights),
                lr=lr,
                beta1=optimizer.beta_1,
                beta2=optimizer.beta_2,
                weight_decay=0.0,
                eps=optimizer.epsilon,
                amsgrad=False,
                maximize=False,
            )
    return True


PIECES = threading.local()  # whether a step that runs in this thread compiles its pieces


@contextlib.contextmanager
def compiled_pieces(enabled):
    """A context in which what `compiled` returns, and blocks in `fold`, are compiled."""
    before = getattr(PIECES, "enabled", False)
    PIECES.enabled = enabled
    try:
        yield
    finally:
        PIECES.enabled = before


def pieces_are_compiled():
    return getattr(PIECES, "enabled", False)


def compilation(jit_compile):
    """What `compile(jit_compile=...)` means for Keras, and whether pieces are compiled.

    JAX compiles the whole step. On TensorFlow `"auto"` has XLA compile pieces, each once for all
    weights of a shape, and `True` the whole step. On PyTorch both mean pieces, `"auto"` only on a
    GPU: of a whole model, `torch.compile` makes a graph that takes minutes, and makes it anew in
    each step; and on a CPU it does not make blocks faster.

    Returns:
        Keras's `jit_compile`, and a boolean.
    """
    engine = keras.config.backend()
    if engine == "torch":
        import torch

        return False, torch.cuda.is_available() if jit_compile == "auto" else bool(jit_compile)
    if engine == "tensorflow" and jit_compile == "auto":
        return False, True
    return jit_compile, False


def compiled(function, static_argnames=()):
    """A pure function that is compiled by itself where that pays.

    JAX always compiles it: eagerly it would compile each single operation on its first use, which
    takes minutes, and under a compiled step this changes nothing. TensorFlow compiles it in
    `compiled_pieces`. PyTorch runs it as it is.
    """
    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function, static_argnames=static_argnames)
    if keras.config.backend() != "tensorflow":
        return function

    by_xla = None

    @functools.wraps(function)
    def run(*args, **kwargs):
        nonlocal by_xla
        if not pieces_are_compiled():
            return function(*args, **kwargs)
        by_xla = by_xla or xla_compiled(function)
        return by_xla(*args, **kwargs)

    return run


def xla_compiled(function):
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


# Transformer blocks from which on JAX scans over stacked weights. It then compiles one block
# instead of all: 3.5 s instead of 12.9 s for 12 blocks, 2.9 s instead of 3.3 s for 4, but 3.1 s
# instead of 2.1 s for 2; a step takes as long (ViT-S, 2 CPU cores).
SCANNED_BLOCKS = 4


def fold(function, x, blocks, remat="none"):
    """`x = function(x, inputs)` with the inputs of each block in turn.

    Args:
        function: Pure function of a tensor and a nest of tensors and `None`.
        x: Tensor. `function` keeps its shape.
        blocks: List of nests of tensors, variables and `None`, all of the same shapes.
        remat: `"none"`, `"blocks"` or `"full"`, see `encoder.encode`.

    Returns:
        The last `x`.
    """
    if remat == "full":
        size = segment_size(len(blocks))

        def segment(x, inputs):
            return fold(function, x, inputs, "blocks")

        segments = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        return fold(segment, x, segments, "blocks")
    engine = keras.config.backend()
    if engine == "torch" and pieces_are_compiled():
        function = torch_compiled(function)
    elif engine == "tensorflow":
        function = compiled_block(function)
    if remat == "blocks":
        function = rematerialized(function)
    blocks = keras.tree.map_structure(tensor_of, blocks)
    if engine == "jax" and len(blocks) >= SCANNED_BLOCKS:
        import jax

        stacked = jax.tree.map(lambda *values: ops.stack(values), *blocks)
        return jax.lax.scan(lambda x, inputs: (function(x, inputs), None), x, stacked)[0]
    for inputs in blocks:
        x = function(x, inputs)
    return x


compiled_block = functools.cache(compiled)


def tensor_of(value):
    """The tensor behind a variable or tensor; `None` stays."""
    if value is None or keras.config.backend() != "tensorflow":
        return None if value is None else ops.convert_to_tensor(value)
    import tensorflow as tf

    return tf.convert_to_tensor(value)  # Keras's leaves a variable as it is


def segment_size(num_blocks):
    """The divisor of a number of blocks that is nearest to its square root."""
    divisors = [size for size in range(1, num_blocks + 1) if num_blocks % size == 0]
    return min(divisors, key=lambda size: abs(size - math.sqrt(num_blocks)))


def rematerialized(function):
    """`function(x, inputs)`, whose inner values the backward pass computes again."""
    engine = keras.config.backend()
    if engine == "jax":
        import jax

        return jax.checkpoint(function)
    if engine == "torch":
        import torch.utils.checkpoint as checkpoint

        return functools.partial(
            checkpoint.checkpoint, function, use_reentrant=False, preserve_rng_state=False
        )
    import tensorflow as tf

    def run(x, inputs):  # TensorFlow's wants a flat list, without `None`
        flat = keras.tree.flatten(inputs)
        given = [position for position, value in enumerate(flat) if value is not None]

        @tf.recompute_grad
        def inner(x, *values):
            full = dict(zip(given, values, strict=True))
            full = [full.get(position) for position in range(len(flat))]
            return function(x, keras.tree.pack_sequence_as(inputs, full))

        return inner(x, *(flat[position] for position in given))

    return run


@functools.cache
def torch_compiled(function):
    """`torch.compile` of a function with static shapes; if there is no compiler, itself."""
    import torch

    compiled = torch.compile(function, dynamic=False)
    failed = False

    def run(*args):
        nonlocal failed
        if failed:
            return function(*args)
        try:
            # Each shape of crops is one more entry, and one more without gradients.
            with torch._dynamo.config.patch(recompile_limit=64):
                return compiled(*args)
        except (
            torch._dynamo.exc.BackendCompilerFailed,
            torch._inductor.exc.InductorError,
        ) as error:
            failed = True
            warnings.warn(
                "`torch.compile` could not compile the blocks, so they run uncompiled: "
                f"{str(error).splitlines()[0]} It needs a C++ compiler such as g++ (and Triton on "
                "a GPU); `compile(jit_compile=False)` does without.",
                stacklevel=2,
            )
            return function(*args)

    return run


def attention(query, key, value):
    """Attention over `(B, length, heads, head_dim)` by the backend's fused kernel."""
    if keras.config.backend() != "torch":
        return ops.dot_product_attention(query, key, value)
    import torch

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    x = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return x.transpose(1, 2)


def matmul(x, kernel):
    """`(..., D) @ (D, K)`, for layers with many tokens."""
    if keras.config.backend() != "torch":
        return ops.matmul(x, kernel)
    import torch

    rows = math.prod(x.shape[:-1])
    if x.device.type == "cpu" and x.dtype == torch.float32 and rows >= 256 and onednn_is_faster():
        return onednn_matmul(x, kernel)
    return torch.matmul(x, kernel)


@functools.cache
def onednn_is_faster():
    """Whether oneDNN multiplies float32 matrices faster than what PyTorch uses, which is MKL.

    On processors of AMD, MKL has no AVX-512 kernels: 210 GFLOP/s where oneDNN reaches 500 on two
    cores of an EPYC.
    """
    import torch

    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "AuthenticAMD" in file.read()
    except OSError:
        return False


def onednn_matmul(x, kernel):
    """`(..., D) @ (D, K)` as the 1x1 convolution of an image with one row, which oneDNN does."""
    return onednn_function().apply(x, kernel)


@functools.cache
def onednn_function():
    import torch

    def product(a, b):  # (m, k), (k, n) to (m, n)
        image = a.reshape(1, len(a), 1, -1).permute(0, 3, 1, 2)  # channels last in memory
        image = torch.nn.functional.conv2d(image, b.t()[:, :, None, None])
        return image.permute(0, 2, 3, 1).reshape(len(a), -1)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, kernel):
            ctx.save_for_backward(x, kernel)
            return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx, gradient):
            x, kernel = ctx.saved_tensors
            rows = gradient.reshape(-1, gradient.shape[-1])
            to_x, to_kernel = None, None
            if ctx.needs_input_grad[0]:
                to_x = product(rows, kernel.t()).reshape(x.shape)
            if ctx.needs_input_grad[1]:
                to_kernel = product(x.reshape(-1, x.shape[-1]).t().contiguous(), rows)
            return to_x, to_kernel

    return Product


def assigning(function, static_argnames=()):
    """A function that assigns to variables what a pure function makes of their values.

    Args:
        function: Pure function of the values of some variables and of further tensors. It returns
            the new values.
        static_argnames: Names of its arguments that are no tensors.

    Returns:
        Function of a tuple of variables, a tuple of tensors, and the static arguments by name.
    """
    pure = compiled(function, static_argnames)

    def assign(variables, tensors, **static):
        values = function(*variables, *tensors, **static)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    in_place = functools.cache(lambda: xla_compiled(assign))  # TensorFlow: without copies

    def run(variables, tensors, **static):
        if keras.config.backend() == "tensorflow" and pieces_are_compiled():
            variables = [v.value if isinstance(v, keras.Variable) else v for v in variables]
            in_place()(variables, tensors, **static)
            return
        values = pure(*map(tensor_of, variables), *tensors, **static)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    return run


def move_towards(averages, values, momentum):
    """`average = momentum * average + (1 - momentum) * value` for pairs of variables, in float32.

    Args:
        averages: List of variables.
        values: List of variables of the same shapes.
        momentum: float32 scalar tensor.
    """
    if keras.config.backend() == "torch":
        import torch

        tensors = [[v.value for v in side] for side in (averages, values)]
        if averages and all(x.dtype == torch.float32 for side in tensors for x in side):
            with torch.no_grad():
                if momentum.device.type == "cpu":
                    torch._foreach_lerp_(*tensors, 1.0 - momentum.item())
                else:  # a look at the number would wait for the GPU
                    torch._foreach_mul_(tensors[0], momentum)
                    torch._foreach_add_(tensors[0], torch._foreach_mul(tensors[1], 1.0 - momentum))
            return
    for average, value in zip(averages, values, strict=True):
        move((average,), (tensor_of(value), momentum))


def _moved(average, value, momentum):
    kept = momentum * ops.cast(average, "float32")
    return (ops.cast(kept + (1.0 - momentum) * ops.cast(value, "float32"), average.dtype),)


move = assigning(_moved)


def loop(count, body, carry):
    """`carry = body(index, carry)` for each `index` below `count`, one after the other.

    Compiled, it is a loop as well, so that one round's arrays are freed before the next.

    Args:
        count: Int.
        body: Function of an int, or an int tensor, and the carry.
        carry: Tuple of tensors, whose shapes and dtypes stay.

    Returns:
        The last carry.
    """
    if count == 1:
        return body(0, carry)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.while_loop(
            lambda index, carry: index < count,
            lambda index, carry: (index + 1, body(index, carry)),
            (0, carry),
            parallel_iterations=1,  # else rounds overlap, and so do their arrays
        )[1]
    return ops.fori_loop(0, count, body, carry)


def put(array, part, starts):
    """`array` with `part` written at `starts`; the caller must not use the old one any more.

    On torch it is written in place, where `ops.slice_update` would copy the whole array.
    """
    if keras.config.backend() == "torch":
        places = tuple(slice(i, i + n) for i, n in zip(starts, part.shape, strict=True))
        array[places] = part
        return array
    return ops.slice_update(array, starts, part)


def with_gradient(forward, backward):
    """A function of tensors with a gradient of its own.

    Args:
        forward: Function `(*tensors) -> (value, saved)`; `value` is one tensor.
        backward: Function `(saved, upstream) -> gradients`, a tuple with one for each tensor, or
            `None` for those that get none. It must not use other tensors of the caller.

    Returns:
        Function `(*tensors) -> value`.
    """
    if keras.config.backend() == "jax":
        import jax

        function = jax.custom_vjp(lambda *tensors: forward(*tensors)[0])
        function.defvjp(forward, backward)
        return function

    @ops.custom_gradient
    def function(*tensors):
        value, saved = forward(*tensors)

        def gradient(*given, upstream=None):  # torch gives `tensors` and `upstream` by name
            return backward(saved, given[0] if upstream is None else upstream)

        return value, gradient

    return function


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
