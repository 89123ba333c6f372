"""VGG16 on CIFAR-10, channels pruned.

Paper: the method of AntiDote (arXiv 2008.06543), predicted gates (arXiv 1810.05331) and static
    filter pruning, at equal MACs.
Command: python -m dynprune_jax.main --mode=study --config=configs/cifar10_vgg16.py --workdir=DIR
    --config.dtype=bfloat16 (with the data set as class folders, add
    --config.data.name=class_folders --config.data.path=DIR; with the official archive,
    --config.data.archive=FILE; without --mode=study: dense, then gates by attention)
Hardware and time: one H100; the dense network 100 seconds alone and 210 beside three others, a
    run among seven 2 to 5 minutes.
Result: dense 94.1 %; by predicted gates with a teacher 94.4, 94.2 and 93.8 % with 55, 65 and 75 %
    of the MACs removed, by static pruning with one 94.3, 94.1 and 93.5 % (3 seeds;
    of all seven dense networks by this recipe the mean is 94.2 %).
"""

from dynprune_jax.config import cifar_config


def get_config():
    config = cifar_config()
    config.model = "vgg16"
    config.data.name = "cifar10"
    # Mild in the first blocks and hard in the last, the best of three on held-out images.
    config.gate.channel_ratio = (0.25, 0.25, 0.25, 0.9, 0.9)

    config.study.methods = (
        "attention",
        "predicted",
        "predicted+distillation",
        "l1",
        "l1+as_predicted",
        "l1+as_predicted+distillation",
        "taylor+as_predicted+distillation",
        "geometric_median+as_predicted+distillation",
        "random_filters+as_predicted+distillation",
    )
    return config
