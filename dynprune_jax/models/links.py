"""What is known of our models: which layer reads which, which convolutions can share columns."""

from collections.abc import Iterator
from typing import Any

from flax import nnx

from dynprune_jax.models.mobilenet import InvertedUnit, LastUnit, MobileNetV2
from dynprune_jax.models.resnet import ResNet
from dynprune_jax.models.resnet_cifar import CifarResNet
from dynprune_jax.models.vgg import VGG, VGGUnit, flatten, global_mean

_TYPES = (VGG, ResNet, CifarResNet, MobileNetV2)


def has_links(model: Any) -> bool:
    """Whether it is a model as this package builds it: of any other `find_links` finds them."""
    if type(model) is VGG:  # which takes any head, and any way to it
        known = model.to_features in (global_mean, flatten)
        return known and type(_first_of_head(model)) is nnx.Linear
    return type(model) in _TYPES


def links(model: Any) -> dict[str, tuple[str, ...]]:
    """What `find_links` finds, of a model that `has_links`, without a trial.

    Of a VGG every convolution has a link; of a residual network those inside a unit, because what
    leaves a unit is added to what entered it, and of a MobileNetV2 those too whose map is no part
    of a sum.

    Returns:
      For each convolution that has one the names of the normalization behind it and of the layer
      that reads the result; if that is depthwise, the same two of it besides. In order.

    Raises:
      ValueError: for any other model.
    """
    names = _names(model, known=has_links(model))
    return {names[id(c)]: tuple(names[id(layer)] for layer in link) for c, *link in _links(model)}


def column_blocks(model: Any) -> list[list[tuple[str, str]]]:
    """Which convolutions of one of this package's models can share one choice of columns.

    Of a VGG those of each block. Of a residual network those of each unit, behind its stride if
    it has one; the shortcut is no part of it: what a unit skips, its input goes through unchanged.

    Returns:
      For each block or unit the names of each convolution and its normalization, in order.

    Raises:
      ValueError: for any other model.
    """
    # A subclass may compute something else.
    names, found = _names(model, known=type(model) in _TYPES), []
    for block in model.blocks:
        units: list[Any] = [unit for unit in block.layers if isinstance(unit, nnx.Module)]
        groups = (
            [[(u.conv, u.norm) for u in units]] if isinstance(model, VGG) else map(_unit, units)
        )
        found += [[(names[id(conv)], names[id(norm)]) for conv, norm in group] for group in groups]
    return found


def _names(model: Any, known: bool) -> dict[int, str]:
    """The names of a known model's modules, by their identity."""
    if not known:
        raise ValueError(
            f"{type(model).__name__} is none of {', '.join(t.__name__ for t in _TYPES)}, of which"
            " alone it is known which layers read which, and which convolutions can share columns"
        )
    return {id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(model)}


def _first_of_head(model: VGG) -> Any:
    head = model.head
    return head.layers[0] if isinstance(head, nnx.Sequential) else head


def _unit(unit: Any) -> list[tuple[nnx.Conv, nnx.BatchNorm]]:
    """A residual unit's convolutions behind the last that has a stride, with their norms."""
    if isinstance(unit, LastUnit):
        return [(unit.conv, unit.norm)]
    if isinstance(unit, InvertedUnit):
        named = [(name, f"{name}_norm") for name in ("expand", "depthwise", "project")]
    else:
        named = [(f"conv{i}", f"norm{i}") for i in (1, 2, 3)]
    pairs = [
        (getattr(unit, conv), getattr(unit, norm)) for conv, norm in named if hasattr(unit, conv)
    ]
    strided = [i for i, (conv, _) in enumerate(pairs) if conv.strides not in (1, (1, 1))]
    return pairs[strided[-1] + 1 :] if strided else pairs


def _links(model: Any) -> Iterator[tuple[nnx.Module, ...]]:
    layers = [layer for block in model.blocks for layer in block.layers]
    if isinstance(model, VGG):
        units = [unit for unit in layers if isinstance(unit, VGGUnit)]
        readers = [*(unit.conv for unit in units[1:]), _first_of_head(model)]
        for unit, reader in zip(units, readers, strict=True):
            yield unit.conv, unit.norm, reader
    elif isinstance(model, MobileNetV2):
        made: tuple[nnx.Module, ...] | None = (model.stem, model.stem_norm)  # None: a sum
        *units, last = layers
        for unit in units:
            behind = (unit.depthwise, unit.depthwise_norm, unit.project)
            if made and not unit.adds:
                yield *made, *([unit.expand] if unit.expands else behind)
            if unit.expands:
                yield unit.expand, unit.expand_norm, *behind
            made = None if unit.adds else (unit.project, unit.project_norm)
        if made:
            yield *made, last.conv
        yield last.conv, last.norm, model.head
    else:
        for unit in layers:
            for i in (1, 2):
                reader = getattr(unit, f"conv{i + 1}", None)
                if reader is not None:
                    yield getattr(unit, f"conv{i}"), getattr(unit, f"norm{i}"), reader
