"""A cascade: the pruned network for every image, the dense one again where it is unsure."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich.table
from flax import nnx

from dynprune_jax import plots, processes
from dynprune_jax.build import evaluation_images
from dynprune_jax.config import Config
from dynprune_jax.errors import UserError
from dynprune_jax.evaluate import Evaluation, cascaded, threshold_of
from dynprune_jax.experiments.timing import (
    Compiled,
    dense_ways,
    planned,
    setting,
    summary,
    timed,
)
from dynprune_jax.pruning.cascade import Cascade, margin
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.forms import Form
from dynprune_jax.run import Run
from dynprune_jax.writers import screen, write_json

_TIMED = 256  # images, or a batch if that is more
_PICTURED = 8


def cascade(config: Config, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Evaluates and times the cascades of a finished run's two networks.

    The pruned network sees every image, and the dense one again the `config.cascade.shares` of
    which it is least sure, see `dynprune_jax.Cascade`. Accuracy and MACs are of the test split.
    Times are of some of its images, in batches of each of `config.benchmark.batch_sizes`: the
    dense network in every way at hand, the pruned one compact, and cascades of it with the fastest
    forms of the dense one, in turns; there the share is one of these very images. Writes
    `cascade.json`, the plans, `cascade.png` and `surest_and_least_sure.png`.

    Returns:
      A row for each batch size and share, 0 for the pruned network alone: the fields of
      `evaluate.cascaded`, `dense_accuracy`, `timed_images`, `timed_share` (the fraction of them
      that the dense network saw), and those of `timing.setting` and `timing.summary`, of
      which `compact_ms` is the cascade's milliseconds a batch.

    Raises:
      UserError: for a mistake in the config, if the run is not finished, prunes nothing or has
        no dense network, or for many processes.
    """
    run = Run.open(config, workdir)
    processes.check_alone("cascade")
    dynamic = run.gates("this run has no pruned network")
    of_dense, of_pruned = run.trained_values()
    if of_dense is None or of_pruned is None:
        raise UserError(
            f"config.prune.start is {config.prune.start!r}: this run has no dense network to see"
            " images again"
        )
    first, second = run.evaluate(dynamic, of_pruned), run.evaluate(run.dense, of_dense)
    shares = (0.0, *config.cascade.shares)
    together = [cascaded(first, second, share) for share in shares]
    pruned = dynamic.bind(run.recalibrated(dynamic, of_pruned))
    dense = run.dense.bind(of_dense)
    pruned.eval()
    dense.eval()
    rows = []
    known: dict[Any, dict[Form, float]] = {}
    for size in config.benchmark.batch_sizes:
        dense_seconds, timed_rows = _time(run, pruned, dense, size, shares, known)
        for found, (told, seconds) in zip(together, timed_rows, strict=True):
            rows.append(
                {
                    **setting(config, size),
                    **summary(dense_seconds, {"compact": seconds}, found["mac_reduction"]),
                    **told,
                    **found,
                    "dense_accuracy": second.accuracy,
                }
            )
        write_json(run.workdir / "cascade.json", rows)
    plots.save(plots.cascade_figure(rows), run.workdir / "cascade.png")
    _draw(run, first)
    _print_table(rows)
    return rows


def _time(
    run: Run,
    pruned: nnx.Module,
    dense: nnx.Module,
    size: int,
    shares: Sequence[float],
    known: dict[Any, dict[Form, float]],
) -> tuple[dict[str, list[float]], list[tuple[dict[str, Any], list[float]]]]:
    """Times the cascades of one batch size; `known` are measurements of layers, see `planned`.

    Returns:
      The seconds a batch of the dense ways, and for each share what was timed and those of the
      cascade.
    """
    test, config = run.dataset.test, run.config
    batches = max(1, min(_TIMED, len(test)) // size)
    chosen = np.random.default_rng(0).permutation(len(test))[: batches * size]
    chosen = np.resize(chosen, batches * size)  # of a split that is less than one batch
    prepare = jax.jit(functools.partial(evaluation_images, config))
    images = [prepare(test.read(rows)[0]) for rows in chosen.reshape(batches, size)]
    plan = functools.partial(planned, config=config, folder=run.workdir, known=known)
    whole_plan = plan("dense", dense, images[0])
    ways = dense_ways(dense, images[0], whole_plan)
    cheap = compact(pruned, images[0], plan=plan("pruned", pruned, images[0]))
    # An eighth of a batch at a time: where a tenth is unsure, that is often enough.
    few = images[0][: math.ceil(size / 8)]
    few_plan = whole_plan if len(few) == size else plan("dense", dense, few)
    again = compact(dense, few, plan=few_plan)
    alone = Compiled(cheap, images[0])
    sure = np.concatenate([np.asarray(margin(alone(batch))) for batch in images])
    compiled = {name: Compiled(way, images[0]) for name, way in ways.items()}
    thresholds = [threshold_of(sure, share) for share in shares]
    names = [f"cascade, {share}" for share in shares]
    for name, threshold in zip(names, thresholds, strict=True):
        both = Cascade(cheap, again, threshold, len(few))
        compiled[name] = Compiled(both, images[0]) if threshold else alone

    def over_all(way: Compiled) -> Callable[[], None]:
        def call() -> None:
            for batch in images:  # each waited for, as by one who asks for the answers
                jax.block_until_ready(way(batch))

        return call

    calls = {name: over_all(way) for name, way in compiled.items()}
    seconds = timed(calls, config.benchmark.repeats, beside=ways, least=None)
    seconds = {name: [taken / batches for taken in times] for name, times in seconds.items()}
    return {name: seconds[name] for name in ways}, [
        (
            {"timed_images": len(sure), "timed_share": float(np.mean(sure < threshold))},
            seconds[name],
        )
        for name, threshold in zip(names, thresholds, strict=True)
    ]


def _draw(run: Run, first: Evaluation) -> None:
    """The images that the pruned network is surest of, and those that it is least sure of."""
    order = np.argsort(first.margins, kind="stable")
    count = min(_PICTURED, len(order))
    chosen = [order[::-1][:count], order[:count]]
    named = run.dataset.class_names
    seen = []
    for rows in chosen:
        images, labels = run.pictures(rows)
        seen.append((images, [str(named[label]) for label in labels]))
    plots.save(
        plots.labelled_images_figure(
            {
                "The pruned network is surest of these (and their classes): done": seen[0],
                "and least sure of these: the dense network sees them too": seen[1],
            }
        ),
        run.workdir / "surest_and_least_sure.png",
    )


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    first = rows[0]
    table = rich.table.Table(
        title=f"{first['network']}, {first['image_size']}² images, {first['dtype']};"
        f" {first['device']}; milliseconds a batch\ndense: accuracy {first['dense_accuracy']:.4f}"
    )
    for column in ("batch", "dense again", "accuracy", "cut", "dense", "cascade", "speedup"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch_size"]),
            f"{row['share']:.1%}",
            f"{row['accuracy']:.4f}",
            f"{row['mac_reduction']:.1%}",
            f"{row['fastest_dense_ms']:.3f}",
            f"{row['compact_ms']:.3f}",
            f"{row['speedup']:.2f}×",
        )
    screen().print(table)
