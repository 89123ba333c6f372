"""ResNet-56 on CIFAR-10, channels and columns pruned in the units' convolutions.

Paper: the method of AntiDote (arXiv 2008.06543); the ratios are a starting point, not the paper's.
Command: python -m dynprune_jax.main --config=configs/cifar10_resnet56.py --workdir=DIR
    (--mode=study for all methods, cuts and seeds; on a GPU add --config.dtype=bfloat16)
    (with the data set as class folders, add --config.data.name=class_folders
    --config.data.path=DIR; with the official archive, --config.data.archive=FILE)
Hardware and time: one H100; the dense network 8 minutes beside three others, a run with predicted
    gates 12 among seven.
Result: with --mode=study, one seed, dense 94.2 %; by predicted gates on channels, with a teacher
    and from a drawn start, 93.8 and 92.9 % with 38 and 62 % of the MACs removed; static pruning
    is ahead, 93.4 % with 62 %. The schedule is the one chosen for VGG16.
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
        "predicted+channels",
        "predicted+channels+distillation",
        "l1",
        "l1+as_predicted+channels+distillation",
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
        "trained_on",
        "trained_on+distillation",
        "distillation",
    )
    config.study.ablation_cut = 0.37
    return config
