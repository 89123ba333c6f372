"""Filters that leave a model for good, and with them what reads them: any model with links."""

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from dynprune_jax.pruning.calls import batch_of
from dynprune_jax.pruning.dynamic_conv import is_depthwise
from dynprune_jax.pruning.layers import all_modules, replaceable_layers, rewritten
from dynprune_jax.pruning.masks import plain_kept_count
from dynprune_jax.pruning.measure import measure
from dynprune_jax.pruning.ratios import least_factor, scaled
from dynprune_jax.pruning.readers import Links, drawn, drawn_weights

_TRIALS = 4  # of which filters leave

# By convolution, one for each of its filters.
Scores = Mapping[str, Float[np.ndarray, " filters"]]


class FixedFiltersError(ValueError):
    """Filters that cannot leave a model, and why."""


def remove_filters(model: Any, links: Links, scores: Scores, ratios: Mapping[str, float]) -> Any:
    """Returns a smaller model without the lowest-scored filters; the given one stays as it is.

    Args:
      model: any, of these links; its arrays are read, so it cannot be traced.
      links: from `removable`.
      scores: by convolution, one for each of its filters.
      ratios: by convolution, the fraction of its filters to remove, in [0, 1); as many go as
        `kept_count` says, and one always stays.
    """
    return _narrowed(model, links, _highest_kept(scores, ratios))


