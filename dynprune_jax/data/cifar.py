"""CIFAR-10 and CIFAR-100 as TFDS builders, from the official binary archive."""

import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dynprune_jax.data.images import encode_png
from dynprune_jax.data.records import RecordBuilder
from dynprune_jax.errors import UserError

CONNECT_SECONDS = 10.0
_PIXEL_BYTES = 32 * 32 * 3


class _Cifar(RecordBuilder, skip_registration=True):
    """What CIFAR-10 and CIFAR-100 share.

    Name, version and features are those of the official TFDS builders, so data prepared by
    either are read by the other.

    Args:
      archive: the `*-binary.tar.gz` file; empty to download it.
      sha256: the digest that the archive must have; empty for the official one.
      url: where to download from; empty for the official place.
      **kwargs: of a TFDS builder.
    """

    VERSION = tfds.core.Version("3.0.2")
    URL: ClassVar[str]
    SHA256: ClassVar[str]
    FOLDER: ClassVar[str]
    TRAIN_FILES: ClassVar[tuple[str, ...]]
    TEST_FILE: ClassVar[str]
    # Feature → (number of classes, file of class names), in the order of the bytes of a record.
    LABELS: ClassVar[tuple[tuple[str, int, str], ...]]

    def __init__(self, *, archive: str = "", sha256: str = "", url: str = "", **kwargs: Any):
        self._archive = os.path.expanduser(archive)
        self._sha256 = sha256 or self.SHA256
        self._url = url or self.URL
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {
            key: tfds.features.ClassLabel(num_classes=count) for key, count, _ in self.LABELS
        }
        features["id"] = tfds.features.Text()
        features["image"] = tfds.features.Image(shape=(32, 32, 3))
        return tfds.core.DatasetInfo(
            builder=self,
            description="60,000 colour images of 32x32 pixels, 50,000 of them to train.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        if self._archive:
            archive = Path(self._archive)
            _check_digest(archive, self._sha256, self._archive)
        else:
            archive = self._downloaded()
        files = _read_members(
            archive,
            [
                f"{self.FOLDER}/{name}"
                for name in (*self.TRAIN_FILES, self.TEST_FILE, *(x[2] for x in self.LABELS))
            ],
        )
        features: Any = self.info.features
        for key, _, names_file in self.LABELS:
            features[key].names = files[f"{self.FOLDER}/{names_file}"].decode().split()
        train = b"".join(files[f"{self.FOLDER}/{name}"] for name in self.TRAIN_FILES)
        return {
            "train": self._generate_examples("train", train),
            "test": self._generate_examples("test", files[f"{self.FOLDER}/{self.TEST_FILE}"]),
        }

    def _generate_examples(self, split: str, data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
        labels_count = len(self.LABELS)
        records = np.frombuffer(data, np.uint8).reshape(-1, labels_count + _PIXEL_BYTES)
        for key, record in enumerate(records):
            pixels = record[labels_count:].reshape(3, 32, 32).transpose(1, 2, 0)
            example: dict[str, Any] = {
                name: int(record[i]) for i, (name, _, _) in enumerate(self.LABELS)
            }
            example["id"] = f"{split}_{key:05d}"
            example["image"] = encode_png(Image.fromarray(pixels))
            yield key, example

    def _downloaded(self) -> Path:
        """Returns the verified archive in `downloads/`, fetching it if it is not there."""
        target = Path(self.data_dir_root) / "downloads" / self._url.rsplit("/", 1)[-1]
        if target.is_file() and _digest(target) == self._sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        print(f"Downloading {self._url} (about 160 MiB).", flush=True)
        try:
            # One try with a short wait: TFDS's own downloader is silent for minutes offline.
            with (
                urllib.request.urlopen(self._url, timeout=CONNECT_SECONDS) as response,
                part.open("wb") as file,
            ):
                while block := response.read(1 << 20):
                    file.write(block)
            _check_digest(part, self._sha256, self._url)
            part.replace(target)
        except OSError as error:  # URLError, time-outs and broken connections among them
            raise UserError(
                f"config.data.name={self.name}: cannot download {self._url} ({error}); give "
                f"config.data.archive=FILE ({target.name}), or set TFDS_DATA_DIR to prepared "
                "data, or use config.data.name=class_folders with config.data.path=DIR, or the "
                "offline default config.data.name=digits"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return target


class Cifar10(_Cifar, skip_registration=True):
    """CIFAR-10: 10 classes."""

    # Address and digest as in TFDS's url_checksums.
    URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    FOLDER = "cifar-10-batches-bin"
    TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    TEST_FILE = "test_batch.bin"
    LABELS = (("label", 10, "batches.meta.txt"),)


class Cifar100(_Cifar, skip_registration=True):
    """CIFAR-100: `label` is one of 100 fine classes."""

    URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    SHA256 = "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
    FOLDER = "cifar-100-binary"
    TRAIN_FILES = ("train.bin",)
    TEST_FILE = "test.bin"
    LABELS = (
        ("coarse_label", 20, "coarse_label_names.txt"),
        ("label", 100, "fine_label_names.txt"),
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_digest(file: Path, sha256: str, source: str) -> None:
    """Raises UserError unless the file has this digest; `source` is what the user knows it by."""
    found = _digest(file)
    if found != sha256:
        raise UserError(
            f"{source} is not the official binary archive: its sha256 is {found}, not {sha256}; "
            "download it again"
        )


def _read_members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Reads members of a tar.gz by exact name, to memory: no path of it touches the disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|gz") as stream:
            for member in stream:
                if member.isfile() and member.name in names:
                    content = stream.extractfile(member)
                    assert content is not None  # true of every regular file
                    found[member.name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} is not a readable tar.gz archive: {error}") from error
    for name in names:
        if name not in found:
            raise UserError(f"{archive} has no member {name}; use the binary version's archive")
    return found
