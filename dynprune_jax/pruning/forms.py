"""The forms a convolution can be executed in: every one gives the same answers, at its own price.

A convolution is a sum over the positions of its kernel (its *taps*). As a matrix product it can
have the taps of its input side by side (`patches`, also known as im2col), the taps of its output
(`taps`: one product for all of them, then shifted adds), or one kernel dimension on each side
(`rows`). What a gate does not keep is set to zero (*masked*), or left out of the product
(*gathered*: the kept rows and channels are collected, and of the kernel the rows of the kept
channels, for each image its own). Outputs that are not wanted are computed all the same, or left
out of the product too: of the kernel only the columns of the wanted ones are collected.

A depthwise convolution is no such product: it is a sum of shifted maps, each times one tap of the
kernel (`shifts`), of which nothing is left out. Any other grouped convolution is a product for each
group.

Three products are not XLA's: `native` and `pairs`, compiled C++ for CPUs, and `pallas`, for GPUs.
They read what is kept of the map and of the kernel in place; `pairs` is `native` with a kernel laid
out for images that want few of the output channels.

With XLA's matrix products, images may be computed a few at a time, in a loop, so that all between
the map and its result stays in the cache. That is worth more than it seems: laid out for a whole
batch, the patches of a large map take longer to write than to multiply.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from dynprune_jax.convolution import MOST_GROUPS, sum_of_shifted_maps
from dynprune_jax.geometry import Geometry, pair, repeats
from dynprune_jax.pruning import native
from dynprune_jax.pruning.dynamic_conv import is_depthwise
from dynprune_jax.pruning.masks import Masks, kept_indices
from dynprune_jax.pruning.native import kept_conv, kernel_pairs, kernel_panels


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


def layout(
    form: Form, kernel: Float[Array, "kh kw channels features"], groups: int = 1
) -> Float[Array, "..."]:
    """Lays a kernel out as the form multiplies it: once, when a network is made compact.

    Args:
      form: how.
      kernel: of the convolution.
      groups: of its channels.

    Returns:
      For `conv`, `shifts` and `pallas` the kernel itself, for `native` panels of 32 features, of
      several groups those of each, for `pairs` `(features, channels, taps)`. Else `(taps of the
      input, channels, taps of the output * features)`.
    """
    lay = _PRODUCTS[form.product].layout
    if form.product == "native" and groups > 1:
        return jnp.stack([lay(part) for part in jnp.split(kernel, groups, axis=-1)])
    return lay(kernel)


def execute(
    form: Form,
    geometry: Geometry,
    weights: Float[Array, "..."],
    x: Float[Array, "batch height width channels"],
    masks: Masks,
    *,
    features: int,
    kept_channels: int,
    kept_columns: int,
    wanted_features: int,
    group_size: int = 1,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "batch out_height out_width features"]:
    """Convolves what the masks keep of each image.

    Args:
      form: how; `conv` only with something gathered, for without it is the layer's own.
      geometry: of the convolution on maps of this size.
      weights: the kernel, from `layout`.
      x: the maps.
      masks: what each image keeps.
      features: of the kernel.
      kept_channels: how many channels each image keeps.
      kept_columns: how many columns each image keeps.
      wanted_features: how many output channels each image wants.
      group_size: how many neighbouring channels are kept or left out together.
      precision: of the products.

    Returns:
      The map without a bias, in float32 or, if `x` is wider, in its dtype; from `pallas` in the
      dtype of `x`.
    """
    batch = x.shape[0]
    if batch == 0:
        return jnp.zeros((0, *geometry.out, features), jnp.promote_types(jnp.float32, x.dtype))
    product = _PRODUCTS[form.product]
    if product.batch is not None:
        masked = Masks(
            None if form.channels else masks.channels, None if form.columns else masks.columns
        )
        skipped = Masks(
            masks.channels if form.channels else None,
            masks.columns if form.columns else None,
            features=masks.features if form.features else None,
            out_columns=masks.out_columns if form.columns else None,
        )
        sizes = {"features": features, "kept_channels": kept_channels, "group_size": group_size}
        return product.batch(geometry, weights, masked.apply(x), skipped, **sizes)
    image = _of_each_image(form, x, masks, kept_channels, kept_columns, wanted_features)
    multiply = product.image
    assert multiply is not None
    dot = _Dot(precision, jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype)

    def convolve(image: Mapping[str, Any]) -> Array:
        if not form.features:
            return multiply(geometry, weights, dot, **image)
        rest = dict(image)
        wanted, stand = rest.pop("wanted"), rest.pop("stand")
        of_features = weights.reshape(*weights.shape[:-1], -1, features)
        part = _take(of_features, wanted, axis=-1).reshape(*weights.shape[:-1], -1)
        y = multiply(geometry, part, dot, **rest)
        nothing = jnp.zeros((*y.shape[:-1], 1), y.dtype)  # where those that are not wanted stand
        return _take(jnp.concatenate([y, nothing], axis=-1), stand, axis=-1)

    if form.product == "conv":  # a loop would keep XLA from its fast convolution
        each = [convolve(jax.tree.map(lambda leaf, i=i: leaf[i], image)) for i in range(batch)]
        return jnp.stack(each)
    if form.images in (0, batch):
        return jax.vmap(convolve)(image)
    return lax.map(convolve, image, batch_size=form.images if form.images > 1 else None)


def _of_each_image(
    form: Form,
    x: Array,
    masks: Masks,
    kept_channels: int,
    kept_columns: int,
    wanted_features: int,
) -> dict[str, Any]:
    """The maps, with indices of what a form gathers and masks of what it does not."""
    image: dict[str, Any] = {"x": x}
    if masks.channels is not None:
        if form.channels:
            kept = masks.kept_channels
            if kept is None:
                kept, _ = kept_indices(masks.channels, kept_channels)
            image["channels"] = kept
        else:
            image["channel_mask"] = masks.channels
    if masks.columns is not None:
        if form.columns:
            flat = masks.columns.reshape(x.shape[0], -1)
            image["columns"], places = kept_indices(flat, kept_columns)
            image["places"] = places.reshape(masks.columns.shape)
        else:
            image["column_mask"] = masks.columns
    if form.features:
        assert masks.features is not None
        image["wanted"], image["stand"] = kept_indices(masks.features, wanted_features)
    return image


@dataclasses.dataclass(frozen=True)
class _Dot:
    """A matrix product of `(..., n)` with `(n, features)`."""

    precision: Any
    dtype: Any

    def __call__(self, left: Array, right: Array) -> Array:
        return jnp.matmul(left, right, precision=self.precision, preferred_element_type=self.dtype)


def _patches(
    geometry: Geometry, weights: Array, dot: _Dot, x: Array, channels: Any = None, **masks: Any
) -> Array:
    """All taps on the input's side: a product of `taps * channels` with `features`."""
    x, weights = _kept_part(x, weights, channels, **masks)
    side_by_side = geometry.patches(_padded(x, geometry.padding))
    return dot(side_by_side, weights.reshape(-1, weights.shape[-1]))


