"""Data sets: what comes out, and what is said when they cannot be had."""

import hashlib
import io
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from dynprune_jax.data.cifar import Cifar10, Cifar100
from dynprune_jax.data.class_folders import ClassFolders
from dynprune_jax.data.imagenet100 import class_wnids
from dynprune_jax.data.images import decode_square, encode_png, open_image
from dynprune_jax.data.records import RecordBuilder, encoded_records, prepare
from dynprune_jax.data.sources import load_dataset
from dynprune_jax.errors import UserError

RNG = np.random.default_rng(0)


def random_image(height=6, width=6, channels=3):
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """Two classes, in train two images each and in test one."""
    root = tmp_path / "pets"
    pixels = {}
    for place in ("train/cat/1", "train/cat/2", "train/dog/1", "train/dog/2"):
        pixels[place] = random_image()
    for place in ("test/cat/3", "test/dog/3"):
        pixels[place] = random_image()
    for place, image in pixels.items():
        save(root / f"{place}.png", image)
    return root, pixels


def open_folders(root, tmp_path, **options):
    options = {"image_size": 6, **options}
    return load_dataset(
        "class_folders", path=str(root), data_dir=str(tmp_path / "prepared"), **options
    )


def assert_nothing_half_written(data_dir):
    left = [p for p in Path(data_dir).rglob("*") if p.is_file()]
    assert left == []


# ---------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("digits"))
    load_dataset("digits", image_size=8, data_dir=folder)
    return folder


def test_digits_are_scikit_learns_split_per_class(digits_dir):
    digits = load_dataset("digits", image_size=8, data_dir=digits_dir)
    train, train_labels = digits.train.read_all()
    test, test_labels = digits.test.read_all()
    assert (len(train), len(test)) == (1347, 450)
    assert (digits.channels, digits.num_classes) == (1, 10)
    assert train.shape == (1347, 8, 8, 1)
    per_class = np.bincount(test_labels)
    assert per_class.min() >= 44
    assert per_class.max() <= 46

    pixels, labels = load_digits(return_X_y=True)
    expected = np.rint(pixels * 255 / 16).astype(np.uint8)
    found = np.concatenate([train, test]).reshape(-1, 64)
    found_labels = np.concatenate([train_labels, test_labels])

    def in_order(rows, labels):
        return np.array(sorted(np.column_stack([rows, labels]).tolist()))

    np.testing.assert_array_equal(
        in_order(found, found_labels), in_order(expected, labels.astype(int))
    )


