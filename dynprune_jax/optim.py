"""The optimizer: SGD with Nesterov momentum, a cosine schedule, decay on kernels only."""

import jax.numpy as jnp
import optax


def learning_rate(peak: float, *, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Rises linearly from 0 to `peak`, then falls along a cosine to 0 at `total_steps`."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
    )
    # Optax counts in int32, which strict promotion does not let meet a Python float.
    return lambda step: schedule(jnp.asarray(step, jnp.float32))


def sgd(
    schedule: optax.Schedule, *, momentum: float, weight_decay: float, salience_rate: float = 1.0
) -> optax.GradientTransformation:
    """Stochastic gradient descent over a flat dictionary of parameters by name.

    Weight decay is added to the gradient of the kernels; biases and batch-norm scales are left
    alone, as in He et al. 2018 (arXiv 1812.01187). The saliences of predicted gates learn at
    `salience_rate` times the schedule.
    """

    def kernels(params: dict) -> dict:
        return {name: name.endswith("kernel") for name in params}

    def saliences(params: dict) -> dict:
        return {name: "salience_" in name.rpartition("/")[2] for name in params}

    parts = [
        optax.add_decayed_weights(weight_decay, mask=kernels),
        optax.sgd(schedule, momentum=momentum, nesterov=True),
    ]
    if salience_rate != 1.0:  # a part more changes the tree that a checkpoint holds
        parts.append(optax.masked(optax.scale(salience_rate), saliences))
    return optax.chain(*parts)
