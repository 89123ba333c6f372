"""Static baselines: whole filters removed for good, the same ones for every input.

The counterpart of a dynamic network at equal MACs: same data, same dense weights, same schedule
and budget of training, same counter. A *criterion* gives every filter of a convolution a score;
those with the lowest leave the network, and with them the next layer's kernel rows.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from dynprune_jax.build import all_links, one_image, training_images
from dynprune_jax.checkpoint import tree_digest
from dynprune_jax.config import Config
from dynprune_jax.data.batches import stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.evaluate import cascaded
from dynprune_jax.models.links import has_links
from dynprune_jax.network import Network, Values
from dynprune_jax.provenance import provenance
from dynprune_jax.pruning.calls import intercept
from dynprune_jax.pruning.layers import all_modules, conv_layers
from dynprune_jax.pruning.measure import dense_macs
from dynprune_jax.pruning.readers import Links
from dynprune_jax.pruning.removal import (
    FixedFiltersError,
    Scores,
    allot,
    removable,
    remove_filters,
    try_removal,
)
from dynprune_jax.run import Run
from dynprune_jax.train import dense_trained, run_phase
from dynprune_jax.writers import say, write_json

_TAYLOR_BATCHES = 8


def l1(model: Any, links: Links, run: Run | None = None) -> Scores:
    """L1 norm of a filter's weights (Li et al. 2016, arXiv 1608.08710)."""
    del run
    return {name: np.abs(rows).sum(axis=1) for name, rows in _filters(model, links)}


def geometric_median(model: Any, links: Links, run: Run) -> Scores:
    """Sum of a filter's distances to the layer's others: the most replaceable has the lowest.

    He et al. 2018, arXiv 1811.00250, equation 4.
    """
    del run

    def distances(filters: np.ndarray) -> np.ndarray:
        squares = np.sum(filters**2, axis=1)
        apart = squares[:, None] + squares[None, :] - 2 * filters @ filters.T
        return np.sqrt(np.maximum(apart, 0)).sum(axis=1)

    return {name: distances(rows.astype(np.float64)) for name, rows in _filters(model, links)}


def taylor(model: Any, links: Links, run: Run) -> Scores:
    """First-order change of the loss if a map were zero (Molchanov et al. 2016, arXiv 1611.06440).

    The mean over images of `|sum over the map of dC/dh * h|`, equation 8, on augmented training
    images. It is taken before the relu, where `dC/dh * h` is the same as behind it.
    """
    norms = {link[0]: name for name, link in links.items()}
    filters = {norm: all_modules(model)[name].out_features for norm, name in norms.items()}
    network = Network(model)

    @jax.jit
    def scores(values: Values, images: Any, labels: Any, key: Any) -> dict[str, Array]:
        def loss(gates: dict[str, Array]) -> Array:
            def gated(name: str, _: Any, call: Any, *args: Any, **kwargs: Any) -> Array:
                y = call(*args, **kwargs)
                return y * gates[name][:, None, None, :].astype(y.dtype) if name in gates else y

            bound: Any = intercept(network.bind(values), nnx.BatchNorm, gated)
            bound.eval()
            logits = bound(training_images(run.config, key, images))
            return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        ones = {norm: jnp.ones((images.shape[0], n)) for norm, n in filters.items()}
        return jax.tree.map(lambda g: jnp.mean(jnp.abs(g), axis=0), jax.grad(loss)(ones))

    keys = jax.random.split(jax.random.key(run.config.seed), _TAYLOR_BATCHES)
    batches = stream_batches(run.dataset.train, run.config.batch_size, run.config.seed, threads=0)
    each = [
        jax.device_get(scores(network.weights, batch["image"], batch["label"], key))
        for key, batch in zip(keys, batches, strict=False)
    ]
    return {norms[name]: np.mean([batch[name] for batch in each], axis=0) for name in norms}


def random(model: Any, links: Links, run: Run) -> Scores:
    """Control: a uniform draw."""
    rng = np.random.default_rng(run.config.seed)
    return {name: rng.random(len(rows)) for name, rows in _filters(model, links)}


def none(model: Any, links: Links, run: Run) -> Scores:
    """Control: nothing is removed, so that a dense network is trained on for as long."""
    del model, links, run
    return {}


CRITERIA: dict[str, Callable[[Any, Links, Run], Scores]] = {
    f.__name__: f for f in (l1, geometric_median, taylor, random, none)
}


