"""A folder of images, `DIR/train|test/<class>/<image>`, as a TFDS builder."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from stat import S_ISREG
from typing import Any

import tensorflow_datasets as tfds

from dynprune_jax.data.images import (
    UndecodableImageError,
    encode_png,
    open_image,
    with_channels,
)
from dynprune_jax.data.records import RecordBuilder, chunks
from dynprune_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Split → the names its folder may have, the first one present wins.
SPLIT_FOLDERS = (("train", ("train",)), ("test", ("test", "val")))
THREADS = 4
_MOST_FAULTS = 5  # that are told of unreadable images; of more their number


@dataclass(frozen=True)
class Listing:
    """What a folder of class folders holds.

    Attributes:
      root: the folder.
      class_names: sorted; the position of a name is its label.
      files: per split, (path relative to the root, label) of every image, in sorted order.
      digest: changes with any file's name, size or time of change.
    """

    root: str
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    digest: str


def list_class_folders(path: str) -> Listing:
    """Lists the images of `path/train/<class>/` and `path/test/<class>/` (or `val`).

    Hidden files and folders, and files that are not named as images, are left out.

    Raises:
      UserError: a folder is missing, a class is empty, there is one alone, or the splits'
        classes differ.
    """
    root = os.path.expanduser(path)
    if not path:
        raise UserError(
            "config.data.path is empty; class_folders needs config.data.path=DIR with "
            "DIR/train|test/<class>/<image>"
        )
    if not os.path.isdir(root):
        raise UserError(f"config.data.path={path}: there is no such folder")
    found = {split: _list_split(root, split, folders) for split, folders in SPLIT_FOLDERS}
    train, test = found["train"], found["test"]
    for name in sorted(train.keys() ^ test.keys()):
        only = "train" if name in train else "test"
        raise UserError(
            f"config.data.path={path}: class {name!r} is only in the {only} folder; "
            "both must have the same classes"
        )
    if len(train) < 2:
        raise UserError(f"config.data.path={path}: it has one class, {min(train)!r}; give two")
    names = tuple(sorted(train))
    digest = hashlib.sha256()
    files: dict[str, list[tuple[str, int]]] = {}
    for split, classes in found.items():
        files[split] = []
        for label, name in enumerate(names):
            images = sorted(classes[name])
            # Archives may tell no times, and images without compression are of one size.
            first = os.path.join(root, images[0][0])
            with _reading(first), open(first, "rb") as file:
                digest.update(file.read())
            for relative, size, changed in images:
                digest.update(os.fsencode(f"{relative}\0{size}\0{changed}\0"))
                files[split].append((relative, label))
    return Listing(root, names, files, digest.hexdigest())


def _list_split(
    root: str, split: str, folders: tuple[str, ...]
) -> dict[str, list[tuple[str, int, int]]]:
    """Lists (path relative to the root, bytes, time in ns) of each image, per class."""
    present = [name for name in folders if os.path.isdir(os.path.join(root, name))]
    if not present:
        raise UserError(f"config.data.path={root}: it has no {' or '.join(folders)} folder")
    folder = present[0]
    classes: dict[str, list[tuple[str, int, int]]] = {}
    for entry in _visible(os.path.join(root, folder)):
        if not entry.is_dir():
            continue
        if not entry.name.isprintable():
            raise UserError(
                f"{entry.path!r}: a class folder needs a name of characters in UTF-8 that can be"
                " printed"
            )
        # Not recursive, so a loop of symbolic links has no end to miss.
        files = _visible(entry.path)
        images = [
            (f"{folder}/{entry.name}/{file.name}", *_size_and_time(file))
            for file in files
            if file.name.lower().endswith(SUFFIXES)
        ]
        if others := len(files) - len(images):
            print(f"{entry.path}: {others} entries are no image files and are left out.")
        if not images:
            raise UserError(
                f"{entry.path}: class {entry.name!r} holds no image ({', '.join(SUFFIXES)})"
            )
        classes[entry.name] = images
    if not classes:
        raise UserError(f"{os.path.join(root, folder)} holds no class folder ({split} split)")
    return classes


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _visible(folder: str) -> list[os.DirEntry[str]]:
    """Lists what is not hidden in a folder."""
    with _reading(folder), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def _size_and_time(file: os.DirEntry[str]) -> tuple[int, int]:
    with _reading(file.path):
        found = file.stat()
    if not S_ISREG(found.st_mode):  # from a pipe nothing may ever come
        raise UserError(f"{file.path}: not a readable image: it is no file")
    return found.st_size, found.st_mtime_ns


class ClassFolders(RecordBuilder, skip_registration=True):
    """Images of any size from class folders, stored as RGB without loss.

    8-bit RGB files in PNG or JPEG are stored byte by byte; everything else (greyscale, palette,
    transparency, CMYK, other formats) becomes an RGB PNG. The name of the configuration holds
    the listing's digest, of every file's name, size and time and of the first image of each
    class: a changed folder is prepared anew, an unchanged one is read again.

    Args:
      path: the folder that holds `train` and `test` (or `val`).
      **kwargs: of a TFDS builder.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, path: str = "", **kwargs: Any):
        self._listing = list_class_folders(path)
        base = os.path.basename(os.path.abspath(self._listing.root))
        name = f"{re.sub('[^A-Za-z0-9_]', '_', base)}-{self._listing.digest[:16]}"
        config = tfds.core.BuilderConfig(name=name, version=self.VERSION)
        super().__init__(config=config, **kwargs)

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        # TFDS's own would look the name up among fixed ones, and warn.
        return builder_config

    def _info(self) -> tfds.core.DatasetInfo:
        names = list(self._listing.class_names)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images from class folders.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=names),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            split: self._generate_examples(files) for split, files in self._listing.files.items()
        }

    def _generate_examples(
        self, files: list[tuple[str, int]]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        root = self._listing.root
        faults: list[str] = []  # all are told at once: to find the next takes as long again
        with ThreadPoolExecutor(THREADS) as pool:
            # In chunks, so that the images that wait to be written stay few.
            for chunk in chunks(len(files), 256):
                paths = [os.path.join(root, files[i][0]) for i in chunk]
                for i, data in zip(chunk, pool.map(_rgb_bytes, paths), strict=True):
                    if isinstance(data, str):
                        faults.append(data)
                        continue
                    relative, label = files[i]
                    # A name that is no UTF-8 must not stop a valid image.
                    name = os.fsencode(relative).decode("utf-8", "replace")
                    yield i, {"image": data, "label": label, "file_name": name}
        if faults:
            more = len(faults) - _MOST_FAULTS
            told = faults[:_MOST_FAULTS] + [f"and {more} more like these"] * (more > 0)
            which = "this file" if len(faults) == 1 else "these files"
            raise UserError(f"{'; '.join(told)}; repair or delete {which}")


def _rgb_bytes(path: str) -> bytes | str:
    """An image file's bytes, as they are if they hold 8-bit RGB in PNG or JPEG; or its fault."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        image = open_image(data)
    except (OSError, UndecodableImageError) as error:
        return f"{path}: not a readable image ({error})"
    if image.format in ("PNG", "JPEG") and image.mode == "RGB":
        return data
    return encode_png(with_channels(image, 3))
