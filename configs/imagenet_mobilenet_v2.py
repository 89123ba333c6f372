"""MobileNetV2 on ImageNet at 224x224: predicted gates, whose choices go through depthwise layers.

Paper: the gates of Feature Boosting and Suppression (arXiv 1810.05331) in MobileNetV2 (arXiv
    1801.04381); the ratios are a starting point.
Command: python -m dynprune_jax.main --config=configs/imagenet_mobilenet_v2.py --workdir=DIR
    (imagenet2012 must be prepared as array_record; --config.data.data_dir=DIR says where)
Hardware and time: one data-centre GPU, not measured.
Result: not measured.
"""

from dynprune_jax.config import imagenet_config


def get_config():
    config = imagenet_config()
    config.model = "mobilenet_v2"
    config.data.name = "imagenet2012"
    config.dense.epochs = 150
    config.dense.learning_rate = 0.05
    config.optim.weight_decay = 4e-5
    config.gate.kind = "predicted"
    config.gate.channel_ratio = (0.3, 0.3, 0.3, 0.3, 0.3)
    config.gate.layers = ("*",)
    return config
