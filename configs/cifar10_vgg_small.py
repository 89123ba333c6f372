"""A small VGG on CIFAR-10 at 16x16: the study that two CPU cores can do.

Paper: the method of AntiDote (arXiv 2008.06543) beside static filter pruning, at equal MACs.
Command: python -m dynprune_jax.main --mode=study --config=configs/cifar10_vgg_small.py
    --workdir=DIR (with the data set as class folders, add --config.data.name=class_folders
    --config.data.path=DIR)
Hardware and time: 2 CPU cores, some hours; "--config.study.seeds=(0,)" for one seed.
Result: dense 77.3 %; with 55 % of the MACs removed and a teacher 76.2 % by predicted gates, 68.3 %
    by attention, 75.9 % by static pruning (3 seeds); docs/results/cifar10_vgg_small has every run.
"""

from dynprune_jax.config import cifar_config


def get_config():
    config = cifar_config()
    config.model = "vgg_digits"
    config.batch_size = 64
    config.eval_batch_size = 500
    config.log_every_steps = 104
    config.evaluate_every_epochs = 20
    config.checkpoint_every_epochs = 20

    config.data.name = "cifar10"
    config.data.train_examples = 20_000
    config.data.image_size = 16
    config.data.crop_padding = 2
    config.data.cutout = 0

    config.gate.channel_ratio = (0.3, 0.4, 0.6)
    config.ascent.increment = 0.05
    config.ascent.interval_epochs = 0.2

    config.dense.epochs = 20
    config.dense.learning_rate = 0.1
    config.dense.warmup_epochs = 1.0
    config.prune.epochs = 6
    config.prune.learning_rate = 0.05
    config.prune.warmup_epochs = 0.0
    config.optim.weight_decay = 5e-4

    config.study.seeds = (0, 1, 2)
    config.study.methods = (
        "attention",
        "distillation",
        "both",
        "both+distillation",
        "block_columns",
        "block_columns+distillation",
        "predicted",
        "predicted+distillation",
        "predicted+block_columns",
        "predicted+block_columns+distillation",
        "l1",
        "l1+distillation",
        "taylor",
    )
    config.study.ablations = (
        "geometric_median",
        "random_filters",
        "random",
        "inverse",
        "shared",
        "predicted+shared",
        "predicted+unscaled",
        "max",
        "l2",
        "columns",
        "no_dropout",
        "trained_on",
        "trained_on+distillation",
        "stochastic",
        "no_ascent",
    )
    return config
