"""Data sets by name: random access to square uint8 images and their labels."""

import contextlib
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Int32, UInt8
from tensorflow_datasets.core.read_only_builder import builder_from_files

from dynprune_jax.data.cifar import Cifar10, Cifar100
from dynprune_jax.data.class_folders import ClassFolders
from dynprune_jax.data.digits import Digits
from dynprune_jax.data.imagenet100 import class_wnids, new_labels, scan_labels
from dynprune_jax.data.images import UndecodableImageError, decode_square
from dynprune_jax.data.records import (
    RecordBuilder,
    chunks,
    data_root,
    encoded_records,
    fetch,
    prepare,
)
from dynprune_jax.errors import UserError

READ_THREADS = 4
SUBSET_SEED = 0
HELD_OUT_SEED = 1


class Split:
    """Random access to one split.

    Args:
      name: the split's name, for messages.
      records: a TFDS data source with the keys `image` (bytes) and `label`.
      side: height and width of the images to return, in pixels.
      channels: 1 or 3.
      indices: which records to use, in which order; None for all.
      relabel: the label to return for each stored one; None to leave them.
    """

    def __init__(
        self,
        name: str,
        records: Any,
        *,
        side: int,
        channels: int,
        indices: Int[np.ndarray, " examples"] | None = None,
        relabel: Int[np.ndarray, " classes"] | None = None,
    ):
        self.name = name
        self.side = side
        self.channels = channels
        self._records = records
        self._indices = np.arange(len(records)) if indices is None else indices
        self._relabel = relabel

    def __len__(self) -> int:
        return len(self._indices)

    def read(
        self, indices: Sequence[int] | Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch side side channels"], Int32[np.ndarray, " batch"]]:
        """Reads and decodes the examples at these places.

        Raises:
          IndexError: an index is outside the split.
          UserError: an image cannot be decoded, an example has no label, or the prepared
            data are damaged.
        """
        keys = self._indices[np.asarray(indices, np.int64)].tolist()
        images = np.empty((len(keys), self.side, self.side, self.channels), np.uint8)
        labels = np.empty(len(keys), np.int32)
        for row, record in enumerate(fetch(self._records, keys, self.name)):
            try:
                images[row] = decode_square(record["image"], self.side, self.channels)
            except UndecodableImageError as error:
                raise UserError(
                    f"{self._place(keys[row], record)}: the image cannot be decoded "
                    f"({error}); repair its source and prepare the data set again"
                ) from error
            label = int(record["label"])
            if label < 0:
                raise UserError(
                    f"{self._place(keys[row], record)} has no label; choose a labelled "
                    "split with config.data.train_split or config.data.test_split"
                )
            labels[row] = label if self._relabel is None else self._relabel[label]
        return images, labels

    def reordered(self, order: Int[np.ndarray, " some"]) -> "Split":
        """The examples at these places, in this order; a place that is left out, is left out."""
        split = copy.copy(self)
        split._indices = self._indices[order]
        return split

    def read_all(
        self, progress: Callable[[int, int], None] | None = None
    ) -> tuple[UInt8[np.ndarray, "n side side channels"], Int32[np.ndarray, " n"]]:
        """Reads the whole split to memory, in its order.

        Args:
          progress: called with (examples done, all examples) after each chunk.

        Raises:
          UserError: as `read`.
        """
        images = np.empty((len(self), self.side, self.side, self.channels), np.uint8)
        labels = np.empty(len(self), np.int32)

        def fill(chunk: range) -> int:
            where = slice(chunk.start, chunk.stop)
            images[where], labels[where] = self.read(chunk)
            return chunk.stop

        with ThreadPoolExecutor(READ_THREADS) as pool:
            for done in pool.map(fill, chunks(len(self), 1024)):
                if progress is not None:
                    progress(done, len(self))
        return images, labels

    def _place(self, index: int, record: Mapping[str, Any]) -> str:
        name = record.get("file_name", record.get("id", b""))
        shown = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        return f"split {self.name!r}, index {index}" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class Dataset:
    """A data set: `class_names[label]` is the name of a label."""

    class_names: tuple[str, ...]
    channels: int
    train: Split
    test: Split

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


# What prepares itself on first use.
_OWN: Mapping[str, Callable[..., RecordBuilder]] = {
    "digits": Digits,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "class_folders": ClassFolders,
}


def load_dataset(
    name: str,
    *,
    image_size: int,
    stored_size: int = 0,
    path: str = "",
    archive: str = "",
    data_dir: str = "",
    train_split: str = "train",
    test_split: str = "test",
    train_examples: int = 0,
    test_examples: int = 0,
    held_out: int = 0,
) -> Dataset:
    """Opens a data set; the package's own ones prepare themselves on first use.

    Args:
      name: `digits`, `cifar10`, `cifar100`, `class_folders`, `imagenet100`, or the name of a
        data set that TFDS has prepared as array_record, such as `imagenet2012` or
        `my_set/my_config:1.0.0`.
      image_size: height and width of the network's input, in pixels.
      stored_size: height and width of the images to return; 0 for `image_size`. Larger than
        `image_size` leaves room for crops.
      path: the folder of `class_folders`.
      archive: the local archive of `cifar10` and `cifar100`; empty to download it.
      data_dir: the folder of prepared data; empty for `TFDS_DATA_DIR` or TFDS's default.
      train_split: the split to train on, in TFDS's notation (`train[:90%]`).
      test_split: the split to test on; no example of it may be in `train_split`.
      train_examples: if positive, use a fixed random subset of this many training examples.
      test_examples: the same of the test examples.
      held_out: if positive, the test split is left alone: a fixed random choice of that many
        training examples takes its place, and the others are trained on.

    What `config.check` refuses is not looked at again.

    Returns:
      The data set, with both splits open and no image read yet.

    Raises:
      UserError: the data cannot be had or a setting does not fit; the message says what to do.
    """
    if archive and not os.path.isfile(os.path.expanduser(archive)):
        # Also when the data are prepared already and the archive would not be read.
        raise UserError(f"config.data.archive={archive}: there is no such file")
    root = data_root(data_dir)
    if name in _OWN:
        if "://" in root:
            raise UserError(
                f"{name} is prepared in a local folder, and not in {root}: set config.data.data_dir"
                " or TFDS_DATA_DIR"
            )
        source = {key: given for key, given in (("path", path), ("archive", archive)) if given}
        builder = prepare(lambda: _OWN[name](data_dir=root, **source))
    else:
        builder = _open_prepared(name, "imagenet2012" if name == "imagenet100" else name, root)
    channels, class_names = _check_features(name, builder)
    relabel = None
    if name == "imagenet100":
        relabel, class_names = new_labels(class_names), class_wnids()

    def open_split(field: str, split: str, examples_field: str, examples: int) -> Split:
        records, count = _open_records(name, builder, field, split)
        indices = np.arange(count)
        if relabel is not None:
            stored = scan_labels(records, Path(builder.data_path), split)
            # A label of -1 marks an unlabelled image: of no class.
            indices = np.flatnonzero((stored >= 0) & (relabel[stored] >= 0))
        if not len(indices):
            raise UserError(f"config.data.{field}={split}: this split of {name} holds no example")
        return Split(
            split,
            records,
            side=stored_size or image_size,
            channels=channels,
            indices=_subset(indices, examples_field, examples),
            relabel=relabel,
        )

    train = open_split("train_split", train_split, "train_examples", train_examples)
    if held_out:
        train, test = _hold_out(train, held_out)
    else:
        test = open_split("test_split", test_split, "test_examples", test_examples)
        shared = _shared_examples(builder.info.splits, train_split, test_split)
        if shared:
            raise UserError(
                f"config.data.test_split={test_split}: {shared} of its examples are in"
                f" config.data.train_split={train_split}; what is trained on is no test"
            )
    return Dataset(class_names, channels, train, test)


def _shared_examples(splits: Mapping[str, Any], first: str, second: str) -> int:
    """How many examples two splits, in TFDS's notation, have in common."""
    return sum(
        max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
        for a in splits[first].file_instructions
        for b in splits[second].file_instructions
        if a.filename == b.filename
    )


def _hold_out(split: Split, examples: int) -> tuple[Split, Split]:
    """Returns the rest of a split and a fixed random choice of that many, both in its order."""
    if not 0 < examples < len(split):
        raise UserError(
            f"config.data.held_out={examples}: the training split holds {len(split)} examples; at"
            " least one must stay, and 0 holds none out"
        )
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(split))
    held, rest = np.sort(order[:examples]), np.sort(order[examples:])
    return split.reordered(rest), split.reordered(held)


