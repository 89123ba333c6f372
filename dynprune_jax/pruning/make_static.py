"""One choice of channels for all inputs: from predicted gates to a plain, narrower model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.pruning.calls import Images, batch_of
from dynprune_jax.pruning.compact_conv import is_compact
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.handover import GatedNorm
from dynprune_jax.pruning.layers import all_modules, dynamic_layers, replaced
from dynprune_jax.pruning.measure import measure
from dynprune_jax.pruning.readers import Links
from dynprune_jax.pruning.removal import FixedFiltersError, removable, remove_filters

# Of the outputs of a convolution: the share of images that want each, and its mean salience there.
Wanted = tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]


def make_static(model: Any, links: Links, images: Images) -> Any:
    """Returns a plain model with the channels that predicted gates want most often.

    Such gates may come to want the same channels of every input, and then to choose anew for each
    is time in vain. Here as many outputs of every convolution stay as its gate wants of an image:
    those that most images want (of equally many, those with the higher salience). The others leave
    for good, and with them what reads them. Scales and biases of the batch norms are multiplied by
    the mean salience over the images that want the channel. If the gates choose and scale alike
    for all inputs the answers stay what they were, to rounding; the MACs are no more than before,
    and fewer where a linear layer reads. The model has no gates, is in the mode of the given one,
    and can be trained on, compacted and exported as any other. Of gates that are not trained yet
    it is what static pruning by L1 norms makes (arXiv 1608.08710).

    Args:
      model: from `predict_channels`, with no gates on columns, trained, and called with images
        alone; it is left as it is. Its arrays are read, so it cannot be traced.
      links: what its gates were made with.
      images: some hundred of mixed classes, `(batch, height, width, channels)`.

    Raises:
      ValueError: for a model that is compact, has no predicted gate or others besides, for links
        that are not those of its gates, if the filters of any of them cannot leave, and where
        `measure` does.
    """
    if is_compact(model):
        raise ValueError("this model is compact; give the model that it was made from")
    size = len(batch_of(images))
    gates = predicted_gates(model)
    if not gates:
        raise ValueError(
            f"{type(model).__name__} has no predicted gates, or has gates on columns or by"
            " attention too: only what predicted gates choose can be chosen once for all inputs"
        )
    layers = all_modules(model)
    for name, gate in gates.items():
        norm = layers.get(links[name][0]) if name in links else None
        if getattr(norm, "handover", None) is not gate.handover:
            raise ValueError(f"links is not what the gate of {name} was made with")
    links, plain = {name: links[name] for name in gates}, _ungated(model)
    one = jax.tree.map(lambda part: part[:1] if np.shape(part)[:1] == (size,) else part, images)
    leave = removable(plain, links, one)
    for name in links:
        if name not in leave:
            raise FixedFiltersError(
                f"the filters of {name} cannot leave {type(model).__name__}: its code or another"
                " layer counts on all of them, or they are shared, masked or grouped"
            )
    layers, ranks, ratios = all_modules(plain), {}, {}
    for name, (share, salience) in _wanted_of(model, images).items():
        norm = layers[links[name][0]]
        for part in (norm.scale, norm.bias):
            if part is not None:
                part.set_value((part[...] * salience).astype(part.dtype))
        ranks[name] = np.empty(len(share))
        ranks[name][np.lexsort((salience, share))] = np.arange(len(share))
        ratios[name] = 1.0 - round(float(share.sum())) / len(share)  # every image wants as many
    return remove_filters(plain, links, ranks, ratios)


def predicted_gates(model: nnx.Module) -> dict[str, DynamicConv]:
    """The predicted gates of a model, by the names of their convolutions; none if it has others."""
    gates = dynamic_layers(model)
    for gate in gates.values():
        follows = gate.follows_features or gate.choice_of is not None
        if gate.column_ratio is not None or (gate.channel_ratio is not None and not follows):
            return {}
    return {name: gate for name, gate in gates.items() if gate.feature_ratio is not None}


def _wanted_of(model: nnx.Module, images: Images) -> dict[str, Wanted]:
    """What the predicted gates of a model want of images, by the names of their convolutions."""
    graph, state = nnx.split(model)

    @jax.jit
    def wanted(state: Any, images: Images) -> dict[str, tuple[Array, Array]]:
        called = nnx.merge(graph, state)
        called.eval()
        found: dict[str, list[Any]] = {}
        for layer in measure(called, images)[1].layers:
            if layer.masks.salience is not None:
                found.setdefault(layer.name, []).append(layer.masks)
        return {name: _mean(calls) for name, calls in found.items()}

    return jax.device_get(wanted(state, images))


def _mean(calls: list[Any]) -> tuple[Array, Array]:
    """Over all images and all calls of a layer."""
    features, salience = (
        jnp.concatenate([getattr(masks, part) for masks in calls])
        for part in ("features", "salience")
    )
    share = jnp.mean(features, axis=0, dtype=jnp.float32)
    of_all = jnp.mean(jnp.where(features, salience, 0.0), axis=0)
    return share, of_all / jnp.maximum(share, 1e-9)


def _ungated(model: Any) -> Any:
    """A copy of a model with plain layers in place of its dynamic ones."""
    copy = nnx.clone(model)
    conv = nnx.eval_shape(lambda: nnx.Conv(1, 1, (1, 1), rngs=nnx.Rngs(0)))
    norm = nnx.eval_shape(lambda: nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
    plain: dict[str, nnx.Module] = {}
    for name, layer in all_modules(copy).items():
        if isinstance(layer, DynamicConv | GatedNorm):
            plain[name] = nnx.clone(conv if isinstance(layer, DynamicConv) else norm)
            for part in list(vars(plain[name])):
                if not part.startswith("_"):  # those belong to NNX's own machinery
                    delattr(plain[name], part)  # static where this one has none, such as a mask
                    setattr(plain[name], part, getattr(layer, part))
    return replaced(copy, plain)
