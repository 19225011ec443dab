"""What a backbone sees in images: similarity, attention and length of its tokens, as arrays."""

import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.block import dense, from_rows, normalize, to_rows
from keras_dinov3.encoder import NO_EXTRAS, block_numbers, blocks_of, embed, shape_of
from keras_dinov3.families import parts_of, patch_size_of
from keras_dinov3.features import FeatureExtractor, checked_features
from keras_dinov3.rope import apply_rope


def patch_features(backbone, images, batch_size=16, **settings):
    """Patch tokens as a grid.

    Args:
        backbone: As in `encode`.
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        batch_size: Int, images per step.
        **settings: `mean`, `std`, `image_size`, `extras` and `layers` of `FeatureExtractor`.

    Returns:
        float32 NumPy array of shape `(B, h, w, D)`.

    Raises:
        ValueError: As `FeatureExtractor` and its `extract`.
    """
    images = backend.numpy_of(images)
    extractor = FeatureExtractor(backbone, "patches", **settings)
    patches = extractor.extract(images, min(batch_size, max(len(images), 1)))
    return patches.reshape(len(patches), *grid_for(extractor, images), -1)


def grid_for(extractor, images):
    """The patches `(h, w)` of images as the extractor resizes them."""
    patch_size = patch_size_of(extractor.backbone)
    return tuple(n // patch_size for n in extractor.input_size(images.shape[1:3]))


def patch_similarity(backbone, images, patch, batch_size=16, **settings):
    """Cosine of one patch with all patches of all images.

    Args:
        backbone: As in `encode`.
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        patch: `(row, column)` of the patch in the first image, or `(image, row, column)`.
        batch_size: Int, images per step.
        **settings: `mean`, `std`, `image_size`, `extras` and `layers` of `FeatureExtractor`.

    Returns:
        float32 NumPy array of shape `(B, h, w)` from -1 to 1.

    Raises:
        ValueError: If there is no such patch, or as `FeatureExtractor`.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), figure 3.
    """
    features = patch_features(backbone, images, batch_size, **settings)
    place = tuple(patch) if len(patch) == 3 else (0, *patch)
    if len(place) != 3 or any(
        not 0 <= i < n for i, n in zip(place, features.shape[:3], strict=True)
    ):
        raise ValueError(
            "`patch` must be (row, column) or (image, row, column) within "
            f"{features.shape[:3]} images, rows and columns. Received: patch={tuple(patch)}."
        )
    unit = features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return unit @ unit[place]


def attention_maps(backbone, images, layer=-1, batch_size=16, **settings):
    """Attention of the class token and of each register, by head.

    Args:
        backbone: As in `encode`.
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        layer: Int. The block, counted from 0, or from the end if negative.
        batch_size: Int, images per step.
        **settings: `mean`, `std`, `image_size` and `extras` of `FeatureExtractor`.

    Returns:
        float32 NumPy array of shape `(B, 1 + R, heads, h, w)`: how much of its attention the class
        token (first) and each register give to each patch. With what they give to each other,
        which is not in it, a map's sum is 1.

    Raises:
        ValueError: If there is no such block, or as `FeatureExtractor`.

    Reference:
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), figure 1;
        [Darcet et al., 2023](https://arxiv.org/abs/2309.16588), figure 9 (registers).
    """
    images = backend.numpy_of(images)
    extractor = AttentionExtractor(backbone, layer, **settings)
    maps = extractor.extract(images, min(batch_size, max(len(images), 1)))
    return maps.reshape(*maps.shape[:3], *grid_for(extractor, images))


class AttentionExtractor(FeatureExtractor):
    """`FeatureExtractor` of `(B, 1 + R, heads, N)`, the attention of all tokens but the patches.

    Args:
        backbone: As in `FeatureExtractor`.
        layer: Int. The block.
        **settings: `mean`, `std`, `image_size` and `extras` of `FeatureExtractor`.
    """

    def __init__(self, backbone, layer=-1, **settings):
        super().__init__(backbone, **settings)
        (self.layer,) = block_numbers([layer], backbone)

    def call(self, images):
        backbone, extras = self.backbone, self.extras or NO_EXTRAS
        parts = parts_of(backbone)
        x, grid_size, num_prefix = embed(backbone, parts, self.prepared(images), None, extras)
        shape = shape_of(x)
        function, blocks = blocks_of(backbone, parts, [(shape[0], grid_size)], num_prefix, extras)
        x = to_rows([x])
        for inputs in blocks[: self.layer]:
            x = function(x, inputs)
        weights, (rope,) = blocks[self.layer]["weights"], blocks[self.layer]["ropes"]
        x = normalize(x, *weights["norm1"], float(parts.norm.epsilon), extras.norm)
        num_heads = backbone.num_heads
        heads = (*shape[:2], num_heads, shape[2] // num_heads)
        query, key = (from_rows(dense(x, weights[name]), [heads])[0] for name in ("query", "key"))
        if rope is not None:
            query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        query, key = (ops.cast(x, "float32") for x in (query[:, :num_prefix], key))
        scores = ops.einsum("bqhd,bkhd->bqhk", query, key) / heads[-1] ** 0.5
        return ops.softmax(scores, axis=-1)[..., num_prefix:]


def token_norms(backbone, images, layers=1, batch_size=16, **settings):
    """Lengths of the tokens before the final norm, where a few patches may stand out.

    Args:
        backbone: As in `encode`.
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
        layers: Int: the last so many blocks, or a list of block numbers, as in `encode_layers`.
        batch_size: Int, images per step.
        **settings: `mean`, `std`, `image_size` and `extras` of `FeatureExtractor`.

    Returns:
        Dict: `"prefix"`, float32 `(B, layers, 1 + R)`, the class token and the registers;
        `"patches"`, float32 `(B, layers, h, w)`; `"outliers"`, bool like it, true where a patch is
        longer than the median of its layer by ten times the median distance from that.

    Raises:
        ValueError: If there is no such block, or as `FeatureExtractor`.

    Reference:
        [Darcet et al., 2023](https://arxiv.org/abs/2309.16588), section 2 (patches of high norm).
    """
    images = backend.numpy_of(images)
    extractor = NormExtractor(backbone, layers, **settings)
    norms = extractor.extract(images, min(batch_size, max(len(images), 1)))
    grid_size = grid_for(extractor, images)
    split = norms.shape[-1] - grid_size[0] * grid_size[1]
    patches = norms[..., split:]
    median = np.median(patches, axis=(0, 2), keepdims=True)
    distance = np.median(np.abs(patches - median), axis=(0, 2), keepdims=True)
    shape = (*patches.shape[:2], *grid_size)
    return {
        "prefix": norms[..., :split],
        "patches": patches.reshape(shape),
        "outliers": (patches > median + 10 * distance).reshape(shape),
    }


class NormExtractor(FeatureExtractor):
    """`FeatureExtractor` of `(B, layers, 1 + R + N)`, lengths of tokens before the final norm.

    Args:
        backbone: As in `FeatureExtractor`.
        layers: As in `token_norms`.
        **settings: `mean`, `std`, `image_size` and `extras` of `FeatureExtractor`.
    """

    def __init__(self, backbone, layers=1, **settings):
        super().__init__(backbone, layers=layers, **settings)

    def call(self, images):
        layers = self.tokens_of(images, normalize=False)
        kinds = [
            ops.concatenate([ops.expand_dims(cls, 1), registers, patches], axis=1)
            for cls, registers, patches in layers
        ]
        lengths = [
            ops.sqrt(ops.sum(ops.square(ops.cast(tokens, "float32")), axis=-1)) for tokens in kinds
        ]
        return ops.stack(lengths, axis=1)


def foreground(features):
    """Which patches belong to what the images show rather than to what is around it.

    The first principal component of all patches is cut in two where the sides differ most between
    and least within (Otsu's threshold). The background is the side that the borders of the images
    have more of.

    Args:
        features: Float array of shape `(B, h, w, D)`.

    Returns:
        Bool NumPy array of shape `(B, h, w)`.

    Reference:
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), section 7.6 (PCA of patches, the
        first component for the foreground).
    """
    count, height, width, depth = features.shape
    rows = checked_features("features", features.reshape(-1, depth)).astype("float64")
    rows = rows - rows.mean(axis=0)
    _, directions = np.linalg.eigh(rows.T @ rows)
    first = rows @ directions[:, -1]
    ordered = np.sort(first)
    below = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)[:-1]
    means = sums / below, (ordered.sum() - sums) / (len(ordered) - below)
    between = below * (len(ordered) - below) * (means[0] - means[1]) ** 2
    cut = between.argmax() if len(between) else 0
    above = (first > ordered[cut]).reshape(count, height, width)
    border = np.ones((height, width), bool)
    border[1:-1, 1:-1] = False
    return ~above if above[:, border].mean() > above.mean() else above


def feature_map(features, method="pca", seed=0):
    """Features as points in a plane.

    Args:
        features: Float array of shape `(n, D)`, at least 2 wide.
        method: `"pca"`: the two main directions. `"tsne"`: t-SNE on unit features by scikit-learn,
            which keeps neighbours together; for a few thousand points.
        seed: Int, for t-SNE.

    Returns:
        float32 NumPy array of shape `(n, 2)`.

    Raises:
        ValueError: If the method is unknown or features are too few, too narrow or not finite.
        ImportError: If scikit-learn is missing, for t-SNE.

    Reference:
        [van der Maaten & Hinton, 2008](https://jmlr.org/papers/v9/vandermaaten08a.html).
    """
    features = checked_features("features", features)
    if min(features.shape) < 2 or method not in ("pca", "tsne"):
        raise ValueError(
            '`features` must hold two images at least, two wide, and `method` be "pca" or "tsne". '
            f"Received: features.shape={features.shape}, method={method!r}."
        )
    if method == "pca":
        rows = features - features.mean(axis=0, dtype="float64")
        _, directions = np.linalg.eigh(rows.T @ rows)
        return (rows @ directions[:, :-3:-1]).astype("float32")
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(
            "t-SNE needs scikit-learn. Install it: `pip install keras-dinov3[evaluation]`."
        ) from error
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, (len(features) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return model.fit_transform(unit).astype("float32")
