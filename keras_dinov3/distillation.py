"""`MultiDistillation`: several students of one frozen teacher, which runs once for all of them."""

import json

import keras

from keras_dinov3 import backend
from keras_dinov3.checks import check_batch
from keras_dinov3.image_model import ImageModel
from keras_dinov3.model import DINOv3
from keras_dinov3.roles import set_roles
from keras_dinov3.schedules import is_zero
from keras_dinov3.targets import targets_of
from keras_dinov3.terms import terms_of

VIEWS = ("augmentation", "masking", "max_masked_patches", "ibot_average")  # what views depend on


@keras.saving.register_keras_serializable(package="keras_dinov3")
class MultiDistillation(ImageModel):
    """Distils one frozen teacher into several students at once, by `fit(images)`.

    ```python
    teacher = keras_hub.models.Backbone.from_preset("dinov3_vit_large_lvd1689m")
    heads = [kd.DINOHead(65536), kd.DINOHead(65536)]  # the teacher's, with the weights they had
    shared = {"teacher": teacher, "teacher_heads": heads, "teacher_ema": None}
    model = kd.MultiDistillation(
        {"small": kd.DINOv3(small, **shared), "base": kd.DINOv3(base, **shared)}
    )
    ```

    Each student is a `DINOv3` of its own, with its own heads, weights of losses, schedules and
    random state. In a step there is one set of crops and masks, which the first student's
    `augmentation` and `masking` make, and one forward pass of the teacher. Students that hold the
    same `teacher_heads` share their logits too, and with the same `teacher_temperature` and
    `"sinkhorn_knopp"` also the targets.

    One optimizer trains all. It moves each weight by its own gradient, and no loss depends on
    another student, so each learns what it would learn alone from these crops and masks.
    `AdamW(part_clipnorm=...)` clips each student's parts on their own.

    Args:
        students: Dict of at least two `DINOv3`s by name, made with one `teacher` object and
            `teacher_ema=None`, and with equal `augmentation`, `masking`, `max_masked_patches` and
            `ibot_average`, seeds aside. Their patch sizes are the teacher's, or with
            `ibot_weight=0`, where no patch is compared, any that divide the crops. A name is a
            Python identifier: it begins the names in the logs.
        **kwargs: Keyword arguments of `keras.Model`.

    Call arguments:
        inputs: As of `DINOv3`.

    Logs:
        `loss`, the sum over students; and for each student, with its name and `_` before them,
        `loss` and the terms of `DINOv3`: `small_loss`, `small_dino_global_loss` and so on. What
        `ScheduleLogger` and `AdamW(log=True)` say of a student is named in the same way. Callbacks
        that measure features are for one student: `callbacks.OfStudent`.

    Raises:
        TypeError: If a student is no `DINOv3`.
        ValueError: If the students cannot share a teacher and views, or share what is trained; or
            in `compile`, for `global_clipnorm`, which would mix their gradients.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 5.2.
    """

    teacher_ema = gram = alignment = preserve = None

    def __init__(self, students, **kwargs):
        check_students(students)
        first = next(iter(students.values()))
        super().__init__(autocast=False, dtype=first.dtype_policy, **kwargs)
        self.students = dict(students)
        self.seed = first.seed
        # Students with the same key share the teacher's logits, or targets.
        self.logit_keys = {name: logit_key(model) for name, model in students.items()}
        self.target_keys = {name: target_key(name, model) for name, model in students.items()}
        logs = {}
        for name, model in students.items():
            pairs = model.student_and_teacher
            set_roles(*(student for student, _ in pairs))
            for weight in (weight for student, _ in pairs for weight in student.weights):
                weight.role = weight.role._replace(part=f"{name}_{weight.role.part}")
            logs |= {f"{name}_{term}": 1 for term in ("loss", *(m.name for m in model.term_means))}
        self.make_logs(**logs)
        self.built = True

    def compile(self, optimizer="adamw", **kwargs):
        """As `DINOv3.compile`.

        Args:
            optimizer: Keras optimizer, or the name of one, for the weights of all students.
            **kwargs: Other arguments of `DINOv3.compile`.
        """
        super().compile(optimizer, **kwargs)
        clipnorm = getattr(backend.bare_optimizer(self), "global_clipnorm", None)
        if clipnorm is not None:
            raise ValueError(
                "Students must not change each other's gradients, so these are clipped by parts of "
                f"a student. Received: global_clipnorm={clipnorm}. Use "
                f"`keras_dinov3.AdamW(..., part_clipnorm={clipnorm})`, or `clipnorm` for each "
                "weight."
            )

    def train_step(self, *args):
        with backend.compiled_pieces(self.compiles_pieces):
            return backend.step_then(self, super().train_step, args, self.update_students)

    def call(self, inputs, training=False):
        views = self.first.make_views(self.declared(inputs, training), training)
        taught, outputs = {}, {}
        for name, model in self.students.items():
            key = self.logit_keys[name]
            if key not in taught:
                taught[key] = model.teach(views)
                views = (*views[:-1], taught[key]["teacher_tokens"])
            outputs[name] = model.compare(views, taught[key], training)
        return outputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        total, terms, targets = 0.0, {}, {}
        for name, model in self.students.items():
            key, outputs = self.target_keys[name], y_pred[name]
            if key not in targets:
                targets[key] = targets_of(model, outputs, training)
            loss, found = model.loss_and_terms(outputs, training, targets[key])
            terms |= {f"{name}_{term}": value for term, value in {"loss": loss, **found}.items()}
            total = total + loss
        self.watch(terms)
        return total

    def update_students(self, ticks):
        """Counts the step of each; `ticks` is 1, or 0 to rest."""
        for model in self.students.values():
            model.update_teacher(ticks)

    def export_backbone(self, name):
        """What a student has learned, as `DINOv3.export_backbone`.

        Args:
            name: The student's.

        Raises:
            ValueError: If there is no such student.
        """
        if name not in self.students:
            raise ValueError(
                f"`name` must be one of {list(self.students)}. Received: name={name!r}."
            )
        return self.students[name].export_backbone()

    # What `ImageModel` and callbacks ask of a model

    def check(self, batch):
        for model in self.students.values():
            check_batch(batch, model)

    @property
    def first(self):
        """The student whose settings make the views."""
        return next(iter(self.students.values()))

    @property
    def augmentation(self):
        return self.first.augmentation

    @property
    def masking(self):
        return self.first.masking

    @property
    def step(self):
        return self.first.step

    @property
    def teacher(self):
        """The backbone that all students learn from."""
        return self.first.teacher

    @property
    def teacher_extras(self):
        return self.first.teacher_extras

    @property
    def schedules(self):
        return {
            f"{name}_{key}": value
            for name, model in self.students.items()
            for key, value in model.schedules.items()
        }

    def refer(self):
        """Raises: of this there is one for each student."""
        name = next(iter(self.students))
        raise ValueError(
            "`MultiDistillation` trains several students, and what was asked for is each one's "
            f"own. Received: a question about one model, of {list(self.students)}. For a student: "
            f'`model.students["{name}"]`; in `fit`, `callbacks.OfStudent("{name}", callback)`.'
        )

    student = learned = student_and_teacher = property(refer)

    def predict(self, *args, **kwargs):
        """Not there: features are a student's backbone's."""
        self.refer()

    def __setattr__(self, name, value):
        if name == "teacher_ema":
            raise ValueError(
                "The teacher of `MultiDistillation` is frozen: several students cannot move it. "
                f"Received: teacher_ema={value!r}. Leave `TeacherEMA` out."
            )
        super().__setattr__(name, value)

    def get_config(self):
        config = keras.Model.get_config(self)
        config.pop("dtype")  # the backbones'
        heads, students = [], {}
        for name, model in self.students.items():
            students[name] = model.get_config()
            given = model.teacher_heads or ()
            heads += [head for head in given if not any(head is known for known in heads)]
            places = [[known is head for known in heads].index(True) for head in given]
            students[name] |= {"teacher": None, "teacher_heads": places or None}
        return {
            **config,
            "students": students,
            "teacher": keras.saving.serialize_keras_object(self.teacher),  # once, as the heads
            "teacher_heads": keras.saving.serialize_keras_object(heads),
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        teacher, heads = (
            keras.saving.deserialize_keras_object(config.pop(name))
            for name in ("teacher", "teacher_heads")
        )
        students = {}
        for name, settings in config.pop("students").items():
            places = settings["teacher_heads"]
            own = None if places is None else [heads[place] for place in places]
            students[name] = DINOv3.from_config(settings, teacher=teacher, teacher_heads=own)
        return cls(students, **config)


def logit_key(model):
    """Equal for models whose teachers' logits are the same."""
    heads = model.teacher_dino_head, model.teacher_ibot_head
    return (*map(id, heads), model.prototype_chunk_size)


def target_key(name, model):
    """Equal for models whose targets are the same; a running center is each model's own."""
    if model.centering != "sinkhorn_knopp":
        return name
    settings = model.teacher_temperature, model.sinkhorn_iterations
    return (*logit_key(model), text_of(settings))


def text_of(value):
    """The settings of a value, but for names and seeds, as a text that can be compared."""
    value = keras.saving.serialize_keras_object(value)
    if isinstance(value, dict) and "config" in value:
        # How a layer's dtype is written depends on what was written before.
        kept = {k: v for k, v in value["config"].items() if k not in ("name", "seed", "dtype")}
        value = {"class_name": value["class_name"], "config": kept}
    return json.dumps(value, sort_keys=True)


def check_students(students):
    """Says why models cannot be the students of a `MultiDistillation`."""
    if not isinstance(students, dict) or len(students) < 2:
        raise ValueError(
            "`students` must be a dict of at least two `DINOv3`s by name. "
            f"Received: students={students!r}. One alone: `DINOv3(..., teacher_ema=None).fit`."
        )
    for name, model in students.items():
        if not (isinstance(name, str) and name.isidentifier()) or f"{name}_".startswith("val_"):
            raise ValueError(
                'A student\'s name must be a Python identifier other than "val", which in the logs '
                f"means validation. Received: {name!r}."
            )
        if type(model) is not DINOv3:
            raise TypeError(
                f"Each of the `students` must be a `DINOv3`. Received: {model!r} for {name!r}."
            )
        asks = any(term.crop_options for term in terms_of(model).values())
        if not model.has_foreign_teacher or model.gram is not None or asks:
            raise ValueError(
                "Each student must be made with the frozen `teacher` and `teacher_ema=None`, and "
                "without `gram` and without an `alignment` of different crops. Received: "
                f"{name!r} made with teacher_ema={model.teacher_ema}, gram={model.gram}, "
                f"alignment={model.alignment}."
            )
    (first_name, first), *others = students.items()
    for name, model in others:
        names = f"{first_name!r} and {name!r}"
        if model.teacher is not first.teacher:
            raise ValueError(
                "All students must have the same teacher, one object, which then runs once. "
                f"Received: {names} with two. Pass one backbone as `teacher` to both."
            )
        different = [
            setting
            for setting in VIEWS
            if text_of(getattr(model, setting)) != text_of(getattr(first, setting))
        ]
        if is_zero(model.ibot_weight) != is_zero(first.ibot_weight):
            different.append("ibot_weight")
        if int(model.step) != int(first.step):
            different.append("step")
        if different:
            raise ValueError(
                "All students see the same crops and masks at the same step, so what these depend "
                f"on must be equal, and patches be compared for all or none. Received: {names} "
                f"with different {', '.join(different)}."
            )
    trained = [
        (id(part), name)
        for name, model in students.items()
        for part in (model.student, model.student_dino_head, model.student_ibot_head)
    ]
    if len({part for part, _ in trained}) < len(trained):
        raise ValueError(
            "Each student must have a backbone and heads of its own. Received: one object in "
            f"several of {list(students)}."
        )
