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
from dynprune_jax.config import Config, is_own
from dynprune_jax.data import augment
from dynprune_jax.data.sources import Dataset, load_dataset
from dynprune_jax.errors import UserError
from dynprune_jax.models import links as known_links
from dynprune_jax.pruning.attention import CRITERIA, STATISTICS
from dynprune_jax.pruning.layers import dynamic_layers
from dynprune_jax.pruning.masks import plain_kept_count
from dynprune_jax.pruning.measure import measure
from dynprune_jax.pruning.readers import Links, find_links
from dynprune_jax.pruning.surgery import make_dynamic, predict_channels


def build_dataset(config: Config) -> Dataset:
    """Opens the data set, and prepares it if need be; no image is read yet.

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
    if config.batch_size > len(dataset.train):
        raise UserError(
            f"config.batch_size is {config.batch_size}; it must be at most the number of training"
            f" examples, {len(dataset.train)}"
        )
    if dataset.num_classes < 2:
        raise UserError(f"config.data.name is {data.name!r}; it has one class, and two are needed")
    check_channels(config, dataset.channels)
    return dataset


def check_channels(config: Config, channels: int) -> None:
    """Raises UserError where the mean or the deviation does not fit the images' channels."""
    for field in ("mean", "std"):
        if len(config.data[field]) not in (1, channels):
            raise UserError(
                f"config.data.{field} has {len(config.data[field])} values; {config.data.name} has"
                f" {channels} channels: give one value, or one for each"
            )


def build_model(config: Config, num_classes: int, channels: int) -> nnx.Module:
    """The dense model, with weights drawn from the config's seed.

    Args:
      config: a checked config.
      num_classes: width of the logits.
      channels: of the images.

    Raises:
      UserError: if there is no such model, it cannot take images of this size, or it is one of
        somebody's own that is not called or does not answer as ours are, or cannot be counted.
    """
    options = {
        "in_channels": channels,
        "image_size": config.data.image_size,
        "width": config.width,
        "dtype": jnp.dtype(config.dtype),
        "rngs": nnx.Rngs(config.seed),
    }
    if is_own(config.model):
        return _build_own(config, num_classes, options)
    try:
        return getattr(models, config.model)(num_classes, **options)
    except ValueError as error:
        raise UserError(f"config.model is {config.model!r}: {error}") from error


def _build_own(config: Config, num_classes: int, options: Mapping[str, Any]) -> nnx.Module:
    """A model by a factory of somebody's own, once it is known to be one that can be trained."""
    said = f"config.model is {config.model!r}; "
    factory = own_factory(config.model)
    # Of a class of Flax itself the signature would be that of any other.
    called, first = (factory.__init__, (None,)) if isinstance(factory, type) else (factory, ())
    try:
        inspect.signature(called).bind(*first, num_classes, **options)
    except (TypeError, ValueError) as error:
        call = ", ".join(("num_classes", *(f"{name}=" for name in options)))
        raise UserError(f"{said}it is called with ({call}): {error}") from error
    try:
        model = factory(num_classes, **options)
    except ValueError as error:  # Flax's own go on for many lines
        raise UserError(said + str(error).partition("\n")[0]) from error
    except Exception as error:  # of code that is not ours its traceback says more than a line
        error.add_note(f"{said}it raised this when it made the model")
        raise
    if not isinstance(model, nnx.Module) or not callable(model):
        raise UserError(f"{said}it returned {type(model).__name__}: no nnx.Module with a __call__")
    images = one_image(config, options["in_channels"])
    try:
        inspect.signature(model.__call__).bind(images)
    except TypeError as error:
        raise UserError(f"{said}its model is called with images alone: {error}") from error
    try:
        logits = nnx.eval_shape(lambda model, images: model(images), model, images)
    except Exception as error:
        shape = "x".join(map(str, images.shape))
        error.add_note(
            f"{said}its model raised this when it was called with {shape} {images.dtype}"
        )
        raise
    if getattr(logits, "shape", None) != (1, num_classes):
        found = getattr(logits, "shape", type(logits).__name__)
        raise UserError(
            f"{said}of images of the shape {images.shape} its model gives {found}, and not logits"
            f" of the shape {(1, num_classes)}"
        )
    several = jax.ShapeDtypeStruct((2, *images.shape[1:]), images.dtype)
    try:
        nnx.eval_shape(lambda model, images: measure(model, images)[0], model, several)
    except ValueError as error:
        raise UserError(f"{said}its work cannot be counted: {error}") from error
    return model


