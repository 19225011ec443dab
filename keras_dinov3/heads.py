"""`DINOHead`: from tokens to prototype logits."""

import keras
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.losses import l2_normalize
from keras_dinov3.schedules import is_count


@keras.saving.register_keras_serializable(package="keras_dinov3")
class DINOHead(keras.layers.Layer):
    """Projects tokens to prototype logits: an MLP, unit norm, a bias-free matmul.

    The MLP has exact GELU between its layers and none after the last. The vector it returns is
    brought to unit length in float32. The prototypes are the columns of one kernel, of any length
    (no weight normalisation), so a logit is the prototype's length times the cosine with it.
    Kernels start from a normal distribution truncated at two standard deviations of 0.02, biases
    from 0.

    Args:
        num_prototypes: Int, `K`, the number of logits.
        hidden_dim: Int. Width of the hidden layers. Defaults to 2048.
        bottleneck_dim: Int. Width of the normalised vector. Defaults to 256.
        num_layers: Int, at least 1. Dense layers up to and including the bottleneck. With 1 there
            is no hidden layer and `hidden_dim` is not used. Defaults to 3.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        tokens: Float tensor of shape `(..., D)`; `D` must be known.
        return_bottleneck: If true, stop at the unit vectors. Defaults to `False`.

    Returns:
        Tensor of shape `(..., K)`, or `(..., bottleneck_dim)` if `return_bottleneck`, in the
        layer's compute dtype.

    Raises:
        ValueError: If one of the numbers is not an integer of at least 1, or if `D` is unknown.

    Reference:
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), section 3.1 and appendix C; the
        defaults are those of [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104).
    """

    def __init__(self, num_prototypes, hidden_dim=2048, bottleneck_dim=256, num_layers=3, **kwargs):
        sizes = {
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            if not is_count(size, at_least=1):
                raise ValueError(
                    f"`{name}` must be an integer of at least 1. Received: {name}={size!r}."
                )
        super().__init__(**kwargs)
        self.num_prototypes = int(num_prototypes)
        self.hidden_dim = int(hidden_dim)
        self.bottleneck_dim = int(bottleneck_dim)
        self.num_layers = int(num_layers)
        self.hidden_layers = [
            self._dense(self.hidden_dim, f"hidden_{i}", activation="gelu")
            for i in range(self.num_layers - 1)
        ]
        self.bottleneck = self._dense(self.bottleneck_dim, "bottleneck")
        self.prototypes = self._dense(self.num_prototypes, "prototypes", use_bias=False)

    def build(self, input_shape):
        if input_shape[-1] is None:
            raise ValueError(
                "`DINOHead` needs tokens of known width, shape (..., D). "
                f"Received: shape {tuple(input_shape)}."
            )
        shape = (*input_shape[:-1], input_shape[-1])
        for layer in (*self.hidden_layers, self.bottleneck, self.prototypes):
            layer.build(shape)
            shape = (*shape[:-1], layer.units)
        super().build(input_shape)

    def call(self, tokens, return_bottleneck=False):
        for layer in self.hidden_layers:
            tokens = layer.activation(self.product(tokens, layer))
        vectors = l2_normalize(ops.cast(self.product(tokens, self.bottleneck), "float32"))
        vectors = ops.cast(vectors, self.compute_dtype)
        return vectors if return_bottleneck else self.product(vectors, self.prototypes)

    def product(self, x, layer):
        bias = ops.cast(layer.bias, self.compute_dtype) if layer.use_bias else None
        return backend.dense(x, ops.cast(layer.kernel, self.compute_dtype), bias)

    def get_config(self):
        config = {
            "num_prototypes": self.num_prototypes,
            "hidden_dim": self.hidden_dim,
            "bottleneck_dim": self.bottleneck_dim,
            "num_layers": self.num_layers,
        }
        return {**super().get_config(), **config}

    def _dense(self, units, name, **kwargs):
        return keras.layers.Dense(
            units,
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            dtype=self.dtype_policy,
            name=name,
            **kwargs,
        )


def make_heads(model, side):
    """The DINO and the iBOT head of the student or the teacher of a `DINOv3`."""
    width = getattr(model, side).hidden_dim
    if side == "teacher" and model.teacher_heads is not None:
        for head in model.teacher_heads:
            if not head.built:
                head.build((None, width))
            # Under TensorFlow, Keras does not reach the layers of a head that was made frozen.
            for layer in (*head.hidden_layers, head.bottleneck, head.prototypes):
                layer.trainable = False
        return model.teacher_heads
    heads = []
    for kind, num_prototypes in model.head_sizes.items():
        head = DINOHead(
            num_prototypes,
            model.head_hidden_dim,
            model.head_bottleneck_dim,
            model.head_num_layers,
            dtype=model.student.dtype_policy,
            name=f"{side}_{kind}_head",
        )
        head.build((None, width))
        heads.append(head)
    return heads


def check_teacher_heads(model):
    """Says why heads cannot be those of the teacher of a `DINOv3`."""
    heads, sizes = model.teacher_heads, tuple(model.head_sizes.values())
    if heads is None:
        return
    if not model.has_foreign_teacher:
        raise ValueError(
            "`teacher_heads` are of a teacher that is distilled. Received: them without a `teacher`"
            " of its own and `teacher_ema=None`; a teacher that follows has the student's heads."
        )
    if not (isinstance(heads, (list, tuple)) and [type(h) for h in heads] == [DINOHead] * 2):
        raise ValueError(f"`teacher_heads` must be two `DINOHead` layers. Received: {heads!r}.")
    if tuple(head.num_prototypes for head in heads) != sizes:
        raise ValueError(
            "Student and teacher must have the same prototypes to be compared. Received: "
            f"`teacher_heads` with {' and '.join(str(h.num_prototypes) for h in heads)} of them, "
            f"num_prototypes={sizes[0]}, num_patch_prototypes={sizes[1]}."
        )
    for head in heads:
        first = [*head.hidden_layers, head.bottleneck][0]
        width = first.kernel.shape[0] if head.built else model.teacher.hidden_dim
        if width != model.teacher.hidden_dim:
            raise ValueError(
                "`teacher_heads` must take the teacher's tokens. Received: a head for width "
                f"{width}, and a teacher of width {model.teacher.hidden_dim}."
            )
