"""Crops of several sizes in one run: `MixedCrops`, and one compiled train step for each size."""

import contextlib
import functools

import keras
import numpy as np

from keras_dinov3.augment import MultiCrop, are_numbers, as_pair, is_size


@keras.saving.register_keras_serializable(package="keras_dinov3")
class MixedCrops(MultiCrop):
    """`MultiCrop` whose crops have other sizes in other training steps.

    `DINOv3(..., augmentation=MixedCrops(...))` draws one of the sizes for each step, all images of
    a batch alike, and compiles one step per size, each when it is first drawn. A draw follows from
    the model's `seed` (or the number that it draws once and saves) and the batches seen so far, so
    that a resumed run draws the same. Under `steps_per_execution` one size holds for all steps of
    an execution.

    Everywhere else the crops have the first size: in validation, pictures and monitors, in
    `tf.data.Dataset.map`, and when the layer is called by itself outside of `at`.

    Args:
        sizes: List of `(global, local)` or `(global, local, gram)`: sizes of the global crops, the
            local crops and the crops of a Gram teacher, each an int or `(height, width)` in pixels.
            Without a third one, or with `None`, a `GramAnchor`'s `resolution_scale` decides.
        probabilities: List of positive numbers, one for each of `sizes`, that are divided by their
            sum. `None`: all alike.
        seed: Int or `None`. Seeds the crops, as in `MultiCrop`.
        **multi_crop_arguments: All other arguments of `MultiCrop` and of `keras.layers.Layer`.

    Call arguments:
        images: As `MultiCrop`.
        gram_scale: As `MultiCrop`; a size's own Gram crops take its place.

    Returns:
        As `MultiCrop`.

    Raises:
        ValueError: If an argument is outside the range given above, or as `MultiCrop`.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 5.1 (mixed resolutions).
    """

    def __init__(self, sizes, probabilities=None, seed=None, **multi_crop_arguments):
        is_list = isinstance(sizes, (list, tuple)) and len(sizes) > 0
        if not is_list or not all(is_triple(size) for size in sizes):
            raise ValueError(
                "`sizes` must be a list of (global, local) or (global, local, gram) crop sizes, "
                f"each a positive integer or a pair of them, in pixels. Received: sizes={sizes!r}."
            )
        if probabilities is not None and not (
            are_numbers(probabilities, np.finfo("float32").tiny, shapes=[(len(sizes),)])
        ):
            raise ValueError(
                f"`probabilities` must be {len(sizes)} positive numbers, one for each of `sizes`, "
                f"or None. Received: probabilities={probabilities!r}."
            )
        fixed = {"global_crop_size", "local_crop_size"} & set(multi_crop_arguments)
        if fixed:
            raise ValueError(
                f"`MixedCrops` takes sizes of crops from `sizes`. Received: {sorted(fixed)}. "
                "Of one size, make a `MultiCrop`."
            )
        first = sizes[0]
        super().__init__(first[0], first[1], seed=seed, **multi_crop_arguments)
        self.sizes = sizes
        self.probabilities = probabilities
        for index in range(len(sizes)):
            with self.at(index):
                self._check_arguments()

    @property
    def crop_sizes(self):
        return [(*(as_pair(x) for x in size[:2]), gram_size(size)) for size in self.sizes]

    @contextlib.contextmanager
    def at(self, index):
        """A context in which crops have the sizes of `sizes[index]`."""
        self.global_crop_size, self.local_crop_size = self.sizes[index][:2]
        self.gram_crop_size = gram_size(self.sizes[index])
        try:
            yield
        finally:
            self.global_crop_size, self.local_crop_size = self.sizes[0][:2]
            self.gram_crop_size = gram_size(self.sizes[0])

    def draw(self, seed, batch):
        """The index of the size of a training step.

        Args:
            seed: Int.
            batch: Int, the batches seen before.

        Returns:
            Int, the same for the same arguments.
        """
        weights = np.ones(len(self.sizes)) if self.probabilities is None else self.probabilities
        # The order of the images is drawn from (seed, batch).
        rng = np.random.default_rng((seed, batch, 1))
        return int(rng.choice(len(self.sizes), p=np.divide(weights, np.sum(weights))))

    def _views(self, gram_scale):
        views = super()._views(gram_scale)
        if "gram" in views and self.gram_crop_size is not None:
            views["gram"] = views["gram"][0], self.gram_crop_size
        return views

    def get_config(self):
        config = super().get_config()
        del config["global_crop_size"], config["local_crop_size"]
        return {**config, "sizes": self.sizes, "probabilities": self.probabilities}


def is_triple(size):
    if not isinstance(size, (list, tuple)) or len(size) not in (2, 3):
        return False
    return all(is_size(side) for side in size[:2]) and (gram_size(size) is None or is_size(size[2]))


def gram_size(size):
    """The third of a size as a pair, or `None`."""
    return None if len(size) == 2 or size[2] is None else as_pair(size[2])


class MixedSteps:
    """The `train_function` of a model with `MixedCrops`: Keras's own, once for each size.

    Args:
        model: `DINOv3`.
        make: Its `make_train_function` as Keras has it.

    Attributes:
        functions: List of Keras's train functions in the order of the sizes. Each is traced and
            compiled when it is first called.
        batch: Int. Batches seen so far, on the host: a look at the model's step waits for the
            device.
    """

    def __init__(self, model, make):
        self.model, self.functions = model, []
        own = vars(model).get("train_step")
        step = model.train_step
        try:
            for _ in model.augmentation.sizes:
                # An object of its own: JAX takes a trace that it has of an equal function.
                model.train_step = functools.partial(step)
                make(force=True)
                self.functions.append(model.train_function)
        finally:
            if own is None:
                del model.train_step
            else:
                model.train_step = own

    def restart(self):
        """Learns from the model where the run is; its weights must be in it."""
        self.seed, self.batch = self.model.data_seed, batches_seen(self.model)

    def __call__(self, *args):
        index = self.model.augmentation.draw(self.seed, self.batch)
        self.batch += self.model.steps_per_execution
        with self.model.augmentation.at(index):  # which is read when a step is traced
            return self.functions[index](*args)


def batches_seen(model):
    """The batches that a model has been trained on, an int; its weights must be in it."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    per_update = optimizer.gradient_accumulation_steps or 1
    return int(model.step) * per_update + int(optimizer._iterations) % per_update


class SizeOrder(keras.callbacks.Callback):
    """Tells `MixedSteps` where the run is, which may not be whole executions; `fit` adds it."""

    def on_epoch_begin(self, epoch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.model.train_function.restart()
