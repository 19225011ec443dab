"""What is compiled, in which pieces, and what the backward pass keeps."""

import contextlib
import functools
import math
import threading
import warnings

import keras
from keras import ops

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
        segments = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        return chain(rematerialized(lambda x, part: fold(function, x, part, "blocks")), x, segments)
    engine = keras.config.backend()
    if engine == "torch" and pieces_are_compiled():
        function = torch_compiled(function)
    elif engine == "tensorflow":
        function = compiled_block(function)
    if remat == "blocks":
        function = rematerialized(function)
    elif engine == "jax":
        function = products_kept(function)
    return chain(function, x, blocks)


def chain(function, x, blocks):
    """`fold` without its options."""
    blocks = keras.tree.map_structure(tensor_of, blocks)
    if keras.config.backend() == "jax" and len(blocks) >= SCANNED_BLOCKS:
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


def products_kept(function):
    """`function(x, inputs)` on JAX; on a CPU, the backward pass gets its matrix products only.

    What is made from them without a product costs less to compute again than to write and read:
    10 % of a step (ViT-S, 2 CPU cores), and memory. A GPU has attention in one kernel, which would
    be computed again.
    """
    import jax

    if jax.default_backend() != "cpu":
        return function
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_saveable)


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
            with (
                # Each shape of crops is one more entry, and one more without gradients.
                torch._dynamo.config.patch(recompile_limit=64),
                # 3 s to see whether the compiler knows the processor's vectors: it tells if not.
                torch._inductor.config.patch({"cpp.vec_isa_ok": True}),
            ):
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
