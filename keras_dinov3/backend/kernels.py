"""Operations that an engine does faster, or with less memory, than by `keras.ops`."""

import itertools

import keras
from keras import ops

CACHED_NUMBERS = 1_500_000  # 6 MB: fewer leave cores waiting for Python, more leave the cache


def attention(query, key, value):
    """Attention over `(B, length, heads, head_dim)` by the backend's fastest kernel."""
    if keras.config.backend() != "torch":
        return ops.dot_product_attention(query, key, value)
    import torch

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # The fused kernel's gradient takes up to 20 times as long as these products.
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        x = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype) @ value
        return x.transpose(1, 2)
    x = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return x.transpose(1, 2)


def split(x, sizes):
    """Parts of the given sizes along the first axis."""
    if keras.config.backend() == "torch":
        return x.split(sizes)  # the gradient of `ops.split` is a sum of padded parts
    return ops.split(x, list(itertools.accumulate(sizes[:-1])))


def dense(x, kernel, bias=None):
    """`x @ kernel + bias`, `(..., D)` to `(..., K)`."""
    if keras.config.backend() == "torch":
        from keras_dinov3.backend import torch_kernels

        return torch_kernels.dense(x, kernel, bias)
    x = ops.matmul(x, kernel)
    return x if bias is None else x + bias


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
