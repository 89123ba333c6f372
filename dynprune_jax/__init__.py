"""Convolutional networks that decide per input which channels and columns to compute."""

from dynprune_jax import models
from dynprune_jax.pruning.cascade import Cascade, margin
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.dynamic_conv import DynamicConv, PruneRatio
from dynprune_jax.pruning.exported import export_model, load_exported
from dynprune_jax.pruning.folding import fold_batch_norms
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.layers import dynamic_layers
from dynprune_jax.pruning.macs import LayerUsage, Usage
from dynprune_jax.pruning.make_static import make_static
from dynprune_jax.pruning.measure import measure
from dynprune_jax.pruning.plan import Plan, measure_plan
from dynprune_jax.pruning.ratios import scale_ratios, set_ratios
from dynprune_jax.pruning.readers import find_links
from dynprune_jax.pruning.recalibrate import recalibrate
from dynprune_jax.pruning.schedules import elastic, ratio_ascent
from dynprune_jax.pruning.surgery import make_dynamic, predict_channels
from dynprune_jax.pruning.time_budget import scale_ratios_to_time

__all__ = [
    "Cascade",
    "DynamicConv",
    "Form",
    "LayerUsage",
    "Plan",
    "PruneRatio",
    "Usage",
    "compact",
    "dynamic_layers",
    "elastic",
    "export_model",
    "find_links",
    "fold_batch_norms",
    "load_exported",
    "make_dynamic",
    "make_static",
    "margin",
    "measure",
    "measure_plan",
    "models",
    "predict_channels",
    "ratio_ascent",
    "recalibrate",
    "scale_ratios",
    "scale_ratios_to_time",
    "set_ratios",
]
