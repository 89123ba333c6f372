"""Schedules of the prune ratios: functions of the step, as Optax's are."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

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
      ValueError: for an interval of less than a step.

    Example:
      >>> schedule = ratio_ascent(0.3, interval_steps=10)
      >>> [round(float(schedule(step)), 2) for step in (0, 9, 10, 40, 1000)]
      [0.1, 0.1, 0.15, 0.3, 0.3]
    """
    if interval_steps < 1:
        raise ValueError(f"interval_steps is {interval_steps}; it must be at least 1")
    interval_steps = min(interval_steps, 2**31 - 1)  # steps are int32, and no run has so many

    def schedule(step):
        rises = jnp.asarray(step // interval_steps, jnp.float32)
        return jnp.minimum(jnp.asarray(target, jnp.float32), warmup + increment * rises)

    return schedule


def ascent_steps(
    target: float, *, interval_steps: int, warmup: float = 0.1, increment: float = 0.05
) -> int:
    """The first step at which `ratio_ascent` with these arguments has reached its target."""
    return max(0, math.ceil((target - 1e-6 - warmup) / increment)) * interval_steps
