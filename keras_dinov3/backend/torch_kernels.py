"""`dense` on PyTorch. Only `kernels.py` imports this, and only when PyTorch runs.

What is decided here is decided on import, because `torch.compile` would look into functions.
"""

import torch


def dense(x, kernel, bias):
    """`x @ kernel + bias`, `(..., D)` to `(..., K)`; `bias` may be `None`."""
    if USES_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        return Dense.apply(x, kernel, bias)
    x = torch.matmul(x, kernel)
    return x if bias is None else x + bias


def onednn_is_faster():
    """Whether oneDNN multiplies float32 matrices faster than what PyTorch uses, which is MKL.

    On processors of AMD, MKL has no AVX-512 kernels: 210 GFLOP/s where oneDNN reaches 500 on two
    cores of an EPYC, and 50 against 170 with 8 rows.
    """
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not has_both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # of no documented interface
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "AuthenticAMD" in file.read()
    except OSError:
        return False


USES_ONEDNN = onednn_is_faster()


def linear(x, weight, bias=None):
    """`(..., k)`, `(n, k)` to `(..., n)`, of any strides, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# `torch.compile` takes that operation for fixed weights only, so it gets it under another name.
opaque_linear = torch.library.custom_op(
    "keras_dinov3::linear",
    linear,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
opaque_linear.register_fake(lambda x, weight, bias: x.new_empty((*x.shape[:-1], len(weight))))


class Dense(torch.autograd.Function):
    """`dense` by oneDNN."""

    @staticmethod
    def forward(ctx, x, kernel, bias):
        ctx.save_for_backward(x, kernel)
        return product(x, kernel.t(), bias)

    @staticmethod
    def backward(ctx, gradient):
        x, kernel = ctx.saved_tensors
        rows, to_x, to_kernel, to_bias = gradient.flatten(0, -2), None, None, None
        if ctx.needs_input_grad[0]:
            to_x = product(gradient, kernel)
        if ctx.needs_input_grad[1]:
            to_kernel = product(x.flatten(0, -2).t(), rows.t())
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        return to_x, to_kernel, to_bias


def product(x, weight, bias=None):
    return (opaque_linear if torch.compiler.is_compiling() else linear)(x, weight, bias)
