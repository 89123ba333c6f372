"""Batch normalization folded into the convolution in front of it, for inference."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.pruning.dynamic_conv import GatedNorm
from dynprune_jax.pruning.layers import (
    Model,
    all_modules,
    as_function,
    intercept,
    path_name,
    replaceable_layers,
)

# What the calls of layers are named in a traced program: the mark, then the layer's name.
_CONV, _NORM = "conv layer ", "norm layer "


class FoldedNorm(nnx.Module):
    """Where a batch normalization was: its convolution has done its work already.

    Attributes:
      dtype: what the normalization returned; None for that of its input.
    """

    def __init__(self, norm: nnx.BatchNorm):
        self.dtype = norm.dtype
        self.param_dtype = norm.param_dtype
        self.handover = nnx.static(getattr(norm, "handover", None))

    def __call__(
        self, x: Float[Array, "*batch height width channels"], **options: Any
    ) -> Float[Array, "*batch height width channels"]:
        """Returns the map, in the dtype of the normalization."""
        del options  # `use_running_average`, which holds in any case
        y = x.astype(self.dtype or jnp.result_type(x, self.param_dtype))
        return y if self.handover is None else self.handover.take(x).apply_to_output(y)


def fold_batch_norms(model: Model, images: Any, *others: Any) -> Model:
    """Returns the model for evaluation, its batch norms folded into convolutions where they can be.

    With stored statistics a normalization is an affine map of each channel, so it may scale the
    kernel and shift the bias instead (Jacob et al. 2017, arXiv 1712.05877, section 3.2). Which
    norm follows which convolution is read from the traced program: a norm is folded if the
    convolution's output goes to it and nowhere else, and each of the two is called once.

    Args:
      model: it is left as it is.
      images: a batch, or its shape and dtype.
      *others: what else the model is called with.
    """
    model = nnx.clone(model)
    model.eval()
    modules = all_modules(model)
    new: dict[str, nnx.Module] = {}
    for conv_name, norm_name in _pairs(model, images, *others):
        conv: Any = modules[conv_name]
        norm: Any = modules[norm_name]
        new[conv_name] = _folded(conv, norm)
        new[norm_name] = FoldedNorm(norm)
    return nnx.recursive_map(lambda path, node: new.get(path_name(path), node), model)


def _folded(conv: nnx.Conv, norm: nnx.BatchNorm) -> nnx.Conv:
    """The convolution with the affine map of its norm, worked out in float32."""
    scale = jax.lax.rsqrt(norm.var[...] + norm.epsilon)
    if norm.scale is not None:
        scale = scale * norm.scale[...]
    shift = -norm.mean[...] * scale
    if norm.bias is not None:
        shift = shift + norm.bias[...]
    if conv.bias is not None:
        shift = shift + conv.bias[...] * scale
    folded = nnx.clone(conv)
    folded.kernel = nnx.Param(conv.kernel[...] * scale.reshape(1, 1, 1, -1))
    folded.bias = nnx.data(nnx.Param(shift))
    folded.use_bias = True
    return folded


def _pairs(model: nnx.Module, *inputs: Any) -> list[tuple[str, str]]:
    """The names of each convolution and the norm that alone reads it, from the traced program."""
    convs = replaceable_layers(model)
    norms = {k for k, v in all_modules(model).items() if type(v) in (nnx.BatchNorm, GatedNorm)}

    def mark(name: str, layer: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, nnx.Conv):
            if name not in convs:
                return call(x, *args, **kwargs)

            def conv(x: Any) -> Any:
                return nnx.Conv.__call__(layer, x)  # the gate is of no matter here

            conv.__name__ = _CONV + name
            return jax.jit(conv)(x)
        if name not in norms:  # it may compute something else
            return call(x, *args, **kwargs)
        # A salience is of no matter either.
        if args or kwargs or not layer.use_running_average or layer.axis not in (-1, x.ndim - 1):
            return nnx.BatchNorm.__call__(layer, x, *args, **kwargs)

        def norm(x: Any) -> Any:
            return nnx.BatchNorm.__call__(layer, x)

        norm.__name__ = _NORM + name
        return jax.jit(norm)(x)

    marked = intercept(model, (nnx.Conv, nnx.BatchNorm), mark)
    function, arrays = as_function(marked, *inputs)
    calls: Counter[str] = Counter()
    found = _pairs_in(jax.make_jaxpr(function)(*arrays).jaxpr, calls)
    return [pair for pair in found if calls[pair[0]] == calls[pair[1]] == 1]


def _pairs_in(jaxpr: Any, calls: Counter[str]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    made_by: dict[Any, str] = {}
    reads = Counter(id(var) for eqn in jaxpr.eqns for var in eqn.invars)
    reads.update(id(var) for var in jaxpr.outvars)
    for eqn in jaxpr.eqns:
        name = str(eqn.params.get("name", ""))
        if name.startswith(_CONV):
            calls[name.removeprefix(_CONV)] += 1
            made_by[id(eqn.outvars[0])] = name.removeprefix(_CONV)
        elif name.startswith(_NORM):
            calls[name.removeprefix(_NORM)] += 1
            for var in eqn.invars:
                if id(var) in made_by and reads[id(var)] == 1:
                    pairs.append((made_by[id(var)], name.removeprefix(_NORM)))
        else:
            for value in jax.tree.leaves(list(eqn.params.values())):
                body = getattr(value, "jaxpr", value)
                if hasattr(body, "eqns"):
                    pairs += _pairs_in(body, calls)
    return pairs
