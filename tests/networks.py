"""Networks for tests, with weights that no program has to draw; how they are run and executed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynprune_jax import models
from dynprune_jax.models.layers import check_image_size, classifier, scaled
from dynprune_jax.models.mobilenet import MobileNetV2
from dynprune_jax.models.resnet import BottleneckUnit, ResNet
from dynprune_jax.models.resnet_cifar import CifarResNet
from dynprune_jax.models.vgg import VGG, global_mean
from dynprune_jax.pruning import native
from dynprune_jax.pruning.forms import possible
from dynprune_jax.pruning.layers import conv_layers
from dynprune_jax.pruning.plan import Plan

_AXES = ("channels", "columns", "features")


def trained(name, **kwargs):
    """A model, ours or of those below, with values as after training, drawn by NumPy."""
    make = getattr(models, name, None) or globals()[name]
    model = nnx.eval_shape(lambda: make(10, rngs=nnx.Rngs(0), **kwargs))
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            fan_in = np.prod(layer.kernel.shape[:-1])
            fill(layer.kernel, rng.normal(size=layer.kernel.shape) * np.sqrt(2 / fan_in))
        if isinstance(layer, nnx.BatchNorm | nnx.Linear):
            fill(layer.bias, 0.1 * rng.normal(size=layer.bias.shape))
        if isinstance(layer, nnx.BatchNorm):
            fill(layer.mean, 0.1 * rng.normal(size=layer.mean.shape))
            fill(layer.var, rng.uniform(0.8, 1.2, size=layer.var.shape))
            fill(layer.scale, rng.uniform(0.4, 0.6, size=layer.scale.shape))
    return model


def small_vgg(num_classes, *, in_channels=1, image_size=8, width=1.0, dtype=jnp.float32, rngs):
    """What tests train: two blocks of two convolutions, `networks:small_vgg` in a config."""
    check_image_size("small_vgg", image_size, at_least=4)
    first, last = scaled(32, width), scaled(64, width)
    plan, head = ((2, first), (2, last)), classifier(last, num_classes, rngs=rngs)
    return VGG(plan, global_mean, head, in_channels=in_channels, dtype=dtype, rngs=rngs)


def small_resnet20(num_classes, *, in_channels, image_size, width, dtype=jnp.float32, rngs):
    """One unit of each of ResNet-20's stages: two of the three have a stride."""
    check_image_size("small_resnet20", image_size, at_least=4)
    return CifarResNet(1, num_classes, in_channels=in_channels, width=width, dtype=dtype, rngs=rngs)


def small_resnet50(num_classes, *, in_channels, image_size, width, dtype=jnp.float32, rngs):
    """The units of ResNet-50: with a shortcut that projects, with a stride, and with neither."""
    check_image_size("small_resnet50", image_size, at_least=8)
    options = {"in_channels": in_channels, "width": width, "dtype": dtype, "rngs": rngs}
    return ResNet(BottleneckUnit, (1, 2), num_classes, **options)


def small_mobilenet(num_classes, *, in_channels, image_size, width, dtype=jnp.float32, rngs):
    """The units of MobileNetV2: one that does not expand, with a stride, and beside its input."""
    check_image_size("small_mobilenet", image_size, at_least=4)
    stages = ((1, 16, 1, 1),), ((2, 32, 2, 2),)
    options = {"in_channels": in_channels, "width": width, "dtype": dtype, "rngs": rngs}
    return MobileNetV2(1, stages, num_classes, **options)


def fill(variable, values):
    variable.set_value(jnp.asarray(values, jnp.float32))


def run(model, x):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def mixed_plan(model):
    """Every form somewhere: each layer takes the next of those that can execute it."""
    forms = {}
    for i, (name, conv) in enumerate(conv_layers(model).items()):
        gates = {axis: getattr(conv, f"{axis[:-1]}_ratio", None) is not None for axis in _AXES}
        choice = [
            form
            for form in possible(conv, **gates)
            if form.product != "pallas" and not (form.compiled and native.why_not())
        ]
        form = choice[i % len(choice)]
        forms[name] = dataclasses.replace(form, images=0 if form.product == "conv" else i % 3)
    return Plan(forms)
