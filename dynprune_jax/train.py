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
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dynprune_jax import processes, sharding
from dynprune_jax.checkpoint import Checkpoints
from dynprune_jax.config import Config
from dynprune_jax.errors import UserError
from dynprune_jax.feed import Feed, ratio_schedule
from dynprune_jax.network import Network, Values
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.report import write_report
from dynprune_jax.run import Run
from dynprune_jax.stopping import Stopped, StopSignals
from dynprune_jax.train_step import TrainState
from dynprune_jax.workdir import trains_alone
from dynprune_jax.writers import PhaseBar, Writers, read_metrics, resident_memory_mb


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
    run.check_ratios()
    with dense_trained(run) as (dense, timings):
        pruned = None
        if run.dynamic is not None:
            start = run.dense.weights if config.prune.start == "scratch" else dense
            assert start is not None  # config.check has seen to it
            teacher = dense if config.prune.distillation else None
            gated = run.gated(start)
            pruned, timings["prune"] = run_phase(run, "prune", run.dynamic, gated, teacher)
        return write_report(run, dense, pruned, timings, started)


@contextlib.contextmanager
def dense_trained(run: Run) -> Iterator[tuple[Values | None, dict[str, dict[str, float]]]]:
    """Makes the work directory the run's own, and does phase one or reads what stands for it.

    Inside, no other run trains in that folder, see `trains_alone`.

    Yields:
      Parameters and batch statistics of the dense network, None where the run has none; and
      where the time went, under `dense` if it was trained here.

    Raises:
      UserError: as `train_and_evaluate`.
    """
    sharding.check_batch(run.config.batch_size, run.mesh)
    source = run.start_state() if run.config.prune.start == "checkpoint" else None
    run.claim()
    with trains_alone(run.workdir):
        if source is not None:
            step = int(source.step)
            with run.checkpoints("dense") as checkpoints:
                # What the source becomes later is its own.
                checkpoints.save(step, source, {"total": step})
            yield source.values, {}
        elif run.phase_steps("dense"):
            values, timing = run_phase(run, "dense", run.dense, run.dense.weights)
            yield values, {"dense": timing}
        else:
            yield None, {}


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
    with (
        run.checkpoints(name, filters_removed_by) as checkpoints,
        Feed(run, name, network, teacher) as feed,
    ):
        phase = _Phase(run, name, network, start, feed, checkpoints)
        if not phase.done:
            with (
                Writers(run.workdir, name, phase.row) as writers,
                PhaseBar(name, phase.step, phase.total) as bar,
                StopSignals() as signals,
            ):
                stopped_by = phase.go_on(writers, bar, signals)
                checkpoints.wait()  # here, where a signal is only noted
                # One may also have come during the last save, or with nothing left to do.
                if stopped_by := stopped_by or processes.agree(signals.received or 0):
                    raise Stopped(
                        stopped_by,
                        f"stopped by {signal.Signals(stopped_by).name}; step {phase.step} of"
                        f" {phase.total} of the {name} phase is saved, and the same command goes"
                        " on",
                    )
    return jax.device_get(phase.state.values), phase.timing.summary()


