"""VGG16 on CIFAR-100, channels pruned.

Paper: the method of AntiDote (arXiv 2008.06543); the ratios are a starting point, not the paper's.
Command: python -m dynprune_jax.main --config=configs/cifar100_vgg16.py --workdir=DIR
    (--mode=study for all methods, cuts and seeds; on a GPU add --config.dtype=bfloat16)
    (with the data set as class folders, add --config.data.name=class_folders
    --config.data.path=DIR; with the official archive, --config.data.archive=FILE)
Hardware and time: one data-centre GPU, not measured.
Result: not measured. The schedule is the one chosen for VGG16 on CIFAR-10.
"""

from dynprune_jax.config import cifar_config


def get_config():
    config = cifar_config()
    config.model = "vgg16"
    config.data.name = "cifar100"
    config.data.mean = (0.5071, 0.4865, 0.4409)
    config.data.std = (0.2673, 0.2564, 0.2762)
    config.gate.channel_ratio = (0.25, 0.25, 0.25, 0.9, 0.9)

    config.study.seeds = (0,)
    config.study.methods = (
        "attention",
        "predicted",
        "predicted+distillation",
        "l1+as_predicted",
        "l1+as_predicted+distillation",
        "taylor+as_predicted",
    )
    config.study.ablations = ("random", "no_dropout", "distillation", "trained_on")
    return config
