"""Surgery on any NNX model: make its convolutions dynamic, set their prune ratios."""

import difflib
import fnmatch
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dynprune_jax.pruning.attention import Criterion, Statistic, attention, mean
from dynprune_jax.pruning.dynamic_conv import DynamicConv, GatedNorm

# One number; one for each block; or one for each pattern of layer names. All are checked by value.
Ratios = float | np.generic | np.ndarray | Array | Sequence[Any] | Mapping[str, Any] | None
# Groups of (convolution, the normalization behind it), by name.
Blocks = Sequence[Sequence[tuple[str, str]]]
Layers = str | Sequence[str] | Callable[[str, nnx.Conv], bool]
Model = TypeVar("Model", bound=nnx.Module)

# A convolution with at most this many input channels sees the image (grey, RGB, RGBA).
_IMAGE_CHANNELS = 4


def path_name(path: Sequence[Any]) -> str:
    """A layer's name: the keys on the way to it, joined, such as `blocks/1/layers/0/conv`."""
    return "/".join(map(str, path))


def conv_layers(model: nnx.Module) -> dict[str, nnx.Conv]:
    """Every 2-D convolution that could get a gate, by name, in order."""
    found = {
        path_name(path): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv)
        and type(module) in (nnx.Conv, DynamicConv)  # a subclass may compute something else
        and len(module.kernel_size) == 2
    }
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def dynamic_layers(model: nnx.Module) -> dict[str, DynamicConv]:
    """Every dynamic convolution by name, in order."""
    return {k: v for k, v in conv_layers(model).items() if isinstance(v, DynamicConv)}


def intercept(
    model: Model, kinds: type[nnx.Module] | tuple[type[nnx.Module], ...], call: Callable[..., Any]
) -> Model:
    """Returns a throw-away copy of a model in which the calls of some layers go through `call`.

    Args:
      model: it is left as it is.
      kinds: of the layers.
      call: gets the layer's name, the layer, its own `__call__`, and the arguments, those with a
        place in their places. The layer stays an instance of its own class, so a model that looks
        at it sees no difference.
    """
    copy = nnx.clone(model)
    for path, layer in list(nnx.iter_modules(copy)):
        if isinstance(layer, kinds):
            _intercept(layer, path_name(path), call)
    return copy


