"""ImageNet-100: a hundred classes of a prepared `imagenet2012`, labels 0 to 99.

The list is that of Tian, Krishnan and Isola, Contrastive Multiview Coding (arXiv 1906.05849).
"""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Int

from dynprune_jax.data.records import chunks, fetch
from dynprune_jax.errors import UserError


def class_wnids() -> tuple[str, ...]:
    """Returns the hundred WordNet ids in sorted order: the position is the label."""
    text = resources.files("dynprune_jax.data").joinpath("imagenet100_classes.txt").read_text()
    return tuple(sorted(text.split()))


def new_labels(names: Sequence[str]) -> Int[np.ndarray, " classes"]:
    """Maps each class of the full set to its label in ImageNet-100, or to -1.

    Args:
      names: the full set's class names, WordNet ids, in the order of its labels.

    Raises:
      UserError: a class of ImageNet-100 is not among the names.
    """
    wnids = class_wnids()
    missing = sorted(set(wnids) - set(names))
    if missing:
        raise UserError(
            f"config.data.name=imagenet100: the prepared imagenet2012 lacks {len(missing)} of "
            f"the 100 classes, {missing[0]} first; its class names must be WordNet ids"
        )
    position = {wnid: label for label, wnid in enumerate(wnids)}
    return np.array([position.get(name, -1) for name in names])


def scan_labels(records: Any, folder: Path, split: str) -> Int[np.ndarray, " examples"]:
    """Reads the label of every record, once: the result is kept beside the prepared data.

    Args:
      records: a TFDS data source whose images are not decoded.
      folder: of the prepared data set; if it cannot be written, nothing is kept.
      split: as given to TFDS; names the file.

    Raises:
      UserError: the prepared data are damaged.
    """
    cache = folder / f"labels-{quote(split, safe='')}.npy"
    with contextlib.suppress(OSError, EOFError, ValueError):  # it is not there, or damaged
        labels = np.load(cache, allow_pickle=False)
        if labels.shape == (len(records),) and labels.dtype.kind == "i":
            return labels
    print(f"Reading the labels of {len(records)} images in {folder} (only once).", flush=True)
    labels = np.array(
        [
            int(record["label"])
            for chunk in chunks(len(records), 512)
            for record in fetch(records, chunk, split)
        ],
        np.int32,
    )
    _write_atomically(cache, labels)
    return labels


def _write_atomically(file: Path, array: np.ndarray) -> None:
    part = ""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as stream:
            part = stream.name
            np.save(stream, array, allow_pickle=False)
        os.replace(part, file)
    except OSError as error:
        print(f"Cannot keep the labels in {file}: {error.strerror}", flush=True)
        if part:
            Path(part).unlink(missing_ok=True)
