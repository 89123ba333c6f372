"""Run a model and count, per input and per layer, what it computed."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from dynprune_jax.pruning.calls import (
    Images,
    all_handed_over,
    as_function,
    batch_of,
    call_and_capture,
    cannot_leave,
    intercept,
    of_kind,
)
from dynprune_jax.pruning.compact_conv import is_compact
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.layers import all_modules, dynamic_layers
from dynprune_jax.pruning.macs import LayerUsage, Usage, conv_usage, linear_usage, program_macs
from dynprune_jax.pruning.masks import Masks


def measure(model: nnx.Module, images: Images, *others: Any) -> tuple[Any, Usage]:
    """Runs a model on images and counts what it computed for each.

    It works under `jax.jit`. What a call writes to the variables that the model has it writes too,
    such as the statistics of batch norms in training mode: as for a call, the model must then be an
    argument of what is transformed. Nothing else is left on it. Every 2-D `nnx.Conv` and every
    `nnx.Linear` is counted, dynamic or not; other products, those of subclasses too, are found in
    the traced program, and spread over the images of the batch even if they are of weights alone.

    Args:
      model: an NNX model, from `make_dynamic` or any other, in the mode it is in.
      images: a batch, `(batch, height, width, channels)`, or what holds one: a pytree whose first
        array, scalars aside, is of the batch.
      *others: what else the model is called with.

    Returns:
      logits: what `model(images, *others)` returns.
      usage: a `Usage`; `usage.macs` and `usage.executed_macs` have the shape `(batch,)`.

    Raises:
      ValueError: for no images; if what is wanted did not reach the normalization, a dynamic
        convolution is called within a transformation that its counts do not leave (under `jax.jit`
        that is JAX's own UnexpectedTracerError), a layer sees another number of maps than there are
        images, or the model is compact: its masks are those of the dynamic model it was made from.
    """
    if is_compact(model):
        raise ValueError("this model is compact; measure the model that it was made from")
    batch = batch_of(images).shape[:1]
    called: list[str] = []  # the layers that are counted, in the order of their calls
    # A subclass may compute something else: what it does is found in the program.
    known = (nnx.Conv, DynamicConv, nnx.Linear)
    counted = {
        name
        for name, layer in all_modules(model).items()
        if type(layer) in known and len(getattr(layer, "kernel_size", (1, 1))) == 2
    }

    def count(name: str, layer: Any, call: Any, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        """Sows the `LayerUsage` of each call of a layer."""
        if name not in counted:
            return call(inputs, *args, **kwargs)
        place = {"name": name, "order": len(called)}
        called.append(name)
        if isinstance(layer, DynamicConv):
            masks = layer.masks(inputs)
            layer.sow(nnx.Intermediate, "usage", conv_usage(layer, inputs.shape, masks, **place))
            return layer.convolve(inputs, masks, *args, **kwargs)
        usage: Any = conv_usage if isinstance(layer, nnx.Conv) else linear_usage
        layer.sow(nnx.Intermediate, "usage", usage(layer, inputs.shape, Masks(), **place))
        return call(inputs, *args, **kwargs)

    metered = intercept(model, (nnx.Conv, nnx.Linear), count)
    variables = nnx.to_flat_state(nnx.state(metered, nnx.Variable))  # a model may hold arrays too
    before = {path: variable.get_value() for path, variable in variables}
    try:
        with all_handed_over(model):
            logits, sown = call_and_capture(metered, images, *others)
    except (TypeError, ValueError) as error:
        if not cannot_leave(error):
            raise
        raise ValueError(_does_not_leave("a layer")) from error
    layers = of_kind(sown, LayerUsage)
    gates = dynamic_layers(model)
    _check_counted({i: name for i, name in enumerate(called) if name in gates}, layers)
    for layer in layers:
        if layer.kept_channels.shape != batch:
            raise ValueError(
                f"{layer.name} sees maps of the shape {layer.kept_channels.shape} for {batch[0]}"
                " images; measure counts per image and needs one map for each, and layers of their"
                " own where several are stacked (as nnx.scan takes them)"
            )
    # A call within a transformation that counts do not leave is found in the program.
    arrived, calls = Counter(layer.name for layer in layers), Counter(called)
    whole = {name for name in counted if arrived[name] == calls[name]}
    rest = _dense_macs_without(model, counted, whole, images, *others)
    twice = sum(layer.dense_macs for layer in layers if layer.name not in whole)
    nnx.update(  # as the last: a model that is refused stays what it was
        model,
        nnx.state(metered, lambda path, v: path in before and before[path] is not v.get_value()),
    )
    return logits, Usage(tuple(layers), rest - twice)


def _dense_macs_without(model: nnx.Module, counted: Set[str], whole: Set[str], *inputs: Any) -> int:
    """Dense MACs per image of all but the layers in `whole`, and no gate's of those counted."""

    def leave_out(name: str, layer: Any, call: Any, *args: Any, **options: Any) -> Array:
        if name not in counted:
            return call(*args, **options)
        kind: Any = nnx.Linear if isinstance(layer, nnx.Linear) else nnx.Conv
        dense = functools.partial(kind.__call__, layer, **options)  # without its gate
        if name not in whole:
            return dense(*args)
        shape = jax.eval_shape(dense, *args)
        return jnp.zeros(shape.shape, shape.dtype)

    return dense_macs(intercept(model, (nnx.Conv, nnx.Linear), leave_out), *inputs)


def _check_counted(called: Mapping[int, str], layers: Sequence[LayerUsage]) -> None:
    """Raises where what a dynamic convolution has counted did not get out of the model."""
    out = {layer.order for layer in layers}
    lost = {name for order, name in called.items() if order not in out}
    for layer in layers:
        try:
            _ = layer.kept_channels + 0  # of a trace that has ended no value can be used
        except jax.errors.UnexpectedTracerError:
            lost.add(layer.name)
    if lost:
        raise ValueError(_does_not_leave(min(lost)))


def _does_not_leave(name: str) -> str:
    return (
        f"{name} is called within a transformation (such as jax.lax.scan, jax.checkpoint, nnx.cond"
        " or nnx.scan) that its counts do not leave; measure a model that calls it plainly, or"
        " within nnx.jit or nnx.remat"
    )


def dense_macs(model: nnx.Module, images: Images, *others: Any) -> int:
    """Dense MACs per image of a model, gates' own products included; nothing is computed.

    Args:
      model: any NNX model.
      images: a batch, or its shape and dtype, or what holds one, as for `measure`.
      *others: what else the model is called with.

    Raises:
      ValueError: for no images.
    """
    batch = batch_of(images).shape[0]
    function, arrays = as_function(model, images, *others)
    return program_macs(function, *arrays) // batch
