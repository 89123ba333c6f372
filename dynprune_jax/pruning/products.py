"""How each form of a convolution multiplies.

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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dynprune_jax.convolution import sum_of_shifted_maps
from dynprune_jax.geometry import Geometry
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.masks import Masks, kept_indices
from dynprune_jax.pruning.native import kept_conv, kernel_pairs, kernel_panels


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
    masked = Masks(
        None if form.channels else masks.channels, None if form.columns else masks.columns
    )
    x = masked.apply(x)
    skipped = Masks(
        masks.channels if form.channels else None,
        masks.columns if form.columns else None,
        masks.kept_channels if form.channels else None,
        features=masks.features if form.features else None,
        out_columns=masks.out_columns if form.columns else None,
    )
    if product.batch is not None:
        sizes = {"features": features, "kept_channels": kept_channels, "group_size": group_size}
        return product.batch(geometry, weights, x, skipped, **sizes)
    image = {"x": x, **_indices(skipped, kept_channels, kept_columns, wanted_features)}
    multiply = product.image
    assert multiply is not None
    dtype = jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype
    dot = functools.partial(jnp.matmul, precision=precision, preferred_element_type=dtype)

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


def _indices(
    skipped: Masks, kept_channels: int, kept_columns: int, wanted_features: int
) -> dict[str, Array]:
    """What each image gathers, as indices."""
    found: dict[str, Array] = {}
    if skipped.channels is not None:
        found["channels"] = (
            kept_indices(skipped.channels, kept_channels)[0]
            if skipped.kept_channels is None
            else skipped.kept_channels
        )
    if skipped.columns is not None:
        flat = skipped.columns.reshape(skipped.columns.shape[0], -1)
        found["columns"], places = kept_indices(flat, kept_columns)
        found["places"] = places.reshape(skipped.columns.shape)
    if skipped.features is not None:
        found["wanted"], found["stand"] = kept_indices(skipped.features, wanted_features)
    return found


def _patches(geometry: Geometry, weights: Array, dot: Any, x: Array, channels: Any = None) -> Array:
    """All taps on the input's side: a product of `taps * channels` with `features`."""
    x, weights = _kept_part(x, weights, channels)
    side_by_side = geometry.patches(_padded(x, geometry.padding))
    return dot(side_by_side, weights.reshape(-1, weights.shape[-1]))


def _rows(geometry: Geometry, weights: Array, dot: Any, x: Array, channels: Any = None) -> Array:
    """The kernel's columns on the input's side, its rows on the output's: a third of the copies.

    With a stride down, rows that nobody asked for would be computed too.
    """
    x, weights = _kept_part(x, weights, channels)
    padded = _padded(x, ((0, 0), geometry.padding[1]))
    views = [padded[:, geometry.across(j)] for j in range(geometry.kernel[1])]
    y = dot(jnp.concatenate(views, axis=-1), weights.reshape(-1, weights.shape[-1]))
    y = y.reshape(*y.shape[:2], geometry.kernel[0], -1)
    y = jnp.pad(y, (geometry.padding[0], (0, 0), (0, 0), (0, 0)))
    return functools.reduce(jnp.add, (y[geometry.down(i), :, i] for i in range(geometry.kernel[0])))


def _taps(
    geometry: Geometry,
    weights: Array,
    dot: Any,
    x: Array,
    columns: Array,
    places: Array,
    channels: Any = None,
) -> Array:
    """All taps on the output's side: each kept column times the kernel, then shifted adds."""
    kept = _take(x.reshape(-1, x.shape[-1]), columns)
    x, weights = _kept_part(kept, weights, channels)
    nothing = jnp.zeros((1, x.shape[-1]), x.dtype)  # what a column that is not kept adds
    y = dot(jnp.concatenate([x, nothing]), weights[0])
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


def _conv(geometry: Geometry, weights: Array, dot: Any, x: Array, channels: Any = None) -> Array:
    """XLA's convolution of the kept channels with their rows of the kernel."""
    x, weights = _kept_part(x, weights, channels, axis=2)
    y = lax.conv_general_dilated(
        x[None],
        weights,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **dot.keywords,
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
        gathered; the rest is masked already. The last axis of the weights is `(..., features)`.
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
    x: Array, weights: Array, channels: Array | None, axis: int = 1
) -> tuple[Array, Array]:
    """The kept channels of a map and their rows of the kernel."""
    if channels is None:
        return x, weights
    return _take(x, channels, axis=-1), _take(weights, channels, axis=axis)


def _padded(x: Array, padding: Any) -> Array:
    """The map with zeros around it. The barrier keeps XLA from making it again for every tap."""
    if any(map(any, padding)):
        x = jnp.pad(x, (*padding, (0, 0)))
    return lax.optimization_barrier(x)


def _take(x: Array, indices: Array, axis: int = 0) -> Array:
    return jnp.take(x, indices, axis=axis, mode="clip")  # the default fills, and compares
