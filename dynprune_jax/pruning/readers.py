"""Which layer reads what a convolution makes: found by trying, for any model."""

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from dynprune_jax.pruning.calls import (
    Images,
    as_function,
    batch_of,
    cannot_leave,
    intercept,
    of_kind,
)
from dynprune_jax.pruning.dynamic_conv import is_depthwise
from dynprune_jax.pruning.folding import traced_pairs
from dynprune_jax.pruning.layers import conv_layers, dynamic_layers

# For a convolution the names of the normalization behind it and of the layer that reads the result;
# and if that is depthwise and hands the channels on, of the normalization behind it, and so on.
Links = Mapping[str, tuple[str, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Seen:
    """A call of a layer: what it got and what it returned; its name, and its place in the order."""

    x: Any
    y: Any
    name: str = dataclasses.field(metadata={"static": True})
    order: int = dataclasses.field(metadata={"static": True})


def find_links(model: nnx.Module, images: Images, *others: Any) -> dict[str, tuple[str, ...]]:
    """Finds where `predict_channels` can put gates: the `links` of any model.

    A link is a convolution, the batch normalization that alone reads its outputs, and the one
    convolution or linear layer that reads the result: wherever the normalization's output has a
    channel of zeros, what that layer gets has one too, and else is the same. So relu, pooling,
    dropout and laying a map out may stand between; a sum with anything else may not. Where a
    depthwise convolution reads the result, makes one output of each channel, and has a
    normalization and one reader in turn, the link goes on to them.

    It is tried and not read from the program: with weights and images drawn anew, so that none is
    zero by chance, half of the channels behind a normalization are set to zero. The first layer
    that notices must get zeros there; and if it answers as before, nothing else may have noticed.
    Of each normalization two halves are tried, in evaluation.

    Args:
      model: any NNX model without gates; it is left as it is.
      images: a batch, `(batch, height, width, channels)`, or its shape and dtype, or a pytree that
        holds one; a small one will do.
      *others: what else the model is called with.

    Returns:
      For each convolution found, in the order of execution, the names of its normalization and
      of the layer that reads the result; behind a depthwise one that hands the channels on, the
      same two of that. Of several with the same reader, the first.

    Raises:
      ValueError: for no images, where there is no link, or layers are called within a
        transformation that what they see does not leave.
    """
    batch_of(images)  # refuses what holds none
    for name, layer in dynamic_layers(model).items():
        if layer.chooses_outputs:
            raise ValueError(
                f"{name} has a gate that chooses its outputs; find the links of the model that it"
                " was made from"
            )
    model = nnx.clone(model)
    model.eval()
    convs = conv_layers(model)
    try:
        pairs, _ = traced_pairs(model, images, *others)
    except ValueError as error:
        if not cannot_leave(error):
            raise
        raise _out_of_reach(model) from error
    # Other grouped ones can neither choose channels nor hand them on.
    norms = {n: c for c, n in pairs if convs[c].feature_group_count == 1 or is_depthwise(convs[c])}
    channels = {norm: convs[conv].out_features for norm, conv in norms.items()}
    trial = _Trial(channels, model, images, *others)
    rng = np.random.default_rng(0)
    found: dict[str, tuple[str, ...]] = {}
    for norm, conv in norms.items():
        n = convs[conv].out_features
        makers = [conv]
        if is_depthwise(convs[conv]):
            makers = [m for m, link in found.items() if link[-1] == conv]
            if not makers or convs[makers[0]].out_features != n:
                continue
        readers = {trial.reader(norm, rng.permutation(n) % 2 == 0) for _ in range(2)}
        (reader, *more) = readers
        taken = {name for link in found.values() for name in link[1::2]}
        if reader and not more and reader not in taken:
            found[makers[0]] = (*found.get(makers[0], ()), norm, reader)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution with a batch normalization behind it whose"
            " channels one other layer reads, each by itself"
        )
    return found


class _Trial:
    """A model as one program, with values drawn anew, in which channels and calls can be held."""

    def __init__(self, channels: Mapping[str, int], model: nnx.Module, *inputs: Any):
        self._model, self._inputs = model, inputs
        _, arrays = as_function(model, *inputs)
        rng = np.random.default_rng(0)
        weights = jax.tree.leaves(drawn_weights(rng, nnx.state(model)))  # they come first
        self._arrays = weights + [drawn(rng, array) for array in arrays[len(weights) :]]
        # Of the call under way, for `_call`: what is kept, and what calls answer if held.
        self._kept: Mapping[str, Any] = {}
        self._answers: Mapping[int, Any] = {}
        self._held: Mapping[int, Any] = {}
        self._clock = itertools.count()
        # Run once as it is, with all channels of the normalizations that are tried.
        self._whole = {name: np.ones(n, bool) for name, n in channels.items()}
        try:
            _, calls = self._program()(self._arrays, self._whole, {}, {})
        except (TypeError, ValueError) as error:
            leaked = isinstance(error, jax.errors.UnexpectedTracerError)
            if not leaked and not cannot_leave(error):  # the model's own mistake
                raise
            raise _out_of_reach(model) from error
        self._given = {call.order: call.y for call in calls}
        self._free = dict.fromkeys(self._given, np.bool_(False))
        self._times = Counter(call.name for call in calls)
        self._run = self._program()

    def _program(self) -> Callable[..., tuple[Any, list[_Seen]]]:
        """The model as a program of its own.

        What Flax and JAX remember of functions that the model transforms itself is of the classes
        of its layers, and these are new: so no program meets values of another.
        """
        trial = weakref.ref(self)  # what is called may hold no arrays

        def call(*args: Any, **kwargs: Any) -> Any:
            watching: Any = trial()
            return watching._call(*args, **kwargs)

        watched = intercept(self._model, (nnx.BatchNorm, nnx.Conv, nnx.Linear), call)
        function, _ = as_function(watched, *self._inputs)

        def run(arrays: list[Any], kept: Any, answers: Any, held: Any) -> tuple[Any, list[_Seen]]:
            self._kept, self._answers, self._held = kept, answers, held
            self._clock = itertools.count()
            (outputs, sown), _ = function(*arrays)
            self._kept, self._answers, self._held = {}, {}, {}  # no value of a trace outlives it
            return outputs, of_kind(sown, _Seen)

        return jax.jit(run)

    def reader(self, norm: str, half: Bool[np.ndarray, " channels"]) -> str:
        """The one layer that finds channels zero which a normalization leaves out, or nothing."""
        _, before = self._with({}, {})
        _, after = self._with({norm: half}, {})
        notice = _differ(before, after)
        if not notice or not _left(before[notice[0]].x, after[notice[0]].x, half):
            return ""
        reader = before[notice[0]]
        held = {reader.order: np.bool_(True)}
        ends, before = self._with({}, held)
        others, after = self._with({norm: half}, held)
        alone = all(jax.tree.leaves(jax.tree.map(_same, ends, others)))
        alone &= _differ(before, after) == notice[:1] and self._times[reader.name] == 1
        return reader.name if alone else ""

    def _with(self, kept: dict[str, Any], held: dict[int, Any]) -> tuple[Any, list[_Seen]]:
        """The outputs and the calls, some channels left alone, some calls answering as at first.

        It is one compiled program always: two may differ in how they round.
        """
        try:
            return self._run(self._arrays, self._whole | kept, self._given, self._free | held)
        except (TypeError, ValueError) as error:  # it ran before; what is held does not get in
            raise _out_of_reach(self._model) from error

    def _call(self, name: str, layer: Any, own: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = own(x, *args, **kwargs)
        if isinstance(layer, nnx.BatchNorm):
            kept = self._kept.get(name)
            return y if kept is None else jnp.where(kept, y, jnp.zeros((), y.dtype))
        order = next(self._clock)
        if order in self._answers:
            y = jnp.where(self._held[order], self._answers[order], y)
        layer.sow(nnx.Intermediate, "seen", _Seen(x, y, name, order))
        return y


def _out_of_reach(model: nnx.Module) -> ValueError:
    return ValueError(
        f"layers of {type(model).__name__} are called within a transformation (such as"
        " jax.lax.scan, nnx.cond, or nnx.remat of what holds an nnx.List) that what they see does"
        " not leave: give links by hand"
    )


def _differ(before: list[_Seen], after: list[_Seen]) -> list[int]:
    """Which calls get something else."""
    return [
        i for i, (old, new) in enumerate(zip(before, after, strict=True)) if not _same(old.x, new.x)
    ]


def _same(old: Any, new: Any) -> bool:
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        old, new = jax.random.key_data(old), jax.random.key_data(new)
    return np.array_equal(old, new, equal_nan=jnp.issubdtype(old.dtype, jnp.inexact))


def _left(old: Any, new: Any, kept: Bool[np.ndarray, " channels"]) -> bool:
    """Whether of a map, or one laid out with its channels last, these channels alone were left."""
    if new.shape[-1] % len(kept):
        return False
    expected = np.where(kept, np.asarray(old).reshape(-1, len(kept)), 0)
    return _same(np.asarray(new).reshape(-1, len(kept)), expected.astype(new.dtype))


def drawn_weights(rng: np.random.Generator, state: Any) -> Any:
    """A state with something like trained weights in it."""

    def weight(path: Any, leaf: Any) -> Any:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return drawn(rng, leaf, str(keys[-1]))

    return jax.tree_util.tree_map_with_path(weight, state)


def drawn(rng: np.random.Generator, leaf: Any, weight: str | None = None) -> Any:
    """Something like an image, or a trained weight of that name, in place of an array or shape."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    if weight and len(leaf.shape) < 2:  # biases, scales, statistics
        value = rng.uniform(0.5, 1.5, leaf.shape)
        if weight == "mean":  # above 0, it would leave a relu nothing where no bias is added
            value *= rng.choice((-1.0, 1.0), leaf.shape)
    else:
        fan_in = np.prod(leaf.shape[:-1]) if weight else 1
        value = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
    return jnp.asarray(value, jax.dtypes.canonicalize_dtype(leaf.dtype))
