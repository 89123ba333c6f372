"""The calls of any NNX model's layers: watched, changed, and traced as a program."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from dynprune_jax.pruning.layers import Model, all_modules, dynamic_layers

# What a model is called with first: a batch of images, as `(batch, height, width, channels)`, or a
# pytree whose first array, scalars aside, has the batch first; where nothing is computed also
# shapes and dtypes.
Images = Any
Sown = TypeVar("Sown")


@contextlib.contextmanager
def all_handed_over(model: nnx.Module) -> Iterator[None]:
    """Around a call of a model: what is wanted of outputs must reach their normalizations.

    Raises:
      ValueError: where it has not.
    """
    handovers = [v.handover for v in dynamic_layers(model).values() if v.chooses_outputs]
    for handover in handovers:
        handover.clear()
    try:
        yield
        for handover in handovers:
            if handover.waits:
                raise handover.error()
    finally:
        for handover in handovers:
            handover.clear()


def intercept(
    model: Model, kinds: type[nnx.Module] | tuple[type[nnx.Module], ...], call: Callable[..., Any]
) -> Model:
    """Returns a throw-away copy of a model in which the calls of some layers go through `call`.

    Args:
      model: it is left as it is.
      kinds: of the layers.
      call: gets the layer's name, the layer, its own `__call__`, and the arguments, those with a
        place in their places. The layer stays an instance of its own class, so a model that looks
        at it sees no difference. Flax never lets go of the classes that are made here, nor they
        of `call`: it may hold names, and no arrays.
    """
    copy = nnx.clone(model)
    for name, layer in all_modules(copy).items():
        if isinstance(layer, kinds):
            _intercept(layer, name, call)
    return copy


def _intercept(layer: nnx.Module, name: str, call: Callable[..., Any]) -> None:
    kind: Any = type(layer)

    class Intercepted(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            own: Any = super().__call__
            given = inspect.signature(own).bind(*args, **kwargs)  # the map may come by its name
            return call(name, self, own, *given.args, **given.kwargs)

    layer.__class__ = Intercepted


def call_and_capture(model: nnx.Module, *inputs: Any) -> tuple[Any, Any]:
    """Calls a model; returns its outputs and all `nnx.Intermediate` that it has sown."""
    return nnx.capture(lambda model, *inputs: model(*inputs), nnx.Intermediate)(model, *inputs)


def of_kind(sown: Any, kind: type[Sown]) -> list[Sown]:
    """What was sown of one kind, which has an `order`, in that: a model may sow too."""
    leaves = jax.tree.leaves(sown, is_leaf=lambda leaf: isinstance(leaf, kind))
    return sorted((leaf for leaf in leaves if isinstance(leaf, kind)), key=attrgetter("order"))


def cannot_leave(error: Exception) -> bool:
    """Whether an error is that what was sown within a transformation does not leave it."""
    # NNX's name for all that is sown; in an nnx.List it cannot be sorted among the numbers.
    return any(part in str(error) for part in ("__captures__", "sorting pytree dictionary keys"))


def as_function(model: nnx.Module, *inputs: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The call of a model as a function of arrays, to be traced.

    Args:
      model: any NNX model.
      *inputs: what it is called with: arrays or their shapes, in pytrees, and anything else.

    Returns:
      function: of the arrays; what else the model holds and is called with is part of it. It
        returns the model's outputs without text, and what it has sown and written: that is read
        by somebody too.
      arrays: the model's variables and the arrays, or shapes of arrays, among the inputs.
    """
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten((state, inputs))
    kinds = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)]

    def function(*arrays: Any) -> Any:
        new = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            new[i] = array
        state, inputs = jax.tree.unflatten(structure, new)
        called = nnx.merge(graph, state)
        outputs, sown = call_and_capture(called, *inputs)
        outputs = [leaf for leaf in jax.tree.leaves(outputs) if not isinstance(leaf, str)]
        given = {id(leaf) for leaf in new}
        written = [v for v in jax.tree.leaves(nnx.state(called)) if id(v) not in given]
        return (outputs, sown), written

    return function, [leaves[i] for i in traced]


def batch_of(images: Images) -> Any:
    """The batch, which is the first array of a pytree that is no scalar.

    Raises:
      ValueError: where there is none, or no image in it.
    """
    for leaf in jax.tree.leaves(images):
        if shape := getattr(leaf, "shape", ()):
            if shape[0] == 0:
                raise ValueError(f"images has the shape {shape}; give a batch of some")
            return leaf
    raise ValueError(f"images is a {type(images).__name__} that holds no array; give a batch")


def bodies(eqn: Any) -> list[Any]:
    """The programs within a step of a traced one: a loop's, the branches', a nested function's."""
    values = [getattr(v, "jaxpr", v) for v in jax.tree.leaves(list(eqn.params.values()))]
    return [value for value in values if hasattr(value, "eqns")]
