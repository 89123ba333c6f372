import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import fill, trained
from networks import run as call

from dynprune_jax.build import build_model
from dynprune_jax.experiments.static import l1
from dynprune_jax.models.links import links
from dynprune_jax.pruning.layers import all_modules, conv_layers
from dynprune_jax.pruning.measure import dense_macs
from dynprune_jax.pruning.readers import find_links
from dynprune_jax.pruning.removal import (
    FixedFiltersError,
    allot,
    removable,
    remove_filters,
    try_removal,
)

MODELS = {
    "small_vgg": (16, 1),
    "vgg16_imagenet": (64, 3),
    "small_resnet20": (8, 3),
    "small_resnet50": (32, 3),
    "small_mobilenet": (8, 3),
}


def build(name, width=0.125):
    side, channels = MODELS[name]
    model = trained(name, image_size=side, in_channels=channels, width=width)
    rng = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):  # so that the first layers count in the last
        if isinstance(module, nnx.BatchNorm):
            fill(module.scale, rng.uniform(0.5, 1.5, module.scale.shape))
    model.eval()
    images = rng.normal(size=(2, side, side, channels))
    return model, jnp.asarray(images, jnp.float32)


def filters(model):
    """How many filters each convolution has that can lose some."""
    convs = conv_layers(model)
    return {name: convs[name].out_features for name in links(model)}


@pytest.mark.parametrize("name", MODELS)
def test_removed_filters_are_filters_made_silent(name):
    """The small network computes what the whole one does with the removed maps set to zero."""
    model, images = build(name)
    rng = np.random.default_rng(0)
    scores = {name: rng.random(n) for name, n in filters(model).items()}
    found = links(model)
    small = remove_filters(model, found, scores, dict.fromkeys(scores, 0.4))
    layers = all_modules(model)
    for name, link in found.items():
        n = len(scores[name])
        gone = np.argsort(-scores[name])[n - int(0.4 * n) :]
        for norm in link[::2]:  # behind a depthwise convolution too
            for part in (layers[norm].scale, layers[norm].bias):
                part[...] = part[...].at[gone].set(0.0)
    np.testing.assert_allclose(call(small, images), call(model, images), rtol=1e-4, atol=1e-5)
    assert dense_macs(small, images) < dense_macs(model, images)
    assert all(conv.kernel_shape == conv.kernel.shape for conv in conv_layers(small).values())


@pytest.mark.parametrize(
    ("name", "reduction"), [("small_vgg", 0.6), ("small_resnet20", 0.3), ("small_mobilenet", 0.4)]
)
def test_the_allotment_is_the_least_that_reaches_the_reduction(name, reduction):
    model, images = build(name, width=1.0)
    found = links(model)
    order = {name: -np.arange(n, dtype=float) for name, n in filters(model).items()}

    def reached(ratios):
        return 1 - dense_macs(remove_filters(model, found, order, ratios), images) / dense

    dense = dense_macs(model, images)
    ratios = allot(model, found, images[:1], reduction, dict.fromkeys(found, 1.0))
    assert reduction <= reached(ratios) < reduction + 0.03
    assert len(set(ratios.values())) == 1
    less = {name: ratio - 0.02 for name, ratio in ratios.items()}
    assert reached(less) < reduction


def test_of_a_network_of_ones_own_leaves_what_alone_is_read(config):
    config.model = "own:Own"
    model, images = trained_own(config)
    found = removable(model, find_links(model, images[:1]), images[:1])
    assert found == {
        "blocks/1": ("norms/2", "blocks/2"),
        "blocks/2": ("norms/3", "head"),
    }
    rng = np.random.default_rng(0)
    scores = {name: rng.random(16) for name in found}
    small = remove_filters(model, found, scores, dict.fromkeys(found, 0.4))
    for name, (norm, _) in found.items():
        gone = np.argsort(-scores[name])[10:]
        for part in (all_modules(model)[norm].scale, all_modules(model)[norm].bias):
            part[...] = part[...].at[gone].set(0.0)
    np.testing.assert_allclose(call(small, images), call(model, images), rtol=1e-4, atol=1e-5)
    # Of 64 columns the stem reads 1 channel and the next two layers 16, of 16 the third 4 x 10.
    assert dense_macs(small, images) == 64 * 9 * (16 + 16 + 16 * 10) + 16 * 9 * 40 * 10 + 1600


