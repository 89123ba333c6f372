"""The only loop: dense, then targeted dropout, then the evaluation; it owns cadence and order.

Order of a resumed run: the config must be the workdir's own; each phase goes on from its newest
checkpoint that is not damaged; rows of metrics after that step are taken out; an evaluation that
was cut off is done; a finished phase is only read back.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynprune_jax import processes, sharding
from dynprune_jax.checkpoint import Checkpoints
from dynprune_jax.config import Config
from dynprune_jax.errors import UserError
from dynprune_jax.feed import Feed, ratio_schedule
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.report import write_report
from dynprune_jax.run import Run
from dynprune_jax.stopping import Stopped, StopSignals
from dynprune_jax.train_step import Network, TrainState, Values
from dynprune_jax.writers import Screen, Writers, read_metrics, resident_memory_mb


def train_and_evaluate(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains both phases, or goes on where the work directory stands, and evaluates.

    Args:
      config: see `dynprune_jax.config.base_config`.
      workdir: folder for checkpoints, metrics, pictures and `report.json`.

    Returns:
      The content of `report.json`.

    Raises:
      UserError: for a mistake in the config, the data or the work directory, or when the loss
        is no longer finite.
      Stopped: after SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    started = time.perf_counter()
    run = Run.open(config, workdir)
    run.check_ascent()
    dense, timings = train_dense(run)
    pruned = None
    if run.dynamic is not None:
        start = run.dense.weights if config.prune.start == "scratch" else dense
        assert start is not None  # config.check has seen to it
        teacher = dense if config.prune.distillation else None
        pruned, timings["prune"] = run_phase(run, "prune", run.dynamic, run.gated(start), teacher)
    return write_report(run, dense, pruned, timings, started)


def train_dense(run: Run) -> tuple[Values | None, dict[str, dict[str, float]]]:
    """Makes the work directory the run's own, and does phase one or reads what stands for it.

    Returns:
      Parameters and batch statistics of the dense network, None where the run has none; and
      where the time went, under `dense` if it was trained here.

    Raises:
      UserError: as `train_and_evaluate`.
    """
    sharding.check_batch(run.config.batch_size, run.mesh)
    if run.config.prune.start == "checkpoint":
        source = run.start_state()
        run.claim()
        step = int(source.step)
        folder, of = run.workdir / "checkpoints" / "dense", run.identity("dense")
        with Checkpoints(folder, of=of, assumed=run.assumed(), mend=True) as checkpoints:
            # What the source becomes later is its own.
            checkpoints.save(step, source, {"total": step})
        return source.values, {}
    run.claim()
    if not run.phase_steps("dense"):
        return None, {}
    values, timing = run_phase(run, "dense", run.dense, run.dense.weights)
    return values, {"dense": timing}


def evaluate_workdir(config: Config, workdir: str | os.PathLike) -> dict[str, Any]:
    """Evaluates the networks of a finished run again; writes its report and pictures anew.

    Raises:
      UserError: as `train_and_evaluate`, and if the run is not finished.
    """
    run = Run.open(config, workdir)
    return write_report(run, *run.trained_values())


@dataclasses.dataclass
class Timing:
    """Where the time of a phase went, in seconds; evaluation and compilation stand apart.

    Attributes:
      images: trained on while the clocks ran.
      in_step: from the call of the compiled step until its results were there.
      outside_step: everything else in the loop: data, logging, checkpoints.
      evaluation: of the test split along the way.
      compilation: the first call of the step, its own steps included.
    """

    images: int = 0
    in_step: float = 0.0
    outside_step: float = 0.0
    evaluation: float = 0.0
    compilation: float = 0.0

    def summary(self) -> dict[str, float]:
        """The seconds, the rate and the share of time outside of the compiled step."""
        loop = self.in_step + self.outside_step
        return {
            **dataclasses.asdict(self),
            "images_per_second": self.images / loop if loop else 0.0,
            "share_outside_step": self.outside_step / loop if loop else 0.0,
        }


def run_phase(
    run: Run,
    name: str,
    network: Network,
    start: Values,
    teacher: Values | None = None,
    filters_removed_by: str | None = None,
) -> tuple[Values, dict[str, float]]:
    """Trains one phase to its end, from its newest good checkpoint if there is any.

    Args:
      run: the run.
      name: `dense` or `prune`, a section of the config.
      network: what to train.
      start: parameters and batch statistics to begin with.
      teacher: those of the dense network to learn from, or None.
      filters_removed_by: the criterion by which a static network became smaller, or None.

    Returns:
      The trained parameters and batch statistics, and where the time went.

    Raises:
      UserError: if the loss is no longer finite, or every checkpoint is damaged.
      Stopped: after SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    config, total = run.config, run.phase_steps(name)
    offset = run.phase_steps("dense") if name == "prune" else 0
    schedule = ratio_schedule(run, network.values(PruneRatio))
    state = TrainState.create(start, network, run.optimizer(name))
    timing = Timing()
    recent: list[dict[str, float]] = []
    folder, of = run.workdir / "checkpoints" / name, run.identity(name, filters_removed_by)
    # Older ones do not tell how they were pruned: there the shapes must do.
    assumed = run.assumed() | {"filters removed by": filters_removed_by}
    with (
        Checkpoints(folder, of=of, assumed=assumed, mend=True) as checkpoints,
        Feed(run, name, network, run.mesh, teacher) as feed,
    ):
        state = feed.place(state)
        if checkpoints.steps():
            state, extra = checkpoints.restore(state)
            timing = Timing(**extra["timing"])
            recent = extra["recent"]
            feed.set_position(extra["position"])
        step = int(state.step)
        every_epochs = {
            "evaluate": config.evaluate_every_epochs * run.steps_per_epoch,
            "checkpoint": config.checkpoint_every_epochs * run.steps_per_epoch,
        }

        def due(what: str) -> bool:
            return step > 0 and (step % every_epochs[what] == 0 or step == total)

        rows = [row for row in read_metrics(run.workdir) if row["step"] == offset + step]
        rows = [row for row in rows if row.get("phase") == name and "test_accuracy" in row]
        owed = due("evaluate") and not rows
        if step == total and not owed:
            return jax.device_get(state.values), timing.summary()
        with (
            Writers(run.workdir, name, offset + step) as writers,
            Screen(name, step, total) as screen,
            StopSignals() as signals,
        ):

            def evaluate() -> None:
                ratios = schedule(jnp.asarray(step - 1))
                # Of many processes none may leave the others in the middle.
                alone = jax.process_count() == 1
                with signals.obeyed() if alone else contextlib.nullcontext():
                    accuracy = run.evaluate(network, state.values, ratios).accuracy
                row = {"test_accuracy": accuracy, "resident_memory_mb": resident_memory_mb()}
                writers.write(offset + step, row)
                screen.say(step, run.steps_per_epoch, accuracy, _mean(ratios))

            if owed:
                evaluate()
            clock = time.perf_counter()
            stopped_by = 0
            while step < total and not stopped_by:
                ends = [total, *(_next(step, every) for every in every_epochs.values())]
                ends.append(_next(step, config.log_every_steps))
                count = min(feed.steps_per_dispatch, min(ends) - step)
                if count < feed.steps_per_dispatch:
                    count = 1  # so that at most two programs are ever compiled
                batch = feed.next_batch()
                called = time.perf_counter()
                state, metrics = feed.advance(state, count, batch)
                metrics = jax.device_get(metrics)
                now = time.perf_counter()
                step += count
                if feed.compiled(count):
                    timing.in_step += now - called
                    timing.outside_step += called - clock
                    timing.images += count * config.batch_size
                else:
                    timing.compilation += now - clock
                clock = now
                means = {key: float(value) for key, value in metrics.items()}
                recent.append({**means, "steps": count})
                _stop_if_not_finite(run, name, step, metrics)
                screen.advance(count, config.batch_size, metrics)
                if step % config.log_every_steps == 0 or step == total:
                    writers.write(offset + step, _row(run, name, recent, schedule, step))
                    recent = []
                if due("evaluate"):
                    timing.outside_step += time.perf_counter() - clock
                    clock = time.perf_counter()
                    with contextlib.suppress(Stopped):  # save first; the resumed run evaluates
                        evaluate()
                    timing.evaluation += time.perf_counter() - clock
                    clock = time.perf_counter()
                stopped_by = processes.agree(signals.received or 0)
                if due("checkpoint") or stopped_by:
                    saved = jax.device_get(state)
                    _stop_if_weights_are_not_finite(run, name, step, saved)
                    extra = {
                        "timing": dataclasses.asdict(timing),
                        "position": feed.position(),
                        "total": total,
                        "recent": recent,
                    }
                    checkpoints.save(step, saved, extra)
            # A signal may have come since: during the last save, or where nothing was left to do.
            if stopped_by := stopped_by or processes.agree(signals.received or 0):
                checkpoints.wait()
                raise Stopped(
                    stopped_by,
                    f"stopped by {signal.Signals(stopped_by).name}; step {step} of {total} of the"
                    f" {name} phase is saved, and the same command goes on",
                )
    return jax.device_get(state.values), timing.summary()


