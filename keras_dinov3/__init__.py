"""DINOv3 self-supervised training for Keras 3, on PyTorch, JAX and TensorFlow."""

from keras_dinov3 import callbacks, convert, data, evaluation, losses, recipes, visualize
from keras_dinov3.alignment import PatchAlignment
from keras_dinov3.augment import MultiCrop
from keras_dinov3.distillation import MultiDistillation
from keras_dinov3.encoder import Tokens, encode, encode_layers
from keras_dinov3.extras import EncoderExtras
from keras_dinov3.gram import GramAnchor
from keras_dinov3.heads import DINOHead
from keras_dinov3.lora import LoRA
from keras_dinov3.masking import BlockMasking, RandomMasking
from keras_dinov3.mixed import MixedCrops
from keras_dinov3.model import DINOv3
from keras_dinov3.optimizers import AdamW, scaled_learning_rate
from keras_dinov3.preservation import Preserve
from keras_dinov3.schedules import WarmupCosine
from keras_dinov3.targets import SoftmaxCentering, sinkhorn_knopp
from keras_dinov3.teacher_cache import TeacherCache, cache_teacher

__all__ = [
    "AdamW",
    "BlockMasking",
    "DINOHead",
    "DINOv3",
    "EncoderExtras",
    "GramAnchor",
    "LoRA",
    "MixedCrops",
    "MultiCrop",
    "MultiDistillation",
    "PatchAlignment",
    "Preserve",
    "RandomMasking",
    "SoftmaxCentering",
    "TeacherCache",
    "Tokens",
    "WarmupCosine",
    "cache_teacher",
    "callbacks",
    "convert",
    "data",
    "encode",
    "encode_layers",
    "evaluation",
    "losses",
    "recipes",
    "scaled_learning_rate",
    "sinkhorn_knopp",
    "visualize",
]
