"""Static baselines: whole filters removed for good, the same ones for every input.

The counterpart of a dynamic network at equal MACs: same data, same dense weights, same schedule
and budget of training, same counter. A *criterion* gives every filter of a convolution a score;
those with the lowest leave the network, and with them the next layer's kernel rows.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.build import training_images
from dynprune_jax.checkpoint import tree_digest
from dynprune_jax.config import Config
from dynprune_jax.data.batches import stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.evaluate import cascaded
from dynprune_jax.models.links import LINKED, Link, links
from dynprune_jax.pruning.calls import intercept
from dynprune_jax.pruning.measure import dense_macs, measure
from dynprune_jax.pruning.ratios import least_factor, scaled
from dynprune_jax.report import provenance
from dynprune_jax.run import Run
from dynprune_jax.train import run_phase, train_dense
from dynprune_jax.train_step import Network, Values
from dynprune_jax.writers import screen, write_json

_TAYLOR_BATCHES = 8

Scores = dict[str, Float[np.ndarray, " filters"]]


def l1(model: Any, run: Run | None = None) -> Scores:
    """L1 norm of a filter's weights (Li et al. 2016, arXiv 1608.08710)."""
    del run
    return {link.name: np.abs(_filters(link)).sum(axis=1) for link in links(model)}


def geometric_median(model: Any, run: Run) -> Scores:
    """Sum of a filter's distances to the layer's others: the most replaceable has the lowest.

    He et al. 2018, arXiv 1811.00250, equation 4.
    """
    del run

    def distances(filters: np.ndarray) -> np.ndarray:
        squares = np.sum(filters**2, axis=1)
        apart = squares[:, None] + squares[None, :] - 2 * filters @ filters.T
        return np.sqrt(np.maximum(apart, 0)).sum(axis=1)

    return {link.name: distances(_filters(link).astype(np.float64)) for link in links(model)}


def taylor(model: Any, run: Run) -> Scores:
    """First-order change of the loss if a map were zero (Molchanov et al. 2016, arXiv 1611.06440).

    The mean over images of `|sum over the map of dC/dh * h|`, equation 8, on augmented training
    images. It is taken before the relu, where `dC/dh * h` is the same as behind it.
    """
    norms = {link.norm_name: link.name for link in links(model)}
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

        ones = {
            link.norm_name: jnp.ones((images.shape[0], link.conv.out_features))
            for link in links(model)
        }
        return jax.tree.map(lambda g: jnp.mean(jnp.abs(g), axis=0), jax.grad(loss)(ones))

    keys = jax.random.split(jax.random.key(run.config.seed), _TAYLOR_BATCHES)
    batches = stream_batches(run.dataset.train, run.config.batch_size, run.config.seed, threads=0)
    each = [
        jax.device_get(scores(network.weights, batch["image"], batch["label"], key))
        for key, batch in zip(keys, batches, strict=False)
    ]
    return {norms[name]: np.mean([batch[name] for batch in each], axis=0) for name in norms}


def random(model: Any, run: Run) -> Scores:
    """Control: a uniform draw."""
    rng = np.random.default_rng(run.config.seed)
    return {link.name: rng.random(link.conv.out_features) for link in links(model)}


def none(model: Any, run: Run) -> Scores:
    """Control: nothing is removed, so that a dense network is trained on for as long."""
    del run
    return {link.name: np.zeros(link.conv.out_features) for link in links(model)}


CRITERIA: dict[str, Callable[[Any, Run], Scores]] = {
    f.__name__: f for f in (l1, geometric_median, taylor, random, none)
}