def _next(step: int, every: int) -> int:
    return (step // every + 1) * every


def _mean(ratios: Values) -> dict[str, float | None]:
    """The mean ratio over the gates on each axis; None where no gate is on that axis.

    Predicted gates choose channels where these are made: the convolutions that read them follow.
    """

    def mean(axis: str) -> float | None:
        values = [float(value) for name, value in ratios.items() if name.endswith(axis)]
        return float(np.mean(values)) if values else None

    predicted, read = mean("feature_ratio"), mean("channel_ratio")
    return {
        "channel_ratio": read if predicted is None else predicted,
        "column_ratio": mean("column_ratio"),
    }


def _row(
    run: Run, name: str, recent: Sequence[Mapping[str, Any]], schedule: Any, step: int
) -> dict[str, Any]:
    steps = [metrics["steps"] for metrics in recent]
    loss, accuracy = (
        float(np.average([metrics[key] for metrics in recent], weights=steps))
        for key in ("loss", "accuracy")
    )
    return {
        "train_loss": loss,
        "train_accuracy": accuracy,
        "learning_rate": float(np.asarray(run.learning_rate(name)(step - 1))),
        **_mean(schedule(jnp.asarray(step - 1))),
    }


def _stop_if_not_finite(run: Run, name: str, step: int, metrics: Mapping[str, Any]) -> None:
    if not np.isfinite(metrics["loss"]):
        raise _diverged(run, name, f"the loss is {metrics['loss']}", step)


def _stop_if_weights_are_not_finite(run: Run, name: str, step: int, state: TrainState) -> None:
    for path, value in state.values.items():
        if not np.isfinite(value).all():
            raise _diverged(run, name, f"{path} is not finite", step)


def _diverged(run: Run, name: str, what: str, step: int) -> UserError:
    return UserError(
        f"{what} at step {step} of the {name} phase, so the run stops (checkpoints of earlier steps"
        f" stay); start again in a new workdir, for instance with config.{name}.learning_rate below"
        f" {run.config[name].learning_rate:g}"
    )