def test_items_and_read_all_agree_and_report_progress(digits_dir):
    split = load_dataset("digits", image_size=12, data_dir=digits_dir).train
    seen = []
    images, labels = split.read_all(progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1024, 1347), (1347, 1347)]
    some = [0, 1346, 700]
    for found, expected in zip(split.read(some), (images[some], labels[some]), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    with pytest.raises(IndexError):
        split.read([1347])


def test_subset_is_fixed_and_mixed(digits_dir):
    def labels(**options):
        data = load_dataset("digits", image_size=8, data_dir=digits_dir, **options)
        return data.train.read_all()[1], data.test.read_all()[1]

    train, test = labels(train_examples=100, test_examples=30)
    again, _ = labels(train_examples=100)
    assert (len(train), len(test)) == (100, 30)
    np.testing.assert_array_equal(train, again)
    assert set(train) == set(range(10))


def test_held_out_examples_are_of_the_training_split_and_not_trained_on(digits_dir):
    def images(split):
        return {image.tobytes() for image in split.read_all()[0]}

    options = {"image_size": 8, "data_dir": digits_dir}
    everything = load_dataset("digits", **options)
    data = load_dataset("digits", held_out=300, **options)
    again = load_dataset("digits", held_out=300, **options)
    assert (len(data.train), len(data.test)) == (1047, 300)
    np.testing.assert_array_equal(data.test.read_all()[0], again.test.read_all()[0])
    assert set(data.test.read_all()[1]) == set(range(10))
    assert images(data.train) | images(data.test) == images(everything.train)
    assert not images(data.test) & images(data.train)
    assert not images(data.test) & images(everything.test)


@pytest.mark.parametrize(
    ("train", "test", "sizes"),
    [
        ("train[:60%]", "train[60%:]", (808, 539)),
        ("test", "train", (450, 1347)),
        ("train[9:]", "train[:9]", (1338, 9)),
    ],
)
def test_splits_that_share_nothing_may_be_of_the_same_images(digits_dir, train, test, sizes):
    data = load_dataset(
        "digits", image_size=8, data_dir=digits_dir, train_split=train, test_split=test
    )
    assert (len(data.train), len(data.test)) == sizes


def test_stored_size_is_the_side(digits_dir):
    data = load_dataset("digits", image_size=8, stored_size=10, data_dir=digits_dir)
    assert data.train.read([0])[0][0].shape == (10, 10, 1)


def test_data_dir_defaults_to_the_environment(digits_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", digits_dir)
    assert len(load_dataset("digits", image_size=8).test) == 450


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"train_examples": 1348}, "config.data.train_examples=1348: the split holds 1347"),
        ({"test_examples": -1}, "config.data.test_examples=-1"),
        ({"held_out": 1347}, "config.data.held_out=1347: the training split holds 1347 examples"),
        ({"train_split": "trian"}, "config.data.train_split=trian: no such split of digits"),
        ({"test_split": "test[:0]"}, "config.data.test_split=test[:0]"),
        (
            {"train_split": "train[:60%]", "test_split": "train[800:900]+train[1000:]+test"},
            "config.data.test_split=train[800:900]+train[1000:]+test: 8 of its examples are in"
            " config.data.train_split=train[:60%]",
        ),
    ],
)
def test_mistakes_in_the_settings(digits_dir, options, phrase):
    with pytest.raises(UserError) as error:
        load_dataset("digits", **{"image_size": 8, "data_dir": digits_dir, **options})
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- decoding


def test_the_central_square_is_cut_out():
    pixels = random_image(height=4, width=7)
    data = encode_png(Image.fromarray(pixels))
    np.testing.assert_array_equal(decode_square(data, 4, 3), pixels[:, 1:5])