def _subset(
    indices: Int[np.ndarray, " all"], field: str, examples: int
) -> Int[np.ndarray, " some"]:
    """Returns a fixed random choice of that many indices, or all of them for 0."""
    if not 0 <= examples <= len(indices):
        raise UserError(
            f"config.data.{field}={examples}: the split holds {len(indices)} examples; "
            "0 takes them all"
        )
    if examples == 0:
        return indices
    order = np.random.default_rng(SUBSET_SEED).permutation(len(indices))
    return indices[order[:examples]]


def _open_prepared(name: str, stored_name: str, root: str) -> tfds.core.DatasetBuilder:
    """Opens a data set that TFDS has prepared; never downloads.

    Args:
      name: what the user asked for.
      stored_name: its name on disk.
      root: the folder of prepared data.

    Raises:
      UserError: it is not there.
    """
    builder = None
    with contextlib.suppress(Exception):  # TFDS raises many types, with misleading messages
        # From the files and not from TFDS's own code of that name: the features and class names
        # are those that the data were prepared with.
        builder = builder_from_files(stored_name, data_dir=root)
    if builder is None:
        raise UserError(
            f"config.data.name={name}: no data set {stored_name} is prepared in "
            f"{root}; set config.data.data_dir or TFDS_DATA_DIR to the folder that holds "
            f"it, prepare it there (tfds build {stored_name} --file_format=array_record, which "
            f"needs TensorFlow), or choose one that prepares itself: {', '.join(_OWN)}"
        )
    return builder


