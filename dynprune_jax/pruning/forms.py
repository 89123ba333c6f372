"""The forms a convolution can be executed in, and which are worth measuring for one.

`products.py` executes them. Every one gives the same answers, at its own price.
"""

import dataclasses
from collections.abc import Iterator

import jax
from flax import nnx
from jax import lax

from dynprune_jax.convolution import MOST_GROUPS
from dynprune_jax.geometry import pair, repeats
from dynprune_jax.pruning import native
from dynprune_jax.pruning.dynamic_conv import is_depthwise


@dataclasses.dataclass(frozen=True, order=True)
class Form:
    """One way to execute a convolution. It is data: plans save, print and compare it.

    Attributes:
      product: `conv` (XLA's own convolution), `patches`, `rows`, `taps`, `shifts`, `native`,
        `pairs` or `pallas`.
      channels: whether only the kept channels are multiplied; if not, the others are masked.
      columns: the same of columns; only `taps` and the compiled ones skip them. These leave out
        columns of the output too, where a tile of columns lands on none that is wanted.
      images: how many are computed at a time; 0 for all.
      features: whether only the wanted output channels are computed; if not, all are.
    """

    product: str = "conv"
    channels: bool = False
    columns: bool = False
    images: int = 0
    features: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if type(value := getattr(self, field.name)) is not type(field.default):
                raise TypeError(f"{field.name} of a form is {value!r}")

    @property
    def compiled(self) -> bool:
        """Whether its product is our own compiled code for CPUs."""
        return self.product in ("native", "pairs")

    def __str__(self) -> str:
        gathered = [name for name in ("channels", "columns", "features") if getattr(self, name)]
        parts = [self.product, "+".join(gathered), f"by {self.images}" if self.images else ""]
        return " ".join(filter(None, parts))


def candidates(
    conv: nnx.Conv,
    batch: int,
    *,
    group_size: int,
    columns: bool,
    features: bool = False,
    platform: str,
    wide: bool = False,
) -> Iterator[Form]:
    """The forms worth measuring for a convolution.

    Args:
      conv: the convolution.
      batch: images at a time.
      group_size: of the channels that its gate leaves out; 0 if it leaves none out.
      columns: whether its gate leaves columns out.
      features: whether its gate leaves output channels out.
      platform: `cpu`, `gpu` or `tpu`. On a CPU loops over a few images keep to the cache, but
        where `native` is to be had none was the fastest in any plan that was measured.
      wide: whether it computes in more than float32, which our own kernels do not.
    """
    loops = platform == "cpu" and native.why_not() is not None
    some = [n for n in (1, 2, 4, 16) if loops and n < batch]
    for form in possible(conv, channels=group_size > 0, columns=columns, features=features):
        if form.product == "pallas":
            if platform == "gpu" and group_size % 16 == 0 and not wide:
                yield form
        elif form.compiled:
            if native.why_not() is None and not wide:
                yield form
        elif form.channels and form.features != features:
            continue  # what copies rows of the kernel for each image copies no more than it must
        elif form in (Form(), Form("shifts")) or (form.product == "conv" and batch <= 8):
            yield form
        elif form.product != "conv":
            counts = [n for n in some if n <= 4] if form.channels else some
            yield from (dataclasses.replace(form, images=n) for n in (0, *counts))


def possible(
    conv: nnx.Conv, *, channels: bool, columns: bool, features: bool = False
) -> list[Form]:
    """The forms that can execute a convolution, all images at a time.

    Args:
      conv: the convolution.
      channels: whether its gate leaves channels out.
      columns: whether its gate leaves columns out.
      features: whether its gate leaves output channels out.
    """
    crops = not isinstance(conv.padding, str) and min(jax.tree.leaves(conv.padding)) < 0
    if pair(conv.input_dilation) != (1, 1) or crops:
        return [Form()]
    if is_depthwise(conv):
        return [Form(), Form("shifts")]
    columns = columns and not repeats(conv)
    # Kept channels are each image's own: of small maps that keep most, all at once is faster.
    compiled = dict.fromkeys((Form("native"), Form("native", channels=channels, columns=columns)))
    if conv.feature_group_count > 1:
        return [Form(), *compiled] if conv.feature_group_count <= MOST_GROUPS else [Form()]
    products = ["patches"]
    if pair(conv.strides)[0] == 1 and pair(conv.kernel_size)[0] > 1:
        products.append("rows")
    forms = [Form(), *map(Form, products), *compiled]
    if channels:
        forms += [Form(product, channels=True) for product in ("conv", *products)]
        plain = pair(conv.strides) == pair(conv.kernel_dilation) == (1, 1)
        if plain and conv.precision in (None, lax.Precision.DEFAULT):
            forms.append(Form("pallas", channels=True))
    if columns:
        forms.append(Form("taps", columns=True))
        if channels:
            forms.append(Form("taps", channels=True, columns=True))
    if features:
        able = [form for form in forms if form.product != "pallas"]
        forms += [dataclasses.replace(form, features=True) for form in able]
        if channels and pair(conv.kernel_size) != (1, 1):
            forms.append(Form("pairs", channels=True, columns=columns, features=True))
    return forms
