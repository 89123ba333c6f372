"""Every field of a config with its default, and the one place where configs are checked."""

import copy
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from dynprune_jax import models
from dynprune_jax.errors import UserError
from dynprune_jax.pruning.attention import CRITERIA, STATISTICS

if TYPE_CHECKING:
    Config = Any  # ConfigDict declares every field as a union of all that a field can be
else:
    Config = ConfigDict

# Whether a value is allowed, and which values are, for the message.
_Rule = tuple[Callable[[Any], bool], str]

FILTER_CRITERIA = ("l1", "geometric_median", "taylor", "random", "none")


def base_config() -> Config:
    """Returns a config with every field; the files in `configs/` set what they need of it.

    A new field's default must be what there was before it: a run that has not got the field is
    taken for one that has its default.
    """
    return ConfigDict(
        {
            "seed": 0,
            # Compute dtype; parameters, batch statistics and rankings are always float32.
            "dtype": "float32",
            "batch_size": 128,
            # Also how many training images decide what predicted gates keep that are made static.
            "eval_batch_size": 250,
            # Training steps run by one call of the compiled step; 0: 1 on CPU, where a
            # convolution inside a loop is slow, and `log_every_steps` elsewhere, which is also the
            # most, as an epoch is.
            "steps_per_dispatch": 0,
            "log_every_steps": 50,
            "evaluate_every_epochs": 1,
            "checkpoint_every_epochs": 1,
            # A factory of dynprune_jax.models; or one of your own, MODULE:NAME, with the signature
            # that they have, in a module that Python finds, such as one in the current folder.
            "model": "vgg16",
            "width": 1.0,  # factor on the channels of every convolution of the model
            "data": {
                # digits, cifar10, cifar100, class_folders, imagenet100, or any data set that
                # TFDS has prepared as array_record.
                "name": "digits",
                "path": "",  # the folder of class_folders
                "archive": "",  # a local archive of cifar10 or cifar100
                "data_dir": "",  # where prepared sets live; empty: TFDS_DATA_DIR or TFDS's default
                "train_split": "train",
                "test_split": "test",  # no example of it may be in train_split
                "train_examples": 0,  # a fixed random subset of that many; 0: all
                "test_examples": 0,
                # To choose among variants: that many training examples take the test split's place.
                "held_out": 0,
                "image_size": 32,  # side of what the network sees, in pixels
                "stored_size": 0,  # side of what is decoded, if larger; 0: image_size
                "mean": (0.5,),  # one value, or one per channel, of images scaled to [0, 1]
                "std": (0.25,),
                "crop_padding": 0,  # pixels of zeros around an image before the random crop
                "flip": False,
                "resized_crop": False,  # random area and aspect, as for Inception
                "cutout": 0,  # side of the square blackened in each training image, in pixels
                # Images of both splits up to this size are held in memory; larger ones stream.
                "memory_limit_mb": 4096,
                "threads": 8,  # decoding a stream
            },
            "gate": {
                # Prune ratios, one for each block of the model; empty: no gate on that axis. A
                # ratio of 0 leaves that block without a gate on that axis.
                "channel_ratio": (),
                "column_ratio": (),
                # attention: in front of a convolution, on its inputs. predicted: before it, by a
                # learnt salience of its outputs, which the next convolution then skips as inputs.
                "kind": "attention",
                # predicted: outputs are multiplied by their salience; or it only ranks them.
                "salience_scales": True,
                # predicted: the saliences' learning rate, beside that of all else.
                "salience_rate": 1.0,
                # Columns are chosen once a block (of a ResNet: a unit), for inputs and outputs.
                "block_columns": False,
                "layers": ("*",),  # patterns of layer names: which convolutions are gated
                # Neighbouring channels, of predicted gates outputs, kept or skipped together.
                "channel_group": 1,
                "column_patch": 1,  # side of the square of columns kept or skipped together
                "statistic": "mean",  # what attention is of a channel or column; or max, l2
                "criterion": "attention",  # or a control: random, inverse, shared
                # Of a target in training; 1: as at test time; 0: never, for comparison.
                "drop_probability": 1.0,
            },
            # The ratios of phase two: min(target, warmup + increment * number of intervals), of
            # which each step draws a fraction in [lowest_fraction, 1], or with a chance of a fourth
            # takes all; metrics tell the highest. Below 1 one network learns a range of ratios,
            # for --mode=sweep; it needs prune.recalibration_images.
            "ascent": {
                "warmup": 0.1,
                "increment": 0.05,
                "interval_epochs": 1.0,
                "lowest_fraction": 1.0,
            },
            # Phase one: the dense network. 0 epochs: none.
            "dense": {"epochs": 10, "learning_rate": 0.1, "warmup_epochs": 0.0},
            # Phase two: targeted dropout.
            "prune": {
                "epochs": 10,
                "learning_rate": 0.05,
                "warmup_epochs": 0.0,
                # dense: from the weights of phase one. checkpoint: from the dense weights in
                # another workdir, with no phase one. scratch: from new weights.
                "start": "dense",
                "checkpoint": "",
                # The dense network's share in the loss, as a teacher, at a temperature.
                "distillation": 0.0,
                "temperature": 4.0,
                # Before a network with gates, or one made static of it, is evaluated or exported
                # its batch statistics are made anew, at its ratios, of so many training images, in
                # whole batches of eval_batch_size; 0: they are what training has left.
                "recalibration_images": 0,
            },
            "optim": {"momentum": 0.9, "weight_decay": 5e-4, "label_smoothing": 0.0},
            # --mode=static: filters removed for good, by l1, geometric_median, taylor or random;
            # none is a control: the dense network is trained on for as long, and loses nothing.
            # uniform: every convolution loses the same fraction; gate: as the channel ratios go.
            "static": {"criterion": "l1", "allotment": "uniform"},
            # --mode=study: for each seed, methods at each cut and ablations at one; their names are
            # in experiments/methods.py.
            "study": {
                "seeds": (0, 1, 2),
                "cuts": (0.4, 0.55, 0.65, 0.75),
                "methods": (
                    "attention",
                    "predicted",
                    "l1",
                    "geometric_median",
                    "taylor",
                    "random_filters",
                ),
                "ablations": (
                    "random",
                    "inverse",
                    "shared",
                    "predicted+shared",
                    "max",
                    "l2",
                    "columns",
                    "both",
                    "no_dropout",
                    "trained_on",
                    "trained_on+distillation",
                    "stochastic",
                    "no_ascent",
                    "distillation",
                ),
                "ablation_cut": 0.55,
            },
            # Every report, and --mode=cascade: the dense network sees this share of the images
            # again, those of which the pruned one is least sure.
            "cascade": {"shares": (0.05, 0.1, 0.2, 0.3)},
            # --mode=sweep: the ratios above times each of these, with every criterion.
            "sweep": {"fractions": (0.0, 0.25, 0.5, 0.75, 1.0)},
            # --mode=sensitivity: each ratio above that is not 0 takes these in turn, and its own.
            "sensitivity": {"ratios": (0.0, 0.2, 0.4, 0.6, 0.8)},
            # --mode=benchmark and --mode=step_cost: how often each side, and each form of a layer,
            # is timed. The batch sizes of the benchmark and of --mode=export, and ratios for all
            # blocks to be measured besides the config's own; the milliseconds that the gates'
            # ratios are scaled to first, for a batch of the first size (0: they stay as they are).
            "benchmark": {
                "repeats": 15,
                "batch_sizes": (1, 8, 64),
                "ratios": (0.0, 0.5),
                "milliseconds": 0.0,
            },
        }
    )


