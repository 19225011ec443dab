"""Logits of many prototypes as factors, and their cross-entropy chunk by chunk, never whole.

A logit is the product of a unit vector with a prototype. What targets and losses need of all logits
are sums over prototypes or samples, and these can be added up over chunks of prototypes, each made
from the two factors when it is needed and then forgotten. So memory grows with samples x chunk, not
with samples x prototypes; the price is that products are computed more than once.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.losses import dino_loss, ibot_loss
from keras_dinov3.schedules import check_range

LOWEST = -1e30  # below every score; finite, so that 0 times it is 0


class FactoredLogits(NamedTuple):
    """Prototype logits `(..., K)` as factors, with the prototypes in C chunks of k."""

    vectors: Any  # (..., D)
    kernel: Any  # (D, C, k)

    @property
    def shape(self):
        return (*self.vectors.shape[:-1], self.kernel.shape[1] * self.kernel.shape[2])

    def chunk(self, index):
        """float32 `(..., k)`; the product is made in the dtype of the vectors, as in `DINOHead`."""
        *samples, width = self.vectors.shape
        vectors = ops.reshape(self.vectors, (-1, width))
        kernel = ops.cast(self.kernel_chunk(index), vectors.dtype)
        logits = ops.cast(ops.matmul(vectors, kernel), "float32")
        return ops.reshape(logits, (*samples, kernel.shape[-1]))

    def kernel_chunk(self, index):
        """The prototypes of one chunk, `(D, k)`."""
        width, _, size = self.kernel.shape
        return ops.reshape(ops.slice(self.kernel, (0, index, 0), (width, 1, size)), (width, size))


class FactoredTargets(NamedTuple):
    """Target probabilities `exp(logits / temperature - offsets - peak) / total`, `(..., K)`."""

    logits: FactoredLogits
    temperature: Any  # scalar
    offsets: Any  # (C, k), of prototypes
    peak: Any  # (...), of samples
    total: Any  # (...), of samples; infinite for padded slots

    def scores(self, index):
        """Teacher logits over temperature, float32 `(..., k)`."""
        return self.logits.chunk(index) / self.temperature

    def chunk(self, index, scores=None):
        """The probabilities, float32 `(..., k)`; `scores` are those of this chunk, if known."""
        scores = self.scores(index) if scores is None else scores
        scores = scores - self.offsets[index] - self.peak[..., None]
        return ops.exp(scores) / self.total[..., None]


def project(head, tokens, chunk_size=None):
    """Logits of a `DINOHead`, as factors if there is a `chunk_size`, which must divide `K`."""
    if chunk_size is None:
        return head(tokens)
    vectors = head(tokens, return_bottleneck=True)
    kernel = ops.reshape(head.prototypes.kernel, (vectors.shape[-1], -1, chunk_size))
    return FactoredLogits(vectors, kernel)


def project_all(head, groups, chunk_size=None):
    """`project` for a list of tokens `(B, crops, D)`, all through the head together."""
    if len(groups) == 1:
        return [project(head, groups[0], chunk_size)]
    logits, start, parts = project(head, ops.concatenate(groups, axis=1), chunk_size), 0, []
    for group in groups:
        crops = slice(start, start + group.shape[1])
        start = crops.stop
        if chunk_size is None:
            parts.append(logits[:, crops])
        else:
            parts.append(logits._replace(vectors=logits.vectors[:, crops]))
    return parts


def add_chunk(peak, total, scores):
    """`peak` and `total` after one more chunk of scores `(..., k)`.

    After all chunks of a row, its softmax is `exp(scores - peak) / total`. They start from
    `LOWEST` and 0.
    """
    higher = ops.maximum(peak, ops.max(scores, axis=-1))
    more = ops.sum(ops.exp(scores - higher[..., None]), axis=-1)
    return higher, total * ops.exp(peak - higher) + more


def cross_entropies(targets, logits, student_temperature):
    """Cross-entropy of each teacher row with each student row of the same image.

    Only one chunk of logits and probabilities exists at a time, also in the backward pass, which
    makes them anew. Gradients reach the factors of `logits` and nothing else.

    Args:
        targets: `FactoredTargets` of shape `(B, T, K)`.
        logits: `FactoredLogits` of shape `(B, S, K)`, with as many chunks.
        student_temperature: Positive float or scalar tensor that divides `logits`.

    Returns:
        float32 tensor of shape `(B, T, S)`.
    """
    check_range("student_temperature", student_temperature, above=0)
    temperature = ops.convert_to_tensor(student_temperature, "float32")
    arguments = (logits, temperature, targets)

    def forward(*tensors):
        logits, temperature, targets = keras.tree.pack_sequence_as(arguments, tensors)

        def add(index, carry):
            peak, total, mass, cross = carry
            scores, shares = logits.chunk(index) / temperature, targets.chunk(index)
            higher, total = add_chunk(peak, total, scores)
            scores = scores - higher[..., None]
            # No matmul: accelerators may round its inputs.
            more = [ops.sum(shares[:, t : t + 1] * scores, axis=-1) for t in range(shares.shape[1])]
            cross = cross + mass[:, :, None] * (peak - higher)[:, None] + ops.stack(more, axis=1)
            return higher, total, mass + ops.sum(shares, axis=-1), cross

        (batch_size, num_teacher, _), num_student = targets.logits.shape, logits.shape[1]
        rows = ops.zeros((batch_size, num_student), "float32")
        mass = ops.zeros((batch_size, num_teacher), "float32")
        start = (rows + LOWEST, rows, mass, ops.zeros((batch_size, num_teacher, num_student)))
        peak, total, mass, cross = backend.loop(logits.kernel.shape[1], add, start)
        losses = mass[:, :, None] * ops.log(total)[:, None] - cross
        return losses, (tensors, peak, total, mass)

    def backward(saved, upstream):
        tensors, peak, total, mass = saved
        logits, temperature, targets = keras.tree.pack_sequence_as(arguments, tensors)
        *samples, width = logits.vectors.shape
        vectors = ops.transpose(ops.reshape(logits.vectors, (-1, width)))  # (D, B*S)
        upstream = upstream / temperature
        row_scale = ops.sum(upstream * mass[:, :, None], axis=1) / total  # (B, S)

        def add(index, carry):
            vectors_gradient, kernel_gradient = carry
            scores, shares = logits.chunk(index) / temperature, targets.chunk(index)
            gradient = ops.exp(scores - peak[..., None]) * row_scale[..., None]  # (B, S, k)
            for t in range(shares.shape[1]):
                gradient = gradient - upstream[:, t, :, None] * shares[:, t : t + 1]
            gradient = ops.cast(ops.reshape(gradient, (-1, gradient.shape[-1])), vectors.dtype)
            kernel = ops.cast(logits.kernel_chunk(index), vectors.dtype)
            more = ops.cast(ops.matmul(gradient, ops.transpose(kernel)), "float32")
            part = ops.cast(ops.matmul(vectors, gradient), "float32")[:, None]
            return vectors_gradient + more, backend.put(kernel_gradient, part, (0, index, 0))

        start = ops.zeros((vectors.shape[1], width)), ops.zeros(logits.kernel.shape)
        more, kernel_gradient = backend.loop(logits.kernel.shape[1], add, start)
        more = ops.reshape(ops.cast(more, vectors.dtype), (*samples, width))
        return more, ops.cast(kernel_gradient, logits.kernel.dtype), *[None] * (len(tensors) - 2)

    return backend.with_gradient(forward, backward)(*keras.tree.flatten(arguments))


def dino_losses(targets, crops, student_temperature, ignore_diagonal):
    """`dino_loss` for the global and the local crops, of whole or of factored logits.

    Args:
        targets: Target probabilities `(B, G, K)`.
        crops: Dict of student logits by kind, `"global"` `(B, G, K)` and `"local"` `(B, L, K)`;
            of both kinds, one may be missing.
        student_temperature: Positive float or scalar tensor.
        ignore_diagonal: Whether to leave out the pairs of a global crop with itself.

    Returns:
        Dict of float32 tensors `(B,)` by kind.
    """
    if not crops:
        return {}
    ignores = {kind: kind == "global" and ignore_diagonal for kind in crops}
    if not isinstance(targets, FactoredTargets):
        return {
            kind: dino_loss(targets, logits, student_temperature, ignores[kind])
            for kind, logits in crops.items()
        }
    logits = [*crops.values()]
    vectors = ops.concatenate([crop.vectors for crop in logits], axis=1)
    pairs = cross_entropies(targets, FactoredLogits(vectors, logits[0].kernel), student_temperature)
    losses, first = {}, 0
    for kind, crop in crops.items():
        of_kind = pairs[:, :, first : first + crop.shape[1]]  # (B, G, crops)
        keep = ops.ones(of_kind.shape[1:], "float32")
        if ignores[kind]:
            keep = keep - ops.eye(*of_kind.shape[1:], dtype="float32")
        losses[kind] = ops.sum(of_kind * keep, axis=(1, 2)) / ops.sum(keep)
        first += crop.shape[1]
    return losses


def ibot_losses(targets, logits, student_temperature):
    """`ibot_loss` of whole or of factored logits: `(M, K)`, `(M, K)` to float32 `(M,)`."""
    if not isinstance(targets, FactoredTargets):
        return ibot_loss(targets, logits, student_temperature)
    logits = logits._replace(vectors=logits.vectors[:, None])
    targets = targets._replace(
        logits=targets.logits._replace(vectors=targets.logits.vectors[:, None]),
        peak=targets.peak[:, None],
        total=targets.total[:, None],
    )
    return cross_entropies(targets, logits, student_temperature)[:, 0, 0]
