"""What each weight of a student is: by it `AdamW` chooses rate, decay and clipping."""

from typing import NamedTuple

from keras_dinov3.families import weight_places


class Role(NamedTuple):
    """What a weight is to its model. `AdamW` reads it from the variable: `variable.role`.

    `DINOv3` gives its student's weights theirs whenever it is made, so also by `load_model`. A
    weight of any other model has none, and is treated as this class's defaults say; to use the
    rules elsewhere, set `variable.role = Role(...)` before the optimizer is built.

    Args:
        part: Str. The gradients of a part are clipped together, by their common norm.
        depth: Int. Transformer blocks from the end of the backbone: 0 for what comes after the
            last block, 1 for the last block, and so on up to the embeddings.
        kind: `"patch_embed"`, `"head"`, `"last_layer"` (the prototypes of a head) or
            `"plain"`, which is all else.
        decays: Whether weight decay applies.
    """

    part: str = ""
    depth: int = 0
    kind: str = "plain"
    decays: bool = True


def role_of(variable):
    """The `Role` of a weight; the default one if its model gave it none."""
    return getattr(variable, "role", Role())


def set_roles(backbone, extras, dino_head, ibot_head):
    """Gives the weights of a student their `Role`."""
    places = weight_places(backbone)
    blocks = places["blocks"]
    if extras.lora is not None:
        blocks = [own + extras.lora.weights_of(i) for i, own in enumerate(blocks)]
    norms = [norm for norm in (extras.cls_norm, extras.local_cls_norm) if norm is not None]
    norm_weights = [weight for norm in norms for weight in norm.weights]
    tokens = [w for w in (extras.register_tokens, extras.mask_token) if w is not None]
    depths = [
        (places["tokens"] + tokens, len(blocks) + 1, "plain"),
        (places["patch_embed"], len(blocks) + 1, "patch_embed"),
        *((weights, len(blocks) - i, "plain") for i, weights in enumerate(blocks)),
        (places["norm"] + norm_weights, 0, "plain"),
    ]
    for weights, depth, kind in depths:
        for weight in weights:
            weight.role = Role("backbone", depth, kind, is_matrix(weight))
    for part, head in (("dino_head", dino_head), ("ibot_head", ibot_head)):
        for weight in head.weights:
            is_last = weight is head.prototypes.kernel
            weight.role = Role(part, 0, "last_layer" if is_last else "head", is_matrix(weight))


def is_matrix(weight):
    """Whether a weight is no bias, norm or layer scale. Tokens have leading axes of length 1."""
    return len(weight.shape) > 1 and weight.name != "bias"  # some biases have an axis of heads