def _intercept(layer: nnx.Module, name: str, call: Callable[..., Any]) -> None:
    kind: Any = type(layer)

    class Intercepted(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            own: Any = super().__call__
            given = inspect.signature(own).bind(*args, **kwargs)  # the map may come by its name
            return call(name, self, own, *given.args, **given.kwargs)

    layer.__class__ = Intercepted


def as_function(model: nnx.Module, *inputs: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The call of a model as a function of arrays, to be traced.

    Args:
      model: any NNX model.
      *inputs: what it is called with: arrays or their shapes, in pytrees, and anything else.

    Returns:
      function: of the arrays; what else the model holds and is called with is part of it.
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
        return nnx.merge(graph, state)(*inputs)

    return function, [leaves[i] for i in traced]


def make_dynamic(
    model: Model,
    channel_ratio: Ratios = None,
    column_ratio: Ratios = None,
    *,
    layers: Layers = "*",
    column_blocks: Blocks = (),
    channel_group: int = 1,
    column_patch: int = 1,
    statistic: Statistic = mean,
    criterion: Criterion = attention,
    drop_probability: float = 1.0,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Returns the model with a gate in front of its convolutions.

    The model that is given keeps its structure. The result shares its parameters: the same
    `nnx.Param` objects under the same paths, so training one trains both. Build the optimizer
    after the surgery. A convolution with a gate by attention already gets a new one.

    Args:
      model: any NNX model, with `nnx.Conv` layers in attributes, `nnx.List`, `nnx.Dict` or
        `nnx.Sequential`.
      channel_ratio: prune ratio over channels, in [0, 1): one number for every gate; or a
        sequence, one for each entry of `model.blocks`; or a mapping from patterns of layer
        names to ratios, of which the last that matches counts (`{"*": 0.3, "blocks/4/*": 0.9}`).
        None, or no match: no gate on channels.
      column_ratio: the same over columns.
      layers: which convolutions to gate: a pattern of layer names as in `fnmatch`
        (`"blocks/*/conv2"`), several of them, or a function of the name and the convolution.
        A pattern with a wildcard leaves out what sees the image, told by its at most 4 input
        channels; its full name, or a function, may choose that too.
      column_blocks: groups of convolutions of one resolution, each with the name of its
        normalization, in order, that share a choice of columns: it is made once, in front of the
        first, for the inputs and the outputs of all; `models.links` has those of this package's
        models. A convolution in no group has a choice of its own, for its inputs.
      channel_group: how many neighbouring channels are kept or skipped together, see
        `DynamicConv`.
      column_patch: the side of the square of columns that are kept or skipped together.
      statistic: what attention is of a channel or a column, see `attention.STATISTICS`.
      criterion: what to rank by, see `attention.CRITERIA`.
      drop_probability: of targeted dropout in training, in [0, 1].
      rngs: seeds the random criterion and stochastic dropout; `nnx.Rngs(0)` by default.

    Raises:
      ValueError: for a pattern that matches no chosen layer, a sequence that does not fit the
        blocks, a ratio out of [0, 1), no ratio at all, `column_blocks` that name no such
        layers, have several column ratios, or a convolution without one between others, or for a
        convolution with a predicted gate, or one that reads what such a gate has chosen.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if channel_ratio is None and column_ratio is None:
        raise ValueError("give channel_ratio, column_ratio or both")
    chosen = _select(model, layers)
    channel = _ratio_of_each(model, chosen, channel_ratio, "channel_ratio")
    column = _ratio_of_each(model, chosen, column_ratio, "column_ratio")

    return _with_gates(
        model,
        channel,
        column,
        blocks=column_blocks,
        channel_group=channel_group,
        column_patch=column_patch,
        statistic=statistic,
        criterion=criterion,
        drop_probability=drop_probability,
        rngs=rngs,
    )


def predict_channels(
    model: Model,
    channel_ratio: Ratios,
    links: Mapping[str, tuple[str, str]],
    column_ratio: Ratios = None,
    *,
    layers: Layers = "*",
    column_blocks: Blocks = (),
    salience_scales: bool = True,
    statistic: Statistic = mean,
    criterion: Criterion = attention,
    drop_probability: float = 1.0,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Returns the model with gates that decide before a convolution which outputs to compute.

    Feature Boosting and Suppression (Gao et al. 2018, arXiv 1810.05331): see `DynamicConv`. The
    convolution that reads the outputs skips the same channels, so a kept share counts squared.

    The gates start from the model's weights: a trained model answers as before, nearly and at
    ratio 0, and skips what static pruning by L1 norms would remove. For that the batch norms behind
    get scales and biases of their own; all other parameters are shared with the given model.

    Args:
      model: any NNX model.
      channel_ratio: prune ratio over the outputs, as in `make_dynamic`; patterns and blocks are
        those of the convolution that makes them.
      links: for each convolution that may get such a gate, the names of the `nnx.BatchNorm`
        behind it and of the one layer that reads the result; `models.links` has those of this
        package's models. What lies between the two must leave a channel of zeros one of zeros,
        as relu and pooling do: by that the reader knows what to skip. A reader that is grouped,
        but not depthwise, skips nothing.
      column_ratio: over columns, by attention in front of any convolution, as in `make_dynamic`.
      layers: patterns of names: which of the linked convolutions, and which for columns.
      column_blocks: as in `make_dynamic`.
      salience_scales: whether saliences multiply the outputs, or only rank them.
      statistic: as in `make_dynamic`, for columns.
      criterion: ranks saliences and column attention.
      drop_probability: as in `make_dynamic`.
      rngs: seeds the new parameters, the random criterion and stochastic dropout.

    Raises:
      ValueError: as in `make_dynamic`, for links that name no such layers, and for a grouped
        convolution whose outputs would be chosen.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    patterns = (layers,) if isinstance(layers, str) else layers
    if callable(patterns):
        raise ValueError("layers must be patterns of names where channels are predicted")
    chosen = dict.fromkeys(name for p in patterns for name in _matches(p, list(links)))
    feature = _ratio_of_each(model, list(chosen), channel_ratio, "channel_ratio")
    feature = {name: ratio for name, ratio in feature.items() if ratio is not None}
    convs, modules = conv_layers(model), _modules(model)
    readers = {}
    for name in feature:
        norm, reader = links[name]
        _check_kind("links", convs, name, nnx.Conv)
        _check_kind("links", modules, norm, nnx.BatchNorm)
        _check_kind("links", modules, reader, nnx.Module)
        conv = convs.get(reader)  # one that keeps or skips whole groups would lose channels
        if conv is not None and conv.feature_group_count in (1, conv.in_features):
            readers[reader] = name
    column = {}
    if column_ratio is not None:
        column = _ratio_of_each(model, _select(model, layers), column_ratio, "column_ratio")
    return _with_gates(
        model,
        {reader: feature[name] for reader, name in readers.items()},
        column,
        feature,
        norms={name: links[name][0] for name in feature},
        readers=readers,
        blocks=column_blocks,
        salience_scales=salience_scales,
        statistic=statistic,
        criterion=criterion,
        drop_probability=drop_probability,
        rngs=rngs,
    )


def _with_gates(
    model: Model,
    channel: Mapping[str, float | None],
    column: Mapping[str, float | None],
    feature: Mapping[str, float | None] = {},
    *,
    norms: Mapping[str, str] = {},
    readers: Mapping[str, str] = {},
    blocks: Blocks = (),
    **gate: Any,
) -> Model:
    """The model with gates of these ratios, by the names of the convolutions.

    Args:
      model: it is left as it is.
      channel: over input channels; None or no entry: no gate on that axis.
      column: over columns.
      feature: over output channels.
      norms: the normalization behind each convolution that chooses its outputs.
      readers: of each convolution that reads such outputs, the one that makes them.
      blocks: see `make_dynamic`.
      **gate: what else a `DynamicConv` takes.
    """
    norms = dict(norms)
    chooses: dict[str, str] = {}  # of each convolution in a block, the first in that block
    convs, modules = conv_layers(model), _modules(model)
    for block in blocks:
        for name, norm in block:
            _check_kind("column_blocks", convs, name, nnx.Conv)
            _check_kind("column_blocks", modules, norm, nnx.BatchNorm)
        gated = [column.get(name) is not None for name, _ in block]
        members = list(itertools.compress(block, gated))
        if True in gated and False in gated[gated.index(True) :][: len(members)]:
            raise ValueError(
                f"{block[gated.index(False, gated.index(True))][0]} has no gate on columns, but"
                " stands between convolutions that share a choice of them"
            )
        if len({column[name] for name, _ in members}) > 1:
            raise ValueError(
                f"column_ratio differs between {', '.join(name for name, _ in members)}, which"
                " share one choice of columns"
            )
        chooses |= {name: members[0][0] for name, _ in members}
        norms |= dict(members)
    new: dict[str, Any] = {}
    for name, conv in convs.items():
        ratios = [of.get(name) for of in (channel, column, feature)]
        if any(ratio is not None for ratio in ratios):
            if isinstance(conv, DynamicConv) and (
                conv.feature_ratio is not None or conv.follows_features
            ):
                raise ValueError(
                    f"{name} has a predicted gate, or reads what one has chosen: make the gates"
                    " of a plain model"
                )
            new[name] = DynamicConv(
                conv,
                channel_ratio=ratios[0],
                column_ratio=ratios[1],
                feature_ratio=ratios[2],
                follows_features=name in readers,
                follows_columns=chooses.get(name, name) != name,
                wants_columns=name in chooses,
                **gate,
            )
    for name, chooser in readers.items():
        new[name].channels_of = nnx.static(new[chooser].handover)
    for name, chooser in chooses.items():
        new[name].columns_of = nnx.static(new[chooser].handover)
    for name, norm in norms.items():
        new[norm] = GatedNorm(modules[norm], new[name])
    return nnx.recursive_map(lambda path, node: new.get(path_name(path), node), model)


def _modules(model: nnx.Module) -> dict[str, Any]:
    return {path_name(path): module for path, module in nnx.iter_modules(model)}


def _check_kind(
    field: str, modules: Mapping[str, nnx.Module], name: str, kind: type[nnx.Module]
) -> None:
    if not isinstance(modules.get(name), kind):
        raise ValueError(f"{field} names {name!r}, which is no {kind.__name__}")


def set_ratios(
    model: nnx.Module, channel_ratio: Ratios = None, column_ratio: Ratios = None
) -> None:
    """Sets the prune ratios of a dynamic model's gates, in place; None leaves an axis as it is.

    The ratios are variables, so a function that takes the model's state as an argument is not
    compiled again.

    Args:
      model: a model from `make_dynamic` or `predict_channels`.
      channel_ratio: as in the function that it is from: predicted gates are named by the
        convolution that makes the outputs, and what reads them follows.
      column_ratio: as in `make_dynamic`; of a block that shares its columns the first convolution
        has the ratio, and the others follow.

    Raises:
      ValueError: as in `make_dynamic`, where no layer has a gate on that axis, and where one is
        named that has none or follows.
    """
    gates = dynamic_layers(model)
    changes = []
    for axis, ratios in (("channel_ratio", channel_ratio), ("column_ratio", column_ratio)):
        if ratios is None:
            continue
        own = _choices(gates, axis)
        for name in gates.keys() - own.keys():
            if isinstance(ratios, Mapping) and name in ratios:
                raise ValueError(
                    f"{axis} of {name} cannot be set: it has no gate on that axis, or one that"
                    " follows what is chosen before it"
                )
        if not own:
            raise ValueError(f"{axis} cannot be set: no layer has a gate on that axis")
        spelled = _ratio_of_each(model, list(own), ratios, axis)
        for name, ratio in spelled.items():
            if ratio is not None:
                changes += [(variable, ratio) for variable in own[name]]
    for variable, ratio in changes:  # all of them, or none
        variable[...] = jnp.asarray(ratio, jnp.float32)


def _choices(gates: Mapping[str, DynamicConv], axis: str) -> dict[str, list[Any]]:
    """The ratios of each choice, its own and its followers', by the name of who makes it."""
    found = {}
    for name, gate in gates.items():
        if axis == "column_ratio":
            of, ratio = "columns_of", None if gate.follows_columns else gate.column_ratio
        else:
            of, ratio = "channels_of", None if gate.follows_features else gate.channel_ratio
            ratio = ratio if gate.feature_ratio is None else gate.feature_ratio
        if ratio is not None:
            followers = [g for g in gates.values() if getattr(g, of) is not None and g is not gate]
            followers = [g for g in followers if getattr(g, of) is getattr(gate, "handover", None)]
            found[name] = [ratio, *(getattr(g, axis) for g in followers)]
    return found


def _select(model: nnx.Module, layers: Layers) -> list[str]:
    """The names of the convolutions that `layers` asks for, in order."""
    convs = conv_layers(model)
    inner = [name for name, conv in convs.items() if conv.in_features > _IMAGE_CHANNELS]
    if callable(layers):
        chosen = {name for name, conv in convs.items() if layers(name, conv)}
        if not chosen:
            raise ValueError("the function given as layers selects no convolution")
    else:
        patterns = (layers,) if isinstance(layers, str) else tuple(layers)
        named = [pattern for pattern in patterns if pattern in convs]
        if not named and not inner:
            raise ValueError(
                f"{type(model).__name__} has no 2-D nnx.Conv with more than {_IMAGE_CHANNELS}"
                " input channels"
            )
        chosen = set(named).union(*(_matches(p, inner) for p in patterns if p not in named))
    return [name for name in convs if name in chosen]


def _matches(pattern: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
        raise ValueError(
            f"the layer pattern {pattern!r} matches none of the {len(names)} convolutions"
            + (f"; one of them is {close[0]!r}" if close else "")
        )
    return found


def _ratio_of_each(
    model: nnx.Module, names: Sequence[str], ratios: Any, field: str
) -> dict[str, float | None]:
    """Spells out, for each layer, one number, a number per block, or a mapping of patterns."""
    if ratios is None:
        return dict.fromkeys(names)
    if np.ndim(ratios) == 0 and not isinstance(ratios, Mapping):
        ratios = {"*": ratios}
    if not isinstance(ratios, Mapping):
        blocks = len(getattr(model, "blocks", ()))
        if len(ratios) != blocks:
            raise ValueError(
                f"{field} has {len(ratios)} values; this model has {blocks} blocks"
                + ("" if blocks else ", so give one number or a mapping of layer patterns")
            )
        # A ratio of 0 may meet a block of which no layer is chosen.
        ratios = {
            f"blocks/{i}/*": ratio
            for i, ratio in enumerate(ratios)
            if ratio != 0 or any(name.startswith(f"blocks/{i}/") for name in names)
        }
    spelled: dict[str, float | None] = dict.fromkeys(names)
    for pattern, ratio in ratios.items():
        number = _checked(ratio, f"{field} for {pattern}")
        for name in _matches(pattern, names):
            spelled[name] = number
    return spelled


def _checked(ratio: Any, field: str) -> float:
    try:
        if isinstance(ratio, str | bool) or not 0.0 <= ratio < 1.0:
            raise ValueError
        return float(ratio)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} is {ratio!r}; it must be a number in [0, 1)") from error


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts `blocks/10` after `blocks/9`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split("/")]
