"""Accuracy over a curve of ratios, by attention and by its controls."""

import itertools
import os
from typing import Any

import rich.table

from dynprune_jax import plots
from dynprune_jax.config import Config
from dynprune_jax.pruning.attention import CRITERIA
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.run import Run
from dynprune_jax.writers import progress_bar, screen, write_json


def sweep(config: Config, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Evaluates a finished run at fractions of its target ratios, without any training.

    With `config.prune.recalibration_images` the batch statistics are made anew for each of them.

    Every gate's ratios are scaled by each of `config.sweep.fractions`, on the weights of the
    dense phase and on those after targeted dropout, with each criterion. The ratios are traced:
    a criterion compiles once. Writes `sweep.json` and `sweep.png`.

    Returns:
      A row for each point: `weights`, `criterion`, `fraction`, `accuracy`, `mac_reduction`,
      `executed_mac_reduction`, `recalibration_images`.

    Raises:
      UserError: for a mistake in the config, or if the run is not finished or prunes nothing.
    """
    run = Run.open(config, workdir)
    dynamic = run.gates("this run has no ratios to sweep")
    trained = run.finished_weights()
    targets = dynamic.values(PruneRatio)
    networks = {criterion: run.network_with(criterion) for criterion in CRITERIA}
    points = list(itertools.product(networks, trained, dict.fromkeys(config.sweep.fractions)))
    rows = []
    with progress_bar("evaluating") as progress:
        for done, (criterion, weights, fraction) in enumerate(points):
            progress(done, len(points))
            ratios = {name: fraction * target for name, target in targets.items()}
            result = run.evaluate(networks[criterion], trained[weights], ratios)
            rows.append(
                {
                    "weights": weights,
                    "criterion": criterion,
                    "fraction": fraction,
                    "accuracy": result.accuracy,
                    "mac_reduction": result.usage.mac_reduction,
                    "executed_mac_reduction": result.usage.executed_mac_reduction,
                    "recalibration_images": run.recalibration_images,
                }
            )
    write_json(run.workdir / "sweep.json", rows)
    plots.save(plots.sweep_figure(rows), run.workdir / "sweep.png")
    _print_table(rows, config)
    return rows


def _print_table(rows: list[dict[str, Any]], config: Config) -> None:
    for weights in dict.fromkeys(row["weights"] for row in rows):  # one table would be too wide
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["weights"] == weights:
                curves.setdefault(row["criterion"], []).append(row)
        title = f"Accuracy of {config.model} on {config.data.name}, {weights} weights"
        table = rich.table.Table(title=title)
        for name in ("cut", *curves):
            table.add_column(name, justify="right")
        for points in zip(*curves.values(), strict=True):
            cut = f"{points[0]['mac_reduction']:.1%}"
            table.add_row(cut, *(f"{point['accuracy']:.4f}" for point in points))
        screen().print(table)
