"""The data joined to the compiled step of a phase, from device memory or from a stream."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dynprune_jax import sharding
from dynprune_jax.build import training_images
from dynprune_jax.convolution import training_options
from dynprune_jax.data.batches import device_batch, stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.network import Network, Values
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.schedules import elastic
from dynprune_jax.run import Run
from dynprune_jax.train_step import TrainState, train_step


class Feed:
    """Joins the data to the compiled step: from device memory, or from a stream.

    Attributes:
      steps_per_dispatch: how many steps one call of the compiled step does, at most.

    Args:
      run: the run.
      name: of the phase.
      network: what is trained.
      teacher: parameters and batch statistics of the dense network to learn from, or None.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        network: Network,
        teacher: Values | None = None,
    ):
        mesh = run.mesh
        self._run = run
        phase_key = jax.random.fold_in(jax.random.key(run.config.seed), name == "prune")
        order_key, augment_key = jax.random.split(phase_key)
        # Given to the step and not built into it, so that runs of other seeds and ratios have the
        # very same program: JAX's compilation cache then serves a whole study.
        self._given = sharding.replicate(
            {
                "order": order_key,
                "augment": augment_key,
                "fraction": jax.random.fold_in(phase_key, 2),
                "settings": network.settings,
                "teacher": None if teacher is None else dict(teacher),
            },
            mesh,
        )
        one = functools.partial(
            train_step,
            network=network,
            optimizer=run.optimizer(name),
            label_smoothing=run.config.optim.label_smoothing,
            distillation=run.config.prune.distillation,
            temperature=run.config.prune.temperature,
        )

        def learn(
            state: TrainState, images: Any, labels: Any, given: Mapping[str, Any]
        ) -> tuple[TrainState, Any]:
            key = jax.random.fold_in(given["augment"], state.step)
            model: Any = None
            if given["teacher"] is not None:
                model = run.dense.bind(given["teacher"])
                model.eval()
            batch = training_images(run.config, key, images), labels
            settings = given["settings"]
            targets = {name: settings[name] for name in network.values(PruneRatio)}
            ratios = ratio_schedule(run, targets, given["fraction"])
            return one(state, batch, settings=settings, ratios=ratios, teacher=model)

        def learn_from_memory(
            state: TrainState, data: Any, given: Mapping[str, Any], count: int
        ) -> tuple[TrainState, Any]:
            def body(state: TrainState, _: None) -> tuple[TrainState, Any]:
                size = run.config.batch_size
                batch = device_batch(given["order"], state.step, data[0], data[1], size)
                images, labels = sharding.split_batch(batch, mesh)
                return learn(state, images, labels, given)

            if count == 1:
                return body(state, None)
            state, metrics = jax.lax.scan(body, state, length=count)
            return state, jax.tree.map(jnp.mean, metrics)

        compiled = functools.partial(
            jax.jit,
            donate_argnums=0,
            out_shardings=sharding.whole(mesh),
            compiler_options=training_options(),
        )
        self._stream = None
        if run.in_memory:
            # Not past a row of the log, where a dispatch has to end.
            longest = min(run.config.log_every_steps, run.steps_per_epoch)
            several = 1 if jax.default_backend() == "cpu" else longest
            self.steps_per_dispatch = min(run.config.steps_per_dispatch or several, longest)
            self._data = sharding.replicate(run.train_arrays, mesh)
            self._step = compiled(learn_from_memory, static_argnames="count")
        else:
            self.steps_per_dispatch = 1
            self._stream = stream_batches(
                run.dataset.train,
                run.config.batch_size,
                run.config.seed,
                threads=run.config.data.threads,
                rows=sharding.local_rows(run.config.batch_size, mesh),
            )
            self._step = compiled(learn)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def place(self, state: TrainState) -> TrainState:
        """Copies a state to where the compiled step expects it; the step then eats the copy."""
        return sharding.replicate(jax.tree.map(jnp.copy, state), self._run.mesh)

    def position(self) -> dict[str, Any] | None:
        """Where the stream stands; None for data in memory, which the step alone determines."""
        return None if self._stream is None else self._stream.get_state()

    def set_position(self, position: dict[str, Any] | None) -> None:
        """Moves the stream to where it stood."""
        if self._stream is not None and position is not None:
            self._stream.set_state(position)

    def next_batch(self) -> Any:
        """What the next call of `advance` needs from the host: a batch of the stream, or None."""
        if self._stream is None:
            return None
        try:
            batch = next(self._stream)
        except UserError as error:  # grain adds lines of its own to the message
            raise UserError(str(error).splitlines()[0]) from error
        return sharding.place_batch(batch, self._run.config.batch_size, self._run.mesh)

    def advance(
        self, state: TrainState, count: int, batch: Any
    ) -> tuple[TrainState, dict[str, Any]]:
        """Does `count` steps; gives the state after them and the mean of their metrics."""
        if self._stream is None:
            return self._step(state, self._data, self._given, count=count)
        return self._step(state, batch["image"], batch["label"], self._given)


def ratio_schedule(run: Run, targets: Values, key: Any = None) -> Callable[[Any], Values]:
    """The step of a phase to the ratio of every gate, by name as the targets are, traced or not.

    With a key they are what a step trains with, without one the highest that it may draw.
    """
    schedules = {name: run.ascent(target) for name, target in targets.items()}
    lowest = run.config.ascent.lowest_fraction
    if key is not None and lowest < 1.0:
        schedules = {name: elastic(s, key, lowest=lowest) for name, s in schedules.items()}
    return lambda step: {name: schedule(step) for name, schedule in schedules.items()}
