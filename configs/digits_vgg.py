"""A small VGG on scikit-learn's digits: the default run, offline.

Paper: the method of AntiDote (arXiv 2008.06543) on data small enough for any laptop.
Command: python -m dynprune_jax.main --config=configs/digits_vgg.py --workdir=DIR
Hardware and time: 2 CPU cores, 2 minutes.
Result: mean ± standard deviation of 3 seeds: dense 0.9963 ± 0.0013; with 55.2 % of the MACs
    removed 0.9919 ± 0.0026, and 0.1941 ± 0.0574 without targeted dropout.
"""

from dynprune_jax.config import base_config


def get_config():
    config = base_config()
    config.model = "vgg_digits"
    config.batch_size = 64
    config.eval_batch_size = 150
    config.log_every_steps = 21
    config.evaluate_every_epochs = 2

    config.data.name = "digits"
    config.data.image_size = 16
    config.data.mean = (0.305,)
    config.data.std = (0.377,)
    config.data.crop_padding = 1

    config.gate.channel_ratio = (0.2, 0.4, 0.6)
    config.gate.column_ratio = (0.2, 0.2, 0.2)
    config.ascent.interval_epochs = 2.0

    config.dense.epochs = 12
    config.dense.learning_rate = 0.1
    config.dense.warmup_epochs = 1.0
    config.prune.epochs = 40
    config.prune.learning_rate = 0.1

    config.study.cuts = (0.55, 0.65, 0.75)
    config.study.methods = (
        "channels",
        "both",
        "block_columns",
        "predicted+channels",
        "predicted+block_columns",
        "channels+distillation",
        "both+distillation",
        "block_columns+distillation",
        "predicted+channels+distillation",
        "predicted+block_columns+distillation",
    )
    config.study.ablations = ()

    config.sweep.fractions = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
    return config