class _Phase:
    """A phase under way, begun at its newest checkpoint or, without one, with `start`.

    Attributes:
      total: steps in all.
      step: steps done.
      state: what they have made.
      timing: where the time went.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        network: Network,
        start: Values,
        feed: Feed,
        checkpoints: Checkpoints,
    ):
        self._run, self._name, self._network = run, name, network
        self._feed, self._checkpoints = feed, checkpoints
        self._schedule = ratio_schedule(run, network.values(PruneRatio))
        self._offset = run.phase_steps("dense") if name == "prune" else 0
        self._every = {
            "evaluate": run.config.evaluate_every_epochs * run.steps_per_epoch,
            "checkpoint": run.config.checkpoint_every_epochs * run.steps_per_epoch,
            "log": run.config.log_every_steps,
        }
        self.total = run.phase_steps(name)
        self.state = feed.place(TrainState.create(start, network, run.optimizer(name)))
        self.timing = Timing()
        self._recent: list[dict[str, float]] = []  # metrics since the last row
        self._dispatched: set[int] = set()  # how many steps: of each number a program is compiled
        if checkpoints.steps():
            self.state, extra = checkpoints.restore(self.state)
            self.timing = Timing(**extra["timing"])
            self._recent = extra["recent"]
            feed.set_position(extra["position"])
        self._began = dataclasses.replace(self.timing)
        self.step = int(self.state.step)
        rows = [row for row in read_metrics(run.workdir) if row["step"] == self.row]
        rows = [row for row in rows if row.get("phase") == name and "test_accuracy" in row]
        owed = self._due("evaluate") and not rows  # cut off after the save and before the row
        self._owed = bool(processes.agree(int(owed)))

    @property
    def row(self) -> int:
        """The step as rows of metrics count it, over both phases."""
        return self._offset + self.step

    @property
    def done(self) -> bool:
        """Whether nothing is left to train or to evaluate."""
        return self.step == self.total and not self._owed

    def _due(self, what: str) -> bool:
        return self.step > 0 and (self.step % self._every[what] == 0 or self.step == self.total)

    def go_on(self, writers: Writers, bar: PhaseBar, signals: StopSignals) -> int:
        """Trains up to the end, or the step that a signal ends; gives its number, or 0."""
        if self._owed:
            self._evaluate(writers, bar, signals)
        stopped_by = 0
        self._clock = time.perf_counter()
        while self.step < self.total and not stopped_by:
            count, metrics = self._advance()
            if not np.isfinite(metrics["loss"]):
                raise self._diverged(f"the loss is {metrics['loss']}")
            bar.advance(count, self._run.config.batch_size, metrics)
            if self._due("log"):
                writers.write(self.row, self._averages())
                self._recent = []
            if self._due("checkpoint"):
                self._save()
            if self._due("evaluate"):
                self._lap("outside_step")
                with contextlib.suppress(Stopped):  # the resumed run evaluates
                    self._evaluate(writers, bar, signals)
                self._lap("evaluation")
            stopped_by = processes.agree(signals.received or 0)
            if stopped_by:
                self._save()  # if it is not yet
        return stopped_by

    def _advance(self) -> tuple[int, dict[str, Any]]:
        """Does the steps up to what is due next, at most a dispatch; gives their mean metrics."""
        most = self._feed.steps_per_dispatch
        due = (_next(self.step, every) for every in self._every.values())
        count = min(most, min(self.total, *due) - self.step)
        if count < most:
            count = 1  # so that at most two programs are ever compiled
        batch = self._feed.next_batch()
        called = time.perf_counter()
        self.state, metrics = self._feed.advance(self.state, count, batch)
        metrics = jax.device_get(metrics)
        self.step += count
        if count in self._dispatched:
            self._lap("outside_step", called)
            self._lap("in_step")
            self.timing.images += count * self._run.config.batch_size
        else:
            self._dispatched.add(count)
            self._lap("compilation")
        means = {key: float(value) for key, value in metrics.items()}
        self._recent.append({**means, "steps": count})
        return count, metrics

    def _lap(self, part: str, now: float | None = None) -> None:
        """Adds the time since the last lap to a part of the timing."""
        now = time.perf_counter() if now is None else now
        setattr(self.timing, part, getattr(self.timing, part) + now - self._clock)
        self._clock = now

    def _evaluate(self, writers: Writers, bar: PhaseBar, signals: StopSignals) -> None:
        ratios = self._schedule(jnp.asarray(self.step - 1))
        # Of many processes none may leave the others in the middle.
        alone = jax.process_count() == 1
        with signals.obeyed() if alone else contextlib.nullcontext():
            accuracy = self._run.evaluate(self._network, self.state.values, ratios).accuracy
        row = {"test_accuracy": accuracy, "resident_memory_mb": resident_memory_mb()}
        writers.write(self.row, row)
        size, now, began = self._run.config.batch_size, self.timing, self._began
        seconds = now.in_step + now.outside_step - began.in_step - began.outside_step
        rate = (now.images - began.images) / size / seconds if seconds else 0.0
        bar.say(self.step, self._run.steps_per_epoch, accuracy, _mean(ratios), rate, size)

    def _averages(self) -> dict[str, Any]:
        """A row of metrics: what was learnt since the last, and how."""
        steps = [metrics["steps"] for metrics in self._recent]
        loss, accuracy = (
            float(np.average([metrics[key] for metrics in self._recent], weights=steps))
            for key in ("loss", "accuracy")
        )
        rate = self._run.learning_rate(self._name)(self.step - 1)
        return {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "learning_rate": float(np.asarray(rate)),
            **_mean(self._schedule(jnp.asarray(self.step - 1))),
        }

    def _diverged(self, what: str) -> UserError:
        name = self._name
        return UserError(
            f"{what} at step {self.step} of the {name} phase, so the run stops (checkpoints of"
            " earlier steps stay); start again in a new workdir, for instance with"
            f" config.{name}.learning_rate below {self._run.config[name].learning_rate:g}"
        )

    def _save(self) -> None:
        saved = jax.device_get(self.state)
        for path, value in saved.values.items():
            if not np.isfinite(value).all():
                raise self._diverged(f"{path} is not finite")
        extra = {
            "timing": dataclasses.asdict(self.timing),
            "position": self._feed.position(),
            "total": self.total,
            "recent": self._recent,
        }
        self._checkpoints.save(self.step, saved, extra)


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
