"""Static baselines: whole filters removed for good, the same ones for every input.

The counterpart of a dynamic network at equal MACs: same data, same dense weights, same schedule
and budget of training, same counter. A *criterion* gives every filter of a convolution a score;
those with the lowest leave the network, and with them the next layer's kernel rows.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.build import Links, all_links, one_image, training_images
from dynprune_jax.checkpoint import tree_digest
from dynprune_jax.config import Config
from dynprune_jax.data.batches import stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.evaluate import cascaded
from dynprune_jax.models.links import LINKED
from dynprune_jax.pruning.calls import intercept
from dynprune_jax.pruning.layers import all_modules
from dynprune_jax.pruning.measure import dense_macs, measure
from dynprune_jax.pruning.ratios import least_factor, scaled
from dynprune_jax.report import provenance
from dynprune_jax.run import Run
from dynprune_jax.train import run_phase, train_dense
from dynprune_jax.train_step import Network, Values
from dynprune_jax.writers import screen, write_json

_TAYLOR_BATCHES = 8

Scores = dict[str, Float[np.ndarray, " filters"]]


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
    norms = {norm: name for name, (norm, _) in links.items()}
    filters = {norm: all_modules(model)[name].out_features for norm, name in norms.items()}
    network = Network(model)

    @jax.jit
    def scores(values: Values, images: Any, labels: Any, key: Any) -> dict[str, Array]:
        def loss(gates: dict[str, Array]) -> Array:
            def gated(name: str, _: Any, call: Any, inputs: Array) -> Array:
                y = call(inputs)
                return y * gates[name][:, None, None, :] if name in gates else y

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
    del run
    return {name: np.zeros(len(rows)) for name, rows in _filters(model, links)}


CRITERIA: dict[str, Callable[[Any, Links, Run], Scores]] = {
    f.__name__: f for f in (l1, geometric_median, taylor, random, none)
}


def remove_filters(model: Any, links: Links, scores: Scores, ratios: dict[str, float]) -> Any:
    """Returns a smaller model without the lowest-scored filters; the given one stays as it is.

    Args:
      model: any, of these links; its arrays are read, so it cannot be traced.
      links: from `removable`.
      scores: by convolution, one for each of its filters.
      ratios: by convolution, the fraction of its filters to remove, in [0, 1).
    """
    small = nnx.clone(model)
    layers = all_modules(small)

    def keep(owner: Any, name: str, kept: np.ndarray, axis: int) -> None:
        # By NumPy, which compiles nothing: each of the many sizes would be a program of its own.
        variable = getattr(owner, name)
        if variable is not None:
            value = np.take(np.asarray(variable.get_value()), kept, axis)
            setattr(owner, name, type(variable)(jnp.asarray(value)))

    for name, (norm_name, reader_name) in links.items():
        conv, norm, reader = layers[name], layers[norm_name], layers[reader_name]
        n = conv.out_features
        count = _kept(n, ratios[name])
        kept = np.sort(np.argsort(-scores[name], kind="stable")[:count])
        for part in ("kernel", "bias"):
            keep(conv, part, kept, -1)
        for part in ("scale", "bias", "mean", "var"):
            keep(norm, part, kept, -1)
        conv.out_features = norm.num_features = count
        # What is laid out as a vector, or has been before, has its channels last.
        rows = np.arange(reader.in_features).reshape(-1, n)[:, kept].ravel()
        keep(reader, "kernel", rows, -2)
        reader.in_features = len(rows)
    return small


def removable(config: Config, model: Any, channels: int) -> Links:
    """The links whose filters can be removed, of our models or of somebody's own.

    Those of somebody's own are tried: the model without half of its filters must take an image. A
    link whose reader has a filter for each of its channels is left out.

    Args:
      config: a checked config.
      model: from `build_model`.
      channels: of the images.

    Raises:
      UserError: if there are none, or the model's code does not take fewer filters.
    """
    links = all_links(config, model, channels)
    if isinstance(model, LINKED):
        return links
    said = f"config.model is {config.model!r}; "
    layers = all_modules(model)
    links = {
        name: (norm, reader)
        for name, (norm, reader) in links.items()
        if getattr(layers[reader], "feature_group_count", 1) == 1
        and all(getattr(layers[layer], "mask", None) is None for layer in (name, reader))
    }
    if not links:
        raise UserError(f"{said}it has no filters that can leave alone, for static pruning")
    small = remove_filters(model, links, l1(model, links), dict.fromkeys(links, 0.5))
    small.eval()
    try:
        nnx.eval_shape(lambda small, images: small(images), small, one_image(config, channels))
    except Exception as error:  # whatever code of somebody else's raises
        raise UserError(
            f"{said}its code counts on the number of its filters, so that static pruning cannot"
            f" remove any: {str(error).partition(chr(10))[0]}"
        ) from error
    return links


def allot(
    model: Any, links: Links, image: Any, mac_reduction: float, shares: dict[str, float]
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

    def at(factor: float) -> dict[str, float]:
        return {name: scaled(share, factor) for name, share in shares.items()}

    def reaches(factor: float) -> bool:
        macs, ratios = {layer.name: layer.dense_macs for layer in usage.layers}, at(factor)
        for name, n in filters.items():
            for layer in (name, links[name][1]):  # one makes n maps, the other reads them
                macs[layer] = macs[layer] * _kept(n, ratios[name]) // n
        left = usage.other_macs + sum(macs.values())
        return 1.0 - left / usage.dense_macs >= mac_reduction - 1e-9

    factor = least_factor(shares.values(), reaches)
    if factor is None:
        raise ValueError(f"no removal of filters takes {mac_reduction:.1%} of the MACs away")
    return at(factor)


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
    image = run.one_image
    model: Any = run.dense.bind(run.dense.weights)
    model.eval()
    links = removable(config, model, run.dataset.channels)
    reduction = 0.0 if config.static.criterion == "none" else run.mac_reduction()
    try:  # before anything is trained: no weights matter
        ratios = allot(model, links, image, reduction, shares(config, links))
    except ValueError as error:
        raise UserError(f"config.static.allotment: {error}") from error
    dense, timings = train_dense(run)
    assert dense is not None  # checked above
    model = run.dense.bind(dense)
    model.eval()
    scores = CRITERIA[config.static.criterion](model, links, run)
    small = remove_filters(model, links, scores, ratios)
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
        "pruned": left_over.summary(),
        "cascade": [cascaded(left_over, whole, share) for share in cascades],
        "pruned_without_training": run.evaluate(network, network.weights).summary(),
        "criterion": config.static.criterion,
        "filters": {
            name: {"kept": len(kept), "ratio": ratios[name]}
            for name, kept in _filters(small, links)
        },
        "dense_macs_per_image": dense_macs(model, image),
        "parameters_digest": tree_digest(pruned),
        **provenance(run),
        "phases": timings,
        "seconds": time.perf_counter() - started,
    }
    for name in ("pruned", "pruned_without_training"):  # counted against the dense network
        for part in ("", "executed_"):
            left = report[name][f"{part}macs_per_image"]["mean"]
            whole = report["dense"][f"{part}macs_per_image"]["mean"]
            report[name][f"{part}mac_reduction"] = 1.0 - left / whole
    write_json(run.workdir / "report.json", report)
    screen().print(
        f"{config.model} on {config.data.name}, filters by {config.static.criterion}: accuracy"
        f" {report['dense']['accuracy']:.4f} dense, {report['pruned']['accuracy']:.4f} with"
        f" {report['pruned']['mac_reduction']:.1%} of the MACs removed"
        f" ({report['pruned_without_training']['accuracy']:.4f} before training)",
        highlight=False,
        soft_wrap=True,
    )
    return report


def shares(config: Config, links: Links) -> dict[str, float]:
    """What each convolution's filters lose, as a config allots it, up to a common factor.

    Where that goes by the gates' ratios, of those that skip the filters: predicted ones are where
    the filters are, others in front of what reads them; what the head reads has those of the last
    block, and what is in no block loses nothing.

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
    for name, (_, reader) in links.items():
        blocks = [block_of(name)] if predicted else [block_of(reader), block_of(name)]
        found[name] = next((given[block] for block in blocks if block is not None), 0.0)
    return found


def block_of(name: str) -> int | None:
    """Which entry of `model.blocks` a layer of that name is in."""
    first, index, *_ = [*name.split("/"), ""]
    return int(index) if first == "blocks" else None


def _kept(n: int, ratio: float) -> int:
    """How many of n filters are left: `kept_count` in Python's numbers, which compile nothing."""
    return max(n - int(ratio * n + 1e-6), 1)


def _filters(model: Any, links: Links) -> Iterator[tuple[str, np.ndarray]]:
    """The convolutions whose filters can leave, and each one's filters as rows."""
    layers = all_modules(model)
    for name in links:
        kernel = np.asarray(layers[name].kernel[...])
        yield name, kernel.reshape(-1, kernel.shape[-1]).T