def cifar_config() -> Config:
    """Returns what every config for 32x32 colour images shares."""
    config = base_config()
    config.batch_size = 512
    config.eval_batch_size = 500
    config.log_every_steps = 97  # an epoch
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 50
    config.data.image_size = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.crop_padding = 4
    config.data.flip = True
    config.data.cutout = 8
    config.dense.epochs = 150
    config.dense.learning_rate = 0.4
    config.dense.warmup_epochs = 5.0
    config.prune.epochs = 80
    # Away from weights that are trained to the end: not at the full rate from the first step.
    config.prune.learning_rate = 0.1
    config.prune.warmup_epochs = 2.0
    config.ascent.increment = 0.1
    return config


def imagenet_config() -> Config:
    """Returns what every config for photographs at 224x224 shares."""
    config = base_config()
    config.dtype = "bfloat16"
    config.batch_size = 256
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.stored_size = 256
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.resized_crop = True
    config.data.flip = True
    config.dense.epochs = 90
    config.dense.learning_rate = 0.1
    config.dense.warmup_epochs = 5.0
    config.prune.epochs = 45
    config.prune.learning_rate = 0.02
    config.optim.weight_decay = 1e-4
    config.optim.label_smoothing = 0.1
    return config


def _at_least(low: float) -> _Rule:
    return lambda value: low <= value < math.inf, f"it must be a finite number, at least {low}"


