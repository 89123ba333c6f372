"""Times of inference: the ways to run a dense network, in turns with others, and their figures."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from dynprune_jax.config import Config
from dynprune_jax.provenance import versions
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.folding import fold_batch_norms
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.layers import replaceable_layers
from dynprune_jax.pruning.plan import (
    Plan,
    available_cores,
    interleaved,
    measure_plan,
    processor,
)
from dynprune_jax.writers import progress_bar, say

_TURN = 0.03  # seconds that a way is called again and again before the next has its turn
_HOPELESS = 2.0  # times the fastest dense way: what is slower is timed three times only


def setting(config: Config, batch_size: int) -> dict[str, Any]:
    """What a row of times says of the network, the batch and the machine."""
    return {
        "network": config.model,
        "width": config.width,
        "image_size": config.data.image_size,
        "dtype": config.dtype,
        "device": f"{processor()}, {available_cores()} cores",
        "versions": versions(),
        "batch_size": batch_size,
    }


def planned(
    name: str,
    model: nnx.Module,
    images: jax.Array,
    config: Config,
    folder: Path,
    known: dict[Any, dict[Form, float]],
) -> Plan:
    """Measures the forms of a network's layers, and keeps them beside the results.

    Args:
      name: of the network, in the plan's file.
      model: in evaluation mode.
      images: a batch.
      config: for how often each form is timed.
      folder: of the results.
      known: measurements on this device, to use and to add to.
    """
    batch = len(images)
    began = time.perf_counter()
    with progress_bar(f"batch {batch}, {name}: measuring the forms of each layer") as progress:
        plan = measure_plan(
            fold_batch_norms(model, images),
            images,
            repeats=config.benchmark.repeats,
            known=known,
            progress=progress,
        )
    plan.save(folder / f"plan_batch_{batch}_{name}.json")
    say(
        f"batch {batch}, {name}: planned {len(plan.forms)} layers in"
        f" {time.perf_counter() - began:.0f} s"
    )
    return plan


def dense_ways(model: nnx.Module, images: jax.Array, plan: Plan) -> dict[str, nnx.Module]:
    """The ways to execute a dense model in JAX, of which the fastest is what others must beat.

    Args:
      model: dense, in evaluation mode.
      images: an example batch.
      plan: of the model, for that batch.
    """
    products = {
        name: Form("patches") if Form("patches") in taken else Form()
        for name, taken in plan.milliseconds.items()
    }
    by_lax = nnx.clone(model)  # and not by `convolve`, which is faster where XLA is slow
    for conv in replaceable_layers(by_lax).values():
        conv.conv_general_dilated = jax.lax.conv_general_dilated
    return {
        "lax.conv": fold_batch_norms(by_lax, images),
        "lax.conv, norms apart": by_lax,
        "matrix products": compact(model, images, plan=Plan(products)),
        "best form of each layer": compact(model, images, plan=plan),
    }


class Compiled:
    """A network compiled for a batch of images; a call runs it on them, or on others like them."""

    def __init__(self, model: nnx.Module, images: jax.Array):
        graph, state = nnx.split(model)
        # A flat list: to walk through the state in every call takes longer than a small layer.
        self._leaves, tree = jax.tree.flatten(state)

        def run(leaves: list[jax.Array], images: jax.Array) -> Any:
            return nnx.merge(graph, jax.tree.unflatten(tree, leaves))(images)

        self._images = images
        self._run = jax.jit(run).lower(self._leaves, images).compile()
        memory = self._run.memory_analysis()
        self.memory_mb = memory and 1e-6 * (
            memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        )

    def __call__(self, images: jax.Array | None = None) -> Any:
        """Runs it; what is returned may not be computed yet."""
        return self._run(self._leaves, self._images if images is None else images)


def timed(
    ways: Mapping[str, Callable[[], Any]],
    repeats: int,
    beside: Collection[str],
    least: float | None = _TURN,
) -> dict[str, list[float]]:
    """Times all ways in turns; what is hopeless beside the fastest of some only three times.

    Args:
      ways: by name.
      repeats: how many turns of each are timed.
      beside: the names of those some, dense ones.
      least: how long a turn is, see `interleaved`.
    """
    first = interleaved(ways, 3, warmup=1, least=least)
    fastest = min((min(first[name]) for name in beside), default=0.0)
    again = {name: run for name, run in ways.items() if min(first[name]) <= _HOPELESS * fastest}
    return first | interleaved(again, repeats, warmup=1, least=least)


def summary(
    dense: Mapping[str, list[float]],
    ways: Mapping[str, list[float]],
    mac_reduction: float,
    others: Mapping[str, list[float]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Turns times into a row's figures.

    Args:
      dense: the seconds of each call of the dense ways in JAX, by name.
      ways: of what is compared with the fastest of them; one is `compact`.
      mac_reduction: the share of the MACs removed.
      others: of dense networks in other runtimes.
    """
    dense_ms, ways_ms, others_ms = (
        {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
        for seconds in (dense, ways, others)
    )
    fastest = min(dense_ms, key=dense_ms.__getitem__)
    speedup = dense_ms[fastest] / ways_ms["compact"]
    ideal = 1.0 / (1.0 - mac_reduction)
    return {
        "mac_reduction": mac_reduction,
        "fastest_dense": fastest,
        "fastest_dense_ms": dense_ms[fastest],
        "fastest_dense_quartiles_ms": quartiles_ms(dense[fastest]),
        **{f"{name.replace(' ', '_')}_ms": taken for name, taken in ways_ms.items()},
        "compact_quartiles_ms": quartiles_ms(ways["compact"]),
        "speedup": speedup,
        "ideal_speedup": ideal,
        "realised": speedup / ideal,
        "dense_ms": dense_ms,
        "other_runtimes_ms": others_ms,
    }


def quartiles_ms(seconds: Sequence[float]) -> list[float]:
    """The first and the third quartile of times, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return [1e3 * low, 1e3 * high]
