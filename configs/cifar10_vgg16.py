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
    config.gate.channel_ratio = (0.2, 0.2, 0.6, 0.9, 0.9)

    # A batch that fills a GPU, at the learning rate that goes with it.
    config.batch_size = 512
    config.eval_batch_size = 500
    config.log_every_steps = 97  # an epoch
    config.evaluate_every_epochs = 10
    config.checkpoint_every_epochs = 50
    config.dense.epochs = 140
    config.dense.learning_rate = 0.2
    config.prune.epochs = 30
    config.prune.learning_rate = 0.1
    config.ascent.interval_epochs = 0.8

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
