"""A network apart from its numbers: what pure functions of numbers compute with."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx import traversals
from jaxtyping import Array, Int

from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.layers import by_name, path_name

Values = Mapping[str, Any]


class Network:
    """A model's structure, ready to be bound to its numbers inside a pure function.

    The numbers are flat dictionaries by path, such as `blocks/0/layers/0/conv/kernel`: quick to
    pass to a compiled step, plain to read in a checkpoint, and the same for a dense model and
    the dynamic one made of it.

    Args:
      model: an NNX model; it is not changed, and later changes to it are not seen.
    """

    def __init__(self, model: nnx.Module):
        self._graph, state = nnx.split(model)
        leaves = list(nnx.to_flat_state(state))
        self._paths = {path_name(path): path for path, _ in leaves}
        self._types = {path_name(path): type(leaf) for path, leaf in leaves}
        self._values = by_name(state)

    def values(self, *kinds: type[nnx.Variable]) -> dict[str, Any]:
        """The model's initial values of some kinds of variables, by name."""
        return {
            name: value
            for name, value in self._values.items()
            if issubclass(self._types[name], kinds)
        }

    @property
    def weights(self) -> dict[str, Any]:
        """The model's initial parameters and batch statistics, by name."""
        return self.values(nnx.Param, nnx.BatchStat)

    @property
    def settings(self) -> dict[str, Any]:
        """Prune ratios and keys of random numbers, by name.

        A compiled program that is given them is the same one for every ratio and every seed.
        """
        return self.values(PruneRatio, nnx.RngKey)

    def bind(self, *values: Values, draw: Int[Array, ""] | int = 0) -> nnx.Module:
        """A model with these values; what is not given has its initial value.

        Args:
          *values: dictionaries by name.
          draw: the place of all streams of random numbers; the same draw gives the same numbers.
        """
        merged = dict(self._values)
        for given in values:
            merged |= given
        # Folded into the keys, not the counts: a stream may be drawn from several times a call.
        for name in self.values(nnx.RngKey):
            merged[name] = jax.random.fold_in(merged[name], draw)
        nested = traversals.unflatten_mapping({self._paths[k]: v for k, v in merged.items()})
        return nnx.merge(self._graph, nested)
