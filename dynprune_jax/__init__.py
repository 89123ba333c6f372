"""Convolutional networks that decide per input which channels and columns to compute."""

from dynprune_jax import models
from dynprune_jax.pruning.dynamic_conv import DynamicConv, PruneRatio
from dynprune_jax.pruning.macs import LayerUsage, Usage
from dynprune_jax.pruning.measure import measure
from dynprune_jax.pruning.schedules import ratio_ascent
from dynprune_jax.pruning.surgery import dynamic_layers, make_dynamic, set_ratios

__all__ = [
    "DynamicConv",
    "LayerUsage",
    "PruneRatio",
    "Usage",
    "dynamic_layers",
    "make_dynamic",
    "measure",
    "models",
    "ratio_ascent",
    "set_ratios",
]
