"""Accuracy and per-input MACs over a data set, each example exactly once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from dynprune_jax.network import Network, Values
from dynprune_jax.pruning.cascade import margin
from dynprune_jax.pruning.macs import Usage
from dynprune_jax.pruning.masks import Masks
from dynprune_jax.pruning.measure import measure

# A compiled evaluation of one batch:
# (values, uint8 images, labels, draw) -> (correct, margins, usage).
Evaluator = Callable[[Values, Any, Any, Any], tuple[Any, Any, Usage]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network did on a data set.

    Attributes:
      correct: for each example, in the set's order.
      margins: how sure the network is of each, see `dynprune_jax.margin`.
      usage: on the host, for each example; without the masks.
    """

    correct: Bool[np.ndarray, " examples"]
    margins: Float[np.ndarray, " examples"]
    usage: Usage

    @property
    def accuracy(self) -> float:
        """Fraction of the examples classified correctly, in [0, 1]."""
        return float(np.mean(self.correct))

    def summary(self, dense: Usage | None = None) -> dict[str, Any]:
        """Accuracy and MACs as a report holds them; MACs are per image.

        Args:
          dense: of the network whose dense MACs the reductions are of; None: of this one.
        """
        usage = self.usage
        dense = usage if dense is None else dense
        return {
            "accuracy": self.accuracy,
            "examples": len(self.correct),
            "macs_per_image": _spread(usage.macs),
            "executed_macs_per_image": _spread(usage.executed_macs),
            "gate_operations_per_image": usage.gate_operations,
            "mac_reduction": _reduction(usage.macs, dense.dense_macs),
            "executed_mac_reduction": _reduction(usage.executed_macs, dense.dense_executed_macs),
        }


def cascaded(first: Evaluation, second: Evaluation, share: float) -> dict[str, Any]:
    """What two networks do together, if the second sees what the first is least sure of.

    An image that both see costs what both compute.

    Args:
      first: of the cheap network.
      second: of the dense one, on the same examples.
      share: of the examples that both see, in [0, 1). Of equally sure ones all do or none.

    Returns:
      `share` as it came out, the `threshold` of `dynprune_jax.Cascade` that makes it, and the
      fields of `Evaluation.summary`; the reductions are of what the second alone computes.
    """
    threshold = threshold_of(first.margins, share)
    again = first.margins < threshold

    def both(macs: str) -> tuple[dict[str, float], float]:
        dense = getattr(second.usage, macs)
        together = getattr(first.usage, macs) + again * dense
        return _spread(together), _reduction(together, dense)

    macs, reduction = both("macs")
    executed, executed_reduction = both("executed_macs")
    return {
        "share": float(np.mean(again)),
        "threshold": threshold,
        "accuracy": float(np.mean(np.where(again, second.correct, first.correct))),
        "examples": len(again),
        "macs_per_image": macs,
        "executed_macs_per_image": executed,
        "gate_operations_per_image": first.usage.gate_operations,
        "mac_reduction": reduction,
        "executed_mac_reduction": executed_reduction,
    }


def threshold_of(margins: Float[np.ndarray, " examples"], share: float) -> float:
    """The threshold below which that share of the margins is, rounded down to whole examples.

    It is halfway between two of them, so that a margin that is computed in another way, and equal
    but for rounding, is on the same side of it.

    Args:
      margins: at least one.
      share: in [0, 1).
    """
    ranked = np.sort(margins)
    count = min(int(share * len(ranked) + 1e-9), len(ranked) - 1)
    if not count:
        return 0.0
    below, above = float(ranked[count - 1]), float(ranked[count])
    middle = float(np.float32((below + above) / 2))  # what margins are compared as
    return middle if middle > below else above


def make_evaluator(
    network: Network, prepare: Callable[[Any], Any], out_sharding: Any = None
) -> Evaluator:
    """Compiles the evaluation of a batch; ratios among the values are traced.

    Args:
      network: of a model; it is evaluated in evaluation mode.
      prepare: uint8 images to what the model takes.
      out_sharding: where to put what comes out, if the batch is shared by many processes.
    """

    @functools.partial(jax.jit, out_shardings=out_sharding)
    def evaluator(values: Values, images: Any, labels: Any, draw: Any) -> tuple[Any, Any, Usage]:
        model = network.bind(values, draw=draw)
        model.eval()
        logits, usage = measure(model, prepare(images))
        layers = tuple(dataclasses.replace(layer, masks=Masks()) for layer in usage.layers)
        correct = jnp.argmax(logits, axis=-1) == labels
        return correct, margin(logits), dataclasses.replace(usage, layers=layers)

    return evaluator


def evaluate(
    evaluator: Evaluator,
    values: Values,
    batches: Iterable[tuple[Any, Any, Bool[np.ndarray, " batch"]]],
) -> Evaluation:
    """Runs a network over a data set.

    Args:
      evaluator: from `make_evaluator`.
      values: parameters, batch statistics and, if not the model's own, prune ratios by name.
      batches: uint8 images, labels, and which examples are valid; all of one shape.
    """
    correct, margins, usages = [], [], []
    for draw, (images, labels, valid) in enumerate(batches):
        right, sure, usage = jax.device_get(evaluator(values, images, labels, draw))
        correct.append(right[valid])
        margins.append(sure[valid])
        usages.append(jax.tree.map(lambda leaf, valid=valid: leaf[valid], usage))
    usage = jax.tree.map(lambda *leaves: np.concatenate(leaves), *usages)
    return Evaluation(np.concatenate(correct), np.concatenate(margins), usage)


def _reduction(macs: np.ndarray, dense: np.ndarray | int) -> float:
    return float(1.0 - np.mean(macs) / np.mean(dense))


def _spread(per_image: np.ndarray) -> dict[str, float]:
    return {
        "mean": float(np.mean(per_image)),
        "min": float(np.min(per_image)),
        "max": float(np.max(per_image)),
    }