def _rows(
    geometry: Geometry, weights: Array, dot: _Dot, x: Array, channels: Any = None, **masks: Any
) -> Array:
    """The kernel's columns on the input's side, its rows on the output's: a third of the copies.

    With a stride down, rows that nobody asked for would be computed too.
    """
    x, weights = _kept_part(x, weights, channels, **masks)
    padded = _padded(x, ((0, 0), geometry.padding[1]))
    views = [padded[:, geometry.across(j)] for j in range(geometry.kernel[1])]
    y = dot(jnp.concatenate(views, axis=-1), weights.reshape(-1, weights.shape[-1]))
    y = y.reshape(*y.shape[:2], geometry.kernel[0], -1)
    y = jnp.pad(y, (geometry.padding[0], (0, 0), (0, 0), (0, 0)))
    return functools.reduce(jnp.add, (y[geometry.down(i), :, i] for i in range(geometry.kernel[0])))


def _taps(
    geometry: Geometry,
    weights: Array,
    dot: _Dot,
    x: Array,
    columns: Array,
    places: Array,
    channels: Any = None,
    **masks: Any,
) -> Array:
    """All taps on the output's side: each kept column times the kernel, then shifted adds."""
    kept = _take(x.reshape(-1, 1, x.shape[-1]), columns)
    x, weights = _kept_part(kept, weights, channels, **masks)
    nothing = jnp.zeros((1, x.shape[-1]), x.dtype)  # what a column that is not kept adds
    y = dot(jnp.concatenate([x[:, 0], nothing]), weights[0])
    taps = geometry.kernel[0] * geometry.kernel[1]
    y = y.reshape(-1, y.shape[-1] // taps)
    # The barrier keeps XLA from working places out again for every value that is gathered.
    places = jnp.pad(places, geometry.padding, constant_values=len(columns))
    places = lax.optimization_barrier(places)

    def add_up(rows: slice) -> Array:
        terms = (
            _take(y, near[rows] * taps + i * geometry.kernel[1] + j)
            for i in range(geometry.kernel[0])
            for j in range(geometry.kernel[1])
            for near in [places[geometry.down(i), geometry.across(j)]]
        )
        return functools.reduce(jnp.add, terms)

    # In halves: XLA fuses the terms of each into one pass. A whole sum that has several readers,
    # a gate and a convolution say, it would leave to them, and write every term to memory.
    half = geometry.out[0] // 2
    return jnp.concatenate([add_up(slice(half)), add_up(slice(half, None))])


def _conv(
    geometry: Geometry, weights: Array, dot: _Dot, x: Array, channels: Any = None, **masks: Any
) -> Array:
    """XLA's convolution of the kept channels with their rows of the kernel."""
    x = Masks(masks.get("channel_mask"), masks.get("column_mask")).apply(x)
    if channels is not None:
        x, weights = _take(x, channels, axis=-1), _take(weights, channels, axis=2)
    y = lax.conv_general_dilated(
        x[None],
        weights,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=dot.precision,
        preferred_element_type=dot.dtype,
    )
    return y[0]


def _shifts(geometry: Geometry, weights: Array, x: Array, masks: Masks, **_: Any) -> Array:
    """Each channel by itself; no barrier behind the padding, which fuses with the sum."""
    del masks  # nothing is skipped
    return sum_of_shifted_maps(geometry, jnp.pad(x, ((0, 0), *geometry.padding, (0, 0))), weights)


def _native(
    geometry: Geometry, weights: Array, x: Array, masks: Masks, *, features: int, **_: Any
) -> Array:
    """Our C++, which reads in place what the masks keep; several groups one after the other."""
    if weights.ndim < 5:
        return kept_conv(x, weights, masks, geometry, features=features)
    groups = len(weights)
    kept = [None] * groups
    if masks.channels is not None:
        kept = jnp.split(masks.channels, groups, axis=-1)
    each = zip(jnp.split(x, groups, axis=-1), weights, kept, strict=True)
    parts = [
        kept_conv(
            part,
            panels,
            Masks(channels, masks.columns, out_columns=masks.out_columns),
            geometry,
            features=features // groups,
        )
        for part, panels, channels in each
    ]
    return jnp.concatenate(parts, axis=-1)


def _pallas(
    geometry: Geometry,
    weights: Array,
    x: Array,
    masks: Masks,
    *,
    kept_channels: int,
    group_size: int,
    **_: Any,
) -> Array:
    """Our Pallas kernel, which reads the kept groups of channels in place."""
    # Imported when it is needed: Pallas's GPU back ends come and go with JAX's versions.
    from dynprune_jax.pruning.pallas_conv import kept_groups_conv

    assert masks.channels is not None
    groups, _ = kept_indices(masks.channels[:, ::group_size], kept_channels // group_size)
    return kept_groups_conv(
        x,
        weights,
        groups,
        group_size=group_size,
        padding=geometry.padding,
        interpret=jax.default_backend() == "cpu",
    )


@dataclasses.dataclass(frozen=True)
class _Product:
    """One product: how a kernel is laid out for it, and how it multiplies; one of the two ways.

    Attributes:
      layout: of a kernel, `(height, width, channels, features)`.
      image: by XLA, a single image: `(geometry, weights, dot, x, ...)`, with indices of what is
        gathered and masks of the rest. The last axis of the weights is `(..., features)`.
      batch: of all images at once: `(geometry, weights, x, masks, ...)`, with masks of what is
        not to be read. It is not told a precision: `possible` leaves it out where one
        matters.
    """

    layout: Callable[[Array], Array]
    image: Callable[..., Array] | None = None
    batch: Callable[..., Array] | None = None


def _unchanged(kernel: Array) -> Array:
    return kernel


_PRODUCTS: dict[str, _Product] = {
    "conv": _Product(_unchanged, image=_conv),
    "patches": _Product(lambda k: k.reshape(-1, *k.shape[2:]), image=_patches),
    "rows": _Product(lambda k: k.transpose(1, 2, 0, 3).reshape(*k.shape[1:3], -1), image=_rows),
    "taps": _Product(lambda k: k.transpose(2, 0, 1, 3).reshape(1, k.shape[2], -1), image=_taps),
    "shifts": _Product(_unchanged, batch=_shifts),
    "native": _Product(kernel_panels, batch=_native),
    "pairs": _Product(kernel_pairs, batch=_native),
    "pallas": _Product(_unchanged, batch=_pallas),
}


def _kept_part(
    x: Array,
    weights: Array,
    channels: Array | None,
    channel_mask: Array | None = None,
    column_mask: Array | None = None,
) -> tuple[Array, Array]:
    """The kept channels of a map and their rows of the kernel; the rest masked."""
    x = Masks(channel_mask, column_mask).apply(x)
    if channels is None:
        return x, weights
    return _take(x, channels, axis=-1), _take(weights, channels, axis=1)


def _padded(x: Array, padding: Any) -> Array:
    """The map with zeros around it. The barrier keeps XLA from making it again for every tap."""
    if any(map(any, padding)):
        x = jnp.pad(x, (*padding, (0, 0)))
    return lax.optimization_barrier(x)


def _take(x: Array, indices: Array, axis: int = 0) -> Array:
    return jnp.take(x, indices, axis=axis, mode="clip")  # the default fills, and compares


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
