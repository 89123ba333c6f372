"""A run: a checked config with its data set and its networks, in its work directory."""

import bisect
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from dynprune_jax import config as config_lib
from dynprune_jax import processes, sharding
from dynprune_jax.build import (
    build_dataset,
    build_dynamic,
    build_links,
    build_model,
    check_gates,
    evaluation_images,
    one_image,
    own_factory,
    training_images,
)
from dynprune_jax.checkpoint import Checkpoints
from dynprune_jax.config import Config
from dynprune_jax.data.augment import center_crop
from dynprune_jax.data.batches import eval_batches
from dynprune_jax.data.sources import Dataset
from dynprune_jax.errors import UserError
from dynprune_jax.evaluate import Evaluation, Evaluator, evaluate, make_evaluator
from dynprune_jax.network import Network, Values
from dynprune_jax.optim import learning_rate, sgd
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.layers import by_name
from dynprune_jax.pruning.make_static import make_static, predicted_gates
from dynprune_jax.pruning.readers import Links
from dynprune_jax.pruning.recalibrate import batch_statistics, mean_of
from dynprune_jax.pruning.removal import FixedFiltersError
from dynprune_jax.pruning.schedules import RatioSchedule, ratio_ascent
from dynprune_jax.train_step import TrainState
from dynprune_jax.workdir import (
    FREE_FIELDS,
    PLACES,
    check_workdir,
    defaults,
    folder_of,
    json_fields,
    keep_config,
    make_folder,
    refuse_study,
)
from dynprune_jax.writers import progress_bar, say

