"""Which layer reads which: the filters of a model that can be left out, one by one or for good."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from flax import nnx

from dynprune_jax.models.vgg import VGG, VGGUnit


@dataclasses.dataclass(frozen=True)
class Link:
    """Filters that can leave: a convolution, its normalization, and the layer that reads them.

    Attributes:
      name: path of the convolution.
      norm_name: path of its normalization.
      reader_name: path of the layer that reads its outputs.
      block: index in `model.blocks` of the reader; of the last block where the head reads.
      conv: the convolution.
      norm: its normalization.
      reader: the one layer that reads its outputs.
    """

    name: str
    norm_name: str
    reader_name: str
    block: int
    conv: nnx.Conv
    norm: nnx.BatchNorm
    reader: nnx.Conv | nnx.Linear


def links(model: Any) -> list[Link]:
    """The links of one of this package's models, in order.

    Of a VGG every convolution; of a residual network those inside a unit, because what leaves a
    unit is added to what entered it.
    """
    names = {id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    found = [
        Link(names[id(conv)], names[id(norm)], names[id(reader)], block, conv, norm, reader)
        for block, conv, norm, reader in _links(model)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no filters that can leave alone")
    return found


def _links(model: Any) -> Iterator[tuple[int, nnx.Conv, nnx.BatchNorm, Any]]:
    if isinstance(model, VGG):
        units = [
            (index, unit)
            for index, block in enumerate(model.blocks)
            for unit in block.layers
            if isinstance(unit, VGGUnit)
        ]
        head: Any = model.head
        first = head if isinstance(head, nnx.Linear) else head.layers[0]
        readers = [(index, unit.conv) for index, unit in units[1:]] + [(units[-1][0], first)]
        for (_, unit), (block, reader) in zip(units, readers, strict=True):
            yield block, unit.conv, unit.norm, reader
    else:
        for index, block in enumerate(model.blocks):
            for unit in block.layers:
                for i in (1, 2):
                    reader = getattr(unit, f"conv{i + 1}", None)
                    if reader is not None:
                        yield index, getattr(unit, f"conv{i}"), getattr(unit, f"norm{i}"), reader
