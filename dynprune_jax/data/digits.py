"""scikit-learn's handwritten digits as a TFDS builder: bundled, offline, the default data set."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dynprune_jax.data.images import encode_png
from dynprune_jax.data.records import RecordBuilder


class Digits(RecordBuilder, skip_registration=True):
    """1797 greyscale digits of 8x8 pixels, 1347 to train and 450 to test, split per class."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's digits with a fixed, stratified split.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # Imported here because it takes a second and only the first run needs it.
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        # Shuffled, then sorted by class: every fourth example is a stratified quarter.
        shuffled = np.random.default_rng(0).permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
        test = by_class[::4]
        train = np.setdiff1d(by_class, test)
        return {
            "train": self._generate_examples(images[train], labels[train]),
            "test": self._generate_examples(images[np.sort(test)], labels[np.sort(test)]),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield key, {"image": encode_png(Image.fromarray(image)), "label": int(label)}