_COUNTED_IMAGES = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config with its data set and its networks, in its work directory.

    Attributes:
      config: checked.
      workdir: of the run; it may not exist yet.
      mesh: the devices that share a batch.
      dataset: open.
      model: the dense model with its initial weights.
      dense: the same as a network.
      dynamic: the network with gates at their target ratios, or None where nothing is pruned.
      links: where predicted gates can go, from `build_links`.
    """

    config: Config
    workdir: Path
    mesh: Mesh
    dataset: Dataset
    model: nnx.Module
    dense: Network
    dynamic: Network | None
    links: Links

    @classmethod
    def open(cls, config: Config, workdir: str | os.PathLike) -> "Run":
        """Checks what can be checked before anything is written to the work directory.

        But not what training alone asks of the ratios: that does `check_ratios`.

        Raises:
          UserError: for any mistake in the config, the data or the work directory.
        """
        config_lib.check(config)
        folder = folder_of(workdir)
        check_workdir(config, folder)
        refuse_study(folder)
        # Before a data set is prepared, which can take minutes: does the model fit the config?
        # Somebody's own may be for no images but its own: of that only the factory is looked for.
        if config_lib.is_own(config.model):
            own_factory(config.model)
        else:
            _build_both(config, num_classes=10, channels=3, lift=nnx.eval_shape)
        dataset = build_dataset(config)
        model, dynamic_model, links = _build_both(config, dataset.num_classes, dataset.channels)
        dynamic = Network(dynamic_model) if dynamic_model is not None else None
        mesh = sharding.data_mesh()
        return cls(config, folder, mesh, dataset, model, Network(model), dynamic, links)

    def check_ratios(self) -> None:
        """Raises UserError where the ratios skip nothing, or are not reached before the end."""
        if self.dynamic is None:
            return
        check_gates(self.config, self.dynamic.bind(), self.dataset.channels)
        targets = self.dynamic.values(PruneRatio).values()
        highest = round(max(float(target) for target in targets), 6)
        schedule, total = self.ascent(highest), self.phase_steps("prune")

        def arrived(step: int) -> bool:
            return float(schedule(step)) >= highest - 1e-6

        if not arrived(total - 1):
            said = f"config.prune.epochs is {self.config.prune.epochs}, that is {total} steps; the"
            last = range(total, 2**31 - 1)  # steps are int32
            if not arrived(last[-1]):
                raise UserError(f"{said} ratio {highest:g} is never reached: change the schedule")
            arrival = bisect.bisect_left(last, True, key=arrived) + total
            raise UserError(
                f"{said} ratio {highest:g} is only reached at step {arrival}: train longer, or"
                " change config.ascent"
            )

    def gates(self, without: str) -> Network:
        """The dynamic network.

        Args:
          without: what it means that there is none, for the message.

        Raises:
          UserError: if nothing is pruned.
        """
        if self.dynamic is None:
            raise UserError(f"config.prune.epochs is {self.config.prune.epochs}: {without}")
        return self.dynamic

    def ascent(self, target: float | Float[ArrayLike, ""]) -> RatioSchedule:
        """How a ratio rises to its target, as `config.ascent` says: by the phase's own step."""
        ascent = self.config.ascent
        interval = max(1, math.floor(ascent.interval_epochs * self.steps_per_epoch))
        return ratio_ascent(
            target, interval_steps=interval, warmup=ascent.warmup, increment=ascent.increment
        )

    def claim(self) -> None:
        """Makes the work directory this run's own: writes config.json if it is not there.

        Raises:
          UserError: if it cannot be written, or if it is not the same for all processes.
        """
        make_folder(self.workdir)
        keep_config(self.config, self.workdir)
        processes.wait_for_all("config.json")
        if not processes.sees(self.workdir / "config.json"):
            raise UserError(
                f"--workdir={self.workdir} holds no config.json, which process 0 has written;"
                " all processes need the same folder"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in one pass over the training split; its remainder is left out."""
        return len(self.dataset.train) // self.config.batch_size

    def checkpoints(self, phase: str, filters_removed_by: str | None = None) -> Checkpoints:
        """The checkpoints of a phase, for the process that trains.

        Args:
          phase: `dense` or `prune`.
          filters_removed_by: the criterion of a static network, whose shapes alone may not tell
            it from a dynamic one.
        """
        of = self._identity(phase, filters_removed_by)
        # Older ones do not tell how they were pruned: there the shapes must do.
        assumed = self._assumed() | {"filters removed by": filters_removed_by}
        return Checkpoints(_folder(self.workdir, phase), of=of, assumed=assumed, mend=True)

    def _identity(self, phase: str, filters_removed_by: str | None = None) -> dict[str, Any]:
        """What tells the checkpoints of a phase of this run from those of any other, as JSON."""
        told = {
            f"config.{name}": value
            for name, value in json_fields(self.config).items()
            if name not in (*FREE_FIELDS, *PLACES)
        }
        # A folder of images may have changed though no field has: labels may then mean others.
        names = ", ".join(self.dataset.class_names)
        if len(names) > 200:
            digest = hashlib.sha256(names.encode()).hexdigest()[:12]
            names = f"{self.dataset.num_classes} whose names have the digest {digest}"
        told["classes of the data"] = names
        told["number of training images"] = len(self.dataset.train)
        told["filters removed by"] = filters_removed_by
        return {"phase": phase, **told}

    @staticmethod
    def _assumed() -> dict[str, Any]:
        """What `_identity` had told of a run that is older than a field."""
        return {f"config.{name}": default for name, default in defaults().items()}

    def phase_steps(self, phase: str) -> int:
        """Training steps of the phase `dense` or `prune`."""
        if phase == "dense" and self.config.prune.start == "checkpoint":
            return 0
        return self.config[phase].epochs * self.steps_per_epoch

    @functools.cached_property
    def in_memory(self) -> bool:
        """Whether both splits together, as uint8, stay within `config.data.memory_limit_mb`."""
        side = self.dataset.train.side
        images = len(self.dataset.train) + len(self.dataset.test)
        size = images * side * side * self.dataset.channels
        return size <= self.config.data.memory_limit_mb * 2**20

    @functools.cached_property
    def train_arrays(self) -> tuple[Any, Any]:
        """The training split, read to memory: uint8 images and int32 labels."""
        with progress_bar("reading training images") as progress:
            return self.dataset.train.read_all(progress)

    @functools.cached_property
    def _test_order(self) -> Int[np.ndarray, " examples"]:
        """A fixed random order for the test split.

        Neighbours in class folders are of one class, and a choice made for a whole batch would
        then be one made by the label.
        """
        return np.random.default_rng(0).permutation(len(self.dataset.test))

    @functools.cached_property
    def _test_examples(self) -> Any:
        split = self.dataset.test.reordered(self._test_order)
        return split.read_all() if self.in_memory else split

    def evaluate(self, network: Network, *values: Mapping[str, Any]) -> Evaluation:
        """Evaluates a network on the test split, whose batches are of mixed classes.

        Args:
          network: to evaluate, with the batch statistics of `recalibrated`.
          *values: parameters, batch statistics and, if not the model's own, ratios by name.

        Returns:
          What it did on each example, in the split's own order.
        """
        found = self._evaluate_on(
            self._test_batches(), network, self.recalibrated(network, *values)
        )
        back = np.argsort(self._test_order)
        usage = jax.tree.map(lambda leaf: leaf[back], found.usage)
        return Evaluation(found.correct[back], found.margins[back], usage)

    def recalibrated(self, network: Network, *values: Mapping[str, Any]) -> dict[str, Any]:
        """The values, with the batch statistics of training images at the ratios among them.

        Of `config.prune.recalibration_images`, in whole batches of at most
        `config.eval_batch_size`, augmented as in training. If that is 0, or the network has no
        gates, the values as they are.

        Args:
          network: dense or dynamic.
          *values: parameters, batch statistics and, if not the model's own, ratios by name.
        """
        merged = _merged(network.settings, *values)
        return self._with_new_statistics(network, merged) if network.values(PruneRatio) else merged

    def _with_new_statistics(self, network: Network, values: Values) -> dict[str, Any]:
        if not self.config.prune.recalibration_images:
            return dict(values)
        statistics = self._statistics(network)
        placed = sharding.replicate(values, self.mesh)

        def made() -> Iterator[Values]:
            batches = self._recalibration_batches
            for batch in zip(
                batches, jax.random.split(jax.random.key(0), len(batches)), strict=True
            ):
                # Whole on every device: cut up, they would depend on how many there are.
                given = sharding.replicate(batch, self.mesh)
                yield jax.device_get(statistics(placed, *given))

        return dict(values) | mean_of(made())

    @functools.cached_property
    def _statistics(self) -> Callable[[Network], Callable[..., Values]]:
        """Of a network what is compiled once: values, images and a key to batch statistics."""

        def compiled(network: Network) -> Callable[..., Values]:
            def statistics(values: Values, images: Any, key: Any) -> Values:
                augmented = training_images(self.config, key, images)
                return by_name(batch_statistics(network.bind(values), augmented))

            return jax.jit(statistics, out_shardings=sharding.whole(self.mesh))

        return functools.cache(compiled)

    @property
    def recalibration_images(self) -> int:
        """How many training images `recalibrated` takes: in whole batches, of those there are."""
        images = min(self.config.prune.recalibration_images, len(self.dataset.train))
        return images - images % min(self.config.eval_batch_size, images) if images else 0

    @functools.cached_property
    def _recalibration_batches(self) -> list[Any]:
        """Training images as they are stored."""
        split = self.dataset.train
        images = self.recalibration_images
        size = min(self.config.eval_batch_size, images)
        order = np.random.default_rng(0).permutation(len(split))
        return [split.read(order[i : i + size])[0] for i in range(0, images, size)]

    def _evaluate_on(
        self, batches: Iterable[tuple[Any, Any, Any]], network: Network, *values: Mapping[str, Any]
    ) -> Evaluation:
        merged = _merged(network.settings, *values)
        return evaluate(self._evaluator(network), sharding.replicate(merged, self.mesh), batches)

    @functools.cached_property
    def _evaluator(self) -> Callable[[Network], Evaluator]:
        """Of a network what is compiled once."""
        prepare = functools.partial(evaluation_images, self.config)
        out = sharding.whole(self.mesh)
        return functools.cache(lambda network: make_evaluator(network, prepare, out))

    def pictures(
        self, rows: Sequence[int] | Int[np.ndarray, " some"]
    ) -> tuple[UInt8[np.ndarray, "some side side channels"], Int[np.ndarray, " some"]]:
        """Test images, cut as the network sees them, and their labels.

        Args:
          rows: which, in the split's own order.
        """
        images, labels = self.dataset.test.read(rows)
        return np.asarray(center_crop(jnp.asarray(images), self.config.data.image_size)), labels

    def _test_batches(self) -> Iterator[tuple[Any, Any, Any]]:
        """The test split in batches of one shape that the devices share, each example once."""
        size = min(self.config.eval_batch_size, len(self.dataset.test))
        size = math.ceil(size / self.mesh.size) * self.mesh.size
        rows = sharding.local_rows(size, self.mesh)
        for images, labels, valid in eval_batches(self._test_examples, size, rows):
            yield *sharding.place_batch((images, labels), size, self.mesh), valid

    @property
    def one_image(self) -> Float[Array, "1 side side channels"]:
        """A black image as the network sees it, for counting."""
        return one_image(self.config, self.dataset.channels)

    def mac_reduction(self, ratios: Mapping[str, Any] | None = None) -> float:
        """The conventional MAC reduction, before any training of the gates.

        It is the same for every input, but where a convolution's outputs lose columns too: then it
        is the mean over a few training images, with the dense weights that training starts from
        where `config.prune.checkpoint` has them.

        Args:
          ratios: of the gates, by name; None: the config's.

        Raises:
          UserError: as `start_state`.
        """
        if self.dynamic is None:
            return 0.0
        values, batch = self._counted
        given = {name: np.float32(ratio) for name, ratio in (ratios or {}).items()}
        return self._evaluate_on([batch], self.dynamic, values, given).usage.mac_reduction

    @functools.cached_property
    def _counted(self) -> tuple[Values, tuple[Any, Any, Any]]:
        values = {}
        if self.config.prune.start == "checkpoint":
            values = self.gated(self.start_state().values)
        split = self.dataset.train
        few = np.linspace(0, len(split) - 1, _COUNTED_IMAGES).astype(int)
        batch = sharding.replicate(split.read(few), self.mesh)
        return values, (*batch, np.ones(_COUNTED_IMAGES, bool))

    def gated(self, dense: Values) -> Values:
        """What the dynamic network starts with: the values of a dense one, and of its new gates."""
        model = self.dense.bind(dense)
        return Network(build_dynamic(self.config, model, self.links)).weights

    def network_with(self, criterion: str) -> Network:
        """The dynamic network with another criterion in its gates."""
        config = config_lib.with_fields(self.config, {"gate.criterion": criterion})
        return Network(build_dynamic(config, self.model, self.links))

    def trained_values(self) -> tuple[Values | None, Values | None]:
        """Reads the weights of a finished run: dense, and after targeted dropout.

        Returns:
          Parameters and batch statistics of each phase; None for a phase the run does not have.

        Raises:
          UserError: if the run is not finished, or a static one.
        """
        if (criterion := self.filters_removed_by) is not None:
            raise UserError(
                f"{self.workdir} holds a run of --mode=static ({criterion}), which has no gates:"
                " --mode=export exports its network, and --mode=static evaluates it again"
            )
        dense = pruned = None
        if self.phase_steps("dense") or self.config.prune.start == "checkpoint":
            dense = self._read(self.workdir, "dense").values
        if self.dynamic is not None:
            pruned = self._read(self.workdir, "prune").values
        return dense, pruned

    @functools.cached_property
    def filters_removed_by(self) -> str | None:
        """The criterion, if the work directory holds a run of `--mode=static`; else None."""
        folder = _folder(self.workdir, "prune")
        if not folder.is_dir():
            return None
        with Checkpoints(folder, of={}) as checkpoints:
            return checkpoints.told().get("filters removed by")

    def static_values(self, network: Network) -> Values:
        """Reads the weights of a finished static run.

        Args:
          network: with as many filters.

        Raises:
          UserError: if the run is not finished.
        """
        return self._read(self.workdir, "prune", network, self.filters_removed_by).values

    def finished_weights(self) -> dict[str, Values]:
        """What a finished run's gates can be tried on: weights of the phases that it has, by name.

        Returns:
          `dense`, with the gates as they start, and `dropout`, after targeted dropout.

        Raises:
          UserError: if the run is not finished.
        """
        dense, pruned = self.trained_values()
        started = None if dense is None else self.gated(dense)
        found = {"dense": started, "dropout": pruned}
        return {name: values for name, values in found.items() if values is not None}

    def made_static(self, values: Values) -> nnx.Module | None:
        """The plain model with what predicted gates want most often, see `make_static`.

        Of as many training images as `config.eval_batch_size`; with batch statistics made anew if
        the config asks for it.

        Args:
          values: of the dynamic network.

        Returns:
          The model, in evaluation mode; None where the run has no such gates or has others too, or
          its model cannot lose their filters, which is then said.
        """
        if self.dynamic is None or not predicted_gates(self.dynamic.bind()):
            return None
        split = self.dataset.train
        some = np.random.default_rng(0).permutation(len(split))[: self.config.eval_batch_size]
        images = evaluation_images(self.config, jnp.asarray(split.read(some)[0]))
        model = self.dynamic.bind(self.recalibrated(self.dynamic, values))
        try:
            network = Network(make_static(model, self.links, images))
        except FixedFiltersError as error:  # in a model of somebody's own
            say(f"not made static: {error}")
            return None
        static = network.bind(self._with_new_statistics(network, network.weights))
        static.eval()
        return static

    def start_state(self) -> TrainState:
        """Reads the dense weights that phase two starts from.

        They are in `config.prune.checkpoint`, and once the run has begun in its own workdir.

        Raises:
          UserError: if there are none, they are not final, of another model or of other classes,
            or were trained on what `config.data.held_out` holds out.
        """
        folder = _folder(self.workdir, "dense")
        own = any(path.name.isdecimal() for path in folder.glob("*"))  # not one half saved
        checkpoint = self.config.prune.checkpoint
        if own:
            try:
                return self._read(self.workdir, "dense")
            except UserError as error:
                raise UserError(
                    f"{error} (it is a copy: if you delete {folder}, it is copied again from"
                    f" {checkpoint})"
                ) from error
        try:
            return self._read(Path(checkpoint).expanduser(), "dense")
        except (UserError, OSError) as error:  # a name too long, for one
            raise UserError(f"config.prune.checkpoint is {checkpoint!r}: {error}") from error

    def _read(
        self,
        workdir: Path,
        phase: str,
        network: Network | None = None,
        filters_removed_by: str | None = None,
    ) -> TrainState:
        folder = _folder(workdir, phase)
        if not folder.is_dir():
            raise UserError(f"{workdir} holds no trained network: there is no {folder}")
        of = self._identity(phase, filters_removed_by)
        if workdir != self.workdir:  # another run's: its classes must be this run's
            told = ["classes of the data"]
            if self.config.data.held_out:  # and it must not have been trained on what is held out
                fields = ("name", "train_split", "train_examples", "held_out")
                told += ["number of training images", *(f"config.data.{field}" for field in fields)]
            of = {name: of[name] for name in told}
        with Checkpoints(folder, of=of, assumed=self._assumed()) as checkpoints:
            network = network or (self.dynamic if phase == "prune" else self.dense)
            assert network is not None  # `trained_values` has asked
            state = TrainState.create(network.weights, network, self.optimizer(phase))
            state, extra = checkpoints.restore(state)
            if int(state.step) != extra["total"]:
                mode = "static" if filters_removed_by else "train"
                raise UserError(
                    f"the run in {workdir} stands at step {state.step} of {extra['total']} of its"
                    f" {phase} phase; finish it with --mode={mode}"
                )
            return state

    def optimizer(self, phase: str) -> optax.GradientTransformation:
        """The optimizer of a phase."""
        return sgd(
            self.learning_rate(phase),
            momentum=self.config.optim.momentum,
            weight_decay=self.config.optim.weight_decay,
            salience_rate=self.config.gate.salience_rate if phase == "prune" else 1.0,
        )

    def learning_rate(self, phase: str) -> optax.Schedule:
        """The learning rate of a phase as a function of its own step."""
        section = self.config[phase]
        total = max(self.phase_steps(phase), 1)  # 1: of a phase that was done in another workdir
        warmup = round(section.warmup_epochs * self.steps_per_epoch)
        return learning_rate(
            section.learning_rate, warmup_steps=min(warmup, total - 1), total_steps=total
        )


def _folder(workdir: Path, phase: str) -> Path:
    return workdir / "checkpoints" / phase


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def _build_both(
    config: Config,
    num_classes: int,
    channels: int,
    lift: Callable[..., Any] = lambda make, *args: make(*args),
) -> tuple[nnx.Module, nnx.Module | None, Links]:
    """The dense model in training mode; if anything is pruned, the dynamic one, and the links.

    With `nnx.eval_shape` as `lift` no weights are drawn.
    """
    model = lift(lambda: build_model(config, num_classes, channels))
    model.train()
    if not config.prune.epochs:
        return model, None, {}
    links = build_links(config, model, channels)
    dynamic = lift(lambda model: build_dynamic(config, model, links), model)
    dynamic.train()
    return model, dynamic, links
