"""What targeted dropout costs in training: a dynamic step against a dense one."""

import contextlib
import os
import statistics
from typing import Any

import jax
import rich.table

from dynprune_jax import sharding
from dynprune_jax.config import Config
from dynprune_jax.experiments.timing import quartiles_ms, setting
from dynprune_jax.feed import Feed
from dynprune_jax.pruning.plan import interleaved
from dynprune_jax.run import Run
from dynprune_jax.train_step import TrainState
from dynprune_jax.workdir import make_folder
from dynprune_jax.writers import screen, write_json


def step_cost(config: Config, workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Times a training step, dense and with targeted dropout, on freshly drawn weights.

    Writes `step_cost.json`.

    Returns:
      A row for each kind of step: `step`, the fields of `timing.setting`, `devices`, median and
      quartiles in milliseconds, `images_per_second`, and `cost`, the
      median over turns of its time by the dense one's of the same turn.

    Raises:
      UserError: for a mistake in the config.
    """
    run = Run.open(config, workdir)
    dynamic = run.gates("there is no dynamic step to time")
    sharding.check_batch(config.batch_size, run.mesh)
    make_folder(run.workdir)
    steps = {}
    with contextlib.ExitStack() as feeds:
        for name, phase, network in (("dense", "dense", run.dense), ("dynamic", "prune", dynamic)):
            feed = feeds.enter_context(Feed(run, phase, network))
            state = TrainState.create(network.weights, network, run.optimizer(phase))
            steps[name] = _Stepper(feed, feed.place(state))
        seconds = interleaved(steps, config.benchmark.repeats)
    rows = []
    for name, times in seconds.items():
        ratios = [mine / dense for mine, dense in zip(times, seconds["dense"], strict=True)]
        rows.append(
            {
                "step": name,
                **setting(config, config.batch_size),
                "devices": jax.device_count(),
                "repeats": len(times),
                "median_ms": 1e3 * statistics.median(times),
                "quartiles_ms": quartiles_ms(times),
                "images_per_second": config.batch_size / statistics.median(times),
                "cost": statistics.median(ratios),
            }
        )
    write_json(run.workdir / "step_cost.json", rows)
    _print_table(rows)
    return rows


class _Stepper:
    """One training step a call, each on from the last; of a stream, always its first batch."""

    def __init__(self, feed: Feed, state: TrainState):
        self._feed = feed
        self._state = state
        self._batch = feed.next_batch()

    def __call__(self) -> Any:
        self._state, metrics = self._feed.advance(self._state, 1, self._batch)
        return self._state, metrics


def _print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    table = rich.table.Table(
        title=f"Training step of {first['network']}, {first['image_size']}² images, batch"
        f" {first['batch_size']}, {first['dtype']}, {first['devices']} x {first['device']};"
        " cost: median over turns of a step's time by the dense one's of the same turn"
    )
    for column in ("step", "median ms", "quartiles ms", "images/s", "cost"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        low, high = row["quartiles_ms"]
        table.add_row(
            row["step"],
            f"{row['median_ms']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['images_per_second']:.0f}",
            f"{row['cost']:.3f}",
        )
    screen().print(table)