def test_shrinking_averages_and_stretching_interpolates():
    steps = np.repeat(np.array([0, 200], np.uint8), 8)
    pixels = np.tile(steps, (16, 1))
    small = decode_square(encode_png(Image.fromarray(pixels)), 2, 1)
    # The filter of the left pixel reaches a little into the right half, and the reverse.
    assert small.shape == (2, 2, 1)
    assert 0 < small[0, 0, 0] < 50 < 150 < small[0, 1, 0] < 200
    large = decode_square(encode_png(Image.fromarray(pixels[:2, 7:9])), 4, 1)
    np.testing.assert_array_equal(large[0, :, 0], [0, 50, 150, 200])


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size():
    stripes = 128 + 100 * np.sin(np.arange(320) / 5) * np.ones((240, 1))
    image = Image.fromarray(stripes.astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    assert open_image(buffer.getvalue(), draft_side=60).size == (80, 60)
    found = decode_square(buffer.getvalue(), 60, 1)
    expected = decode_square(encode_png(image), 60, 1)
    assert expected.std() > 40
    np.testing.assert_allclose(found.astype(int), expected, atol=25)


def test_greyscale_of_16_bits_is_scaled_not_clipped():
    pixels = np.array([[0, 256], [32768, 65535]], np.uint16)
    found = decode_square(encode_png(Image.fromarray(pixels)), 2, 3)
    np.testing.assert_array_equal(found[..., 0], [[0, 1], [128, 255]])
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


# ---------------------------------------------------------------- class folders


def test_class_folders_give_back_every_pixel(folders, tmp_path):
    root, pixels = folders
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".hidden.png").write_text("no image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "dog" / "loop").symlink_to(root / "train")
    data = open_folders(root, tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.channels == 3
    images, labels = data.train.read_all()
    np.testing.assert_array_equal(labels, [0, 0, 1, 1])
    expected = [pixels[f"train/{name}"] for name in ("cat/1", "cat/2", "dog/1", "dog/2")]
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(data.test.read([1])[0][0], pixels["test/dog/3"])


def test_val_may_stand_for_test(folders, tmp_path):
    root, pixels = folders
    (root / "test").rename(root / "val")
    data = open_folders(root, tmp_path)
    np.testing.assert_array_equal(data.test.read([0])[0][0], pixels["test/cat/3"])


def test_every_kind_of_image_becomes_rgb(folders, tmp_path):
    root, _ = folders
    grey = random_image()[..., 0]
    colour = random_image()
    flat = np.full((6, 6, 3), (10, 200, 60), np.uint8)
    cats = root / "train" / "cat"
    save(cats / "a_grey.PNG", grey)
    save(cats / "b_alpha.png", np.dstack([colour, grey]))
    save(cats / "c_lossless.webp", colour, lossless=True)
    save(cats / "d_bitmap.BMP", colour)
    palette = Image.fromarray(flat).quantize(4)
    palette.save(cats / "e_palette.png", transparency=b"\x00\x80")
    Image.fromarray(flat).convert("CMYK").save(cats / "f_cmyk.jpeg", quality=100)
    save(cats / "g_grey.jpg", np.full((6, 6), 77, np.uint8), quality=100)
    images, _ = open_folders(root, tmp_path).train.read_all()
    found = images[2:9]  # after 1.png and 2.png
    np.testing.assert_array_equal(found[0], np.dstack([grey] * 3))
    for image in found[1:4]:
        np.testing.assert_array_equal(image, colour)
    np.testing.assert_array_equal(found[4], flat)
    np.testing.assert_allclose(found[5].astype(int), flat, atol=4)
    np.testing.assert_allclose(found[6].astype(int), 77, atol=1)


def test_rgb_files_are_stored_as_they_are(folders, tmp_path):
    root, _ = folders
    jpeg = root / "test" / "cat" / "3.jpg"
    save(jpeg, random_image(), quality=60)
    save(root / "test" / "cat" / "4.jpg", random_image()[..., 0])
    builder = prepare(lambda: ClassFolders(path=str(root), data_dir=tmp_path / "prepared"))
    records = encoded_records(builder, "test")
    assert records[0]["image"] == jpeg.read_bytes()
    assert records[0]["file_name"] == b"test/cat/3.jpg"
    grey = Image.open(io.BytesIO(records[2]["image"]))
    assert (grey.format, grey.mode) == ("PNG", "RGB")


def test_a_changed_folder_is_prepared_anew_and_an_unchanged_one_is_not(folders, tmp_path):
    root, _ = folders
    prepared = tmp_path / "prepared" / "class_folders"
    open_folders(root, tmp_path)
    (first,) = prepared.iterdir()
    written = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    open_folders(root, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == written
    changed = random_image()
    save(root / "test" / "cat" / "3.png", changed)
    os.utime(root / "test" / "cat" / "3.png", ns=(1, 1))
    data = open_folders(root, tmp_path)
    np.testing.assert_array_equal(data.test.read([0])[0][0], changed)
    assert len(list(prepared.iterdir())) == 2
    assert first in list(prepared.iterdir())


def test_a_folder_is_not_taken_for_another_that_looks_alike(folders, tmp_path):
    """Of the same names, sizes and times, as an archive that tells no times leaves them."""
    root, _ = folders
    other = tmp_path / "elsewhere" / root.name
    shutil.copytree(root, other)
    changed = np.arange(108, dtype=np.uint8).reshape(6, 6, 3)
    for place, pixels in ((root, changed), (other, changed[::-1])):
        save(place / "test" / "cat" / "3.bmp", pixels)
        for file in place.rglob("*.*"):
            os.utime(file, ns=(1, 1))
    for place, pixels in ((root, changed), (other, changed[::-1])):
        data = open_folders(place, tmp_path)
        np.testing.assert_array_equal(data.test.read([0])[0][0], pixels)


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


MISTAKES = [
    (lambda root: remove(root), "there is no such folder"),
    (lambda root: remove(root / "train"), "has no train folder"),
    (lambda root: remove(root / "test"), "has no test or val folder"),
    (lambda root: (root / "train" / "owl").mkdir(), "class 'owl' holds no image"),
    (lambda root: remove(root / "test" / "dog"), "class 'dog' is only in the train folder"),
    (lambda root: remove(root / "train" / "dog"), "class 'dog' is only in the test folder"),
    (lambda root: [remove(p) for p in (root / "train").iterdir()], "holds no class folder"),
    (lambda root: (root / "train/dog/2.png").write_bytes(b"junk"), "train/dog/2.png: not a rea"),
    (lambda root: truncate(root / "test/cat/3.png"), "test/cat/3.png: not a readable image"),
    (lambda root: (root / "test/cat/x.png").symlink_to("nowhere"), "test/cat/x.png: cannot be"),
    (lambda root: (root / "test/cat/x.png").mkdir(), "test/cat/x.png: not a readable image"),
    (lambda root: os.mkfifo(root / "test/cat/0.png"), "test/cat/0.png: not a readable image: it"),
    (lambda root: (root / "test/c\nt").mkdir(), "a class folder needs a name of characters"),
]


@pytest.mark.parametrize(("spoil", "phrase"), MISTAKES, ids=[phrase for _, phrase in MISTAKES])
def test_mistakes_in_class_folders(folders, tmp_path, spoil, phrase):
    root, _ = folders
    spoil(root)
    with pytest.raises(UserError) as error:
        open_folders(root, tmp_path)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)
    assert_nothing_half_written(tmp_path / "prepared")


@pytest.mark.parametrize("spoiled", [2, 7])
def test_all_unreadable_images_of_a_split_are_told_at_once(folders, tmp_path, spoiled):
    root, _ = folders
    paths = [root / "train" / "cat" / f"{i}.png" for i in range(3, 3 + spoiled)]
    for path in paths:
        save(path, random_image())
        truncate(path)
    with pytest.raises(UserError) as error:
        open_folders(root, tmp_path)
    told = str(error.value)
    assert [f"{path}: not a readable" in told for path in paths] == [i < 5 for i in range(spoiled)]
    assert ("; and 2 more like these;" in told) is (spoiled == 7)
    assert told.endswith("; repair or delete these files")
    assert_nothing_half_written(tmp_path / "prepared")


def test_class_folders_need_a_path(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.path is empty"):
        load_dataset("class_folders", image_size=8, data_dir=str(tmp_path))


# ---------------------------------------------------------------- CIFAR


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10_archive(tmp_path):
    """Six files of two records each; record i of the whole has label i % 10."""
    members = {"../escape.txt": b"never to be written"}
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    images = RNG.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    for i, name in enumerate(names):
        pairs = (bytes([j % 10]) + images[j].tobytes() for j in (2 * i, 2 * i + 1))
        members[f"cifar-10-batches-bin/{name}"] = b"".join(pairs)
    classes = "\n".join(f"class{i}" for i in range(10)) + "\n\n"
    members["cifar-10-batches-bin/batches.meta.txt"] = classes.encode()
    path = tmp_path / "cifar-10-binary.tar.gz"
    return path, write_archive(path, members), images.transpose(0, 2, 3, 1), members


def test_cifar10_from_a_local_archive(cifar10_archive, tmp_path):
    path, sha256, images, _ = cifar10_archive
    data_dir = str(tmp_path / "prepared")
    prepare(lambda: Cifar10(archive=str(path), sha256=sha256, data_dir=data_dir))
    data = load_dataset("cifar10", image_size=32, data_dir=data_dir)
    assert data.class_names == tuple(f"class{i}" for i in range(10))
    train, train_labels = data.train.read_all()
    np.testing.assert_array_equal(train, images[:10])
    np.testing.assert_array_equal(train_labels, np.arange(10))
    np.testing.assert_array_equal(data.test.read_all()[0], images[10:])
    assert not list(tmp_path.rglob("escape.txt"))


def test_cifar10_official_name_and_features(cifar10_archive, tmp_path):
    path, sha256, _, _ = cifar10_archive
    builder = prepare(lambda: Cifar10(archive=str(path), sha256=sha256, data_dir=tmp_path))
    assert builder.info.full_name == "cifar10/3.0.2"
    assert encoded_records(builder, "test")[1]["id"] == b"test_00001"


def test_cifar100_labels_are_the_fine_ones(tmp_path):
    image = RNG.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    record = bytes([7, 42]) + image.tobytes()
    path = tmp_path / "cifar-100-binary.tar.gz"
    sha256 = write_archive(
        path,
        {
            "cifar-100-binary/train.bin": record * 2,
            "cifar-100-binary/test.bin": record,
            "cifar-100-binary/coarse_label_names.txt": "\n".join(map(str, range(20))).encode(),
            "cifar-100-binary/fine_label_names.txt": "\n".join(map(str, range(100))).encode(),
        },
    )
    prepare(lambda: Cifar100(archive=str(path), sha256=sha256, data_dir=tmp_path))
    data = load_dataset("cifar100", image_size=32, data_dir=str(tmp_path))
    assert data.num_classes == 100
    assert data.test.read([0])[1][0] == 42
    np.testing.assert_array_equal(data.test.read([0])[0][0], image.transpose(1, 2, 0))


def test_cifar_downloads_once_and_checks_the_digest(cifar10_archive, tmp_path):
    path, sha256, images, _ = cifar10_archive
    data_dir = tmp_path / "prepared"
    url = path.as_uri()
    with pytest.raises(UserError, match="not the official binary archive"):
        prepare(lambda: Cifar10(url=url, sha256="0" * 64, data_dir=data_dir))
    assert_nothing_half_written(data_dir)
    prepare(lambda: Cifar10(url=url, sha256=sha256, data_dir=data_dir))
    kept = data_dir / "downloads" / path.name
    assert kept.read_bytes() == path.read_bytes()
    data = load_dataset("cifar10", image_size=32, data_dir=str(data_dir))
    np.testing.assert_array_equal(data.train.read_all()[0], images[:10])


def test_cifar_offline_says_at_once_what_to_do(tmp_path):
    start = time.monotonic()
    with pytest.raises(UserError) as error:  # nothing listens on port 9
        prepare(lambda: Cifar10(url="http://127.0.0.1:9/cifar.tar.gz", data_dir=tmp_path))
    assert time.monotonic() - start < 5
    for phrase in ("config.data.archive=FILE", "TFDS_DATA_DIR", "class_folders", "digits"):
        assert phrase in str(error.value)
    assert "\n" not in str(error.value)
    assert_nothing_half_written(tmp_path)


def test_mistakes_in_a_cifar_archive(cifar10_archive, tmp_path):
    path, _, _, members = cifar10_archive
    data_dir = tmp_path / "prepared"

    def load(archive):
        return load_dataset("cifar10", image_size=32, archive=str(archive), data_dir=str(data_dir))

    with pytest.raises(UserError, match=r"config\.data\.archive=.*there is no such file"):
        load(tmp_path / "missing.tar.gz")
    with pytest.raises(UserError, match="not the official binary archive"):
        load(path)

    def prepare_from(archive, sha256):
        return prepare(lambda: Cifar10(archive=str(archive), sha256=sha256, data_dir=data_dir))

    del members["cifar-10-batches-bin/test_batch.bin"]
    lacking = tmp_path / "lacking.tar.gz"
    with pytest.raises(UserError, match=r"no member cifar-10-batches-bin/test_batch\.bin"):
        prepare_from(lacking, write_archive(lacking, members))
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match=r"not a readable tar\.gz"):
        prepare_from(broken, hashlib.sha256(broken.read_bytes()).hexdigest())
    assert_nothing_half_written(data_dir)


# ---------------------------------------------------------------- prepared sets, ImageNet-100


class Tiny(RecordBuilder, skip_registration=True):
    """Stands for a prepared ImageNet: `examples[split]` is a list of (label, image bytes)."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")

    def __init__(self, *, names, examples, **kwargs):
        self.names = names
        self.examples = examples
        super().__init__(**kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(names=self.names),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(items) for name, items in self.examples.items()}

    def _generate_examples(self, items):
        for key, (label, image) in enumerate(items):
            yield key, {"image": image, "label": label, "file_name": f"{key}.JPEG"}


def png_of_value(value):
    return encode_png(Image.new("RGB", (4, 5), (value, 0, 0)))


def prepare_tiny(data_dir, train, names=("a", "b")):
    examples = {
        "train": train,
        "validation": [(1, png_of_value(1))],
        "test": [(-1, png_of_value(0))],
    }
    return prepare(lambda: Tiny(names=list(names), examples=examples, data_dir=data_dir))


def test_imagenet100_picks_its_classes_in_sorted_order(tmp_path):
    wnids = class_wnids()
    assert len(set(wnids)) == 100
    assert wnids == tuple(sorted(wnids))
    # Two foreign classes come before and between those of the list.
    names = ("n00000000", wnids[0], "n01600000", *wnids[1:])
    assert names == tuple(sorted(names))
    train = [(label, png_of_value(label)) for label in (101, 0, 1, 2, 3, 1)]
    prepare_tiny(tmp_path, train, names=names)

    def load():
        return load_dataset(
            "imagenet100", image_size=4, data_dir=str(tmp_path), test_split="validation"
        )

    data = load()
    assert data.class_names == wnids
    images, labels = data.train.read_all()
    np.testing.assert_array_equal(labels, [99, 0, 1, 0])
    np.testing.assert_array_equal(images[:, 0, 0, 0], [101, 1, 3, 1])

    # The second time the labels come from the file beside the data.
    (cache,) = tmp_path.rglob("labels-train.npy")
    np.save(cache, np.array([0, 0, 0, 0, 3, 0], np.int32))
    np.testing.assert_array_equal(load().train.read_all()[1], [1])
    np.save(cache, np.array([0, 0], np.int32))  # of another length: not trusted
    np.testing.assert_array_equal(load().train.read_all()[1], [99, 0, 1, 0])
    with pytest.raises(UserError, match=r"config\.data\.test_split=test: this split .* no exam"):
        load_dataset("imagenet100", image_size=4, data_dir=str(tmp_path))


def test_imagenet100_needs_wnids(tmp_path):
    prepare_tiny(tmp_path, [(0, png_of_value(0))])
    with pytest.raises(UserError, match="lacks 100 of the 100 classes, n01558993 first"):
        load_dataset("imagenet100", image_size=4, data_dir=str(tmp_path), test_split="validation")


def test_any_prepared_set_opens_by_name(tmp_path):
    prepare_tiny(tmp_path, [(1, png_of_value(9)), (0, png_of_value(8))])
    for name in ("imagenet2012", "imagenet2012:5.1.0"):
        data = load_dataset(
            name, image_size=4, data_dir=str(tmp_path), test_split="validation", train_examples=2
        )
        assert data.class_names == ("a", "b")
        assert sorted(data.train.read_all()[0][:, 0, 0, 0]) == [8, 9]


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet100", "cifar10:3.0.2", "no_such", "a b"])
def test_a_set_that_is_not_prepared_says_what_to_do(tmp_path, name):
    with pytest.raises(UserError) as error:
        load_dataset(name, image_size=4, data_dir=str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"config.data.name={name}: ")
    for phrase in ("config.data.data_dir", "TFDS_DATA_DIR", "tfds build", "class_folders"):
        assert phrase in message
    assert "\n" not in message


def test_a_set_in_another_format_is_refused(tmp_path):
    builder = prepare_tiny(tmp_path, [(0, png_of_value(0))])
    info = Path(builder.data_dir) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="not in the array_record format"):
        load_dataset("imagenet2012", image_size=4, data_dir=str(tmp_path))


def test_a_set_without_image_and_label_is_refused(tmp_path):
    class Sounds(Tiny, skip_registration=True):
        name = "sounds"

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _generate_examples(self, items):
            yield 0, {"text": "la"}

    prepare(lambda: Sounds(names=[], examples={"train": []}, data_dir=tmp_path))
    with pytest.raises(UserError, match=r"features image .* it has text"):
        load_dataset("sounds:5.1.0", image_size=4, data_dir=str(tmp_path))


def test_undecodable_and_unlabelled_examples_are_named(tmp_path):
    cut_off = encode_png(Image.fromarray(random_image(40, 40)))[:-1000]
    prepare_tiny(tmp_path, [(0, png_of_value(0)), (1, b"junk"), (0, cut_off)])
    data = load_dataset("imagenet2012", image_size=4, data_dir=str(tmp_path))
    assert data.train.read([0])[1][0] == 0
    with pytest.raises(UserError, match=r"split 'train', index 1 \(1\.JPEG\): .*unknown image"):
        data.train.read_all()
    with pytest.raises(UserError, match=r"split 'train', index 2 \(2\.JPEG\): .*truncated"):
        data.train.read([2])
    with pytest.raises(UserError, match=r"split 'test', index 0 .* has no label"):
        data.test.read([0])


def test_damaged_records_are_reported(tmp_path):
    prepare_tiny(tmp_path, [(0, png_of_value(0))])
    (shard,) = tmp_path.rglob("*train.array_record*")
    shard.unlink()
    data = load_dataset(
        "imagenet2012", image_size=4, data_dir=str(tmp_path), test_split="validation"
    )
    with pytest.raises(UserError, match="the prepared data cannot be read"):
        data.train.read([0])


# ---------------------------------------------------------------- preparing


def test_large_splits_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("dynprune_jax.data.records.SHARD_BYTES", 250)
    builder = prepare_tiny(tmp_path, [(0, png_of_value(i)) for i in range(9)])
    assert builder.info.splits["train"].num_shards > 1
    data = load_dataset("imagenet2012", image_size=4, data_dir=str(tmp_path))
    np.testing.assert_array_equal(data.train.read_all()[0][:, 0, 0, 0], range(9))


def test_an_interrupted_preparation_leaves_nothing(tmp_path):
    class Interrupted(Tiny, skip_registration=True):
        name = "imagenet2012"

        def _generate_examples(self, items):
            yield from list(super()._generate_examples(items))[:1]
            raise KeyboardInterrupt

    items = {"train": [(0, png_of_value(0))] * 3}
    with pytest.raises(KeyboardInterrupt):
        prepare(lambda: Interrupted(names=["a"], examples=items, data_dir=tmp_path))
    assert_nothing_half_written(tmp_path)
    builder = prepare_tiny(tmp_path, items["train"])
    assert builder.info.splits["train"].num_examples == 3


def test_of_two_that_prepare_at_once_both_read_the_same(tmp_path):
    class Slow(Tiny, skip_registration=True):
        name = "imagenet2012"

        def _split_generators(self, dl_manager):
            # Another process finishes while this one is at work.
            prepare_tiny(tmp_path, [(1, png_of_value(5))])
            return super()._split_generators(dl_manager)

    items = {"train": [(0, png_of_value(0))] * 3}
    builder = prepare(lambda: Slow(names=["a", "b"], examples=items, data_dir=tmp_path))
    assert builder.info.splits["train"].num_examples == 1
    assert not list(tmp_path.rglob("*incomplete*"))


def test_a_foreign_folder_in_the_place_is_not_taken_for_data(tmp_path):
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    (tmp_path / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001").touch()
    with pytest.raises(UserError, match="not a complete prepared data set; delete this folder"):
        load_dataset("digits", image_size=8, data_dir=str(tmp_path))


def test_a_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"config\.data\.data_dir: cannot write"):
        load_dataset("digits", image_size=8, data_dir=str(tmp_path / "file"))
