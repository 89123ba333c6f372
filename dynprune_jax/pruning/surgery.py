"""Surgery on any NNX model: make its convolutions dynamic."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from dynprune_jax.pruning.attention import Criterion, Statistic, attention, mean
from dynprune_jax.pruning.dynamic_conv import DynamicConv, Ratio, is_depthwise
from dynprune_jax.pruning.handover import GatedNorm, Handover
from dynprune_jax.pruning.layers import (
    Layers,
    Model,
    all_modules,
    conv_layers,
    matches,
    patterns_of,
    replaced,
    select,
)
from dynprune_jax.pruning.ratios import Ratios, ratio_of_each

# Groups of (convolution, the normalization behind it), by name.
Blocks = Sequence[Sequence[tuple[str, str]]]


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
        sequence, one for each entry of `model.blocks`, None for no gate in it; or a mapping from
        patterns of layer names to ratios, of which the last that matches counts
        (`{"*": 0.3, "blocks/4/*": 0.9}`). None, or no match: no gate on channels.
      column_ratio: the same over columns.
      layers: which convolutions to gate: a pattern of layer names as in `fnmatch`
        (`"blocks/*/conv2"`), several of them, or a function of the name and the convolution.
        A pattern with a wildcard leaves out what sees the image, told by its at most 4 input
        channels; its full name, or a function, may choose that too.
      column_blocks: groups of convolutions of one resolution, each with the name of its
        normalization, in order, that share a choice of columns: it is made once, in front of the
        first, for the inputs and the outputs of all; `column_blocks` of
        `dynprune_jax.models.links` finds those of this package's models. A convolution in no group
        has a choice of its own, for its inputs.
      channel_group: how many neighbouring channels are kept or skipped together, see
        `DynamicConv`.
      column_patch: the side of the square of columns that are kept or skipped together.
      statistic: what attention is of a channel or a column, see
        `dynprune_jax.pruning.attention.STATISTICS`.
      criterion: what to rank by, see `dynprune_jax.pruning.attention.CRITERIA`.
      drop_probability: of targeted dropout in training, in [0, 1].
      rngs: seeds the random criterion and stochastic dropout; `nnx.Rngs(0)` by default.

    Raises:
      ValueError: for a pattern that matches no chosen layer, a sequence that does not fit the
        blocks, a ratio out of [0, 1), no ratio at all, `column_blocks` that name no such
        layers, have several column ratios, or a convolution without one between others, for a
        `channel_group` of at least as many channels as any of the gated layers has, or for a
        convolution with a predicted gate, one that reads what such a gate has chosen, or one that
        shares a choice of columns.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    chosen = select(model, layers)
    channel = ratio_of_each(model, chosen, channel_ratio, "channel_ratio")
    column = ratio_of_each(model, chosen, column_ratio, "column_ratio")
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
    links: Mapping[str, tuple[str, ...]],
    column_ratio: Ratios = None,
    *,
    layers: Layers = "*",
    column_blocks: Blocks = (),
    channel_group: int = 1,
    column_patch: int = 1,
    salience_scales: bool = True,
    statistic: Statistic = mean,
    criterion: Criterion = attention,
    drop_probability: float = 1.0,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Returns the model with gates that decide before a convolution which outputs to compute.

    Feature Boosting and Suppression (Gao et al. 2018, arXiv 1810.05331): see `DynamicConv`. The
    convolution that reads the outputs skips the same channels, so a kept share counts squared.

    The gates start from the model's weights: at ratio 0 a trained model answers as before, but for
    rounding; above, until it is trained, it skips for every input what static pruning by L1 norms
    would remove. For that the batch norms behind get scales and biases of their own; all other
    parameters are shared with the given model. A depthwise convolution hands a choice on: it
    computes the channels that it is given, and what reads them skips the others too.

    Args:
      model: any NNX model.
      channel_ratio: prune ratio over the outputs, as in `make_dynamic`; patterns and blocks are
        those of the convolution that makes them.
      links: for each convolution that may get such a gate, the names of the `nnx.BatchNorm`
        behind it and of the one layer that reads the result, as `find_links` finds them; if that
        is depthwise, the same two of it may follow. What lies between the two must leave a channel
        of zeros one of zeros, as relu and pooling do: by that the reader knows what to skip. A
        reader that is grouped, but not depthwise, skips nothing, nor does one with another number
        of input channels: it reads something else besides.
      column_ratio: over columns, by attention in front of any convolution, as in `make_dynamic`.
      layers: patterns of names: which of the linked convolutions, and which for columns.
      column_blocks: as in `make_dynamic`.
      channel_group: how many neighbouring outputs are computed or skipped together; they are
        ranked by their mean salience, and each is scaled by its own.
      column_patch: as in `make_dynamic`.
      salience_scales: whether saliences multiply the outputs, or only rank them.
      statistic: as in `make_dynamic`, for columns.
      criterion: ranks saliences and column attention.
      drop_probability: as in `make_dynamic`.
      rngs: seeds the random criterion and stochastic dropout; `nnx.Rngs(0)` by default.

    Raises:
      ValueError: as in `make_dynamic`, for no links, for links that name no such layers, or one
        normalization or one reader twice, for one that goes on behind what is not depthwise, and
        for a grouped convolution whose outputs would be chosen.
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    if callable(layers):
        raise ValueError("layers must be patterns of names where channels are predicted")
    if not isinstance(links, Mapping) or not links:
        raise ValueError(f"links is {links!r}; it must be a mapping, as `find_links` returns")
    chosen = dict.fromkeys(name for p in patterns_of(layers) for name in matches(p, list(links)))
    feature = ratio_of_each(model, list(chosen), channel_ratio, "channel_ratio")
    feature = {name: ratio for name, ratio in feature.items() if ratio is not None}
    convs, modules = conv_layers(model), all_modules(model)
    norms, readers, hands_on = {}, {}, {}
    for name in feature:
        _check_kind("links", convs, name, nnx.Conv)
        link = links[name]
        if len(link) < 2 or len(link) % 2:
            raise ValueError(
                f"links has {link!r} for {name!r}; it must be a normalization and a reader, or"
                " several such pairs"
            )
        makers = (name, *link[1:-1:2])
        for maker, norm, reader in zip(makers, link[::2], link[1::2], strict=True):
            if maker != name and not (maker in readers and is_depthwise(convs[maker])):
                raise ValueError(
                    f"links goes on behind {maker!r}, which is no depthwise convolution of what"
                    f" {name!r} makes"
                )
            _check_kind("links", modules, norm, nnx.BatchNorm)
            _check_kind("links", modules, reader, nnx.Module)
            norms[maker] = norm
            conv = convs.get(reader)
            if conv is None or conv.in_features != convs[name].out_features:
                continue
            if conv.feature_group_count in (1, conv.in_features):  # whole groups would lose some
                if reader in readers:
                    raise ValueError(
                        f"links has {reader!r} as what reads the outputs of both"
                        f" {readers[reader]!r} and {name!r}: it could skip no channel that only"
                        " one of them leaves out"
                    )
                readers[reader] = name
        hands_on |= {after: before for before, after in itertools.pairwise(makers)}
    column = {}
    if column_ratio is not None:
        column = ratio_of_each(model, select(model, layers), column_ratio, "column_ratio")
    return _with_gates(
        model,
        {reader: feature[name] for reader, name in readers.items()},
        column,
        feature,
        norms=norms,
        readers=readers,
        hands_on=hands_on,
        blocks=column_blocks,
        channel_group=channel_group,
        column_patch=column_patch,
        salience_scales=salience_scales,
        statistic=statistic,
        criterion=criterion,
        drop_probability=drop_probability,
        rngs=rngs,
    )


def _with_gates(
    model: Model,
    channel: Mapping[str, Ratio | None],
    column: Mapping[str, Ratio | None],
    feature: Mapping[str, Ratio | None] = {},
    *,
    norms: Mapping[str, str] = {},
    readers: Mapping[str, str] = {},
    hands_on: Mapping[str, str] = {},
    blocks: Blocks = (),
    channel_group: int,
    **gate: Any,
) -> Model:
    """The model with gates of these ratios, by the names of the convolutions.

    Args:
      model: it is left as it is.
      channel: over input channels; None or no entry: no gate on that axis.
      column: over columns.
      feature: over output channels.
      norms: the normalization behind each convolution that chooses its outputs, or hands a choice
        on.
      readers: of each convolution that reads such outputs, the one that chooses them.
      hands_on: of each that hands a choice on, the convolution that it has it from.
      blocks: see `make_dynamic`.
      channel_group: see `make_dynamic`.
      **gate: what else a `DynamicConv` takes.
    """
    ratios = itertools.chain(channel.values(), column.values(), feature.values())
    if all(ratio is None for ratio in ratios):
        raise ValueError("give channel_ratio, column_ratio or both")
    norms = dict(norms)
    chooses: dict[str, str] = {}  # of each convolution in a block, the first in that block
    convs, modules = conv_layers(model), all_modules(model)
    for block in blocks:
        for name, norm in block:
            _check_kind("column_blocks", convs, name, nnx.Conv)
            _check_kind("column_blocks", modules, norm, nnx.BatchNorm)
        members = _sharing(block, column)
        chooses |= {name: members[0][0] for name, _ in members}
        norms |= dict(members)
    handovers = {name: Handover(name, name in hands_on.values()) for name in norms}
    new: dict[str, Any] = {}
    for name, conv in convs.items():
        ratios = [of.get(name) for of in (channel, column, feature)]
        if any(ratio is not None for ratio in ratios):
            if isinstance(conv, DynamicConv) and (
                conv.feature_ratio is not None or conv.channels_of or conv.columns_of
            ):
                raise ValueError(
                    f"{name} has a predicted gate, or reads what one has chosen, or shares a choice"
                    " of columns: make the gates of a plain model"
                )
            new[name] = DynamicConv(
                conv,
                channel_ratio=ratios[0],
                column_ratio=ratios[1],
                feature_ratio=ratios[2],
                handover=handovers.get(name),
                channels_of=handovers.get(readers.get(name, "")),
                columns_of=handovers.get(chooses.get(name, "")),
                choice_of=handovers.get(hands_on.get(name, "")),
                channel_group=channel_group,
                **gate,
            )
    _check_groups(channel_group, new.values())
    for name, norm in norms.items():
        if norm in new:
            raise ValueError(f"{norm} is named as the normalization of several convolutions")
        conv = new[name]
        scales = conv.feature_ratio is not None and conv.salience_scales
        start = conv.salience_bias[...] if scales else None
        new[norm] = GatedNorm(modules[norm], conv.handover, start)
    return replaced(model, new)


def _sharing(
    block: Sequence[tuple[str, str]], column: Mapping[str, Ratio | None]
) -> list[tuple[str, str]]:
    """Those of a block that share its choice of columns: side by side, and of one ratio."""
    gated = [column.get(name) is not None for name, _ in block]
    if not any(gated):
        return []
    members = block[gated.index(True) : len(gated) - gated[::-1].index(True)]
    for name, _ in members:
        if column.get(name) is None:
            raise ValueError(
                f"{name} has no gate on columns, but stands between convolutions that share a"
                " choice of them"
            )
    if any(column[name] != column[members[0][0]] for name, _ in members):
        raise ValueError(
            f"column_ratio differs between {', '.join(name for name, _ in members)}, which"
            " share one choice of columns"
        )
    return list(members)


def _check_groups(channel_group: int, gates: Iterable[DynamicConv]) -> None:
    """Refuses groups of which no gate could skip any."""
    sizes = []  # of the channels that a gate ranks: how many there are, and in a group
    for gate in gates:
        if gate.channel_ratio is not None:
            sizes.append((gate.in_features, gate.group_size(gate.in_features)))
        if gate.feature_ratio is not None:
            sizes.append((gate.out_features, gate.feature_group))
    if channel_group > 1 and sizes and all(n == size for n, size in sizes):
        raise ValueError(
            f"channel_group is {channel_group}, and the convolutions with a gate on channels have"
            f" at most {max(n for n, _ in sizes)}: no channel would be skipped"
        )


def _check_kind(
    field: str, modules: Mapping[str, nnx.Module], name: str, kind: type[nnx.Module]
) -> None:
    found = modules.get(name)
    # A `GatedNorm` can take the place of these alone: a subclass may compute something else.
    known = (nnx.BatchNorm, GatedNorm)
    if not (type(found) in known if kind is nnx.BatchNorm else isinstance(found, kind)):
        odd = "a subclass of" if isinstance(found, kind) else "no"
        raise ValueError(f"{field} names {name!r}, which is {odd} {kind.__name__}")
