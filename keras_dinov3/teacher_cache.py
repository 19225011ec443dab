"""A frozen teacher's tokens, computed once and kept on disk."""

from keras_dinov3.encoder import Tokens, merge


def known_tokens(crops):
    """The teacher's `Tokens` of the global crops that ready crops bring, or `None`."""
    if "teacher_cls" not in crops:
        return None
    return Tokens(merge(crops["teacher_cls"]), None, merge(crops["teacher_patches"]))