def _highest_kept(scores: Scores, ratios: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The filters that stay, by convolution, in order; of equal scores the first."""
    return {
        name: np.sort(
            np.argsort(-of_it, kind="stable")[: plain_kept_count(ratios[name], len(of_it))]
        )
        for name, of_it in scores.items()
    }


def _narrowed(model: Any, links: Links, kept: Mapping[str, np.ndarray]) -> Any:
    """The model with these filters alone."""
    small = nnx.clone(model)
    layers = all_modules(small)

    def keep(owner: Any, name: str, rows: np.ndarray, axis: int) -> None:
        # By NumPy, which compiles nothing: each of the many sizes would be a program of its own.
        variable = getattr(owner, name)
        if variable is not None:
            value = np.take(np.asarray(variable.get_value()), rows, axis)
            setattr(owner, name, variable.replace(jnp.asarray(value)))

    for name, link in links.items():
        reader = layers[link[-1]]
        rows = _rows_of(kept[name], layers[name], reader)
        depthwise = link[1:-1:2]
        for conv_name, norm_name in zip((name, *depthwise), link[::2], strict=True):
            conv, norm = layers[conv_name], layers[norm_name]
            for part in ("kernel", "bias"):
                keep(conv, part, kept[name], -1)
            for part in ("scale", "bias", "mean", "var"):
                keep(norm, part, kept[name], -1)
            conv.out_features = norm.num_features = len(kept[name])
            if conv_name != name:
                conv.in_features = conv.feature_group_count = len(kept[name])
        keep(reader, "kernel", rows, -2)
        reader.in_features = len(rows)
    for layer in layers.values():
        if isinstance(layer, nnx.Conv):
            layer.kernel_shape = layer.kernel.shape
    return small


def _silenced(model: Any, links: Links, kept: Mapping[str, np.ndarray]) -> Any:
    """The model that computes all filters, and whose readers pass over all but these."""
    silent = nnx.clone(model)
    layers = all_modules(silent)
    for name, link in links.items():
        reader = layers[link[-1]]
        rows = _rows_of(kept[name], layers[name], reader)
        read = np.isin(np.arange(reader.in_features), rows)[:, None]
        reader.kernel[...] = jnp.where(read, reader.kernel[...], 0)
    return silent


def _rows_of(filters: np.ndarray, conv: Any, reader: Any) -> np.ndarray:
    """Which inputs of a reader come from these filters: what is laid out has its channels last."""
    return np.arange(reader.in_features).reshape(-1, conv.out_features)[:, filters].ravel()


def removable(model: nnx.Module, links: Links, image: Any) -> Links:
    """Those links of a model whose filters can be removed.

    Filters stay where their last reader has its own for some of the channels alone or is none that
    this package counts, where one of the layers has weights in common with another, and where the
    model's code counts on them: `try_removal` of half of all, or if that fails of each layer's.

    Args:
      model: any NNX model without gates, called with images alone.
      links: from `find_links`.
      image: a batch of one, or its shape and dtype, or a pytree that holds one.

    Returns:
      Those links, as they are.

    Raises:
      FixedFiltersError: if there are none.
    """
    convs, layers, around = replaceable_layers(model), all_modules(model), rewritten(model)
    owners = Counter(id(part) for layer in layers.values() for part in _variables(layer))

    def holds(name: str, hands_on: bool) -> str:
        """What of a layer keeps filters from leaving; nothing if they can."""
        layer = layers[name]
        if any(owners[id(part)] > 1 for part in _variables(layer)):
            return "shares its weights"
        if name.startswith(around):
            return "has weights that a module around it computes"
        if type(layer) in (nnx.Linear, nnx.BatchNorm):
            return ""
        if name not in convs:
            return f"is {type(layer).__name__}, which is not known"
        if layer.feature_group_count > 1 and not (hands_on and is_depthwise(layer)):
            return "is grouped"
        return "" if layer.mask is None else "has a mask"

    found, why = {}, ""
    for name, link in links.items():
        parts = {part: part in link[1:-1:2] for part in (name, *link)}
        held = [
            f"{part} {what}" for part, between in parts.items() if (what := holds(part, between))
        ]
        if held:
            why = why or f": for instance those of {name} stay, for {held[0]}"
        else:
            found[name] = link
    if not found:
        raise FixedFiltersError(f"{type(model).__name__} has no filters that can leave alone{why}")
    try:
        try_removal(model, found, dict.fromkeys(found, 0.5), image)
    except FixedFiltersError:
        together, found = found, {}
        for name, link in together.items():
            with contextlib.suppress(FixedFiltersError):
                try_removal(model, {name: link}, {name: 0.5}, image)
                found[name] = link
        if not found:
            raise
    return found


def try_removal(model: nnx.Module, links: Links, ratios: Mapping[str, float], image: Any) -> None:
    """Tries whether a model takes the removal of filters.

    With weights and an image drawn anew it must answer as one that computes them all and whose
    readers pass over them; else its code counts its channels, or knows their places.

    Args:
      model: any NNX model without gates, called with images alone; it is left as it is.
      links: from `removable`.
      ratios: by convolution, as for `remove_filters`.
      image: a batch of one, or its shape and dtype, or a pytree that holds one.

    Raises:
      FixedFiltersError: if it does not.
    """
    said = f"{type(model).__name__} cannot lose filters, for its code counts on all of them"
    rng = np.random.default_rng(0)
    whole = nnx.clone(model)
    state = nnx.state(whole, nnx.Any(nnx.Param, nnx.BatchStat))
    nnx.update(whole, drawn_weights(rng, state))
    whole.eval()
    layers = all_modules(whole)
    for layer in layers.values():  # the fewer roundings, the less is hidden by them
        if getattr(layer, "dtype", None) is not None:
            layer.dtype = jnp.float32
    close = 1e-3 if batch_of(image).dtype == jnp.float32 else 1e-2  # code around layers may round
    image = jax.tree.map(lambda part: drawn(rng, part), image)
    call = nnx.jit(lambda model, image: model(image))
    for _ in range(_TRIALS):
        scores = {name: rng.random(layers[name].out_features) for name in links}
        kept = _highest_kept(scores, ratios)
        small = _narrowed(whole, links, kept)
        try:
            with jax.default_matmul_precision("highest"):
                found, expected = call(small, image), call(_silenced(whole, links, kept), image)
            small.train()
            nnx.eval_shape(lambda small, image: small(image), small, image)
        except jax.errors.JaxRuntimeError:  # such as want of memory
            raise
        except Exception as error:  # whatever code of somebody else's raises
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise FixedFiltersError(f"{said}: {reason}") from error
        ours, other = (jax.tree.leaves(outputs) for outputs in (found, expected))
        if len(ours) != len(other) or not all(map(functools.partial(_near, close), ours, other)):
            raise FixedFiltersError(f"{said}: without them it answers as another model")


def _near(close: float, found: Any, expected: Any) -> bool:
    if found.shape != expected.shape:
        return False
    atol = close * np.max(np.abs(expected), initial=0)
    return np.allclose(found, expected, rtol=0, atol=atol, equal_nan=True)


def _variables(layer: Any) -> list[Any]:
    return [part for part in vars(layer).values() if isinstance(part, nnx.Variable)]


def allot(
    model: Any, links: Links, image: Any, mac_reduction: float, shares: Mapping[str, float]
) -> dict[str, float]:
    """The ratio of every convolution with which a model loses that fraction of its MACs.

    Args:
      model: any, of these links.
      links: from `removable`.
      image: a batch of one, or its shape and dtype.
      mac_reduction: of the whole network, conventional.
      shares: by convolution; its ratio is this times a common factor, at most 0.95.

    Returns:
      The ratios, with the smallest factor that reaches the reduction.

    Raises:
      ValueError: if none does.
    """
    if not any(shares.values()):
        raise ValueError("no removal of filters is asked for: all shares are 0")
    usage = nnx.eval_shape(lambda model, image: measure(model, image)[1], model, image)
    layers = all_modules(model)
    filters = {name: layers[name].out_features for name in links}
    whole: Counter[str] = Counter()
    for layer in usage.layers:  # one that is called again is there again
        whole[layer.name] += layer.dense_macs

    def at(factor: float) -> dict[str, float]:
        return {name: scaled(share, factor) for name, share in shares.items()}

    def reaches(factor: float) -> bool:
        macs, ratios = dict(whole), at(factor)
        for name, n in filters.items():
            for layer in (name, *links[name][1::2]):  # one makes n maps, the others read them
                macs[layer] = macs[layer] * plain_kept_count(ratios[name], n) // n
        left = usage.other_macs + sum(macs.values())
        return 1.0 - left / usage.dense_macs >= mac_reduction - 1e-9

    factor = least_factor(shares.values(), reaches)
    if factor is None:
        raise ValueError(f"no removal of filters takes {mac_reduction:.1%} of the MACs away")
    return at(factor)
