"""Multiply-accumulates (MACs), dense and effective, from geometry and masks; 1 MAC = 2 FLOPs.

Three figures, all per image:

* *dense*: `H_out * W_out * K_h * K_w * C_in / groups * C_out`, the literature's convention.
  Taps on the padding count. Those on the zeros that a transposed convolution puts between the
  columns of its input do not, and neither do those on padding that would be such zeros.
* *conventional* effective: dense x kept channel share x kept column share x wanted share of the
  output channels, comparable with papers. Where columns of the output are left out too, they are
  mostly those of the input, so the shares of the two do not multiply: the share of the taps that
  are left takes their place.
* *executed*: the exact number of taps that fall inside the map on a kept column, for a wanted
  column of the output, times the kept channels, times the outputs each feeds. With nothing pruned
  it is the dense figure without the taps on the padding.

Devices count in int32, which a network outgrows; so what comes off the device are small exact
counts per input, and the MACs are multiplied out in int64 on the host.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dynprune_jax.convolution import DEPTHWISE
from dynprune_jax.geometry import Geometry, pair, repeats, spans
from dynprune_jax.pruning.calls import bodies
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.masks import Leaf, Masks


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerUsage:
    """What one layer computed for each input of a batch. A pytree: `jit` may return it.

    Attributes:
      kept_channels: input channels kept, `(*batch)`.
      kept_columns: input columns kept, `(*batch)`.
      kept_features: output channels computed, `(*batch)`; of a grouped convolution all of them,
        for what it leaves out on one side is the same as on the other: that counts once.
      kept_taps: (output position, kernel position) pairs that fall inside the map on a kept
        column, for a wanted one, `(*batch)`.
      masks: the masks themselves.
      name: the layer's path in the model.
      order: place in the order of execution.
      dense_macs: of the layer, per image, taps on the padding included.
      dense_taps: `kept_taps` with every column kept and wanted.
      fan_out: outputs that one input channel feeds at one tap, `C_out / groups`.
      channels: input channels.
      columns: input columns, `height * width`.
      features: output channels.
      both_columns: whether columns of the output are left out too.
      ranked: how many the gate ranks, for each axis that it has: channels or groups of them,
        then columns or patches of them, then output channels.
      salience_macs: of the gate's own linear layer, which predicts the salience of the outputs.
    """

    kept_channels: Int[Leaf, "*batch"]
    kept_columns: Int[Leaf, "*batch"]
    kept_features: Int[Leaf, "*batch"]
    kept_taps: Int[Leaf, "*batch"]
    masks: Masks
    name: str = _static()
    order: int = _static()
    dense_macs: int = _static()
    dense_taps: int = _static()
    fan_out: int = _static()
    channels: int = _static()
    columns: int = _static()
    features: int = _static()
    both_columns: bool = _static()
    ranked: tuple[int, ...] = _static()
    salience_macs: int = _static()

    @property
    def dense_executed_macs(self) -> int:
        """Per image, with nothing pruned: the dense MACs without the taps on the padding."""
        return self.dense_taps * self.channels * self.fan_out

    @property
    def macs(self) -> Float[np.ndarray, "*batch"]:
        """Conventional effective MACs of each input."""
        channel_share = np.asarray(self.kept_channels, np.float64) / self.channels
        feature_share = np.asarray(self.kept_features, np.float64) / self.features
        column_share = np.asarray(self.kept_columns) / self.columns
        if self.both_columns:
            column_share = np.asarray(self.kept_taps, np.float64) / self.dense_taps
        return self.dense_macs * channel_share * column_share * feature_share

    @property
    def executed_macs(self) -> Int[np.ndarray, "*batch"]:
        """Executed MACs of each input, exact."""
        taps = np.asarray(self.kept_taps, np.int64)
        # Only an ungrouped convolution, whose fan-out is all its features, leaves any out.
        fan_out = self.fan_out * np.asarray(self.kept_features, np.int64) // self.features
        return taps * np.asarray(self.kept_channels, np.int64) * fan_out

    @property
    def gate_operations(self) -> int:
        """The gate's own cost for each input, kept apart from the MACs.

        For each axis that it ranks: one addition per value of the map (the mean, also where two
        axes share it) and `n * ceil(log2(n))` comparisons; and the MACs of the salience.
        """
        means = len(self.ranked) * self.channels * self.columns
        comparisons = sum(n * math.ceil(math.log2(n)) for n in self.ranked)
        return means + comparisons + self.salience_macs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Usage:
    """What a whole network computed for each input of a batch. A pytree: `jit` may return it.

    The figures are NumPy, worked out on the host: read them outside of `jit`.

    Attributes:
      layers: one `LayerUsage` for each call of a layer, in the order of execution.
      other_macs: per image, products outside of convolution and linear layers (attention, a raw
        `lax.conv`, ...), found in the traced program; they count as dense everywhere.
    """

    layers: tuple[LayerUsage, ...]
    other_macs: int = _static()

    @property
    def dense_macs(self) -> int:
        """Dense MACs per image."""
        return self.other_macs + sum(layer.dense_macs for layer in self.layers)

    @property
    def dense_executed_macs(self) -> int:
        """Per image, with nothing pruned: the dense MACs without the taps on the padding."""
        return self.other_macs + sum(layer.dense_executed_macs for layer in self.layers)

    @property
    def macs(self) -> Float[np.ndarray, " batch"]:
        """Conventional effective MACs of each image."""
        return self.other_macs + sum((x.macs for x in self.layers), np.zeros(()))

    @property
    def executed_macs(self) -> Int[np.ndarray, " batch"]:
        """Executed MACs of each image, exact."""
        return self.other_macs + sum((x.executed_macs for x in self.layers), np.zeros((), np.int64))

    @property
    def gate_operations(self) -> int:
        """What all gates cost per image, see `LayerUsage.gate_operations`; no part of the MACs."""
        return sum(layer.gate_operations for layer in self.layers)

    @property
    def mac_reduction(self) -> float:
        """Mean over the batch of `1 - effective / dense`, conventional, whole network."""
        return float(1.0 - np.mean(self.macs) / self.dense_macs)

    @property
    def executed_mac_reduction(self) -> float:
        """Mean over the batch of `1 - executed / executed by the unpruned network`."""
        return float(1.0 - np.mean(self.executed_macs) / self.dense_executed_macs)


def conv_usage(conv: nnx.Conv, shape: tuple[int, ...], masks: Masks, **place: Any) -> LayerUsage:
    """Counts one call of a convolution under masks of its input and its output.

    Args:
      conv: the convolution; any kernel, stride, padding, dilation and grouping.
      shape: of its input, `(*batch, height, width, channels)`.
      masks: what is kept of the input and wanted of the output.
      **place: `name` and `order` of the layer.

    Raises:
      ValueError: for a map of which int32 cannot count the taps, some 15,000 columns a side.
    """
    *batch, height, width, channels = shape
    all_taps, dense_taps = _taps_of(conv, height, width)
    if dense_taps >= 2**31:
        raise ValueError(f"a map of {height} x {width} has {dense_taps} taps: int32 counts fewer")
    fan_out = conv.out_features // conv.feature_group_count
    return LayerUsage(
        kept_channels=_kept(masks.channels, batch, channels, axes=(-1,)),
        kept_features=_kept(
            None if conv.feature_group_count > 1 else masks.features,
            batch,
            conv.out_features,
            axes=(-1,),
        ),
        kept_columns=_kept(masks.columns, batch, height * width, axes=(-2, -1)),
        kept_taps=jnp.full(batch, dense_taps, jnp.int32)
        if masks.columns is None and masks.out_columns is None
        else _kept_taps(conv, (*batch, height, width), masks),
        masks=masks,
        dense_macs=all_taps * channels * fan_out,
        dense_taps=dense_taps,
        fan_out=fan_out,
        channels=channels,
        columns=height * width,
        features=conv.out_features,
        both_columns=masks.out_columns is not None,
        ranked=conv.ranked(shape) if isinstance(conv, DynamicConv) else (),
        salience_macs=0 if masks.salience is None else channels * conv.out_features,
        **place,
    )


def _taps_of(conv: nnx.Conv, height: int, width: int) -> tuple[int, int]:
    """How many (output position, kernel position) pairs meet a column or padding; and a column.

    Neither counts those on the zeros that a dilated input has between its columns.
    """
    if repeats(conv):  # each tap on the padding is one on a column
        height, width = (n + span - 1 for n, span in zip((height, width), spans(conv), strict=True))
    apart = pair(conv.input_dilation)
    sides = [max(0, (n - 1) * a + 1) for n, a in zip((height, width), apart, strict=True)]
    geometry = Geometry.of(conv, height, width)
    geometry = dataclasses.replace(geometry, height=sides[0], width=sides[1])
    met = inside = 1
    for axis in range(2):
        at = _places_of_taps(
            geometry.out[axis],
            geometry.kernel[axis],
            geometry.strides[axis],
            geometry.padding[axis][0],
            geometry.dilation[axis],
        )
        on_a_place = at % apart[axis] == 0
        met *= int(np.sum(on_a_place))
        inside *= int(np.sum(on_a_place & (at >= 0) & (at < sides[axis])))
    return met, inside


def _places_of_taps(
    out: int, kernel: int, stride: int, before: int, dilation: int
) -> Int[np.ndarray, "out kernel"]:
    """Where on one side of the input, padding below 0 and beyond its end, each tap falls."""
    return (stride * np.arange(out) - before)[:, None] + dilation * np.arange(kernel)


def _kept_taps(conv: nnx.Conv, shape: tuple[int, ...], masks: Masks) -> Int[Array, "*batch"]:
    """The pairs that meet a kept column for a wanted one, in int32: exact."""
    # A convolution of the same geometry, with one channel and a kernel of ones, counts for each
    # output position the taps that fall on a kept column.
    ones = nnx.Conv(
        1,
        1,
        conv.kernel_size,
        conv.strides,
        padding=conv.padding,
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        use_bias=False,
        kernel_init=nnx.initializers.ones,
        rngs=nnx.Rngs(0),
    )
    columns = jnp.ones(shape, bool) if masks.columns is None else masks.columns
    counts = ones(columns.astype(jnp.float32)[..., None])[..., 0].astype(jnp.int32)
    if masks.out_columns is not None:
        counts = jnp.where(masks.out_columns, counts, 0)
    return jnp.sum(counts, axis=(-2, -1))


def linear_usage(
    linear: nnx.Linear, shape: tuple[int, ...], masks: Masks, **place: Any
) -> LayerUsage:
    """Counts one call of a linear layer: nothing of it is skipped.

    Args:
      linear: the layer.
      shape: of its input, `(batch, *positions, features)`.
      masks: of its input; empty, for a linear layer has no gate.
      **place: `name` and `order` of the layer.
    """
    batch, positions = shape[:1], math.prod(shape[1:-1])
    return LayerUsage(
        kept_channels=jnp.full(batch, linear.in_features, jnp.int32),
        kept_columns=jnp.full(batch, positions, jnp.int32),
        kept_features=jnp.full(batch, linear.out_features, jnp.int32),
        kept_taps=jnp.full(batch, positions, jnp.int32),
        masks=masks,
        ranked=(),
        salience_macs=0,
        dense_macs=positions * linear.in_features * linear.out_features,
        dense_taps=positions,
        fan_out=linear.out_features,
        channels=linear.in_features,
        columns=positions,
        features=linear.out_features,
        both_columns=False,
        **place,
    )


def program_macs(function: Callable[..., Any], *args: Any) -> int:
    """Dense MACs of every convolution and matrix product in a traced function.

    It reads the program that JAX traces, not the model, so nothing is overlooked; the body of a
    `scan` counts once per turn, a `while` loop once, the dearest branch of a `cond`.

    Args:
      function: any function of arrays.
      *args: its arguments; only shapes and dtypes count.

    Returns:
      MACs of the whole call, not per image.
    """
    with jax.disable_jit(False):  # what is known by its name is a jitted function
        return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_macs(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        shapes: list[Any] = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        if eqn.primitive.name == "conv_general_dilated":
            total += _conv_macs(eqn.params, shapes[1], eqn.outvars[0].aval.shape)
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * math.prod(shapes[0][axis] for axis in contracted)
        else:
            inner = [_jaxpr_macs(body) for body in bodies(eqn)]
            if eqn.params.get("name") == DEPTHWISE:  # no product of matrices
                total += sum(_size_of_products(body) for body in bodies(eqn))
            if eqn.primitive.name == "cond":
                total += max(inner)
            else:
                total += sum(inner) * eqn.params.get("length", 1)
    return total


def _size_of_products(jaxpr: Any) -> int:
    return sum(e.outvars[0].aval.size for e in jaxpr.eqns if e.primitive.name == "mul")


def _conv_macs(params: Any, kernel: Sequence[int], out: Sequence[int]) -> int:
    """MACs of a `conv_general_dilated`: for each output channel of each image the taps."""
    numbers = params["dimension_numbers"]
    (batch, features, *places), (_, channels, *sides) = numbers.out_spec, numbers.rhs_spec
    total = out[batch] * out[features] * kernel[channels]
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    axes = zip(places, sides, *(params[name] for name in names), strict=True)
    for place, side, stride, (before, _), apart, step in axes:
        at = _places_of_taps(out[place], kernel[side], stride, before, step)
        total *= int(np.count_nonzero(at % apart == 0))  # not on the zeros between columns
    return total


def _kept(mask: Array | None, batch: list[int], n: int, axes: tuple[int, ...]) -> Array:
    if mask is None:
        return jnp.full(batch, n, jnp.int32)
    return jnp.sum(mask, axis=axes, dtype=jnp.int32)
