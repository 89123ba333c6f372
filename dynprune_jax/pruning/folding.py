"""Batch normalization folded into the convolution in front of it, for inference."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from dynprune_jax.pruning.calls import Images, as_function, bodies, intercept
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.handover import GatedNorm, absent, take_over
from dynprune_jax.pruning.layers import Model, all_modules, replaceable_layers, replaced

# What the calls of layers are named in a traced program: the mark, then the layer's name.
_CONV, _NORM = "conv layer ", "norm layer "


class FoldedNorm(nnx.BatchNorm):
    """Where a batch normalization was: its convolution has done its work already.

    It still is one, for a model that looks at its layers; of its parameters and statistics there
    are shapes and dtypes.
    """

    def __init__(self, norm: nnx.BatchNorm):
        take_over(self, norm)
        parts = [norm.mean, norm.var, norm.scale, norm.bias]
        self.dtypes = tuple(part.dtype for part in parts if part is not None)
        for name in ("mean", "var", "scale", "bias"):
            setattr(self, name, absent(getattr(norm, name)))
        self.handover = nnx.static(getattr(norm, "handover", None))

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Float[Array, "*batch height width channels"]:
        """Returns the map, in the dtype that the normalization would return.

        Raises:
          ValueError: if it is asked for the statistics of the batch.
        """
        del mask  # of the statistics, which are stored
        stored = self.use_running_average if use_running_average is None else use_running_average
        if not stored:
            raise ValueError(
                "this batch normalization is folded, with its stored statistics: for those of a"
                " batch call the model that it was made from; for these, eval() sets this one back"
            )
        y = x.astype(self.dtype or jnp.result_type(x, *self.dtypes))
        return y if self.handover is None else self.handover.take(x).apply_to_output(y)


def fold_batch_norms(model: Model, images: Images, *others: Any) -> Model:
    """Returns the model for evaluation, its batch norms folded into convolutions where they can be.

    With stored statistics a normalization is an affine map of each channel, so it may scale the
    kernel and shift the bias instead (Jacob et al. 2017, arXiv 1712.05877, section 3.2). Which
    norm follows which convolution is read from the traced program: a norm is folded if the
    convolution's output goes to it and nowhere else, each of the two is called once, and nothing
    but calls of layers reads their parameters (tied weights and penalties do).

    Args:
      model: it is left as it is.
      images: a batch, or its shape and dtype.
      *others: what else the model is called with.
    """
    return fold(model, images, *others)[0]


def fold(model: Model, *inputs: Any) -> tuple[Model, set[str]]:
    """The model of `fold_batch_norms`, and the layers whose parameters more than calls read."""
    model = nnx.clone(model)
    model.eval()
    modules = all_modules(model)
    new: dict[str, nnx.Module] = {}
    pairs, read = traced_pairs(model, *inputs)
    for conv_name, norm_name in pairs:
        conv: Any = modules[conv_name]
        norm: Any = modules[norm_name]
        new[conv_name] = _folded(conv, norm)
        new[norm_name] = FoldedNorm(norm)
    return replaced(model, new), read


def _folded(conv: nnx.Conv, norm: nnx.BatchNorm) -> nnx.Conv:
    """The convolution with the affine map of its norm."""
    parts = [conv.kernel, conv.bias, norm.mean, norm.var, norm.scale, norm.bias]
    values = [None if part is None else part[...] for part in parts]
    kernel, shift = _affine(*values, epsilon=float(norm.epsilon))
    folded: Any = nnx.clone(conv)
    folded.kernel = conv.kernel.replace(kernel)
    folded.bias = nnx.data(nnx.Param(shift) if conv.bias is None else conv.bias.replace(shift))
    folded.use_bias = True
    return folded


@functools.partial(jax.jit, static_argnames="epsilon")
def _affine(
    kernel: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    norm_scale: Array | None,
    norm_bias: Array | None,
    epsilon: float,
) -> tuple[Array, Array]:
    """A kernel and a bias for both, worked out in float32 or float64."""
    scale = jax.lax.rsqrt(var.astype(jnp.promote_types(jnp.float32, kernel.dtype)) + epsilon)
    if norm_scale is not None:
        scale = scale * norm_scale
    shift = -mean * scale
    if norm_bias is not None:
        shift = shift + norm_bias
    if bias is not None:
        shift = shift + bias * scale
    return kernel * scale.reshape(1, 1, 1, -1), shift


def traced_pairs(model: nnx.Module, *inputs: Any) -> tuple[list[tuple[str, str]], set[str]]:
    """What the traced program tells of a model's convolutions and their norms; nothing is computed.

    Returns:
      pairs: the names of each convolution and the norm that it can be folded with.
      read: the layers whose parameters are read by more than such calls.
    """
    convs = set(replaceable_layers(model))  # names: `mark` may hold no arrays
    norms = {k for k, v in all_modules(model).items() if type(v) in (nnx.BatchNorm, GatedNorm)}

    def mark(name: str, layer: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, nnx.Conv):
            if name not in convs:
                # The gate is of no matter here, and no choice is handed over to it.
                dynamic = isinstance(layer, DynamicConv)
                plain = functools.partial(nnx.Conv.__call__, layer) if dynamic else call
                return plain(x, *args, **kwargs)

            def conv(x: Any) -> Any:
                return nnx.Conv.__call__(layer, x)

            conv.__name__ = _CONV + name
            return jax.jit(conv)(x)
        if name not in norms:  # it may compute something else
            return call(x, *args, **kwargs)
        # A salience is of no matter either.
        stored = layer.use_running_average if args in ((), (None,)) else args[0]
        plain = isinstance(stored, bool | np.bool_) and stored and kwargs.get("mask") is None
        plain = plain and layer.promote_dtype is promote_dtype
        if not plain or layer.axis not in (-1, x.ndim - 1):
            return nnx.BatchNorm.__call__(layer, x, *args, **kwargs)

        def norm(x: Any) -> Any:
            return nnx.BatchNorm.__call__(layer, x, True)

        norm.__name__ = _NORM + name
        return jax.jit(norm)(x)

    marked = intercept(model, (nnx.Conv, nnx.BatchNorm), mark)
    function, arrays = as_function(marked, *inputs)
    calls: Counter[str] = Counter()
    with jax.disable_jit(False):  # a mark is a jitted function of that name
        closed, (outputs, _) = jax.make_jaxpr(function, return_shape=True)(*arrays)
    jaxpr = closed.jaxpr
    pairs = _pairs_in(jaxpr, calls)
    places: dict[int, set[int]] = {}  # clones have variables of their own that hold one array
    for array, var in zip(arrays, jaxpr.invars, strict=True):
        places.setdefault(id(array), set()).add(id(var))
    layers, returned = all_modules(marked), len(jax.tree.leaves(outputs))
    read_elsewhere = set()
    for name in (*convs, *norms):
        values = jax.tree.leaves(nnx.state(layers[name], nnx.Any(nnx.Param, nnx.BatchStat)))
        own = set[int]().union(*(places[id(value)] for value in values))
        out = _follow(jaxpr, own)
        # What is written goes back to where it was: a transformation hands on all that it gets.
        if out is None or any(i < returned for i in out):
            read_elsewhere.add(name)
    return [
        (conv, norm)
        for conv, norm in pairs
        if calls[conv] == calls[norm] == 1 and not {conv, norm} & read_elsewhere
    ], read_elsewhere


def _follow(jaxpr: Any, own: set[int]) -> list[int] | None:
    """Which outputs of a program are one of the variables `own`, given by their ids, as it came in.

    None where anything but the marked layers reads one, or it is not clear.
    """
    for eqn in jaxpr.eqns:
        places = [i for i, var in enumerate(eqn.invars) if id(var) in own]
        if not places:
            continue
        if str(eqn.params.get("name", "")).startswith((_CONV, _NORM)):
            if places[-1] == len(eqn.invars) - 1:  # it is the map of that layer
                return None
            continue
        within = bodies(eqn)
        before = 1 if eqn.primitive.name == "cond" else 0  # which branch to take
        if not within or any(len(body.invars) + before != len(eqn.invars) for body in within):
            return None
        loops = eqn.primitive.name in ("scan", "while")
        for body in within:
            given = {i - before for i in places if i >= before}
            out = _follow(body, {id(body.invars[i]) for i in given})
            if out is None:
                return None
            for i in out:
                stacked = eqn.outvars[i].aval.shape != body.outvars[i].aval.shape
                # What the next turn gets in another place was not followed there.
                if stacked or (loops and i + _constants(eqn, body) not in given):
                    return None
                own = own | {id(eqn.outvars[i])}
    return [i for i, var in enumerate(jaxpr.outvars) if id(var) in own]


def _constants(loop: Any, body: Any) -> int:
    """How many inputs of a loop's body are neither carried from turn to turn nor cut up, by shape.

    Parameters that tell have come and gone with JAX's versions.
    """
    carried, cut = (
        sum((a.aval.shape == b.aval.shape) is same for a, b in zip(whole, turn, strict=True))
        for whole, turn, same in (
            (loop.outvars, body.outvars, True),
            (loop.invars, body.invars, False),
        )
    )
    return len(body.invars) - carried - cut


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
            for body in bodies(eqn):
                pairs += _pairs_in(body, calls)
    return pairs
