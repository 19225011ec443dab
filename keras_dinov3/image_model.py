"""What training on images adds to a `keras.Model`: data of any kind, named terms, saved seeds."""

import inspect
import random

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.batches import full_batches, inputs_of, is_arrays
from keras_dinov3.callbacks import DataOrder, GramTeacher, StopOnNonFinite, TeacherEMA
from keras_dinov3.checks import check_batch, check_teacher_ema, sizes_of
from keras_dinov3.mixed import MixedSteps, SizeOrder
from keras_dinov3.presets import read_preset
from keras_dinov3.schedules import check_count, is_zero
from keras_dinov3.terms import terms_of


class ImageModel(keras.Model):
    """The user's side of `DINOv3`: `fit` and its like, what the logs show, what is saved.

    A subclass has `student`, `teacher`, `learned`, `augmentation`, `teacher_ema`, `gram`, `seed`,
    and a weight `step`; it calls `make_logs` once and `watch` in each step.
    """

    train_shapes = test_shapes = None  # of the arrays of a batch; known once data have been seen
    compiles_pieces = False  # see `backend.compilation`

    def compile(
        self,
        optimizer="adamw",
        loss=None,
        metrics=None,
        weighted_metrics=None,
        jit_compile="auto",
        **kwargs,
    ):
        """As `keras.Model.compile`, without losses and metrics: the method brings its own.

        Args:
            optimizer: Keras optimizer, or the name of one.
            loss: `None`.
            metrics: `None`.
            weighted_metrics: `None`.
            jit_compile: `True`, `False` or `"auto"`. JAX compiles the whole step. TensorFlow does
                so at `True`; at `"auto"` it compiles the pieces that a step repeats, which is
                ready sooner. PyTorch compiles its blocks, once per crop size: `"auto"` only on a
                GPU.
            **kwargs: Other arguments of `keras.Model.compile`.

        Raises:
            ValueError: If a loss or metrics are given.
        """
        given = {"loss": loss, "metrics": metrics, "weighted_metrics": weighted_metrics}
        given = {name: value for name, value in given.items() if value}
        if given:
            raise ValueError(
                f"`{type(self).__name__}` has its own losses and logs each term. Received: {given}."
                " Leave these out; how good the features are, `callbacks.KNN` says."
            )
        self.compiles = jit_compile
        jit_compile, self.compiles_pieces = backend.compilation(jit_compile)
        super().compile(optimizer, jit_compile=jit_compile, **kwargs)

    def get_compile_config(self):
        config = super().get_compile_config()
        return {**config, "jit_compile": self.compiles} if config else config

    def compile_from_config(self, config):  # Keras leaves it to classes with their own `compile`
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_data=None,
        shuffle=True,
        **kwargs,
    ):
        """Trains on images; everything else is as in `keras.Model.fit`.

        Short batches are dropped, so that shapes are static and XLA compiles once.

        Args:
            x: Images `(n, H, W, C)`, uint8 0-255 or float 0-1, or a dict of ready crops (see the
                class), as arrays; or batches of either: `tf.data.Dataset`, `PyDataset`, torch
                `DataLoader`, grain dataset or loader, list, generator. Both may be
                `(images, labels)`; the labels are ignored.
            y: Labels, ignored.
            batch_size: Int, images per step when `x` are arrays. Default 32.
            epochs: Int.
            verbose: `"auto"`, 0, 1 or 2.
            callbacks: List of callbacks. The model's `teacher_ema` is added, unless a
                `TeacherEMA` is among them, which then becomes the model's; and so is the rule of
                its `gram`, unless a `GramTeacher` is.
            validation_data: Like `x`, but no generator; the loss terms are computed on it.
            shuffle: Whether arrays are shuffled for each epoch, in an order that follows from
                `seed` (or a number that the model draws once and saves) and the model's step.
            **kwargs: Other arguments of `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: If the data are empty or do not fit the model.
            FloatingPointError: If the loss is no longer finite; it names the term.
        """
        if kwargs.get("validation_split"):
            raise ValueError(
                "`validation_split` is not taken. Split the images yourself: "
                "`fit(images[:-n], validation_data=images[-n:])`. Received: validation_split="
                f"{kwargs['validation_split']}."
            )
        x = self.prepare(x, batch_size, shuffle, self.data_seed)
        if validation_data is not None:
            if hasattr(validation_data, "__next__"):
                raise ValueError(
                    "`validation_data` is read after every epoch, and a generator only once. "
                    "Received: a generator. Give arrays, a list of batches or a data set."
                )
            validation_data = inputs_of(validation_data)
            size = self.train_shapes[0][0] if is_arrays(validation_data) else None
            validation_data = self.prepare(validation_data, size, training=False)
        callbacks = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks) or [])
        for callback in callbacks:
            if isinstance(callback, TeacherEMA):
                self.teacher_ema = callback
            if isinstance(callback, GramTeacher):
                self.set_gram_teacher(callback)
        rules = [self.teacher_ema, *(term.refresh for term in terms_of(self).values())]
        callbacks += [rule for rule in rules if rule is not None and rule not in callbacks]
        self.bad_since.assign([0] * len(self.term_means))
        in_order = getattr(x, "position", None) is not None
        if in_order:
            callbacks.append(DataOrder(x))
        if len(sizes_of(self.augmentation)) > 1:
            callbacks.append(SizeOrder())
        with backend.weights_kept(self):
            return super().fit(
                x,
                epochs=epochs,
                verbose=verbose,
                # First the one that stops: no other may write weights that are lost.
                callbacks=[StopOnNonFinite.before(callbacks), *callbacks],
                validation_data=validation_data,
                shuffle=shuffle and not in_order,
                **kwargs,
            )

    def evaluate(self, x=None, y=None, batch_size=None, **kwargs):
        """The loss terms on images; takes the data that `fit` takes."""
        if not kwargs.get("_use_cached_eval_dataset"):  # `fit` has prepared its own
            x = self.prepare(x, batch_size, training=False)
        return super().evaluate(x, **kwargs)

    def train_on_batch(self, x, y=None, **kwargs):
        """One step on one batch; takes the batches that `fit` takes."""
        self.declare(x)
        return super().train_on_batch(inputs_of(x), **kwargs)

    def test_on_batch(self, x, y=None, **kwargs):
        """The loss terms of one batch; takes the batches that `fit` takes."""
        self.declare(x, training=False)
        return super().test_on_batch(inputs_of(x), **kwargs)

    def predict(self, *args, **kwargs):
        """Not there: features are the backbone's."""
        raise NotImplementedError(
            "This model is for training. Features of images are those of its teacher: "
            "`keras_dinov3.evaluation.FeatureExtractor(model.teacher, "
            "extras=model.teacher_extras).extract(images)`, or `model.export_backbone()`."
        )

    def test_step(self, *args):
        with backend.compiled_pieces(self.compiles_pieces), backend.after(args):
            return super().test_step(*args)

    def make_train_function(self, force=False):
        """As in Keras; with crops of several sizes, a function for each in a `MixedSteps`."""
        make = super().make_train_function
        if len(sizes_of(self.augmentation)) < 2:
            return make(force)
        if force or self.train_function is None:
            self.train_function = MixedSteps(self, make)
        self.train_function.restart()

    def prepare(self, x, *args, training=True):
        x, first = full_batches(x, *args)
        self.declare(first, training)
        return x

    def check(self, batch):
        """Raises if a batch does not fit the model."""
        check_batch(batch, self)

    def declared(self, inputs, training):
        """Inputs with the shapes of the batch that was declared."""
        shapes = self.train_shapes if training else self.test_shapes
        return backend.declare_shapes(inputs, shapes)

    def declare(self, batch, training=True):
        """Checks a batch; a step that was traced for other shapes is forgotten."""
        self.check(batch)
        mode = "train" if training else "test"
        shapes = [tuple(x.shape) for x in keras.tree.flatten(inputs_of(batch))]
        if shapes != getattr(self, f"{mode}_shapes"):
            setattr(self, f"{mode}_shapes", shapes)
            setattr(self, f"{mode}_function", None)
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and not optimizer.built:
            optimizer.build(self.trainable_variables)  # in a step, TensorFlow traces twice

    def __setattr__(self, name, value):
        if name == "teacher_ema" and value is not getattr(self, name, None):
            if not isinstance(value, (TeacherEMA, type(None))):
                raise ValueError(
                    '`teacher_ema` must be a `callbacks.TeacherEMA`, "default", or None for a '
                    f"frozen teacher. Received: teacher_ema={value!r}."
                )
            if hasattr(self, "teacher"):
                student_alone = (self.extras or self.lora) if self.has_foreign_teacher else None
                check_teacher_ema(value, self.student, self.teacher, student_alone)
            self.train_function = None  # traced with another rule
        super().__setattr__(name, value)

    def set_gram_teacher(self, rule):
        if self.gram is None or self.gram.source != "teacher":
            raise ValueError(
                "`GramTeacher` copies the EMA teacher, which needs a model made with "
                '`gram=GramAnchor(source="teacher")`. Received: a model with gram='
                f"{self.gram and self.gram.source!r}."
            )
        if rule is not self.gram.refresh:
            self.gram.refresh = rule
            self.train_function = self.test_function = None  # traced with another rule

    @property
    def schedules(self):
        """What follows schedules of the step, by its name in the logs: numbers or schedules."""
        names = ("teacher_temperature", "student_temperature")
        schedules = {name: getattr(self, name) for name in names}
        if self.teacher_ema is not None:
            schedules["teacher_momentum"] = self.teacher_ema.momentum
        return schedules

    def make_logs(self, **weights):
        """Makes a running mean for each loss term whose weight is not the number 0."""
        self.term_means = [
            keras.metrics.Mean(name) for name, weight in weights.items() if not is_zero(weight)
        ]
        order_seed = keras.initializers.Constant(random.randrange(2**31))
        self.order_seed = self.add_weight(
            (), order_seed, "int32", trainable=False, name="order_seed"
        )
        self.bad_since = self.add_weight(  # the step at which each term became NaN or infinite
            (len(self.term_means),), "zeros", "int32", trainable=False, name="bad_since"
        )

    def watch(self, terms):
        """Puts the terms into the logs and notes the step at which each became NaN or infinite."""
        for mean in self.term_means:
            if mean.name in terms:
                mean.update_state(terms[mean.name])
        values = [terms.get(mean.name, ops.zeros(())) for mean in self.term_means]
        is_bad = ~ops.isfinite(ops.stack(values))
        since = ops.convert_to_tensor(self.bad_since)
        is_first = ops.logical_and(is_bad, since == 0)
        self.bad_since.assign(ops.where(is_first, self.step + 1, since))

    def bad_terms(self):
        """Names of the loss terms that first became NaN or infinite, and their step (from 1)."""
        since = ops.convert_to_numpy(self.bad_since)
        step = min(since[since > 0], default=None)
        return [
            mean.name for mean, s in zip(self.term_means, since, strict=True) if s == step
        ], step

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """A model that goes on from released weights, or from those of a run.

        The heads are new: released backbones come without. Trained as if they were not, they
        soon ruin what the backbone knows; `recipes.continue_from` has settings that do not.

        Args:
            preset: Name or folder of a Keras Hub preset, or folder of a run of `keras-dinov3
                pretrain`.
            **kwargs: Arguments of the class, but for the backbone.

        Returns:
            Model of this class, not compiled. A mask token that the preset lacks is new.

        Raises:
            TypeError: If the backbone is of no supported family.
            ValueError: If there is no such preset, or settings contradict it.
        """
        return cls(read_preset(preset), **kwargs)

    def export_backbone(self):
        """What was learned, as a plain Keras Hub backbone of its own, trainable.

        It is the teacher; if a frozen teacher was distilled, the student. Its kernels have the
        adapters of a `lora` in them.

        Raises:
            ValueError: If its features need what the backbone's class has no place for.
        """
        backbone, extras = self.learned
        extras.check_export(backbone)
        return extras.merged(backbone)

    @classmethod
    def arguments(cls):
        """Names of the arguments of the method, without the backbone."""
        return tuple(inspect.signature(cls.__init__).parameters)[2:-1]

    def get_config(self):
        config = super().get_config()
        config.pop("dtype")  # the backbone's
        for name in self.arguments():
            config[name] = keras.saving.serialize_keras_object(getattr(self, name))
        config["backbone"] = keras.saving.serialize_keras_object(self.student)
        if not self.has_foreign_teacher:
            config["teacher"] = None  # a copy of the student until its weights are loaded
        config["frozen"] = [i for i, w in enumerate(self.student.weights) if not w.trainable]
        return config

    @classmethod
    def from_config(cls, config, **objects):
        """The model; `objects` are arguments that exist already."""
        for name in ("backbone", *cls.arguments()):
            if name not in objects:
                objects[name] = keras.saving.deserialize_keras_object(config[name])
        settings = {key: value for key, value in config.items() if key != "frozen"}
        model = cls(**{**settings, **objects})
        for index in config["frozen"]:  # Keras itself keeps only whether the whole backbone is
            model.student.weights[index].trainable = False
        return model

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for index, state in enumerate(self.random_states):
            store[f"random_state_{index}"] = ops.convert_to_numpy(state)

    def load_own_variables(self, store):
        states = {f"random_state_{i}": state for i, state in enumerate(self.random_states)}
        super().load_own_variables({key: store[key] for key in store.keys() if key not in states})
        for key, state in states.items():
            state.assign(store[key])

    @property
    def data_seed(self):
        """What the order of the images, and of sizes of crops, is drawn from, an int."""
        return int(self.order_seed) if self.seed is None else self.seed

    @property
    def random_states(self):
        """States of all seed generators, which Keras itself does not save."""
        return [v for v in self.non_trainable_variables if v.name == "seed_generator_state"]


def spread(seed, index):
    """Seeds far apart: neighbouring ones give overlapping streams on torch."""
    if seed is None:
        return None
    check_count("seed", seed)
    return int(np.random.SeedSequence(seed).generate_state(index + 1)[index] % 2**31)
