"""ResNet-56 on CIFAR-10, channels and columns pruned in each second convolution.

Paper: the method of AntiDote (arXiv 2008.06543); the ratios are a starting point, not the paper's.
Command: python -m dynprune_jax.main --config=configs/cifar10_resnet56.py --workdir=DIR
    (--mode=study for all methods, cuts and seeds; on a GPU add --config.dtype=bfloat16)
    (with the data set as class folders, add --config.data.name=class_folders
    --config.data.path=DIR; with the official archive, --config.data.archive=FILE)
Hardware and time: one data-centre GPU, not measured.
Result: not measured. The schedule is the one chosen for VGG16 on CIFAR-10.
"""

from dynprune_jax.config import cifar_config


def get_config():
    config = cifar_config()
    config.model = "resnet56"
    config.data.name = "cifar10"
    config.gate.channel_ratio = (0.4, 0.5, 0.6)
    config.gate.column_ratio = (0.6, 0.6, 0.6)
    config.gate.layers = ("blocks/*/conv2",)
    config.optim.weight_decay = 2e-4

    config.study.methods = (
        "attention",
        "predicted",
        "predicted+distillation",
        "l1",
        "l1+distillation",
        "taylor",
        "geometric_median",
        "random_filters",
    )
    config.study.cuts = (0.37, 0.5, 0.62)
    config.study.ablations = (
        "channels",
        "columns",
        "all_layers",
        "random",
        "inverse",
        "no_dropout",
        "distillation",
    )
    config.study.ablation_cut = 0.37
    return config