def _above(low: float, most: float) -> _Rule:
    return lambda value: low < value <= most, f"it must be in ({low}, {most}]"


def _in(low: float, high: float) -> _Rule:
    return lambda value: low <= value < high, f"it must be in [{low}, {high})"


def _one_of(*choices: str) -> _Rule:
    return lambda value: value in choices, f"choose one of {', '.join(choices)}"


def _key_of(named: Mapping[str, Any]) -> _Rule:
    """One of the names; a config's file may have added some."""
    return lambda value: value in named, f"{_one_of(*named)[1]}, or one that your config adds"


def _each(rule: _Rule, kind: type | tuple[type, ...] = (int, float)) -> _Rule:
    holds, text = rule
    whole = " (whole numbers)" if kind is int else ""
    return (
        lambda value: all(
            isinstance(x, kind) and not isinstance(x, bool) and holds(x) for x in value
        ),
        f"for each of its values{whole}, {text}",
    )


def is_own(model: str) -> bool:
    """Whether `config.model` names a factory of somebody's own, as MODULE:NAME."""
    module, _, name = model.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), name))


_SEED = (lambda value: 0 <= value < 2**31, "it must be in [0, 2**31)")
_RATIO = (lambda value: 0 <= value <= 0.999, "it must be in [0, 0.999]")  # in float32 below 1
_FRACTION = (lambda value: 0 <= value <= 1, "it must be in [0, 1]")
_PART = (lambda value: 0 < value < 1, "it must be in (0, 1)")
_METHOD = (bool, "it must be a name of experiments/methods.py")
_PATH = (lambda value: not os.path.expanduser(value).startswith("~"), "there is no such user")
_RULES: dict[str, _Rule] = {
    "seed": _SEED,
    "dtype": _one_of("float32", "bfloat16"),
    "batch_size": _at_least(1),
    "eval_batch_size": _at_least(1),
    "steps_per_dispatch": _at_least(0),
    "log_every_steps": _at_least(1),
    "evaluate_every_epochs": _at_least(1),
    "checkpoint_every_epochs": _at_least(1),
    "model": (
        lambda value: value in models.__all__ or is_own(value),
        f"choose one of {', '.join(sorted(models.__all__))}, or a factory of your own as"
        " MODULE:NAME",
    ),
    "width": _in(0.01, 1000.0),
    "data.name": (bool, "it must name a data set, such as digits"),
    "data.path": _PATH,
    "data.archive": _PATH,
    "data.data_dir": _PATH,
    "data.image_size": _in(1, 2**14),
    "data.stored_size": _in(0, 2**14),
    "data.train_examples": _at_least(0),
    "data.test_examples": _at_least(0),
    "data.held_out": _at_least(0),
    "data.mean": _each(_in(0.0, 1.0)),
    "data.std": _each(_in(0.001, 1000.0)),
    "data.crop_padding": _at_least(0),
    "data.cutout": _at_least(0),
    "data.memory_limit_mb": _at_least(0),
    "data.threads": _in(0, 1025),
    "gate.channel_ratio": _each(_RATIO),
    "gate.column_ratio": _each(_RATIO),
    "gate.layers": _each((bool, "it must be a pattern of layer names"), str),
    "gate.kind": _one_of("attention", "predicted"),
    "gate.channel_group": _at_least(1),
    "gate.column_patch": _at_least(1),
    "gate.statistic": _key_of(STATISTICS),
    "gate.criterion": _key_of(CRITERIA),
    "gate.salience_rate": _above(0.0, 1000.0),
    "gate.drop_probability": _FRACTION,
    "ascent.warmup": _in(0.0, 1.0),
    "ascent.increment": (lambda value: 1e-6 <= value <= 1, "it must be in [1e-6, 1]"),
    "ascent.interval_epochs": _above(0.0, 100_000.0),
    "ascent.lowest_fraction": _FRACTION,
    "dense.epochs": _in(0, 100_000),
    "dense.learning_rate": _above(0.0, 1000.0),
    "dense.warmup_epochs": _at_least(0.0),
    "prune.epochs": _in(0, 100_000),
    "prune.learning_rate": _above(0.0, 1000.0),
    "prune.warmup_epochs": _at_least(0.0),
    "prune.start": _one_of("dense", "checkpoint", "scratch"),
    "prune.checkpoint": _PATH,
    "prune.distillation": _FRACTION,
    "prune.temperature": _in(0.01, 1000.0),
    "prune.recalibration_images": _at_least(0),
    "optim.momentum": _in(0.0, 1.0),
    "optim.weight_decay": _in(0.0, 1000.0),
    "optim.label_smoothing": _in(0.0, 1.0),
    "cascade.shares": _each(_PART),
    "sweep.fractions": _each(_FRACTION),
    "sensitivity.ratios": _each(_RATIO),
    "study.seeds": _each(_SEED, int),
    "study.cuts": _each(_PART),
    "study.methods": _each(_METHOD, str),
    "study.ablations": _each(_METHOD, str),
    "study.ablation_cut": _PART,
    "static.criterion": _one_of(*FILTER_CRITERIA),
    "static.allotment": _one_of("uniform", "gate"),
    "benchmark.repeats": _at_least(3),
    "benchmark.batch_sizes": _each(_in(1, 2**20), int),
    "benchmark.ratios": _each(_RATIO),
    "benchmark.milliseconds": _at_least(0.0),
}


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name, such as `data.image_size`."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def with_fields(config: Config, fields: Mapping[str, Any]) -> Config:
    """A copy of a config with some fields changed; one number for ratios goes to each block."""
    changed = copy.deepcopy(config)
    blocks = max(len(config.gate.channel_ratio), len(config.gate.column_ratio))
    for name, value in fields.items():
        if name.endswith("_ratio") and isinstance(value, float):
            value = (value,) * blocks
        section, _, field = name.rpartition(".")
        (changed[section] if section else changed)[field] = value
    return changed