def _check_features(name: str, builder: tfds.core.DatasetBuilder) -> tuple[int, tuple[str, ...]]:
    """Returns the number of channels and the class names of an image classification set."""
    features: Any = builder.info.features
    is_dict = isinstance(features, tfds.features.FeaturesDict)
    found: dict[str, Any] = dict(features.items()) if is_dict else {}
    if not (
        isinstance(found.get("image"), tfds.features.Image)
        and isinstance(found.get("label"), tfds.features.ClassLabel)
    ):
        raise UserError(
            f"config.data.name={name}: it needs the features image (Image) and label "
            f"(ClassLabel); it has {', '.join(found) or 'none by name'}"
        )
    return (1 if found["image"].shape[-1] == 1 else 3), tuple(found["label"].names)


def _open_records(
    name: str, builder: tfds.core.DatasetBuilder, field: str, split: str
) -> tuple[Any, int]:
    """Opens a split's records and counts them, turning TFDS's exceptions into the user's."""
    try:
        records = encoded_records(builder, split)
        return records, len(records)
    except NotImplementedError as error:
        raise UserError(
            f"config.data.name={name}: {builder.data_dir} is not in the array_record format; "
            "prepare it in another config.data.data_dir with file_format=array_record"
        ) from error
    except Exception as error:  # an unknown split, a bad slice, an empty one: many types
        raise UserError(
            f"config.data.{field}={split}: no such split of {name}; it has "
            f"{', '.join(builder.info.splits)} (and slices such as train[:90%])"
        ) from error
