"""One choice of channels for all inputs: from predicted gates to a plain, narrower model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.pruning.calls import Images, batch_of, intercept
from dynprune_jax.pruning.compact_conv import is_compact
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.handover import GatedNorm
from dynprune_jax.pruning.layers import all_modules, dynamic_layers, replaced
from dynprune_jax.pruning.readers import Links
from dynprune_jax.pruning.removal import removable, remove_filters

# Of each output of a convolution: the share of images that want it, and what it is scaled by in
# the mean over all of them, by 0 where it is not wanted.
Wanted = tuple[Float[Array, " features"], Float[Array, " features"]]


def make_static(model: Any, links: Links, images: Images) -> Any:
    """Returns a plain model with the channels that predicted gates want most over some images.

    Such gates may come to want the same channels of every input, and then to choose anew for each
    is time in vain. Here as many outputs of every convolution stay as its gate wants of one image,
    those with the highest salience in the mean over the images (0 where not wanted); the others
    leave for good, and with them what reads them. Scales and biases of the batch norms are
    multiplied by the mean salience over the images that want the channel. So the MACs stay what
    they were, and if the gates choose and scale alike for all inputs the answers do too. No part
    of this package is left in the model: it can be trained on, compacted and exported as any other.

    Args:
      model: from `predict_channels`, with no gates on columns, trained, and called with images
        alone; it is left as it is. Its arrays are read, so it cannot be traced.
      links: what its gates were made with.
      images: some hundred of mixed classes, `(batch, height, width, channels)`.

    Raises:
      ValueError: for a model that is compact, has no predicted gate or others besides, for links
        that are not those of its gates, and where filters cannot leave.
    """
    if is_compact(model):
        raise ValueError("this model is compact; give the model that it was made from")
    batch_of(images)  # refuses what holds none
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
    links = {name: links[name] for name in gates}
    one = jax.tree.map(lambda part: part[:1] if np.ndim(part) else part, images)
    stay = gates.keys() - removable(_ungated(model), links, one).keys()
    if stay:
        raise ValueError(
            f"the filters of {min(stay)} cannot leave, for the model's code or other layers count"
            " on all of them"
        )
    graph, state = nnx.split(model)
    wanted = jax.jit(lambda state: wanted_of(nnx.merge(graph, state), images))(state)
    return _with_one_choice(model, links, wanted)


def predicted_gates(model: nnx.Module) -> dict[str, DynamicConv]:
    """The predicted gates of a model, by the names of their convolutions; none if it has others."""
    gates = dynamic_layers(model)
    for gate in gates.values():
        follows = gate.follows_features or gate.choice_of is not None
        if gate.column_ratio is not None or (gate.channel_ratio is not None and not follows):
            return {}
    return {name: gate for name, gate in gates.items() if gate.feature_ratio is not None}


def wanted_of(model: nnx.Module, images: Images) -> dict[str, Wanted]:
    """What the gates of a model want over a batch of images, by the names of their convolutions."""
    gates, found = predicted_gates(model).keys(), {}

    def call(name: str, gate: Any, own: Any, x: Any, *args: Any) -> Any:
        if name not in gates:
            return own(x, *args)
        masks = gate.masks(x)
        share = jnp.mean(masks.features, axis=0, dtype=jnp.float32)
        found[name] = share, jnp.mean(jnp.where(masks.features, masks.salience, 0.0), axis=0)
        return gate.convolve(x, masks, *args)

    copy: Any = intercept(model, DynamicConv, call)
    copy.eval()
    copy(images)
    return found


def _with_one_choice(model: Any, links: Links, wanted: Mapping[str, Wanted]) -> Any:
    plain = _ungated(model)
    layers = all_modules(plain)
    scores, ratios = {}, {}
    for name, (share, salience) in jax.device_get(dict(wanted)).items():
        norm = layers[links[name][0]]
        for part in (norm.scale, norm.bias):
            if part is not None:
                scaled = part[...] * np.where(share > 0.0, salience / np.maximum(share, 1e-9), 0.0)
                part.set_value(jnp.asarray(scaled, part.dtype))
        scores[name] = salience
        ratios[name] = 1.0 - round(float(share.sum())) / len(share)  # as many as every image wants
    return remove_filters(plain, links, scores, ratios)


def _ungated(model: Any) -> Any:
    """A copy of a model with plain layers in place of its dynamic ones."""
    copy = nnx.clone(model)
    conv = nnx.Conv(1, 1, (1, 1), rngs=nnx.Rngs(0))
    norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
    plain: dict[str, nnx.Module] = {}
    for name, layer in all_modules(copy).items():
        if isinstance(layer, DynamicConv | GatedNorm):
            plain[name] = nnx.clone(conv if isinstance(layer, DynamicConv) else norm)
            for part in vars(plain[name]):
                if not part.startswith("_"):  # those belong to NNX's own machinery
                    setattr(plain[name], part, getattr(layer, part))
    return replaced(copy, plain)
