"""The small model and data that several test files share; every axis has its own length."""

import keras
import keras_hub
import numpy as np

import keras_dinov3 as kd

B, G, L, K, K_PATCH = 4, 2, 3, 20, 14
GLOBAL, LOCAL, PATCH = (32, 24), (16, 8), 8  # pixels; grids of 4x3 and 2x1 patches
N = 12


def backbone(**config):
    config = {
        "patch_size": PATCH,
        "num_layers": 2,
        "hidden_dim": 32,
        "num_heads": 2,
        "intermediate_dim": 48,
        "num_register_tokens": 3,
        "image_shape": (*GLOBAL, 3),
        **config,
    }
    return keras_hub.models.DINOV3Backbone(**config)


def multi_crop(**config):
    return kd.MultiCrop(
        **{
            "global_crop_size": GLOBAL,
            "local_crop_size": LOCAL,
            "num_local_crops": L,
            "seed": 1,
            **config,
        }
    )


def model(optimizer=None, compile=None, **config):
    keras.utils.set_random_seed(0)
    config = {
        "num_prototypes": K,
        "num_patch_prototypes": K_PATCH,
        "head_hidden_dim": 28,
        "head_bottleneck_dim": 18,
        "seed": 3,
        **config,
    }
    config.setdefault("augmentation", multi_crop())
    built = kd.DINOv3(config.pop("backbone", None) or backbone(), **config)
    built.compile(optimizer or keras.optimizers.AdamW(1e-3), **(compile or {}))
    return built


def images(count=B, height=40, width=36, channels=3, dtype="uint8", seed=0):
    rng = np.random.default_rng(seed)
    if dtype == "uint8":
        return rng.integers(0, 256, (count, height, width, channels)).astype("uint8")
    return rng.random((count, height, width, channels)).astype(dtype)


def crops(count=B, seed=0, masked=None):
    """Ready crops; `masked`: the share of hidden patches, `None` for no masks."""
    rng = np.random.default_rng(seed)
    ready = {
        "global_crops": rng.normal(size=(count, G, *GLOBAL, 3)).astype("float32"),
        "local_crops": rng.normal(size=(count, L, *LOCAL, 3)).astype("float32"),
    }
    if masked is not None:
        ready["masks"] = rng.random((count, G, N)) < masked
    return ready
