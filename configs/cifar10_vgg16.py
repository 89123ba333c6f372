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
    return config