def static(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains the static counterpart of a config's dynamic network, and evaluates it.

    The dense network comes from the dense phase, or from `config.prune.checkpoint`. Filters are
    removed until as many MACs are gone as the config's gates skip, all at once; what is left is
    trained as `config.prune` says. With `config.static.criterion` of `none` nothing is removed.
    Otherwise every convolution loses the same fraction of its filters, or with
    `config.static.allotment` of `gate` one in proportion to the channel ratio of the gate that
    skips them: of its own block where gates are predicted, of the block that reads them where
    they go by attention. Writes `report.json`.

    Returns:
      The content of `report.json`.

    Raises:
      UserError: for a mistake in the config, the data or the work directory.
    """
    started = time.perf_counter()
    run = Run.open(config, workdir)
    if run.dynamic is None or config.prune.start == "scratch":
        raise UserError(
            f"config.prune.epochs is {config.prune.epochs} and config.prune.start is"
            f" {config.prune.start!r}; --mode=static prunes a dense network: it needs epochs, and"
            " a start from dense or checkpoint"
        )
    score, (links, ratios) = CRITERIA[config.static.criterion], removed(run)
    with dense_trained(run) as (dense, timings):
        assert dense is not None  # checked above
        model: Any = run.dense.bind(dense)
        model.eval()
        small = remove_filters(model, links, score(model, links, run), ratios)
        small.train()
        network = Network(small)
        teacher = dense if config.prune.distillation else None
        pruned, timings["prune"] = run_phase(
            run, "prune", network, network.weights, teacher, config.static.criterion
        )
    whole, left_over = run.evaluate(run.dense, dense), run.evaluate(network, pruned)
    cascades = config.cascade.shares if any(ratios.values()) else ()
    report = {
        "dense": whole.summary(),
        "pruned": left_over.summary(whole.usage),
        "cascade": [cascaded(left_over, whole, share) for share in cascades],
        "pruned_without_training": run.evaluate(network, network.weights).summary(whole.usage),
        "criterion": config.static.criterion,
        "filters": {
            name: {"kept": len(kept), "ratio": ratios[name]}
            for name, kept in _filters(small, links)
        },
        "dense_macs_per_image": dense_macs(model, run.one_image),
        "parameters_digest": tree_digest(pruned),
        **provenance(run),
        "phases": timings,
        "seconds": time.perf_counter() - started,
    }
    write_json(run.workdir / "report.json", report)
    say(
        f"{config.model} on {config.data.name}, filters by {config.static.criterion}: accuracy"
        f" {report['dense']['accuracy']:.4f} dense, {report['pruned']['accuracy']:.4f} with"
        f" {report['pruned']['mac_reduction']:.1%} of the MACs removed"
        f" ({report['pruned_without_training']['accuracy']:.4f} before training)"
    )
    return report


def trained(run: Run) -> tuple[Network, Values] | None:
    """The network of a finished static run and its weights; None where the run is another.

    Raises:
      UserError: if the run is not finished.
    """
    if run.filters_removed_by is None:
        return None
    links, ratios = removed(run)
    model: Any = run.dense.bind()
    model.eval()
    network = Network(remove_filters(model, links, l1(model, links), ratios))  # as many of any
    return network, run.static_values(network)


def removed(run: Run) -> tuple[Links, dict[str, float]]:
    """What `static` removes from the network of a run, whose weights do not matter.

    Returns:
      The links whose filters leave, and by convolution the fraction that does.

    Raises:
      UserError: if the removal of filters cannot take away what the config's gates skip.
    """
    config, image = run.config, run.one_image
    if config.static.criterion == "none":
        return {}, {}
    model = run.dense.bind()
    model.eval()
    links = find_removable(config, model, run.dataset.channels, run.links)
    allotted, reduction = shares(config, links), run.mac_reduction()
    try:
        ratios = allot(model, links, image, reduction, allotted)
    except ValueError as error:
        raise UserError(
            f"config.static.allotment is {config.static.allotment!r}, and the gates skip"
            f" {reduction:.1%} of the MACs: {error}"
        ) from error
    check_removal(config, model, links, ratios, image)
    return links, ratios


def find_removable(config: Config, model: nnx.Module, channels: int, links: Links) -> Links:
    """The links of a config's model whose filters can be removed.

    Args:
      config: a checked config.
      model: from `build_model`.
      channels: of the images.
      links: of its predicted gates, if it has some.

    Raises:
      UserError: if it has none.
    """
    links = links or all_links(config, model, channels)
    if has_links(model):
        return links
    try:
        found = removable(model, links, one_image(config, channels))
    except FixedFiltersError as error:
        raise UserError(
            f"config.model is {config.model!r}; static pruning has no place in it: {error}"
        ) from error
    told = f"filters can leave {len(found)} of {len(conv_layers(model))} convolutions"
    say(f"{told}: {', '.join(found)}")
    return found


def check_removal(
    config: Config, model: nnx.Module, links: Links, ratios: Mapping[str, float], image: Any
) -> None:
    """Raises UserError where somebody's own model does not take the removal of filters."""
    if has_links(model):  # ours do, as tests show
        return
    try:
        try_removal(model, links, ratios, image)
    except FixedFiltersError as error:
        raise UserError(f"config.model is {config.model!r}; {error}") from error


def shares(config: Config, links: Links) -> dict[str, float]:
    """What each convolution's filters lose, as a config allots it, up to a common factor.

    Where that goes by the gates' ratios, of those that skip the filters: predicted ones are where
    the filters are, others in front of what reads them. What is read outside of the blocks has the
    ratio of its own, and what is in no block loses nothing.

    Raises:
      UserError: where it is to go by ratios and there are none.
    """
    if config.static.allotment != "gate":
        return dict.fromkeys(links, 1.0)
    given = config.gate.channel_ratio
    if not any(given):
        raise UserError(
            "config.static.allotment is 'gate' and config.gate.channel_ratio is"
            f" {given}; give ratios, or choose uniform"
        )
    predicted = config.gate.kind == "predicted"
    found = {}
    for name, link in links.items():
        blocks = [block_of(name)] if predicted else [block_of(link[1]), block_of(name)]
        found[name] = next((given[block] for block in blocks if block is not None), 0.0)
    return found


def block_of(name: str) -> int | None:
    """Which entry of `model.blocks` a layer of that name is in."""
    first, index, *_ = [*name.split("/"), ""]
    return int(index) if first == "blocks" else None


def _filters(model: Any, links: Links) -> Iterator[tuple[str, np.ndarray]]:
    """The convolutions whose filters can leave, and each one's filters as rows."""
    layers = all_modules(model)
    for name in links:
        kernel = np.asarray(layers[name].kernel[...], np.float32)
        yield name, kernel.reshape(-1, kernel.shape[-1]).T
