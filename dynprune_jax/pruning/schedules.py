"""Schedules of the prune ratios: functions of the step, as Optax's are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Key

RatioSchedule = Callable[[Int[ArrayLike, ""]], Float[Array, "..."]]


def ratio_ascent(
    target: float | Float[ArrayLike, "..."],
    *,
    interval_steps: int,
    warmup: float = 0.1,
    increment: float = 0.05,
) -> RatioSchedule:
    r"""Raises the prune ratio in small steps up to a target (AntiDote, arXiv 2008.06543).

    .. math:: r(t) = \min(target, warmup + increment \lfloor t / interval \rfloor)

    Args:
      target: the ratio to end at, in [0, 1); an array gives each element its own end.
      interval_steps: how many steps a ratio is held before it rises, at least 1.
      warmup: the ratio of the first interval.
      increment: the rise after each interval.

    Returns:
      A function of the step (traced or not) to the float32 ratio, of the shape of `target`.

    Raises:
      ValueError: for an interval of less than a step, a target or a warm-up out of [0, 1), unless
        it is traced, or an increment of less than 0.

    Example:
      >>> schedule = ratio_ascent(0.3, interval_steps=10)
      >>> [round(float(schedule(step)), 2) for step in (0, 9, 10, 40, 1000)]
      [0.1, 0.1, 0.15, 0.3, 0.3]
    """
    if interval_steps < 1:
        raise ValueError(f"interval_steps is {interval_steps}; it must be at least 1")
    for name, ratio in (("target", target), ("warmup", warmup)):
        given = np.asarray(0.0 if isinstance(ratio, Tracer) else ratio)
        if not np.all((given >= 0) & (given < 1)):
            raise ValueError(f"{name} is {ratio}; it must be in [0, 1)")
    if not isinstance(increment, Tracer) and increment < 0:
        raise ValueError(f"increment is {increment}; it must be at least 0")
    interval_steps = min(interval_steps, 2**31 - 1)  # steps are int32, and no run has so many

    def schedule(step):
        rises = jnp.asarray(step // interval_steps, jnp.float32)
        return jnp.minimum(jnp.asarray(target, jnp.float32), warmup + increment * rises)

    return schedule


def elastic(
    schedule: RatioSchedule,
    key: Key[Array, ""],
    *,
    lowest: float = 0.0,
    at_highest: float = 0.25,
) -> RatioSchedule:
    r"""Multiplies a schedule's ratio by a fraction that every step draws anew.

    So one network learns all ratios of a range, as in AntiDoteX (TCAD 2022). The highest ratio
    costs the most and has steps of its own, as the smallest of universally slimmable networks
    has (Yu and Huang 2019, arXiv 1903.05134: the sandwich rule, which has the largest too).

    .. math:: r(t) = u_t \, s(t), \quad u_t = 1 \text{ with probability } p,
        \text{ else } u_t \sim U[lowest, 1]

    The batch statistics of such a network are of all its ratios together: see `recalibrate`.

    Args:
      schedule: the step to the highest ratio of that step.
      key: of random numbers. The fraction depends on it and on the step alone: schedules of one
        key, such as those of all gates of a network, have the same.
      lowest: the smallest fraction, in [0, 1]; 1 leaves the schedule as it is.
      at_highest: p, the share of the steps whose fraction is 1, in [0, 1].

    Returns:
      A function of the step (traced or not) to the float32 ratio.

    Raises:
      ValueError: for a `lowest` or an `at_highest` that is not in [0, 1].

    Example:
      >>> schedule = elastic(lambda step: jnp.float32(0.5), jax.random.key(0), lowest=0.2)
      >>> all(0.1 <= schedule(step) <= 0.5 for step in range(100))
      True
    """
    for name, value in (("lowest", lowest), ("at_highest", at_highest)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must be in [0, 1]")

    def drawn(step):
        which, where = jax.random.split(jax.random.fold_in(key, step))
        fraction = jax.random.uniform(where, minval=lowest, maxval=1.0)
        fraction = jnp.where(jax.random.bernoulli(which, at_highest), 1.0, fraction)
        return fraction * schedule(step)

    return drawn