def remove_filters(model: Any, scores: Scores, ratios: dict[str, float]) -> Any:
    """Returns a smaller model without the lowest-scored filters; the given one stays as it is.

    Args:
      model: one of this package's; its arrays are read, so it cannot be traced.
      scores: by convolution, one for each of its filters.
      ratios: by convolution, the fraction of its filters to remove, in [0, 1).
    """
    small = nnx.clone(model)

    def keep(owner: Any, name: str, kept: np.ndarray, axis: int) -> None:
        # By NumPy, which compiles nothing: each of the many sizes would be a program of its own.
        variable = getattr(owner, name)
        if variable is not None:
            value = np.take(np.asarray(variable.get_value()), kept, axis)
            setattr(owner, name, type(variable)(jnp.asarray(value)))

    for link in links(small):
        n = link.conv.out_features
        count = _kept(n, ratios[link.name])
        kept = np.sort(np.argsort(-scores[link.name], kind="stable")[:count])
        for name in ("kernel", "bias"):
            keep(link.conv, name, kept, -1)
        for name in ("scale", "bias", "mean", "var"):
            keep(link.norm, name, kept, -1)
        link.conv.out_features = link.norm.num_features = count
        if isinstance(link.reader, nnx.Conv):
            keep(link.reader, "kernel", kept, 2)
            link.reader.in_features = count
        else:  # a map laid out as one vector: its channels come last
            rows = np.arange(link.reader.in_features).reshape(-1, n)[:, kept].ravel()
            keep(link.reader, "kernel", rows, 0)
            link.reader.in_features = len(rows)
    return small


def allot(model: Any, image: Any, mac_reduction: float, shares: dict[str, float]) -> dict[str, Any]:
    """The ratio of every convolution with which a model loses that fraction of its MACs.

    Args:
      model: one of this package's.
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
    found = links(model)

    def at(factor: float) -> dict[str, float]:
        return {name: scaled(share, factor) for name, share in shares.items()}

    def reaches(factor: float) -> bool:
        macs, ratios = {layer.name: layer.dense_macs for layer in usage.layers}, at(factor)
        for link in found:
            n = link.conv.out_features
            for name in (link.name, link.reader_name):  # one makes n maps, the other reads them
                macs[name] = macs[name] * _kept(n, ratios[link.name]) // n
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
    reduction = 0.0 if config.static.criterion == "none" else run.mac_reduction()
    try:  # before anything is trained: no weights matter
        ratios = allot(model, image, reduction, shares(config, model))
    except ValueError as error:
        raise UserError(f"config.static.allotment: {error}") from error
    dense, timings = train_dense(run)
    assert dense is not None  # checked above
    model = run.dense.bind(dense)
    model.eval()
    small = remove_filters(model, CRITERIA[config.static.criterion](model, run), ratios)
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
            link.name: {"kept": link.conv.out_features, "ratio": ratios[link.name]}
            for link in links(small)
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


def refuse_own(config: Config, model: Any) -> None:
    """Raises UserError for a model that is no architecture of this package."""
    if not isinstance(model, LINKED):
        raise UserError(
            f"config.model is {config.model!r}; filters are removed from our architectures alone:"
            " choose gates, or one of dynprune_jax.models"
        )


def shares(config: Config, model: Any) -> dict[str, float]:
    """What each convolution's filters lose, as a config allots it, up to a common factor.

    Raises:
      UserError: for somebody's own model, or where it is to go by ratios and there are none.
    """
    refuse_own(config, model)
    if config.static.allotment != "gate":
        return {link.name: 1.0 for link in links(model)}
    given = config.gate.channel_ratio
    if not any(given):
        raise UserError(
            "config.static.allotment is 'gate' and config.gate.channel_ratio is"
            f" {given}; give ratios, or choose uniform"
        )
    predicted = config.gate.kind == "predicted"  # then gates are where the filters are
    return {
        link.name: given[link.block if predicted else link.reader_block] for link in links(model)
    }


def _kept(n: int, ratio: float) -> int:
    """How many of n filters are left: `kept_count` in Python's numbers, which compile nothing."""
    return max(n - int(ratio * n + 1e-6), 1)


def _filters(link: Link) -> np.ndarray:
    """A convolution's filters as rows."""
    kernel = np.asarray(link.conv.kernel[...])
    return kernel.reshape(-1, kernel.shape[-1]).T
