"""Prune ratios: spelled out for each layer, set in place, and scaled to a budget."""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from dynprune_jax.pruning.calls import Images
from dynprune_jax.pruning.compact_conv import is_compact
from dynprune_jax.pruning.dynamic_conv import DynamicConv, PruneRatio, Ratio
from dynprune_jax.pruning.layers import dynamic_layers, matches
from dynprune_jax.pruning.measure import measure

# One number; one for each block; or one for each pattern of layer names. All are checked by value.
Ratios = float | np.generic | np.ndarray | Array | Sequence[Any] | Mapping[str, Any] | None

HIGHEST = 0.95  # that a ratio is scaled up to
_LOWEST = 1e-4  # that the highest is scaled down to
_STEPS = 2**16  # that factors are tried in
_ROUNDING = 1e-9  # by which a cut may miss what is asked for: 1 - 0.9 is below 0.1


def set_ratios(
    model: nnx.Module, channel_ratio: Ratios = None, column_ratio: Ratios = None
) -> None:
    """Sets the prune ratios of a dynamic model's gates, in place; None leaves an axis as it is.

    The ratios are variables, so a function that takes the model's state as an argument is not
    compiled again; and a ratio may be a traced value itself, within a compiled step. Of such a one
    it is not checked that it lies in [0, 1).

    Args:
      model: a model from `make_dynamic` or `predict_channels`.
      channel_ratio: as in the function that it is from, but None in a sequence leaves that block
        as it is: predicted gates are named by the convolution that makes the outputs, and what
        reads them follows.
      column_ratio: as in `make_dynamic`; of a block that shares its columns the first convolution
        has the ratio, and the others follow.

    Raises:
      ValueError: as in `make_dynamic`, where no layer has a gate on that axis, where one is
        named that has none or follows, and for a compact model.
    """
    _refuse_compact(model)
    gates = dynamic_layers(model)
    changes = []
    for axis, ratios in (("channel_ratio", channel_ratio), ("column_ratio", column_ratio)):
        if ratios is None:
            continue
        own = _choices(gates, axis)
        for name in gates.keys() - own.keys():
            if isinstance(ratios, Mapping) and name in ratios:
                raise ValueError(
                    f"{axis} of {name} cannot be set: it has no gate on that axis, or one that"
                    " follows what is chosen before it"
                )
        if not own:
            raise ValueError(f"{axis} cannot be set: no layer has a gate on that axis")
        spelled = ratio_of_each(model, list(own), ratios, axis)
        for name, ratio in spelled.items():
            if ratio is not None:
                changes += [(variable, ratio) for variable in own[name]]
    for variable, ratio in changes:  # all of them, or none
        variable[...] = jnp.asarray(ratio, jnp.float32)


def scale_ratios(model: nnx.Module, cut: float, images: Images, *others: Any) -> None:
    """Scales the prune ratios of a dynamic model's gates, in place, to a budget of MACs.

    All are multiplied by one factor, up or down: the smallest with which the model loses as much
    as is asked for. So what they are before are proportions. None gets above 0.95.

    Args:
      model: from `make_dynamic` or `predict_channels`, with ratios above 0 where it shall prune.
      cut: the `Usage.mac_reduction` to reach, of the whole network, in (0, 1). Whole channels and
        columns are kept, so it is exceeded by as little as they allow.
      images: a batch, as for `measure`; a few will do. Images cost the same but where a block
        shares its columns: there the mean over these counts.
      *others: what else the model is called with.

    Raises:
      ValueError: for a `cut` out of its range, one that no factor makes, ratios that are all 0, a
        compact model, and as `measure`. The ratios stay what they were.
    """
    _refuse_compact(model)
    if not 0.0 < cut < 1.0:
        raise ValueError(f"cut is {cut!r}; it must be in (0, 1)")
    proportions = Proportions(model, images, *others)
    factor = proportions.factor(cut)
    if factor is None:
        raise ValueError(
            f"cut is {cut}; with all ratios that are not 0 at {HIGHEST} the gates cut"
            f" {proportions.most:.1%}"
        )
    nnx.update(model, proportions.times(factor))


class Proportions:
    """The ratios of a dynamic model's gates, to be scaled; the model is left as it is.

    Args:
      model: from `make_dynamic` or `predict_channels`.
      images: a batch, as for `measure`.
      *others: what else the model is called with.

    Raises:
      ValueError: for ratios that are all 0, and a compact model.
    """

    def __init__(self, model: nnx.Module, images: Images, *others: Any):
        _refuse_compact(model)
        trial = nnx.clone(model)
        trial.eval()
        graph, self._ratios, self._rest = nnx.split(trial, PruneRatio, ...)
        self._numbers = [float(ratio) for ratio in jax.tree.leaves(self._ratios)]
        if not any(self._numbers):
            raise ValueError("no gate has a prune ratio above 0: give them proportions to scale")

        def usage(ratios: Any, rest: Any) -> Any:
            return measure(nnx.merge(graph, ratios, rest), images, *others)[1]

        self._usage = jax.jit(usage)

    def times(self, factor: float) -> Any:
        """All ratios times a factor, none above 0.95: a state to update the model with."""
        return jax.tree.map(lambda ratio: jnp.float32(scaled(float(ratio), factor)), self._ratios)

    def cut(self, factor: float) -> float:
        """The share of the MACs that they remove; at first a program is compiled."""
        return self._usage(self.times(factor), self._rest).mac_reduction

    def factor(self, cut: float) -> float | None:
        """The smallest factor with which they remove as much; None if none does."""
        return least_factor(self._numbers, lambda factor: self.cut(factor) >= cut - _ROUNDING)

    @property
    def most(self) -> float:
        """The share of the MACs that they remove when all that are not 0 are 0.95."""
        return self.cut(HIGHEST / min(filter(None, self._numbers)))


