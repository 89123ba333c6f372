"""From a config to its data set and its models; what only they can tell is checked here."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from dynprune_jax import models
from dynprune_jax.config import Config
from dynprune_jax.data import augment
from dynprune_jax.data.batches import check_batch_size
from dynprune_jax.data.sources import Dataset, load_dataset
from dynprune_jax.errors import UserError
from dynprune_jax.models.links import LINKED, column_blocks, links
from dynprune_jax.pruning.attention import CRITERIA, STATISTICS
from dynprune_jax.pruning.readers import find_links
from dynprune_jax.pruning.surgery import make_dynamic, predict_channels


def build_dataset(config: Config) -> Dataset:
    """Opens the data set; nothing is read yet.

    Raises:
      UserError: if it cannot be had, or the batch, the mean or the deviation does not fit it.
    """
    data = config.data
    dataset = load_dataset(
        data.name,
        image_size=data.image_size,
        stored_size=data.stored_size,
        path=data.path,
        archive=data.archive,
        data_dir=data.data_dir,
        train_split=data.train_split,
        test_split=data.test_split,
        train_examples=data.train_examples,
        test_examples=data.test_examples,
        held_out=data.held_out,
    )
    check_batch_size(config.batch_size, len(dataset.train))
    if dataset.num_classes < 2:
        raise UserError(f"config.data.name is {data.name!r}; it has one class, and two are needed")
    for field in ("mean", "std"):
        if len(data[field]) not in (1, dataset.channels):
            raise UserError(
                f"config.data.{field} has {len(data[field])} values; {data.name} has"
                f" {dataset.channels} channels: give one value, or one for each"
            )
    return dataset


def build_model(config: Config, num_classes: int, channels: int) -> nnx.Module:
    """The dense model, with weights drawn from the config's seed.

    Args:
      config: a checked config.
      num_classes: width of the logits.
      channels: of the images.

    Raises:
      UserError: if there is no such model, or it cannot take images of this size.
    """
    options = {
        "in_channels": channels,
        "image_size": config.data.image_size,
        "width": config.width,
        "dtype": jnp.dtype(config.dtype),
        "rngs": nnx.Rngs(config.seed),
    }
    factory, said = _factory(config.model), f"config.model is {config.model!r};"
    try:
        inspect.signature(factory).bind(num_classes, **options)
    except TypeError as error:
        call = ", ".join(("num_classes", *(f"{name}=" for name in options)))
        raise UserError(f"{said} it is called with ({call}): {error}") from error
    try:
        model = factory(num_classes, **options)
    except ValueError as error:
        raise UserError(f"config.data.image_size: {error}") from error
    if not isinstance(model, nnx.Module):
        raise UserError(f"{said} it returned {type(model).__name__}, and no nnx.Module")
    return model


def _factory(name: str) -> Callable[..., Any]:
    """The factory of a model: of this package, or MODULE:NAME.

    Raises:
      UserError: if there is none.
    """
    module, _, attribute = name.rpartition(":")
    if not module:
        return getattr(models, name)
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"config.model is {name!r}; {error}") from error
    if not callable(factory):
        raise UserError(f"config.model is {name!r}; it must be a function")
    return factory


def build_dynamic(
    config: Config, model: nnx.Module, channels: int, criterion: str = ""
) -> nnx.Module:
    """The model with gates at the config's target ratios; it shares the model's parameters.

    With every ratio 0 that is the model itself.

    Args:
      config: a checked config.
      model: from `build_model`.
      channels: of the images.
      criterion: in place of the config's.

    Raises:
      UserError: if ratios or layer patterns do not fit the model.
    """
    ratios: dict[str, Any] = {}
    for field in ("channel_ratio", "column_ratio"):
        given = config.gate[field]
        blocks = len(getattr(model, "blocks", ()))
        if given and not blocks:
            raise UserError(
                f"config.gate.{field} is {given}, a ratio for each block; the model of"
                f" {config.model} has no `blocks`: give it a list of its stages of that name"
            )
        if given and len(given) != blocks:
            raise UserError(
                f"config.gate.{field} is {given}; {config.model} has {blocks} blocks:"
                f" give a tuple of {blocks} ratios in [0, 1), or ()"
            )
        # A ratio of 0 needs no gate, and a gate not there costs nothing.
        ratios[field] = [ratio or None for ratio in given] if any(given) else None
    if not any(ratios.values()):
        return model
    try:
        if config.gate.kind == "predicted":
            surgery = functools.partial(
                predict_channels,
                links=_links(config, model, channels),
                salience_scales=config.gate.salience_scales,
            )
        else:
            surgery = make_dynamic
        return surgery(
            model,
            **ratios,
            layers=config.gate.layers,
            column_blocks=column_blocks(model) if config.gate.block_columns else (),
            channel_group=config.gate.channel_group,
            column_patch=config.gate.column_patch,
            statistic=STATISTICS[config.gate.statistic],
            criterion=CRITERIA[criterion or config.gate.criterion],
            drop_probability=config.gate.drop_probability,
            rngs=nnx.Rngs(config.seed),
        )
    except ValueError as error:
        raise UserError(f"config.gate: {error}") from error


def _links(config: Config, model: nnx.Module, channels: int) -> Mapping[str, tuple[str, str]]:
    if isinstance(model, LINKED):
        return {link.name: (link.norm_name, link.reader_name) for link in links(model)}
    side, dtype = config.data.image_size, jnp.dtype(config.dtype)
    return _found_links(config.model, config.width, (1, side, side, channels), dtype)


@functools.cache  # it takes seconds, and a run makes its network dynamic some twenty times
def _found_links(
    name: str, width: float, shape: tuple[int, ...], dtype: Any
) -> Mapping[str, tuple[str, str]]:
    """The links of a model of somebody's own, which does not depend on its weights."""

    def model() -> nnx.Module:
        kwargs = {"image_size": shape[1], "in_channels": shape[-1], "width": width, "dtype": dtype}
        return _factory(name)(10, **kwargs, rngs=nnx.Rngs(0))

    with jax.ensure_compile_time_eval():  # a run checks its config in a trace
        return find_links(nnx.eval_shape(model), jax.ShapeDtypeStruct(shape, dtype))


def evaluation_images(
    config: Config, images: UInt8[Array, "batch stored stored channels"]
) -> Float[Array, "batch side side channels"]:
    """What the network sees of stored images when it is evaluated: the centre, normalised."""
    data = config.data
    cropped = augment.center_crop(images, data.image_size)
    return augment.normalise(cropped, data.mean, data.std, jnp.dtype(config.dtype))


def training_images(
    config: Config, key: Any, images: UInt8[Array, "batch stored stored channels"]
) -> Float[Array, "batch side side channels"]:
    """What the network sees of stored images in training: augmented, normalised."""
    data = config.data
    augmented = augment.augment(
        key,
        images,
        image_size=data.image_size,
        crop_padding=data.crop_padding,
        flip=data.flip,
        resized_crop=data.resized_crop,
        cutout_size=data.cutout,
    )
    return augment.normalise(augmented, data.mean, data.std, jnp.dtype(config.dtype))