def own_factory(name: str) -> Callable[..., Any]:
    """The factory that MODULE:NAME names; the module is imported.

    Raises:
      UserError: if there is none.
    """
    module, _, attribute = name.partition(":")
    said = f"config.model is {name!r}; "
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{said}{module} cannot be imported: {error}") from error
        raise UserError(
            f"{said}there is no module {error.name!r} in the current folder, in PYTHONPATH or"
            " among what is installed"
        ) from error
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UserError(said + str(error)) from error
    except Exception as error:  # of code that is not ours its traceback says more than a line
        error.add_note(f"{said}{module} raised this when it was imported")
        raise
    if not callable(factory):
        raise UserError(f"{said}it is of type {type(factory).__name__}, and must be a function")
    return factory


def build_links(config: Config, model: nnx.Module, channels: int) -> Links:
    """Where predicted gates can go; for others nothing. Of somebody's own model it takes seconds.

    Args:
      config: a checked config.
      model: from `build_model`.
      channels: of the images.

    Raises:
      UserError: if they can go nowhere.
    """
    return all_links(config, model, channels) if config.gate.kind == "predicted" else {}


def all_links(config: Config, model: nnx.Module, channels: int) -> Links:
    """The links of any model: what predicted gates skip, and static pruning removes.

    Raises:
      UserError: if there are none.
    """
    try:
        if known_links.has_links(model):
            return known_links.links(model)
        return find_links(model, one_image(config, channels))
    except ValueError as error:
        raise UserError(
            f"config.model is {config.model!r}; neither predicted gates nor static pruning have a"
            f" place in it: {error}"
        ) from error


def build_dynamic(config: Config, model: nnx.Module, links: Links) -> nnx.Module:
    """The model with gates at the config's target ratios; it shares the model's parameters.

    With every ratio 0 that is the model itself.

    Args:
      config: a checked config.
      model: from `build_model`.
      links: of the model, from `build_links`.

    Raises:
      UserError: if ratios or layer patterns do not fit the model.
    """
    ratios: dict[str, Any] = {}
    for field in ("channel_ratio", "column_ratio"):
        given = config.gate[field]
        stages = getattr(model, "blocks", None)
        if given and not isinstance(stages, nnx.List):
            raise UserError(
                f"config.gate.{field} is {given}, a ratio for each block; the model of"
                f" {config.model} has no attribute `blocks` that is an nnx.List: give it one of its"
                " stages"
            )
        blocks = len(stages or ())
        if given and len(given) != blocks:
            raise UserError(
                f"config.gate.{field} is {given}; {config.model} has {blocks} blocks:"
                f" give a tuple of {blocks} ratios, or ()"
            )
        # A ratio of 0 needs no gate, and a gate not there costs nothing.
        ratios[field] = [ratio or None for ratio in given] if any(given) else None
    if not any(ratios.values()):
        return model
    try:
        if config.gate.kind == "predicted":
            surgery = functools.partial(
                predict_channels, links=links, salience_scales=config.gate.salience_scales
            )
        else:
            surgery = make_dynamic
        return surgery(
            model,
            **ratios,
            layers=config.gate.layers,
            column_blocks=known_links.column_blocks(model) if config.gate.block_columns else (),
            channel_group=config.gate.channel_group,
            column_patch=config.gate.column_patch,
            statistic=STATISTICS[config.gate.statistic],
            criterion=CRITERIA[config.gate.criterion],
            drop_probability=config.gate.drop_probability,
            rngs=nnx.Rngs(config.seed),
        )
    except ValueError as error:
        raise UserError(f"config.gate: {error}") from error


def check_gates(config: Config, dynamic: nnx.Module, channels: int) -> None:
    """Raises UserError where a model has gates, and none of them skips anything at its ratio.

    Args:
      config: that it was built from.
      dynamic: from `build_dynamic`, with numbers.
      channels: of the images.
    """
    gates = dynamic_layers(dynamic).values()
    counted = [(g.channel_ratio, g.in_features // g.group_size(g.in_features)) for g in gates]
    counted += [(g.feature_ratio, g.out_features // g.feature_group) for g in gates]
    if any(r is not None and plain_kept_count(float(r[...]), n) < n for r, n in counted):
        return
    dynamic.eval()
    _, usage = nnx.jit(measure)(dynamic, one_image(config, channels))  # maps tell their columns
    if usage.mac_reduction == 0.0:
        raise UserError(
            f"config.gate.channel_ratio is {config.gate.channel_ratio} and config.gate.column_ratio"
            f" is {config.gate.column_ratio}; no map has enough channels or columns (in groups of"
            f" {config.gate.channel_group} and patches of {config.gate.column_patch}) to skip any:"
            " give higher ratios"
        )


def one_image(config: Config, channels: int) -> Float[Array, "1 side side channels"]:
    """A black image as the network sees it, for counting."""
    side = config.data.image_size
    return evaluation_images(config, jnp.zeros((1, side, side, channels), jnp.uint8))


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
