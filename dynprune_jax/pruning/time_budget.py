"""Prune ratios scaled to a budget of time: by measuring, on this device."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, Generic

import jax
from flax import nnx

from dynprune_jax.pruning.calls import Images, as_function
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.folding import fold_batch_norms
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.layers import Model
from dynprune_jax.pruning.plan import interleaved, measure_plan
from dynprune_jax.pruning.ratios import HIGHEST, Proportions

_TRIALS = 8  # networks that are timed, at the most
# Times vary by more: so much of the budget is used, and so close in their cut are two networks.
_NEAR, _CLOSE = 0.95, 0.01
_REPEATS, _TURN = 15, 0.03  # turns of a network, and the seconds of one


class TimeBudgetError(ValueError):
    """A budget of time that is none, or that no ratios keep."""


@dataclasses.dataclass
class Trial(Generic[Model]):
    """A compact network that was timed.

    Attributes:
      factor: that the ratios were multiplied with.
      cut: the share of the MACs that they remove.
      milliseconds: for a batch, in the median; the longer of two if the first kept the budget.
      model: the network.
    """

    factor: float
    cut: float
    milliseconds: float
    model: Model


def scale_ratios_to_time(
    model: Model,
    milliseconds: float,
    images: Images,
    *others: Any,
    progress: Callable[[Trial[Model]], None] | None = None,
) -> Model:
    """Scales the prune ratios of a dynamic model's gates, in place, to a budget of time.

    All are multiplied by one factor, up or down, as by `scale_ratios`. It is found by timing the
    compact network of up to eight factors, which takes some minutes; nothing else should run
    meanwhile. Another device, batch size or version of JAX has other times. They do
    not depend on the weights, so ratios can be found before training; but predicted gates that
    are not trained choose alike for all inputs, which takes a little less time.

    Args:
      model: from `make_dynamic` or `predict_channels`, with ratios above 0 where it shall prune.
      milliseconds: that the compact network may take for the batch, in the median of 15 turns.
      images: a batch.
      *others: what else the model is called with.
      progress: called with each network that was timed.

    Returns:
      The compact network with those ratios, which kept the budget both times it was timed. If
      it does with ratios of 0, all are 0 then.

    Raises:
      TimeBudgetError: for a budget that is not above 0 and finite, or that no factor keeps.
      ValueError: for ratios that are all 0, a compact model, and as `measure` and `compact`.
        The ratios stay what they were.
    """
    proportions = Proportions(model, images, *others)
    found = fastest_enough(model, proportions, milliseconds, images, *others, progress=progress)
    nnx.update(model, proportions.times(found.factor))
    return found.model


def fastest_enough(
    model: Model,
    proportions: Proportions,
    milliseconds: float,
    images: Images,
    *others: Any,
    progress: Callable[[Trial[Model]], None] | None = None,
) -> Trial[Model]:
    """Finds the factor of `scale_ratios_to_time`; the model is left as it is."""
    if not 0.0 < milliseconds < math.inf:
        raise TimeBudgetError(f"milliseconds is {milliseconds!r}; it must be above 0, and finite")
    known: dict[Any, dict[Form, float]] = {}

    def trial(cut: float) -> Trial[Model]:
        factor = proportions.factor(cut) if cut else 0.0
        assert factor is not None  # `cut` is at most what they reach
        pruned = nnx.clone(model)
        nnx.update(pruned, proportions.times(factor))
        pruned.eval()
        folded = fold_batch_norms(pruned, images, *others)
        plan = measure_plan(folded, images, *others, known=known)
        fast = compact(pruned, images, *others, plan=plan)
        taken = _milliseconds(fast, images, *others)
        if taken <= milliseconds:  # not for a lucky moment
            taken = max(taken, _milliseconds(fast, images, *others))
        timed = Trial(factor, proportions.cut(factor), taken, fast)
        if progress is not None:
            progress(timed)
        return timed

    return _search(trial, lambda: proportions.most, milliseconds)


def _search(
    trial: Callable[[float], Trial[Model]], most: Callable[[], float], milliseconds: float
) -> Trial[Model]:
    """The trial of the smallest cut that keeps the budget, of up to eight."""
    slow = trial(0.0)
    if slow.milliseconds <= milliseconds:
        return slow
    fast = trial(most())
    if fast.milliseconds > milliseconds:
        raise TimeBudgetError(
            f"milliseconds is {milliseconds}; the network takes {slow.milliseconds:.3g} with all"
            f" ratios at 0, and {fast.milliseconds:.3g} with those that are not 0 at {HIGHEST}"
        )
    for _ in range(_TRIALS - 2):
        if fast.milliseconds >= _NEAR * milliseconds or fast.cut - slow.cut <= _CLOSE:
            break
        # As if time fell evenly, but well within what is left of the range.
        share = (slow.milliseconds - milliseconds) / (slow.milliseconds - fast.milliseconds)
        between = trial(slow.cut + min(max(share, 0.1), 0.9) * (fast.cut - slow.cut))
        if between.milliseconds <= milliseconds:
            fast = between
        else:
            slow = between
    return fast


def _milliseconds(model: nnx.Module, *inputs: Any) -> float:
    """The median time of a compiled call."""
    function, arrays = as_function(model, *inputs)
    run = {"": functools.partial(jax.jit(function), *arrays)}
    return 1e3 * statistics.median(interleaved(run, _REPEATS, warmup=1, least=_TURN)[""])
