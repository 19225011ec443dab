"""`CollapseMonitor`: what student and teacher still tell apart, on images that stay the same."""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.alarms import Watch, announce
from keras_dinov3.batches import full_batches, inputs_of, is_arrays
from keras_dinov3.checks import check_batch
from keras_dinov3.encoder import encode, grid_of, merge
from keras_dinov3.families import patch_size_of
from keras_dinov3.losses import l2_normalize
from keras_dinov3.monitors import Monitor, changed, scheduled_values
from keras_dinov3.prototypes import dino_losses, ibot_losses
from keras_dinov3.schedules import check_count, is_zero, value_at

NUM_SIMILARITIES = 16  # images whose patches are compared with each other


class CollapseMonitor(Monitor):
    """Watches whether student and teacher still tell images apart, and says what to change if not.

    A few images, cut and masked once, are shown to both now and then, apart from training. In the
    logs then, for the class token and, with `patch_` before the name, for hidden patches:

    - `target_entropy`: of the teacher's targets, in nats, from 0 to `log(num_prototypes)`. It is
      the part of the loss that the student cannot change.
    - `target_kl`: the rest of the loss, the divergence of the student's predictions from them. The
      loss of the global crops is the sum of both.
    - `target_information`: what a target says about its image, in nats: the entropy of the mean
      target minus `target_entropy`. At 0 all images have one target, and nothing can be learned.

    And, for the class token:

    - `prototypes_used`: how many prototypes some crop's target prefers, of as many as could be.
    - `feature_std`: the deviation of the teacher's normalised features over the images, mean over
      dimensions, times the square root of the width: 1 where they point all ways, 0 where all are
      one.
    - `feature_agreement`, `prototype_agreement`: the cosine between student and teacher for the
      same crop, and how often both prefer one prototype.
    - `patch_drift`: how far the cosines between the patches of an image are from those of an early
      copy, root mean square. Dense features can fade while the rest still improves.
    - `weight_norm`, `teacher_distance`: the length of the student's weights, and the distance of
      the teacher's from them as a share of it.

    An alarm fires once in a `fit` for each of its kinds, as a warning that says what was seen,
    since when, and which setting to try:

    - `flat_targets`: uniform targets of class tokens and of patches, as with a teacher's
      temperature too high;
    - `one_target`: one other target for all images, as without Sinkhorn or centering;
    - `teacher_is_student`: a teacher that averages nothing, as with momentum 0;
    - `diverged`: weights that explode, or a loss above that of a uniform guess, as with a learning
      rate far too high. After it no other fires: it would be a consequence.

    Args:
        images: Images `(n, H, W, C)`, or `(images, labels)`, or a dict of ready crops as `fit`
            takes them, or batches of these, of which the first is used. All are looked at
            together, 64 to 256 are plenty; Sinkhorn is over them.
        every: Int, at least 1. Epochs from one look to the next.
        every_steps: Int or `None`: batches from one look to the next, see `Monitor`. A look costs
            as much as a step without its backward pass; alarms need some before it is too late.
        reference_epoch: Int. After how many epochs `patch_drift` takes its early copy; 0 before
            that.
        patience: Int, at least 1. Updates for which targets must be flat or all the same before
            an alarm fires, since every run begins that way. `None`: a tenth of the run, but at
            least 100. The other alarms need two looks.
        path: Path of a file that each alarm is appended to, as a line of JSON. `None`: no file.
        seed: Int. Seeds crops and masks.

    Attributes:
        alarms: List of dicts, one for each alarm: `kind`, `step` and `epoch` at which it fired,
            `since_step` and `since_epoch`, `message` and `values`, the numbers that it saw.
        records: List of dicts, see `Monitor`.

    Raises:
        ValueError: If an argument is outside its range; before training, if the images do not fit
            the model.

    Reference:
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), section 5.3 and figure 7 (entropy
        and divergence); [Chen & He, 2021](https://arxiv.org/abs/2011.10566), section 4.1
        (deviation of normalised features); [Siméoni et al.,
        2025](https://arxiv.org/abs/2508.10104), section 4 (patch similarities that fade).
    """

    def __init__(
        self,
        images,
        every=1,
        every_steps=100,
        reference_epoch=1,
        patience=None,
        path=None,
        seed=0,
    ):
        super().__init__(every, every_steps)
        check_count("reference_epoch", reference_epoch)
        if patience is not None:
            check_count("patience", patience, at_least=1)
        check_count("seed", seed)
        self.images = images
        self.reference_epoch = reference_epoch
        self.patience = patience
        self.path = path
        self.seed = seed
        self.alarms = []
        self._first = self._reference = None

    def prepare(self):
        if self._first is None:
            images = self.images[0] if isinstance(self.images, tuple) else self.images
            size = len(keras.tree.flatten(images)[0]) if is_arrays(images) else None
            self._first = full_batches(images, size)[1]
        check_batch(self._first, self.model)
        self._crops = self.crops_of(inputs_of(self._first))
        self._probe = CollapseProbe(self.model)  # anew: settings may have changed
        self._watch = Watch(self.patience)

    def crops_of(self, inputs):
        """What the probe sees: crops and masks as in training, but always the same."""
        model, crops = self.model, inputs
        if not isinstance(inputs, dict):
            crops = changed(model.augmentation, num_local_crops=0, seed=self.seed)(inputs)
        images, masks = backend.numpy_of(crops["global_crops"]), crops.get("masks")
        if masks is None and model.masking is not None:
            grid_size = grid_of(images.shape[2:4], patch_size_of(model.student), "global_crops")
            masks = changed(model.masking, seed=self.seed).sample(*images.shape[:2], grid_size)
        found = {"global_crops": images}
        if masks is not None:
            found["masks"] = backend.numpy_of(masks).astype(bool)
            if found["masks"].any() and not is_zero(model.ibot_weight):
                found["masked"] = np.flatnonzero(found["masks"]).astype("int32")
        return found

    def measure(self):
        values = self._probe.predict_on_batch(self._crops)
        similarity = values.pop("patch_similarity")
        self._similarity = similarity
        values = {name: float(value) for name, value in values.items()}
        if self._reference is None:
            return {**values, "patch_drift": 0.0}
        drift = np.sqrt(np.mean(np.square(similarity - self._reference)))
        return {**values, "patch_drift": float(drift)}

    def _record(self, epoch):
        super()._record(epoch)
        if self._reference is None and epoch >= self.reference_epoch:
            self._reference = self._similarity
        for alarm in self._watch.look(self.records[-1], self.settings()):
            self.alarms.append(alarm)
            announce(alarm, self.path)

    def settings(self):
        """What the alarms' advice is computed from."""
        model, params = self.model, self.params or {}
        batches = (params.get("epochs") or 0) * (params.get("steps") or 0)
        optimizer = backend.bare_optimizer(model)
        per_update = optimizer.gradient_accumulation_steps or 1
        values = scheduled_values(model)
        return {
            **values,
            "peak_learning_rate": getattr(
                optimizer._learning_rate, "peak", values["learning_rate"]
            ),
            "num_prototypes": model.head_sizes["dino"],
            "num_patch_prototypes": model.head_sizes["ibot"],
            "centering": model.centering,
            "koleo_weight": model.koleo_weight,
            "batch_size": model.train_shapes[0][0] * per_update,
            "total_steps": batches // per_update or None,
        }


