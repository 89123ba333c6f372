"""The base of the package's own TFDS builders: prepared quietly, at once, without TensorFlow."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.splits import SplitDict

from dynprune_jax.errors import UserError

SHARD_BYTES = 256 * 2**20


def data_root(data_dir: str) -> str:
    """Returns the folder of prepared data: `data_dir`, or `TFDS_DATA_DIR`, or TFDS's default."""
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return os.path.expanduser(chosen)


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder that streams its examples into array_record shards.

    TFDS's own writer holds up to 1 GB of a split in memory to shuffle it, and past that needs
    TensorFlow. Here examples go to disk in the order in which they come; training shuffles by
    index. Builders are not registered with TFDS, so they may bear an official name.
    """

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        del download_config
        # TFDS has pointed `data_path` at a temporary folder, which it renames when this returns.
        features: Any = self.info.features
        splits = []
        for name, examples in self._split_generators(dl_manager).items():
            template = self._get_filename_template(split_name=name)
            records = (features.serialize_example(example) for _, example in examples)
            lengths, size = _write_shards(Path(self.data_path), template, records)
            splits.append(
                tfds.core.SplitInfo(
                    name=name, shard_lengths=lengths, num_bytes=size, filename_template=template
                )
            )
        self.info.set_splits(SplitDict(splits))

    # TFDS prints a banner before and after; `prepare` prints one line instead.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def _write_shards(folder: Path, template: Any, records: Iterable[bytes]) -> tuple[list[int], int]:
    """Writes records into shards of about `SHARD_BYTES`; returns their lengths and all bytes."""
    lengths: list[int] = []
    total = room = 0
    writer = None
    for record in records:
        if writer is None or room <= 0:
            if writer is not None:
                writer.close()
            writer = ArrayRecordWriter(str(folder / f"shard-{len(lengths)}"), "group_size:1")
            lengths.append(0)
            room = SHARD_BYTES
        writer.write(record)
        lengths[-1] += 1
        total += len(record)
        room -= len(record)
    if writer is not None:
        writer.close()
    # A shard's final name says how many there are, which is known only now.
    for index in range(len(lengths)):
        name = template.sharded_filepath(shard_index=index, num_shards=len(lengths))
        (folder / f"shard-{index}").rename(name)
    return lengths, total


def prepare(make_builder: Callable[[], RecordBuilder]) -> RecordBuilder:
    """Returns the builder `make_builder()` with its data on disk, preparing them on first use.

    The data appear by one rename of a finished folder, so an interruption leaves nothing that a
    later run would take for good. Of several processes that prepare at once, one wins and the
    others read what it wrote.

    Raises:
      UserError: the data folder cannot be written, or holds something else at that place;
        and whatever the builder finds wrong with its source.
    """
    builder = make_builder()
    if builder.data_path.exists():
        if builder.is_prepared():
            return builder
        raise UserError(
            f"{builder.data_path} is not a complete prepared data set; "
            "delete this folder and run again"
        )
    print(f"Preparing {builder.name} in {builder.data_path} (only once).", flush=True)
    try:
        builder.download_and_prepare(file_format="array_record")
    except UserError:
        _remove_empty_folders(builder)
        raise
    except OSError as error:
        if builder.data_path.exists():  # another process was quicker
            return prepare(make_builder)
        raise UserError(
            f"config.data.data_dir: cannot write {builder.data_dir}: {error.strerror or error}"
        ) from error
    return builder


def _remove_empty_folders(builder: RecordBuilder) -> None:
    """Takes away the folders that TFDS made for data that could not be prepared."""
    root = Path(builder.data_path).parent
    downloads = Path(builder._data_dir_root, "downloads")
    for folder in (root, root.parent, downloads / "extracted", downloads):
        with contextlib.suppress(OSError):  # it holds something else, or is not there
            folder.rmdir()


def encoded_records(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """Opens a TFDS data source of a split, in which `image` stays the bytes of its file."""
    # TFDS's decorators hide the signature of this method from type checkers.
    open_source: Any = builder.as_data_source
    return open_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def fetch(records: Any, keys: Sequence[int], split: str) -> Sequence[Mapping[str, Any]]:
    """Reads records of a TFDS data source.

    Raises:
      UserError: the prepared data are damaged; the message names the split.
    """
    try:
        return records.__getitems__(list(keys))
    except Exception as error:  # array_record and protobuf have their own types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"split {split!r}: the prepared data cannot be read ({reason}); delete "
            "their folder and prepare them again"
        ) from error


def chunks(count: int, size: int) -> Iterator[range]:
    """Yields `range(count)` in consecutive pieces of `size`, the last one shorter."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