def scaled(ratio: float, factor: float) -> float:
    """A ratio times a factor, at most 0.95, to four places."""
    return round(min(factor * ratio, HIGHEST), 4)


def least_factor(ratios: Iterable[float], reaches: Callable[[float], bool]) -> float | None:
    """The smallest factor on ratios with which something is reached; None if none does it.

    Args:
      ratios: in proportion to each other; those of 0 stay 0.
      reaches: whether the ratios, `scaled` by a factor, are high enough; if so, higher ones are.
    """
    above = [ratio for ratio in ratios if ratio]
    lowest, highest = _LOWEST / max(above), HIGHEST / min(above)
    steps = range(_STEPS + 1)

    def at(step: int) -> float:
        return lowest * (highest / lowest) ** (step / _STEPS)

    step = bisect.bisect_left(steps, True, key=lambda step: reaches(at(step)))
    return at(step) if step < len(steps) else None


def _refuse_compact(model: nnx.Module) -> None:
    if is_compact(model):
        raise ValueError(
            "the ratios of a compact model are fixed: set them on the model that it was made from,"
            " and make that compact"
        )


def _choices(gates: Mapping[str, DynamicConv], axis: str) -> dict[str, list[Any]]:
    """The ratios of each choice, its own and its followers', by the name of who makes it."""
    of = "columns_of" if axis == "column_ratio" else "channels_of"

    def own(gate: DynamicConv) -> Any:
        if axis == "column_ratio":
            return None if gate.follows_columns else gate.column_ratio
        if gate.feature_ratio is not None:  # the channels that it reads may be another's choice
            return gate.feature_ratio
        return None if gate.follows_features else gate.channel_ratio

    def follows(other: DynamicConv, gate: DynamicConv) -> bool:
        handover = gate.handover
        return other is not gate and handover is not None and getattr(other, of) is handover

    return {
        name: [ratio, *(getattr(g, axis) for g in gates.values() if follows(g, gate))]
        for name, gate in gates.items()
        if (ratio := own(gate)) is not None
    }


def ratio_of_each(
    model: nnx.Module, names: Sequence[str], ratios: Any, field: str
) -> dict[str, Ratio | None]:
    """Spells ratios out: one number, one for each block, or one for each pattern of names.

    Args:
      model: whose `blocks` a sequence is of; None in it: no ratio in that block.
      names: of the layers.
      ratios: see `Ratios`; of patterns that match the same layer the last counts.
      field: what errors call them.

    Returns:
      The ratio of each layer; None for one that has none.

    Raises:
      ValueError: for a pattern that matches none of the names, a sequence that does not fit the
        blocks, a ratio other than 0 for a block without any of the names, and a ratio that is no
        number in [0, 1).
    """
    if ratios is None:
        return dict.fromkeys(names)
    if not isinstance(ratios, Mapping):
        if (isinstance(ratios, Sequence) and not isinstance(ratios, str)) or np.ndim(ratios) > 0:
            return _ratio_of_blocks(model, names, ratios, field)
        ratios = {"*": ratios}
    spelled: dict[str, Ratio | None] = dict.fromkeys(names)
    for pattern, ratio in ratios.items():
        number = _checked(ratio, f"{field} for {pattern}")
        for name in matches(pattern, names):
            spelled[name] = number
    return spelled


def _ratio_of_blocks(
    model: nnx.Module, names: Sequence[str], ratios: Any, field: str
) -> dict[str, Ratio | None]:
    found: Any = getattr(model, "blocks", ())
    blocks = len(found) if isinstance(found, Sequence | nnx.List) else 0
    if len(ratios) != blocks:
        raise ValueError(
            f"{field} has {len(ratios)} values; this model has {blocks} blocks"
            + ("" if blocks else ", so give one number or a mapping of layer patterns")
        )
    spelled: dict[str, Ratio | None] = dict.fromkeys(names)
    for i, ratio in enumerate(ratios):
        number = None if ratio is None else _checked(ratio, f"{field} for block {i}")
        inside = [name for name in names if f"{name}/".startswith(f"blocks/{i}/")]
        prunes = isinstance(number, Tracer) or bool(number)
        if prunes and not inside:
            raise ValueError(
                f"{field} for block {i} is {number}, and no convolution chosen for such a gate"
                " is in that block (one that sees at most 4 channels only by its full name; where"
                " gates predict, none without a link): give 0 for it"
            )
        spelled |= dict.fromkeys(inside, number)
    return spelled


def _checked(ratio: Any, field: str) -> Ratio:
    if isinstance(ratio, Tracer) and ratio.ndim == 0:  # its value is not known yet
        return ratio
    try:
        if isinstance(ratio, str | bool) or not 0.0 <= ratio < 1.0:
            raise ValueError
        return float(ratio)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} is {ratio!r}; it must be a number in [0, 1)") from error
