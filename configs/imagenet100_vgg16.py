"""VGG16 on ImageNet-100 at 224x224, mostly columns pruned.

Paper: the method of AntiDote (arXiv 2008.06543); the ratios are a starting point, not the paper's.
Command: python -m dynprune_jax.main --config=configs/imagenet100_vgg16.py --workdir=DIR
    (imagenet2012 must be prepared as array_record; --config.data.data_dir=DIR says where)
Hardware and time: one data-centre GPU, not measured.
Result: not measured.
"""

from dynprune_jax.config import imagenet_config


def get_config():
    config = imagenet_config()
    config.model = "vgg16_imagenet"
    config.data.name = "imagenet100"
    config.gate.channel_ratio = (0.1, 0.0, 0.0, 0.0, 0.2)
    config.gate.column_ratio = (0.5, 0.5, 0.5, 0.5, 0.5)
    config.dense.learning_rate = 0.05
    return config
