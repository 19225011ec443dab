"""Named methods: the arguments of `DINOv3` that make it one."""

from keras_dinov3.callbacks import TeacherEMA
from keras_dinov3.extras import EncoderExtras
from keras_dinov3.masking import BlockMasking, RandomMasking
from keras_dinov3.schedules import WarmupCosine


def dinov3(total_steps, seed=None):
    """The method of DINOv3's first phase. Its crops are `MultiCrop`'s defaults.

    Args:
        total_steps: Int. Optimizer updates of the whole training.
        seed: Int for the masks.

    Returns:
        Dict of arguments of `DINOv3`.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 3.
    """
    return {
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "koleo_weight": 0.1,
        "masking": BlockMasking(seed=seed),
        "teacher_ema": TeacherEMA(WarmupCosine(0.992, total_steps, end=1.0)),
    }


def seed_method(total_steps, num_register_tokens=4, seed=None):
    """The "seed" method: a DINOv2 with registers and KoLeo, on any Vision Transformer.

    What it does otherwise than DINOv3: random masks in every global crop; a plain mean over all
    masked patches; KoLeo on the first global crop alone, by cosine; a teacher whose momentum is
    `1 - 0.004 * (1 + cos(pi * step / total_steps)) / 2`, from 0.996 to 1 after the last step.
    The DINO terms share their weight by their number of pairs, as here always.

    Args:
        total_steps: Int. Optimizer updates of the whole training.
        num_register_tokens: Int. Registers for a backbone without any: a `ViTBackbone`, or one
            built with none. Give 0 for a backbone with registers of its own.
        seed: Int for the masks.

    Returns:
        Dict of arguments of `DINOv3`.

    Reference:
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193);
        [Darcet et al., 2023](https://arxiv.org/abs/2309.16588).
    """
    momentum = WarmupCosine(0.996, total_steps, end=1.0, cosine_reaches_end=False)
    return {
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "koleo_weight": 0.1,
        "koleo_crops": 1,
        "koleo_distance": "cosine",
        "ibot_average": "patches",
        "masking": RandomMasking(0.3, seed=seed),
        "extras": EncoderExtras(num_register_tokens=num_register_tokens),
        "teacher_ema": TeacherEMA(momentum),
    }