def check(config: Config) -> None:
    """Checks names, types, ranges and combinations of the fields.

    What only the data or the model can tell (the number of blocks, the size of the set) is
    checked where they are built.

    Raises:
      UserError: one line that names the field, the value and what is allowed.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config returned {type(config).__name__}; it must be a ConfigDict")
    fields, known = flatten(config), flatten(base_config())
    for name in fields.keys() - known.keys():
        raise UserError(f"config.{name} is no field of a config")
    for name in known.keys() - fields.keys():
        raise UserError(f"config.{name} is missing; start from dynprune_jax.config.base_config()")
    for name, default in known.items():
        check_type(name, fields[name], default)
    for name, (holds, text) in _RULES.items():
        if not holds(fields[name]):
            raise UserError(f"config.{name} is {fields[name]!r}; {text}")
    _check_combinations(config)


def check_type(name: str, value: Any, default: Any) -> None:
    """Raises UserError where a field's value is not of its default's type."""
    kind = type(default)
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        example = f", such as {default!r}" if default not in ("", ()) else ""
        raise UserError(f"config.{name} is {value!r}; it must be of type {kind.__name__}{example}")


def _check_combinations(config: Config) -> None:
    if not config.gate.layers:
        raise UserError("config.gate.layers is (); give a pattern of layer names, such as ('*',)")
    patch, side = config.gate.column_patch, config.data.image_size
    if any(config.gate.column_ratio) and patch > 1 and patch >= side:
        raise UserError(
            f"config.gate.column_patch is {patch}; it must be less than config.data.image_size,"
            f" {side}: of a map that is one patch no column is skipped"
        )
    shares = config.cascade.shares
    if len({round(share, 2) for share in shares}) < len(shares):
        raise UserError(f"config.cascade.shares is {shares}; give shares a hundredth apart")
    if not config.sweep.fractions:
        raise UserError("config.sweep.fractions is (); give at least one fraction")
    if not config.study.seeds:
        raise UserError("config.study.seeds is (); give at least one")
    if not config.benchmark.batch_sizes:
        raise UserError("config.benchmark.batch_sizes is (); give at least one")
    if config.dense.epochs + config.prune.epochs == 0:
        raise UserError("config.dense.epochs and config.prune.epochs are both 0; nothing to train")
    if config.prune.epochs and config.prune.start == "dense" and not config.dense.epochs:
        raise UserError(
            "config.prune.start is 'dense' and config.dense.epochs is 0; train a dense network"
            " first, or choose checkpoint or scratch"
        )
    if (config.prune.start == "checkpoint") != bool(config.prune.checkpoint):
        raise UserError(
            f"config.prune.start is {config.prune.start!r} and config.prune.checkpoint is"
            f" {config.prune.checkpoint!r}; a start from a checkpoint takes both, any other neither"
        )
    if config.prune.distillation and config.prune.start == "scratch" and not config.dense.epochs:
        raise UserError(
            f"config.prune.distillation is {config.prune.distillation} and there is no dense"
            " network to learn from; train one first, or give it as a checkpoint"
        )
    for phase in ("dense", "prune"):
        warmup, epochs = config[phase].warmup_epochs, config[phase].epochs
        if epochs and warmup >= epochs:
            raise UserError(
                f"config.{phase}.warmup_epochs is {warmup}; it must be less than"
                f" config.{phase}.epochs, {epochs}"
            )
    if config.prune.epochs and not any((*config.gate.channel_ratio, *config.gate.column_ratio)):
        raise UserError(
            "config.gate.channel_ratio and config.gate.column_ratio prune nothing; give a ratio"
            " above 0, or set config.prune.epochs to 0"
        )
    elastic = config.prune.epochs and config.ascent.lowest_fraction < 1
    if elastic and not config.prune.recalibration_images:
        raise UserError(
            f"config.ascent.lowest_fraction is {config.ascent.lowest_fraction} and"
            " config.prune.recalibration_images is 0; the batch statistics of many ratios together"
            " fit none of them: give some hundred images"
        )
    if 0 < config.data.stored_size < side:
        raise UserError(
            f"config.data.stored_size is {config.data.stored_size}; it must be 0 or at least"
            f" config.data.image_size, {side}"
        )
    for field, owners in (("path", ("class_folders",)), ("archive", ("cifar10", "cifar100"))):
        if config.data[field] and config.data.name not in owners:
            raise UserError(
                f"config.data.{field} is {config.data[field]!r} and config.data.name is"
                f" {config.data.name!r}; it is for {' and '.join(owners)} alone"
            )
    if config.data.held_out and config.data.test_examples:
        raise UserError(
            f"config.data.held_out is {config.data.held_out} and config.data.test_examples is"
            f" {config.data.test_examples}; of a test split that is left alone, choose none"
        )
    for field in ("crop_padding", "cutout"):
        if config.data[field] > side:
            raise UserError(
                f"config.data.{field} is {config.data[field]}; it must be at most"
                f" config.data.image_size, {side}"
            )
