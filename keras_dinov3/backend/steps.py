"""A training step around Keras's own, and the work on all weights that it ends with."""

import contextlib

import keras
from keras import ops

from keras_dinov3.backend.compiling import assigning, tensor_of


def step_then(model, train_step, args, update):
    """Runs Keras's train step, then `update`, inside the same compiled function.

    Args:
        model: The `keras.Model` that trains.
        train_step: Bound `train_step` of the Keras trainer.
        args: Its positional arguments: `(data,)`, or `(state, data)` on JAX.
        update: Function of one int tensor, 1 when the optimizer has changed the weights in
            this step and 0 on a micro-step of gradient accumulation. It may assign
            any weight of the model.

    Returns:
        What `train_step` returns, with `update`'s assignments in the JAX state and the values of
        `optimizer_logs` in the logs.
    """
    if keras.config.backend() == "jax":
        return _jax_step_then(model, train_step, *args, update)
    if keras.config.backend() == "torch":
        import torch

        before = optimizer_updates(model) + 0  # a copy: torch updates in place
        # Keras clears gradients by variable path, and of variables that share a path, as those
        # of student and teacher may, it clears only one.
        for variable in model.trainable_variables:
            variable.value.grad = None
        result = train_step(*args)
        with torch.no_grad():
            update(optimizer_updates(model) - before)
        return {**result, **optimizer_logs(model)}
    with after(args):
        before = optimizer_updates(model) + 0
        result = train_step(*args)
        update(optimizer_updates(model) - before)
        return {**result, **optimizer_logs(model)}


def _jax_step_then(model, train_step, state, data, update):
    with keras.StatelessScope(zip(model.optimizer.variables, state[2], strict=True)):
        before = optimizer_updates(model)
    logs, (trainable, non_trainable, optimizer, metrics) = train_step(state, data)
    variables = [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
    ]
    values = [*trainable, *non_trainable, *optimizer]
    with keras.StatelessScope(zip(variables, values, strict=True)) as scope:
        update(optimizer_updates(model) - before)
        logs = {**logs, **optimizer_logs(model)}
    non_trainable = [scope.get_current_value(v) for v in model.non_trainable_variables]
    return logs, (trainable, non_trainable, optimizer, metrics)


def after(data):
    """A context whose operations wait for `data` in a TensorFlow graph.

    A `tf.data.Dataset` of unknown length ends in the middle of Keras's step function. What needs
    no data (step counts, weight decay, teacher, the denominators of metrics) would run once more
    by then.
    """
    if keras.config.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([x for x in tf.nest.flatten(data) if x is not None])


@contextlib.contextmanager
def weights_kept(model):
    """A context in which a first training step that fails does not cost the weights.

    On JAX `fit` takes the values out of the model before its first step, and if that step raises,
    because of the data for instance, does not put them back.
    """
    if keras.config.backend() != "jax":
        yield
        return
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    values = [variable.value for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            if variable._value is None:
                variable.assign(value)


def optimizer_updates(model):
    """How often the optimizer has changed the weights, an int tensor."""
    return ops.convert_to_tensor(bare_optimizer(model).iterations)


def optimizer_logs(model):
    """What the optimizer says about its last update, a dict of scalar tensors; often empty."""
    optimizer = bare_optimizer(model)
    return optimizer.logs() if hasattr(optimizer, "logs") else {}


def bare_optimizer(model):
    """The model's optimizer, taken out of loss scaling."""
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def global_norm(gradients):
    """The length of a list of tensors taken as one vector, a float32 scalar."""
    if keras.config.backend() == "torch":
        import torch

        norms = torch._foreach_norm(gradients, dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack(norms))
    gradients = [ops.cast(gradient, "float32") for gradient in gradients]
    return ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))


def scaled(tensors, factor):
    """A list of tensors times a scalar tensor; the tensors keep their dtypes."""
    if keras.config.backend() == "torch":
        import torch

        return list(torch._foreach_mul(tensors, factor))
    return [tensor * ops.cast(factor, tensor.dtype) for tensor in tensors]


def update_together(optimizer, gradients, variables, rates):
    """`AdamW.update_step` for many weights at once, where the backend has operations for that.

    PyTorch's fused kernel reads and writes each weight once, and all weights with one rate in one
    call.

    Args:
        optimizer: `AdamW`.
        gradients: List of tensors.
        variables: List of their `keras.Variable`s.
        rates: The optimizer's `Rates`.

    Returns:
        Whether the weights have been updated. If not, the caller updates them one by one.
    """
    if keras.config.backend() != "torch":
        return False
    import torch

    groups = {}
    for variable, gradient in zip(variables, gradients, strict=True):
        weight = variable.value
        key = (optimizer.multipliers(variable), weight.dtype)
        moments = (moment.value for moment in optimizer.moments(variable))
        groups.setdefault(key, []).append((weight, gradient.to(weight.dtype), *moments))
    with torch.no_grad():
        # The factors of all groups at once: on a GPU, single numbers cost as much as arrays.
        factors = torch.tensor([key[0] for key in groups], dtype=torch.float32)
        factors = factors.to(rates.rate.device)
        rate = torch.where(factors[:, 2] > 0, rates.last_layer_rate, rates.rate)
        rate = torch.where(factors[:, 3] > 0, rates.backbone_rate, rate) * factors[:, 0]
        kept = (1 - rate * rates.decay * factors[:, 1]).unbind()
        step = ops.cast(optimizer.iterations + 1, "float32")
        for ((multipliers, _), members), lr, keep in zip(
            groups.items(), rate.unbind(), kept, strict=True
        ):
            weights, *others = (list(column) for column in zip(*members, strict=True))
            if multipliers.decay:
                torch._foreach_mul_(weights, keep)
            torch._fused_adamw_(
                weights,
                *others,
                [],
                [step] * len(weights),
                lr=lr,
                beta1=optimizer.beta_1,
                beta2=optimizer.beta_2,
                weight_decay=0.0,
                eps=optimizer.epsilon,
                amsgrad=False,
                maximize=False,
            )
    return True


def move_towards(averages, values, momentum):
    """`average = momentum * average + (1 - momentum) * value` for pairs of variables, in float32.

    Args:
        averages: List of variables.
        values: List of variables of the same shapes.
        momentum: float32 scalar tensor.
    """
    if keras.config.backend() == "torch":
        import torch

        tensors = [[v.value for v in side] for side in (averages, values)]
        if averages and all(x.dtype == torch.float32 for side in tensors for x in side):
            with torch.no_grad():
                if momentum.device.type == "cpu":
                    torch._foreach_lerp_(*tensors, 1.0 - momentum.item())
                else:  # a look at the number would wait for the GPU
                    torch._foreach_mul_(tensors[0], momentum)
                    torch._foreach_add_(tensors[0], torch._foreach_mul(tensors[1], 1.0 - momentum))
            return
    for average, value in zip(averages, values, strict=True):
        move((average,), (tensor_of(value), momentum))


def _moved(average, value, momentum):
    kept = momentum * ops.cast(average, "float32")
    return (ops.cast(kept + (1.0 - momentum) * ops.cast(value, "float32"), average.dtype),)


move = assigning(_moved)
