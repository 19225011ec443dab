"""What training on images adds to a `keras.Model`: data of any kind, named terms, saved seeds."""

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.batches import full_batches
from keras_dinov3.callbacks import StopOnNonFinite, TeacherEMA
from keras_dinov3.checks import check_batch, is_zero


class ImageModel(keras.Model):
    """The user's side of `DINOv3`: `fit` and its like, what the logs show, what is saved.

    A subclass has `student`, `augmentation`, `teacher_ema`, `seed`, and a weight `step`; it calls
    `make_logs` once and `watch` in each step.
    """

    input_shapes = None  # of the arrays of a batch; known once data have been seen

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
                `DataLoader`, grain loader, generator. Batches may be `(images, labels)`.
            y: Labels, ignored.
            batch_size: Int, images per step when `x` are arrays. Default 32.
            epochs: Int.
            verbose: `"auto"`, 0, 1 or 2.
            callbacks: List of callbacks. The model's `teacher_ema` is added, unless a
                `TeacherEMA` is among them, which then becomes the model's.
            validation_data: Like `x`; the loss terms are computed on it.
            shuffle: Whether arrays are shuffled each epoch, seeded by `seed`.
            **kwargs: Other arguments of `keras.Model.fit`.

        Returns:
            `keras.callbacks.History`.

        Raises:
            ValueError: If the data are empty or do not fit the model.
            FloatingPointError: If the loss is no longer finite; it names the term.
        """
        x = self.prepare(x, batch_size, shuffle, self.seed)
        if validation_data is not None:
            if isinstance(validation_data, tuple):
                validation_data = validation_data[0]
            validation_data = full_batches(validation_data, self.input_shapes[0][0])[0]
        callbacks = list(getattr(callbacks, "callbacks", callbacks) or [])
        for callback in callbacks:
            if isinstance(callback, TeacherEMA):
                self.teacher_ema = callback
        if self.teacher_ema is not None and self.teacher_ema not in callbacks:
            callbacks.append(self.teacher_ema)
        self.bad_since.assign([0] * len(self.term_means))
        return super().fit(
            x,
            epochs=epochs,
            verbose=verbose,
            callbacks=[*callbacks, StopOnNonFinite()],
            validation_data=validation_data,
            shuffle=shuffle,
            **kwargs,
        )

    def evaluate(self, x=None, y=None, batch_size=None, **kwargs):
        """The loss terms on images; takes the data that `fit` takes."""
        if not kwargs.get("_use_cached_eval_dataset"):  # `fit` has prepared its own
            x = self.prepare(x, batch_size)
        return super().evaluate(x, **kwargs)

    def train_on_batch(self, x, y=None, **kwargs):
        """One step on one batch; takes the batches that `fit` takes."""
        self.declare(x)
        return super().train_on_batch(x, **kwargs)

    def test_step(self, *args):
        with backend.after(args):
            return super().test_step(*args)

    def prepare(self, x, *args):
        x, first = full_batches(x, *args)
        self.declare(first)
        return x

    def declare(self, batch):
        """Checks a batch; a step that was traced for other shapes is forgotten."""
        check_batch(batch, self)
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        shapes = [tuple(x.shape) for x in keras.tree.flatten(inputs)]
        if shapes != self.input_shapes:
            self.input_shapes = shapes
            self.train_function = self.test_function = None
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)  # in a step, TensorFlow traces twice

    def __setattr__(self, name, value):
        if name == "teacher_ema" and value is not getattr(self, name, None):
            self.train_function = None  # traced with another rule
        super().__setattr__(name, value)

    def make_logs(self, **weights):
        """Makes a running mean for each loss term whose weight is not the number 0."""
        self.term_means = [
            keras.metrics.Mean(name) for name, weight in weights.items() if not is_zero(weight)
        ]
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
    def random_states(self):
        """States of all seed generators, which Keras itself does not save."""
        return [v for v in self.non_trainable_variables if v.name == "seed_generator_state"]


def spread(seed, index):
    """Seeds far apart: neighbouring ones give overlapping streams on torch."""
    if seed is None:
        return None
    return int(np.random.SeedSequence(seed).generate_state(index + 1)[index] % 2**31)