class CollapseProbe(keras.Model):
    """`look_at` a model, compiled: crops in, values out.

    Args:
        model: `DINOv3`. Its weights of the moment are read; settings are those of now.

    Call arguments:
        crops: As in `look_at`.
    """

    def __init__(self, model):
        super().__init__(autocast=False)
        targets = [model.class_targets, model.patch_targets]
        targets = [side for side in targets if isinstance(side, keras.layers.Layer)]
        # What is read, and no more: Keras carries and builds all that a model holds.
        self.parts = [part for pair in model.student_and_teacher for part in pair] + targets
        self.step = model.step
        self._look = functools.partial(look_at, model)
        self.built = True  # no weights of its own

    def call(self, crops):
        return self._look(crops)


def look_at(model, crops):
    """The values of `CollapseMonitor` of the moment, but for what is compared with earlier ones.

    Args:
        model: `DINOv3`.
        crops: Dict of `"global_crops"` `(B, G, S, S, C)` and, if patches are hidden, `"masks"`
            `(B, G, N)` and `"masked"` `(M,)`, the numbers of the hidden ones among all `B*G*N`.

    Returns:
        Dict of float32 scalars, and `"patch_similarity"` `(b, N, N)`: the cosines between the
        teacher's patches of the first crops of a few images.
    """
    images, masks = crops["global_crops"], crops.get("masks")
    batch_size, num_crops = images.shape[:2]
    masks = None if masks is None else merge(masks)
    teacher = encode(model.teacher, merge(images), extras=model.teacher_extras)
    student = encode(model.student, merge(images), masks=masks, extras=model.student_extras)
    teacher_temperature = value_at(model.teacher_temperature, model.step)
    student_temperature = value_at(model.student_temperature, model.step)

    def logits_of(head, tokens):
        return ops.reshape(head(tokens), (batch_size, num_crops, -1))

    logits = logits_of(model.teacher_dino_head, teacher.cls)  # (B, G, K)
    targets = model.class_targets(logits, teacher_temperature, training=False)
    logits = logits_of(model.student_dino_head, student.cls)
    ignore_diagonal = model.ignore_diagonal and num_crops > 1
    losses = dino_losses(targets, {"global": logits}, student_temperature, ignore_diagonal)
    values = parts_of_loss(targets, losses["global"])
    winners = ops.argmax(targets, axis=-1)
    values["prototypes_used"] = share_used(winners, targets.shape[-1])
    agree = ops.argmax(logits, axis=-1) == winners
    values["prototype_agreement"] = ops.mean(ops.cast(agree, "float32"))

    if "masked" in crops:
        patches = [ops.take(merge(x.patches), crops["masked"], axis=0) for x in (teacher, student)]
        logits = model.teacher_ibot_head(patches[0])  # (M, K)
        targets = model.patch_targets(logits, teacher_temperature, training=False)
        losses = ibot_losses(targets, model.student_ibot_head(patches[1]), student_temperature)
        parts = parts_of_loss(targets, losses)
        values.update({f"patch_{name}": value for name, value in parts.items()})

    cls, student_cls, patches = (
        l2_normalize(ops.cast(x, "float32")) for x in (teacher.cls, student.cls, teacher.patches)
    )
    values["feature_std"] = ops.mean(ops.std(cls, axis=0)) * math.sqrt(cls.shape[-1])
    if cls.shape[-1] == student_cls.shape[-1]:
        values["feature_agreement"] = ops.mean(ops.sum(cls * student_cls, axis=-1))
    few = patches[: NUM_SIMILARITIES * num_crops : num_crops]
    values["patch_similarity"] = ops.matmul(few, ops.transpose(few, (0, 2, 1)))

    weights = [*model.student.weights, *model.student_extras.weights]
    weights = [ops.convert_to_tensor(weight) for weight in weights]
    values["weight_norm"] = backend.global_norm(weights)
    if model.teacher_ema is not None:
        others = [*model.teacher.weights, *model.teacher_extras.weights]
        pairs = zip(weights, others, strict=True)
        distance = backend.global_norm([x - ops.convert_to_tensor(y) for x, y in pairs])
        values["teacher_distance"] = distance / values["weight_norm"]
    return values


def parts_of_loss(targets, losses):
    """The two parts of a cross-entropy, and how much targets `(..., K)` say about a sample.

    Cross-entropy is the entropy of the targets, which the student cannot change, plus their
    divergence from its predictions. The information is the entropy of the mean target minus the
    mean entropy of the targets: 0 if all samples have one target, whether flat or sharp.
    """
    entropy = ops.mean(entropy_of(targets))
    mean = ops.mean(ops.reshape(targets, (-1, targets.shape[-1])), axis=0)
    return {
        "target_entropy": entropy,
        "target_kl": ops.mean(losses) - entropy,
        "target_information": entropy_of(mean) - entropy,
    }


def entropy_of(probabilities):
    """In nats, over the last axis."""
    logs = ops.log(ops.maximum(probabilities, 1e-30))
    return -ops.sum(probabilities * logs, axis=-1)


def share_used(winners, num_prototypes):
    """How many prototypes win a sample, as a share of the most that could."""
    wins = ops.sum(ops.one_hot(ops.reshape(winners, (-1,)), num_prototypes), axis=0)
    most = min(num_prototypes, winners.shape[0] * winners.shape[1])
    return ops.sum(ops.cast(wins > 0, "float32")) / most
