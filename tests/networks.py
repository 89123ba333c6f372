"""Networks for tests, with weights that no program has to draw; how they are run and executed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynprune_jax import models
from dynprune_jax.pruning import native
from dynprune_jax.pruning.forms import possible
from dynprune_jax.pruning.layers import conv_layers
from dynprune_jax.pruning.plan import Plan

_AXES = ("channels", "columns", "features")


def trained(name, **kwargs):
    """A model with weights and batch statistics as after training, drawn by NumPy."""
    model = nnx.eval_shape(lambda: getattr(models, name)(10, rngs=nnx.Rngs(0), **kwargs))
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
