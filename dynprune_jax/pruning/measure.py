"""Run a model and count, per input and per layer, what it computed."""

import itertools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.pruning.macs import LayerUsage, Meter, Usage, program_macs
from dynprune_jax.pruning.surgery import path_name


def measure(model: nnx.Module, images: Float[Array, "batch height width channels"]):
    """Runs a model on images and counts what it computed for each.

    It works under `jax.jit` and leaves nothing behind on the model. Every convolution and
    linear layer is counted, dynamic or not; other products are found in the traced program.

    Args:
      model: an NNX model, from `make_dynamic` or any other, in the mode it is in.
      images: a batch.

    Returns:
      logits: what `model(images)` returns.
      usage: a `Usage`; `usage.macs` and `usage.executed_macs` have the shape `(batch,)`.

    Raises:
      ValueError: if a layer sees another number of maps than there are images.
    """
    clock = itertools.count().__next__

    def meter(path: tuple, node: Any) -> Any:
        counted = isinstance(node, nnx.Conv | nnx.Linear)
        return Meter(node, path_name(path), clock) if counted else node

    metered = nnx.recursive_map(meter, nnx.clone(model))
    logits, sown = nnx.capture(lambda model, x: model(x), nnx.Intermediate)(metered, images)
    layers = jax.tree.leaves(sown, is_leaf=lambda x: isinstance(x, LayerUsage))
    layers = sorted(layers, key=lambda layer: layer.order)
    for layer in layers:
        if layer.kept_channels.shape != images.shape[:1]:
            raise ValueError(
                f"{layer.name} sees maps of the shape {layer.kept_channels.shape} for"
                f" {images.shape[0]} images; measure counts per image and needs one map for each"
            )
    known = sum(layer.dense_macs for layer in layers)
    graph, state = nnx.split(model)
    total = program_macs(lambda state, images: nnx.merge(graph, state)(images), state, images)
    other = total // images.shape[0] - known
    return logits, Usage(tuple(layers), other)
