"""ResNet-50 on ImageNet at 224x224, channels and columns of its 3x3 convolutions pruned.

Paper: the method of AntiDote (arXiv 2008.06543); the ratios are a starting point, not the paper's.
Command: python -m dynprune_jax.main --config=configs/imagenet_resnet50.py --workdir=DIR
    (imagenet2012 must be prepared as array_record; --config.data.data_dir=DIR says where)
Hardware and time: one data-centre GPU, not measured.
Result: not measured.
"""

from dynprune_jax.config import imagenet_config


def get_config():
    config = imagenet_config()
    config.model = "resnet50"
    config.data.name = "imagenet2012"
    config.gate.channel_ratio = (0.5, 0.5, 0.5, 0.5)
    config.gate.column_ratio = (0.5, 0.5, 0.5, 0.5)
    config.gate.layers = ("blocks/*/conv2",)
    return config
