"""`DINOv3`: the whole training step, to be read from top to bottom."""

import keras
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.augment import MultiCrop
from keras_dinov3.callbacks import TeacherEMA
from keras_dinov3.checks import check_mask_shape, check_settings, crops_of
from keras_dinov3.encoder import View, by_image, encode, encode_views, grid_of, merge
from keras_dinov3.extras import extras_for
from keras_dinov3.families import (
    check_backbone,
    copy_of,
    freeze_mask_token,
    patch_size_of,
    settle_positions,
)
from keras_dinov3.heads import make_heads
from keras_dinov3.image_model import ImageModel, spread
from keras_dinov3.known_tokens import known_tokens
from keras_dinov3.losses import koleo_loss
from keras_dinov3.masking import BlockMasking, masked_slots
from keras_dinov3.prototypes import dino_losses, ibot_losses, project, project_all
from keras_dinov3.roles import set_roles
from keras_dinov3.schedules import is_zero, value_at
from keras_dinov3.targets import make_targets, targets_of
from keras_dinov3.terms import merged, terms_of


@keras.saving.register_keras_serializable(package="keras_dinov3")
class DINOv3(ImageModel):
    """DINOv3 self-supervised training of a Keras Hub backbone by `fit(images)`.

    A student sees masked global crops and local crops of each image, a teacher the whole
    global crops. Class tokens are compared across crops (DINO), masked patches with the
    teacher's view of them (iBOT), and KoLeo spreads the class tokens. The teacher is the
    moving average of the student and is what `export_backbone` returns. Or a frozen teacher of its
    own is distilled into the student, which `export_backbone` then returns.

    Args:
        backbone: `DINOV3Backbone` or `DINOV2Backbone` of `keras_hub.models`, built with
            `use_mask_token=True`, or `ViTBackbone`. It becomes the student and is trained in
            place.
        num_prototypes: Int, `K`, the prototypes of the class token head.
        num_patch_prototypes: Int, the prototypes of the patch head. `None`: `num_prototypes`.
        head_hidden_dim: Int. Width of the hidden layers of both heads.
        head_bottleneck_dim: Int. Width of the unit vector before the prototypes.
        head_num_layers: Int. Dense layers up to and including the bottleneck.
        student_temperature: Float or schedule. Divides the student's logits.
        teacher_temperature: Float or schedule. Divides the teacher's logits.
        dino_weight: Float or schedule. Weight of the class token losses; the global and the
            local one share it in proportion to their pairs of crops.
        ibot_weight: Float or schedule. Weight of the masked patch loss.
        koleo_weight: Float or schedule. Weight of KoLeo, summed over the global crops.
        koleo_top_k: Int. Nearest neighbours that KoLeo pushes away.
        drop_path_rate: Float in [0, 1). Share of the batch that skips each residual branch of
            the student.
        remat: `"none"`, `"blocks"` or `"full"`: what of the student the backward pass computes
            again to save memory, see `encode`. Gradients are the same.
        centering: `"sinkhorn_knopp"`, or a `SoftmaxCentering` layer, whose settings both the
            class token and the patch targets take.
        sinkhorn_iterations: Int. Alternations of `sinkhorn_knopp`.
        augmentation: `MultiCrop` or `MixedCrops` layer; `"multi_crop"` is the first with its
            defaults. `None`: the data are ready crops.
        masking: `BlockMasking` or `RandomMasking` layer; `"block"` is the first with its
            defaults. `None`: no patch is hidden, unless the data bring `masks`.
        max_masked_patches: Int. For data that bring `masks`: slots for the masked
            patches of a whole batch, over all its global crops. `None`: a slot for every patch.
        ignore_diagonal: Whether the DINO loss leaves out pairs of a global crop with itself.
        local_weight: Float or schedule. Multiplies the DINO loss of the local crops.
        ibot_average: `"crops"`: the patch loss is the mean over global crops, masked or not, of
            the means over their masked patches; `"patches"`: the mean over all masked patches.
        koleo_crops: Int. Global crops, from the first, that KoLeo is summed over. `None`: all.
        koleo_distance: `"euclidean"` or `"cosine"`, see `losses.koleo_loss`.
        extras: `EncoderExtras` with what the backbone's class lacks: registers for a ViT, untied
            norms, varied rotary positions and more. `None`: nothing.
        lora: `LoRA`: of the student's backbone, only low-rank adapters of the chosen projections
            train, and the weights of `backbone` itself stay. `None`: all of it trains.
        teacher: Backbone to start the teacher from. `None`: a copy of `backbone`. With
            `teacher_ema=None` it is distilled: it stays as it is, `extras` are the student's
            alone, and the student sees the masked patches too, whose loss stays.
        teacher_heads: Pair of `DINOHead`s, for class tokens and for patches, of a teacher that is
            distilled: trained with it, of any width. `None`: new ones.
        teacher_ema: `callbacks.TeacherEMA`; `"default"` is one with its defaults. `None`: the
            teacher is frozen. A `TeacherEMA` among `fit`'s callbacks takes its place.
        gram: `GramAnchor`, which holds patch similarities to those of a frozen backbone, or `None`.
        alignment: `PatchAlignment`, which aligns the patches of overlapping crops, or `None`.
        preserve: `Preserve`, which keeps class tokens near those of released weights, or `None`.
        prototype_chunk_size: Int, a divisor of both numbers of prototypes. Logits are then made
            and compared for that many prototypes at a time, in the backward pass once more: the
            same losses and gradients in less memory and more time. `None`: all at once.
        seed: Int. Seeds the default augmentation and masking, and the drop path.
        **kwargs: Keyword arguments of `keras.Model`.

    Call arguments:
        inputs: Images `(B, H, W, C)`, uint8 0-255 or float 0-1. Or a dict of ready,
            normalised crops: `"global_crops"` `(B, G, S, S, C)`, optionally `"local_crops"`
            `(B, L, s, s, C)` and `"masks"` `(B, G, N)`, bool, true where hidden; with a `gram`
            also `"gram_crops"` `(B, G, T, T, C)`, with an `alignment` where they lie, see there;
            and what `cache_teacher` kept of a frozen teacher, which then does not run.

    Logs:
        `loss`, `dino_global_loss`, `dino_local_loss`, `ibot_loss`, `koleo_loss`, `gram_loss`,
        `alignment_loss`, `preservation_loss`: the total, and the unweighted mean of each term
        whose weight is not the number 0.

    Raises:
        TypeError: If `backbone` is of no supported family.
        ValueError: If settings contradict each other or the backbone.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 3, equation 1;
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), section 4.
    """

    def __init__(
        self,
        backbone,
        num_prototypes=65536,
        num_patch_prototypes=None,
        head_hidden_dim=2048,
        head_bottleneck_dim=256,
        head_num_layers=3,
        student_temperature=0.1,
        teacher_temperature=0.07,
        dino_weight=1.0,
        ibot_weight=1.0,
        koleo_weight=0.1,
        koleo_top_k=1,
        drop_path_rate=0.0,
        remat="none",
        centering="sinkhorn_knopp",
        sinkhorn_iterations=3,
        augmentation="multi_crop",
        masking="block",
        max_masked_patches=None,
        ignore_diagonal=True,
        local_weight=1.0,
        ibot_average="crops",
        koleo_crops=None,
        koleo_distance="euclidean",
        extras=None,
        lora=None,
        teacher=None,
        teacher_heads=None,
        teacher_ema="default",
        gram=None,
        alignment=None,
        preserve=None,
        prototype_chunk_size=None,
        seed=None,
        **kwargs,
    ):
        check_backbone(backbone)
        super().__init__(autocast=False, dtype=backbone.dtype_policy, **kwargs)
        if augmentation == "multi_crop":
            augmentation = MultiCrop(seed=spread(seed, 0))
        if masking == "block":
            masking = BlockMasking(seed=spread(seed, 1))
        if teacher_ema == "default":
            teacher_ema = TeacherEMA()
        self.num_prototypes = num_prototypes
        self.num_patch_prototypes = num_patch_prototypes
        self.head_hidden_dim = head_hidden_dim
        self.head_bottleneck_dim = head_bottleneck_dim
        self.head_num_layers = head_num_layers
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.dino_weight = dino_weight
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.koleo_top_k = koleo_top_k
        self.drop_path_rate = drop_path_rate
        self.remat = remat
        self.centering = centering
        self.sinkhorn_iterations = sinkhorn_iterations
        self.augmentation = augmentation
        self.masking = masking
        self.max_masked_patches = max_masked_patches
        self.ignore_diagonal = ignore_diagonal
        self.local_weight = local_weight
        self.ibot_average = ibot_average
        self.koleo_crops = koleo_crops
        self.koleo_distance = koleo_distance
        self.extras = extras
        self.lora = lora
        self.teacher_heads = teacher_heads
        self.teacher_ema = teacher_ema
        self.gram = gram
        self.alignment = alignment
        self.preserve = preserve
        self.prototype_chunk_size = prototype_chunk_size
        self.seed = seed
        self.student = backbone
        self.teacher = copy_of(backbone) if teacher is None else teacher
        self.has_foreign_teacher = teacher is not None and teacher_ema is None
        check_settings(self)

        self.student_extras = extras_for(self.student, extras, "student", lora)
        if self.has_foreign_teacher:
            extras = lora = None
        self.teacher_extras = extras_for(self.teacher, extras, "teacher", lora)
        self.student_dino_head, self.student_ibot_head = make_heads(self, "student")
        self.teacher_dino_head, self.teacher_ibot_head = make_heads(self, "teacher")
        for student, teacher in self.student_and_teacher:
            teacher.trainable = False
            if student is not backbone and teacher_ema is not None:
                teacher.set_weights(student.get_weights())
        for term in terms_of(self).values():
            term.build_for(self)
        if self.has_foreign_teacher:
            freeze_mask_token(self.student, self.student_extras)  # nothing is hidden from it
        set_roles(*(student for student, _ in self.student_and_teacher))
        self.class_targets = make_targets(centering, num_prototypes, sinkhorn_iterations)
        self.patch_targets = make_targets(centering, self.head_sizes["ibot"], sinkhorn_iterations)
        self.seed_generator = keras.random.SeedGenerator(spread(seed, 2))
        self.step = self.add_weight((), "zeros", "int32", trainable=False, name="step")
        crops = {kind: count for kind, (count, _) in crops_of(augmentation).items()}
        self.make_logs(
            dino_global_loss=dino_weight if crops.get("global") != 1 else 0,
            dino_local_loss=dino_weight if crops.get("local") != 0 else 0,
            ibot_loss=ibot_weight,
            koleo_loss=koleo_weight,
            **merged(term.log_weights() for term in terms_of(self).values()),
        )
        self.built = True

    def train_step(self, *args):
        with backend.compiled_pieces(self.compiles_pieces):
            return backend.step_then(self, super().train_step, args, self.update_teacher)

    def call(self, inputs, training=False):
        views = self.make_views(inputs, training)
        return self.compare(views, self.teach(views), training)

    def teach(self, views):
        """The teacher's tokens of the global crops, unless they are known, and its logits."""
        global_crops, _, _, slots, _, tokens = views
        if tokens is None:
            tokens = encode(self.teacher, merge(global_crops), extras=self.teacher_extras)
        class_tokens, chunk = by_image(tokens.cls, global_crops), self.prototype_chunk_size
        outputs = {"teacher_global": project(self.teacher_dino_head, class_tokens, chunk)}
        if slots is not None:
            patches = ops.take(merge(tokens.patches), slots.index, axis=0)  # (M, D)
            outputs["teacher_patches"] = project(self.teacher_ibot_head, patches, chunk)
        return {"teacher_tokens": tokens, **outputs}

    def compare(self, views, taught, training=False):
        """What the teacher said, which `teach` returns, and beside it what the student says."""
        global_crops, local_crops, masks, slots, crops, _ = views
        hidden = None if self.has_foreign_teacher else masks
        student, *local = self.study(global_crops, local_crops, hidden, training)
        class_tokens = [by_image(tokens.cls, global_crops) for tokens in (student, *local)]
        logits = project_all(self.student_dino_head, class_tokens, self.prototype_chunk_size)
        outputs = {"student_cls": class_tokens[0], **taught}  # (B, G, D)
        outputs |= zip(("student_global", "student_local"), logits, strict=False)  # (B, G, K)
        if slots is not None:
            patches = ops.take(merge(student.patches), slots.index, axis=0)
            patches = project(self.student_ibot_head, patches, self.prototype_chunk_size)
            outputs |= {"student_patches": patches, "slots": slots}
        for name, term in terms_of(self).items():
            outputs[name] = term.see(crops, student, taught["teacher_tokens"], masks, self.step)
        return outputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        total, terms = self.loss_and_terms(y_pred, training)
        self.watch(terms)
        return total

    def loss_and_terms(self, outputs, training=False, targets=None):
        """The total loss, and the unweighted mean of each of its terms by name."""
        targets = targets_of(self, outputs, training) if targets is None else targets
        student_temperature = value_at(self.student_temperature, self.step)
        num_global = outputs["student_global"].shape[1]
        num_local = outputs["student_local"].shape[1] if "student_local" in outputs else 0
        others = num_global - 1 if self.ignore_diagonal else num_global
        pairs = {"global": num_global * others, "local": num_global * num_local}
        terms, weights = {}, {}

        kinds = [kind for kind in pairs if pairs[kind] and not is_zero(self.dino_weight)]
        logits = {kind: outputs[f"student_{kind}"] for kind in kinds}
        losses = dino_losses(targets["dino"], logits, student_temperature, self.ignore_diagonal)
        for kind in kinds:
            name = f"dino_{kind}_loss"
            terms[name] = ops.mean(losses[kind])  # of (B,)
            share = pairs[kind] / sum(pairs.values())
            weights[name] = value_at(self.dino_weight, self.step) * share
            if kind == "local":
                weights[name] = weights[name] * value_at(self.local_weight, self.step)
        if "slots" in outputs:
            slots, logits = outputs["slots"], outputs["student_patches"]
            losses = ibot_losses(targets["ibot"], logits, student_temperature)  # (M,)
            batch_size = outputs["student_cls"].shape[0]
            losses = ops.segment_sum(losses * slots.weight, slots.image, batch_size)  # (B,)
            terms["ibot_loss"] = ops.mean(losses)
            weights["ibot_loss"] = value_at(self.ibot_weight, self.step)
        if not is_zero(self.koleo_weight):
            num_crops = min(self.koleo_crops or num_global, num_global)
            losses = [
                koleo_loss(outputs["student_cls"][:, crop], self.koleo_top_k, self.koleo_distance)
                for crop in range(num_crops)
            ]
            terms["koleo_loss"] = ops.mean(ops.stack(losses))
            weights["koleo_loss"] = value_at(self.koleo_weight, self.step) * num_crops
        for name, term in terms_of(self).items():
            losses, own_weights = term.losses_of(*outputs[name], step=self.step)
            terms, weights = terms | losses, weights | own_weights
        return sum(weights[name] * terms[name] for name in terms), terms

    def update_teacher(self, ticks):
        """Moves the teacher by `teacher_ema` and counts the step; `ticks` is 1, or 0 to rest."""
        settle_positions(self.student)  # it is the user's, who may save it at any time
        if self.teacher_ema is not None:
            momentum = value_at(self.teacher_ema.momentum, self.step)
            momentum = ops.where(ticks > 0, momentum, 1.0)
            for student, teacher in self.student_and_teacher:
                backend.move_towards(teacher.weights, student.weights, momentum)
        self.step.assign_add(ops.cast(ticks, "int32"))
        for term in terms_of(self).values():
            term.follow(self, ticks)

    # What the step is made of

    def make_views(self, inputs, training):
        """Global and local crops, masks, their slots, all that came, tokens of the teacher."""
        crops = inputs = self.declared(inputs, training)
        if not isinstance(inputs, dict):
            options = merged(term.crop_options for term in terms_of(self).values())
            crops = self.augmentation(inputs, **options)
        global_crops, local_crops = crops["global_crops"], crops.get("local_crops")
        if local_crops is not None and local_crops.shape[1] == 0:
            local_crops = None
        batch_size, num_crops = global_crops.shape[:2]
        grid_size = grid_of(global_crops.shape[2:4], patch_size_of(self.student), "global_crops")
        shape = (batch_size, num_crops, grid_size[0] * grid_size[1])

        masks, slots = crops.get("masks"), None
        if masks is not None:
            check_mask_shape(masks, shape)
            masks = ops.cast(masks, "bool")
            num_slots = self.max_masked_patches or shape[0] * shape[1] * shape[2]
            slots = masked_slots(masks, num_slots, self.ibot_average)
        elif self.masking is not None:
            masks = self.masking.sample(batch_size, num_crops, grid_size)
            num_masked = self.masking.num_masked(batch_size, num_crops, grid_size)
            slots = masked_slots(masks, num_masked, self.ibot_average, exact=True)
        if is_zero(self.ibot_weight):
            slots = None
        return global_crops, local_crops, masks, slots, crops, known_tokens(crops)

    def study(self, global_crops, local_crops, masks, training):
        """The student's tokens of masked global crops and, if there are any, of local ones."""
        views = [View(merge(global_crops), None if masks is None else merge(masks))]
        if local_crops is not None:
            views.append(View(merge(local_crops), is_local=True))
        return encode_views(
            self.student,
            views,
            training,
            self.drop_path_rate,
            self.seed_generator,
            self.student_extras,
            self.remat,
        )

    @property
    def head_sizes(self):
        """Prototypes of each head."""
        num_patch_prototypes = self.num_patch_prototypes or self.num_prototypes
        return {"dino": self.num_prototypes, "ibot": num_patch_prototypes}

    @property
    def learned(self):
        """The backbone that training makes, and its extras: the student's if it is distilled."""
        if self.has_foreign_teacher:
            return self.student, self.student_extras
        return self.teacher, self.teacher_extras

    @property
    def student_and_teacher(self):
        """Pairs of modules with corresponding weights."""
        return [
            (self.student, self.teacher),
            (self.student_extras, self.teacher_extras),
            (self.student_dino_head, self.teacher_dino_head),
            (self.student_ibot_head, self.teacher_ibot_head),
        ]
