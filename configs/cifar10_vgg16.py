"""VGG16 on CIFAR-10, channels pruned.

Paper: the method of AntiDote (arXiv 2008.06543); the ratios are a starting point, not the paper's.
Command: python -m dynprune_jax.main --config=configs/cifar10_vgg16.py --workdir=DIR
    (--mode=study for all methods, cuts and seeds; on a GPU add --config.dtype=bfloat16)
    (with the data set as class folders, add --config.data.name=class_folders
    --config.data.path=DIR; with the official archive, --config.data.archive=FILE)
Hardware and time: one data-centre GPU, not measured.
Result: not measured.
"""

from dynprune_jax.config import cifar_config


def get_config():
    config = cifar_config()
    config.model = "vgg16"
    config.data.name = "cifar10"
    # How mild in the first blocks and hard in the last is as static pruning allots VGG16's filters
    # at such cuts: .3 and .75 at 67 % (CHIP, arXiv 2110.13981).
    config.gate.channel_ratio = (0.3, 0.3, 0.3, 0.75, 0.75)

    config.batch_size = 256
    config.eval_batch_size = 500
    config.log_every_steps = 195  # an epoch
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 50
    config.dense.epochs = 150
    config.dense.learning_rate = 0.2
    config.prune.epochs = 40
    config.prune.learning_rate = 0.02
    config.prune.warmup_epochs = 1.0
    config.ascent.interval_epochs = 1.0

    config.study.methods = (
        "attention",
        "predicted",
        "predicted+distillation",
        "l1",
        "l1+as_gates",
        "l1+as_gates+distillation",
        "taylor+as_gates",
        "geometric_median+as_gates",
        "random_filters+as_gates",
    )
    return config
