"""`LoRA`: training low-rank changes of a backbone's matrices instead of the matrices."""

import math

import keras
from keras import ops

from keras_dinov3.families import add_to_kernels, copy_of, parts_of
from keras_dinov3.schedules import check_count, check_range

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")


@keras.saving.register_keras_serializable(package="keras_dinov3")
class LoRA(keras.layers.Layer):
    """Low-rank adapters: of a backbone, only a product of two small matrices per projection learns.

    A chosen projection of every block computes `x W + bias + (alpha / rank) x A B`, with the
    backbone's own `W` `(in, out)`, which stays as it is, and new `A` `(in, rank)` and `B`
    `(rank, out)`. `B` starts at zero, so that training starts from the backbone's own features.

    `DINOv3(backbone, lora=LoRA(rank=8))` uses it to go on from released weights. All of the
    student's backbone is frozen but for its adapters, which no attribute of the backbone shows:
    they belong to the model's `student_extras`. What `EncoderExtras` add (registers, a mask token,
    norms) and the heads train as ever. A teacher that follows has adapters of its own, of the
    shapes of the student's, whose average they are, factor by factor; so the frozen weights of
    both stay the released ones. `export_backbone` adds `(alpha / rank) A B` to each kernel. Weight
    decay draws towards the released weights.

    Keras's own `enable_lora` would not do. What it saves has the adapters merged, and what it loads
    has both factors zero, whose gradients are zero too, so that a resumed run would learn nothing;
    its `EinsumDense` has an `A` for each head; and it adds weights to the Hub's layers, which
    their configurations do not tell.

    Args:
        rank: Int, at least 1 and at most each side of the chosen matrices.
        alpha: Positive number. The adapter's product is multiplied by `alpha / rank`. `None`:
            `rank`, so by 1.
        projections: Names of those that get adapters: `"query"`, `"key"`, `"value"`, `"output"`
            (of the attention), `"up"`, `"down"` and, in a gated MLP, `"gate"`.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If a number is out of range, a projection is unknown or named twice, or none is
            named.

    Reference:
        [Hu et al., 2021](https://arxiv.org/abs/2106.09685), section 4.1, equation 3.
    """

    def __init__(self, rank, alpha=None, projections=("query", "value"), **kwargs):
        super().__init__(**{"name": "lora", **kwargs})
        check_count("rank", rank, at_least=1)
        if alpha is not None:
            check_range("alpha", alpha, above=0, below=math.inf, scheduled=False)
        is_list = isinstance(projections, (list, tuple))
        is_known = is_list and all(name in PROJECTIONS for name in projections)
        if not is_known or not 0 < len(projections) == len(set(projections)):
            raise ValueError(
                f"`projections` must be a list of some of {PROJECTIONS}, each once. Received: "
                f"projections={projections!r}."
            )
        self.rank = rank
        self.alpha = alpha
        self.projections = tuple(projections)
        self.factors = ()  # of each block, a dict from projection to its A and B

    def build_for(self, backbone):
        """Makes the adapters of a backbone and freezes its own weights.

        Args:
            backbone: Backbone of a supported family.

        Returns:
            This layer.

        Raises:
            ValueError: If the backbone lacks a chosen projection, or one is not larger than `rank`.
        """
        if self.built:
            raise ValueError(
                "A `LoRA` holds the adapters of one backbone. Received: one that has a backbone. "
                "Make another: `LoRA.from_config(lora.get_config())`."
            )
        parts = parts_of(backbone)
        blocks = [parts.block_weights(layer, "float32") for layer in parts.blocks]
        self.check_fit(blocks[0], type(backbone).__name__)
        self.factors = tuple(
            {
                name: self.make_factors(f"block_{index}_{name}", *weights[name][0].shape)
                for name in self.projections
            }
            for index, weights in enumerate(blocks)
        )
        backbone.trainable = False
        self.built = True
        return self

    def check_fit(self, weights, family):
        """Raises if the adapters do not fit a block's weights."""
        kernels = {name: weights[name][0] for name in PROJECTIONS if name in weights}
        missing = [name for name in self.projections if name not in kernels]
        if missing:
            raise ValueError(
                "`projections` must be some that the backbone has. Received: "
                f"{', '.join(missing)}, and a `{family}` that has {', '.join(kernels)}."
            )
        smallest = min(min(kernels[name].shape) for name in self.projections)
        if self.rank > smallest:
            raise ValueError(
                "`rank` must be at most the sides of the matrices, or adapters are no smaller than "
                f"these. Received: rank={self.rank}, and a side of {smallest}."
            )

    def make_factors(self, name, num_inputs, num_outputs):
        """`A` and `B` of one projection; `x A` has about the variance of `x`."""
        initializer = keras.initializers.RandomNormal(stddev=num_inputs**-0.5)
        return (
            self.add_weight((num_inputs, self.rank), initializer, name=f"{name}_a"),
            self.add_weight((self.rank, num_outputs), "zeros", name=f"{name}_b"),
        )

    @property
    def scale(self):
        """What the product of the factors is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def weights_of(self, index):
        """The adapters of a block, a list of variables."""
        return [weight for pair in self.factors[index].values() for weight in pair]

    def adapted(self, index, weights):
        """The weights of a block with its adapters.

        Args:
            index: Int, the block.
            weights: Dict by role, see `block.block`.

        Returns:
            Dict by role, where adapted projections have `A` and `alpha / rank * B` too, in the
            dtype of the kernel.
        """
        weights = dict(weights)
        for name, (a, b) in self.factors[index].items():
            kernel, bias = weights[name]
            adapter = (ops.cast(x, kernel.dtype) for x in (a, self.scale * b))
            weights[name] = kernel, bias, *adapter
        return weights

    def merged(self, backbone):
        """A trainable copy of the adapters' backbone with `alpha / rank * A B` in its kernels."""
        copy = copy_of(backbone)
        parts = parts_of(copy)
        for layer, factors in zip(parts.blocks, self.factors, strict=True):
            changes = {name: self.scale * ops.matmul(a, b) for name, (a, b) in factors.items()}
            add_to_kernels(parts.projections(layer), changes)
        return copy

    def get_config(self):
        config = {"rank": self.rank, "alpha": self.alpha, "projections": list(self.projections)}
        return {**super().get_config(), **config}


def check_lora(lora):
    """Raises if what was given as `lora` is none."""
    if not isinstance(lora, (LoRA, type(None))):
        raise ValueError(f"`lora` must be a `LoRA` layer, or None. Received: lora={lora!r}.")
