"""VGG16 on CIFAR-10, channels pruned.

Paper: the method of AntiDote (arXiv 2008.06543), predicted gates (arXiv 1810.05331) and static
    filter pruning, at equal MACs.
Command: python -m dynprune_jax.main --mode=study --config=configs/cifar10_vgg16.py --workdir=DIR
    --config.dtype=bfloat16 (with the data set as class folders, add
    --config.data.name=class_folders --config.data.path=DIR; with the official archive,
    --config.data.archive=FILE; without --mode=study: dense, then gates by attention)
Hardware and time: one H100; the dense network 2 minutes, eight runs side by side 3 to 4.5.
Result: one seed, dense 93.7 %; with 55 % of the MACs removed 93.4 % by predicted gates with a
    teacher, 93.3 % by static pruning with one, 90.6 % by attention.
"""

from dynprune_jax.config import cifar_config


def get_config():
    config = cifar_config()
    config.model = "vgg16"
    config.data.name = "cifar10"
    # How mild in the first blocks and hard in the last is as static pruning allots VGG16's filters
    # at such cuts: .3 and .75 at 67 % (CHIP, arXiv 2110.13981).
    config.gate.channel_ratio = (0.25, 0.25, 0.25, 0.9, 0.9)

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
