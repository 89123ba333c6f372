"""The layers of any NNX model: their names, and which of them a pattern means."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from dynprune_jax.convolution import convolve
from dynprune_jax.pruning.dynamic_conv import DynamicConv

# A pattern of layer names, several, or a function of the name and the convolution.
Layers = str | Sequence[str] | Callable[[str, nnx.Conv], bool]
Model = TypeVar("Model", bound=nnx.Module)

# A convolution with at most this many input channels sees the image (grey, RGB, RGBA).
_IMAGE_CHANNELS = 4


def path_name(path: Sequence[Any]) -> str:
    """A layer's name: the keys on the way to it, joined, such as `blocks/1/layers/0/conv`."""
    return "/".join(map(str, path))


def by_name(state: Any) -> dict[str, Any]:
    """The arrays of an `nnx.State` by the names of their variables."""
    return {path_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def all_modules(model: nnx.Module) -> dict[str, Any]:
    """Every module of a model, by name.

    Raises:
      ValueError: where two of them would have one name.
    """
    found: dict[str, Any] = {}
    for path, module in nnx.iter_modules(model):
        name = path_name(path)
        if name in found:
            raise ValueError(
                f"two layers have the name {name!r}, for a key of an nnx.Dict has a slash: give it"
                " another"
            )
        found[name] = module
    return found


def conv_layers(model: nnx.Module) -> dict[str, nnx.Conv]:
    """Every 2-D convolution that could get a gate, by name, in order."""
    found = {
        name: module
        for name, module in all_modules(model).items()
        if isinstance(module, nnx.Conv)
        and type(module) in (nnx.Conv, DynamicConv)  # a subclass may compute something else
        and len(module.kernel_size) == 2
        and len(module.kernel.shape) == 4  # more are layers stacked by nnx.vmap
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def replaceable_layers(model: nnx.Module) -> dict[str, nnx.Conv]:
    """The convolutions that another execution may take the place of, by name, in order.

    Not those that compute or promote with a function of their own, nor those `rewritten`.
    """
    around = rewritten(model)
    return {
        name: conv
        for name, conv in conv_layers(model).items()
        if conv.conv_general_dilated in (jax.lax.conv_general_dilated, convolve)
        and conv.promote_dtype is promote_dtype
        and not name.startswith(around)
    }


def rewritten(model: nnx.Module) -> tuple[str, ...]:
    """How the names of layers begin whose kernel a module around them rewrites in every call."""
    return tuple(
        f"{name}/"
        for name, module in all_modules(model).items()
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm)
    )


def dynamic_layers(model: nnx.Module) -> dict[str, DynamicConv]:
    """Every dynamic convolution by name, in order."""
    return {k: v for k, v in conv_layers(model).items() if isinstance(v, DynamicConv)}


def replaced(model: Model, new: Mapping[str, nnx.Module]) -> Model:
    """Returns the model with other layers of these names; the given one stays as it is.

    Raises:
      ValueError: where one is in a tuple.
    """
    try:
        return nnx.recursive_map(lambda path, node: new.get(path_name(path), node), model)
    except ValueError as error:
        if "does not support mutation" not in str(error):
            raise
        raise ValueError(
            f"a layer of {type(model).__name__} is in a tuple, where none can take its place: put"
            " its layers in an nnx.List"
        ) from error


def select(model: nnx.Module, layers: Layers) -> list[str]:
    """The names of the convolutions that `layers` asks for, in order.

    Args:
      model: any NNX model.
      layers: patterns of names, or a function of a name and a convolution. A pattern with a
        wildcard leaves out what sees the image; its full name, or a function, may choose that too.

    Raises:
      ValueError: where there is no pattern, one matches none, or the function chooses none.
    """
    convs = conv_layers(model)
    inner = [name for name, conv in convs.items() if conv.in_features > _IMAGE_CHANNELS]
    if callable(layers):
        chosen = {name for name, conv in convs.items() if layers(name, conv)}
        if not chosen:
            raise ValueError("the function given as layers selects no convolution")
    else:
        patterns = patterns_of(layers)
        named = [pattern for pattern in patterns if pattern in convs]
        if not named and not inner:
            raise ValueError(
                f"{type(model).__name__} has no 2-D nnx.Conv with more than {_IMAGE_CHANNELS}"
                " input channels (of layers that are stacked, as by nnx.vmap, none can get a gate)"
            )
        chosen = set(named).union(*(matches(p, inner) for p in patterns if p not in named))
    return [name for name in convs if name in chosen]


def patterns_of(layers: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns that were given, one or several.

    Raises:
      ValueError: where there is none.
    """
    patterns = (layers,) if isinstance(layers, str) or not isinstance(layers, Iterable) else layers
    patterns = tuple(patterns)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"layers is {layers!r}; it must be a pattern of layer names, such as '*', or several"
        )
    return patterns


def matches(pattern: str, names: Sequence[str]) -> list[str]:
    """Those of the names that a pattern, as in `fnmatch`, matches.

    Raises:
      ValueError: where that is none, or it is no pattern.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{pattern!r} is no pattern of layer names, such as '*'")
    if pattern in names:  # it may have brackets
        return [pattern]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
        raise ValueError(
            f"the layer pattern {pattern!r} matches none of the {len(names)} convolutions"
            + (f"; one of them is {close[0]!r}" if close else "")
        )
    return found


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts `blocks/10` after `blocks/9`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split("/")]