def test_a_depthwise_convolution_loses_what_it_reads():
    model, images = build("small_mobilenet")
    found = removable(model, find_links(model, images[:1]), images[:1])
    assert list(found.items()) == list(links(model).items())
    small = all_modules(remove_filters(model, found, l1(model, found), dict.fromkeys(found, 0.5)))
    conv = small["blocks/1/layers/0/depthwise"]
    assert conv.in_features == conv.out_features == conv.feature_group_count
    assert conv.kernel.shape == (3, 3, 1, conv.in_features)
    try_removal(model, found, dict.fromkeys(found, 0.3), images[:1])


def trained_own(config):
    model = build_model(config, 10, 1)
    rng = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            fill(module.scale, rng.uniform(0.5, 1.5, module.scale.shape))
            fill(module.bias, rng.normal(size=module.bias.shape))
    model.eval()
    return model, jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)


@pytest.mark.parametrize("answers", [lambda y: (y, y.mean()), lambda y: {"a": y, "b": y[:, 0]}])
def test_filters_leave_a_model_of_several_answers(answers):
    class Several(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.second = nnx.Conv(8, 4, (3, 3), rngs=rngs)

        def __call__(self, images):
            return answers(self.second(nnx.relu(self.norm(self.first(images["image"])))))

    model, images = Several(nnx.Rngs(0)), {"image": jnp.ones((1, 6, 6, 3))}
    links = {"first": ("norm", "second")}
    assert find_links(model, images) == removable(model, links, images) == links


def test_filters_of_a_model_with_an_answer_for_each_stay():
    class Each(nnx.Module):
        def __init__(self, rngs):
            self.first, self.norm = nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.second = nnx.Conv(8, 4, (3, 3), rngs=rngs)

        def __call__(self, images):
            x = nnx.relu(self.norm(self.first(images)))
            return self.second(x), [jnp.float32(i) for i in range(x.shape[-1])]

    with pytest.raises(FixedFiltersError, match="without them it answers as another model"):
        removable(Each(nnx.Rngs(0)), {"first": ("norm", "second")}, jnp.ones((1, 6, 6, 3)))


def test_no_allotment_reaches_everything():
    model, images = build("small_resnet20", width=1.0)
    with pytest.raises(ValueError, match="no removal of filters takes 99"):
        allot(model, links(model), images, 0.99, dict.fromkeys(links(model), 1.0))


def test_an_allotment_of_nothing_is_refused():
    model, images = build("small_resnet20")
    with pytest.raises(ValueError, match="all shares are 0"):
        allot(model, links(model), images, 0.1, dict.fromkeys(links(model), 0.0))


def test_what_is_called_twice_counts_twice(config):
    config.model = "own:Again"
    model, images = trained_own(config)
    found = removable(model, find_links(model, images[:1]), images[:1])
    assert found == {"blocks/0": ("norm", "head")}
    ratios = allot(model, found, images[:1], 0.1, {"blocks/0": 1.0})
    small = remove_filters(model, found, l1(model, found), ratios)
    assert 0.9 >= dense_macs(small, images) / dense_macs(model, images) > 0.85


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_that_change_places_are_no_zeros_that_stay(config, dtype):
    config.model, config.dtype = "own:Halves", dtype
    with jax.numpy_dtype_promotion("standard"):  # as Flax's own normalization needs it
        model, images = trained_own(config)
        image = images[:1].astype(dtype)
        found = find_links(model, image)
        with pytest.raises(ValueError, match="without them it answers as another model"):
            try_removal(model, found, {"blocks/0": 0.5}, image)
        try_removal(model, found, {"blocks/0": 0.0}, image)


def test_where_the_code_counts_on_some_filters_the_others_leave(config):
    config.model = "own:counting_on_filters"
    model, images = trained_own(config)
    found = removable(model, find_links(model, images[:1]), images[:1])
    assert found == {"blocks/2": ("norms/3", "head")}
