"""Architectures, one file each; they know nothing of pruning or of a config.

Every name below is a factory with the same signature, so that a config can name a model:
`factory(num_classes, *, in_channels, image_size, width, dtype, rngs)`. The model maps float
images (batch, height, width, channels) to float32 logits (batch, num_classes). Its `blocks` list
has one entry per stage of equal resolution, the unit in which papers quote prune ratios.
"""

from dynprune_jax.models.mobilenet import mobilenet_v2, mobilenet_v2_cifar
from dynprune_jax.models.resnet import resnet18, resnet50
from dynprune_jax.models.resnet_cifar import resnet20, resnet56, resnet110
from dynprune_jax.models.vgg import vgg16, vgg16_imagenet, vgg_digits

__all__ = [
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "resnet18",
    "resnet20",
    "resnet50",
    "resnet56",
    "resnet110",
    "vgg16",
    "vgg16_imagenet",
    "vgg_digits",
]
