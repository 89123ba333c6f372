"""The architectures: shapes, parameters, MACs, shortcuts and modes."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import trained

from dynprune_jax import models
from dynprune_jax.convolution import DEPTHWISE
from dynprune_jax.models import layers
from dynprune_jax.models.resnet import BasicUnit, BottleneckUnit
from dynprune_jax.models.resnet_cifar import CifarResNet, option_a_shortcut
from dynprune_jax.models.vgg import VGG, global_mean
from dynprune_jax.pruning.layers import conv_layers
from dynprune_jax.pruning.macs import program_macs

SMALLEST = {
    "mobilenet_v2": 32,
    "mobilenet_v2_cifar": 8,
    "vgg16": 32,
    "vgg16_imagenet": 32,
    "vgg_digits": 8,
    "resnet20": 4,
    "resnet56": 4,
    "resnet110": 4,
    "resnet18": 32,
    "resnet50": 32,
}
BLOCKS = {"vgg16": 5, "vgg16_imagenet": 5, "resnet18": 4, "resnet50": 4}
BLOCKS |= {"mobilenet_v2": 5, "mobilenet_v2_cifar": 5}


def abstract(name, num_classes=10, **kwargs):
    """Returns the model with shapes in the place of its arrays."""
    factory = getattr(models, name)
    return nnx.eval_shape(lambda: factory(num_classes, rngs=nnx.Rngs(0), **kwargs))


def forward(model, image_shape, dtype=jnp.float32):
    """Returns a pure function of (state, images) and abstract arguments for it."""
    model.eval()
    graphdef, state = nnx.split(model)

    def apply(state, images):
        return nnx.merge(graphdef, state)(images)

    return apply, (state, jax.ShapeDtypeStruct(image_shape, dtype))


def count_parameters(model):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_every_factory_is_listed():
    assert sorted(models.__all__) == sorted(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(name, dtype):
    model = abstract(name, num_classes=7, in_channels=2, image_size=SMALLEST[name], dtype=dtype)
    assert len(model.blocks) == BLOCKS.get(name, 3)
    stored = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.float32)}

    apply, arguments = forward(model, (3, SMALLEST[name], SMALLEST[name], 2))
    closed, logits = jax.make_jaxpr(apply, return_shape=True)(*arguments)
    assert logits.shape == (3, 7)
    assert logits.dtype == jnp.float32
    convolutions = [
        eqn.outvars[0].aval.dtype
        for eqn in closed.eqns
        if eqn.primitive.name == "conv_general_dilated"
        or (eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.ndim == 4)
    ]
    depthwise = [eqn for eqn in closed.eqns if DEPTHWISE in str(eqn)]
    convolutions += [eqn.invars[0].aval.dtype for eqn in depthwise]  # they round behind it
    assert len(convolutions) == len(conv_layers(model))
    assert set(convolutions) == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", SMALLEST)
def test_an_image_too_small_is_refused(name):
    small = SMALLEST[name] - 1
    message = f"^image_size {small} pools to nothing: {name} needs at least {SMALLEST[name]}$"
    with pytest.raises(ValueError, match=message):
        getattr(models, name)(10, image_size=small, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "num_classes", "millions", "tolerance"),
    [
        ("resnet20", 10, 0.27, 0.005),
        ("resnet56", 10, 0.85, 0.005),
        ("resnet110", 10, 1.7, 0.05),
        ("resnet18", 1000, 11.69, 0.005),
        ("resnet50", 1000, 25.56, 0.005),
        ("mobilenet_v2", 1000, 3.50, 0.005),
        ("vgg16_imagenet", 1000, 138.36, 0.01),
    ],
)
def test_parameters_agree_with_the_literature(name, num_classes, millions, tolerance):
    assert count_parameters(abstract(name, num_classes)) / 1e6 == pytest.approx(
        millions, abs=tolerance
    )


@pytest.mark.parametrize("name", SMALLEST)
def test_a_width_of_one_is_the_default(name):
    # That this is the network of the literature, tests of its parameters and its MACs tell.
    assert inspect.signature(getattr(models, name)).parameters["width"].default == 1.0


@pytest.mark.parametrize("name", SMALLEST)
def test_macs_fall_with_the_square_of_the_width(name):
    def macs(width):
        side = 2 * SMALLEST[name]
        model = abstract(name, image_size=side, width=width)
        apply, arguments = forward(model, (1, side, side, 3 if "digits" not in name else 1))
        return program_macs(apply, *arguments)

    # The image and the logits keep their channels, so the ends of the network fall by the width.
    assert 0.25 < macs(0.5) / macs(1.0) < 0.31


def test_width_scales_every_layer():
    def features(name, width):
        layers = [m for _, m in nnx.iter_modules(abstract(name, image_size=64, width=width))]
        return {
            kind: [(m.in_features, m.out_features) for m in layers if isinstance(m, kind)]
            for kind in (nnx.Conv, nnx.Linear)
        }

    for name in ("vgg16_imagenet", "resnet20", "resnet18", "resnet50"):
        full, half = features(name, 1.0), features(name, 0.5)
        for kind, pairs in full.items():  # all but the image's 3 channels and the 10 logits
            expected = [(i if i == 3 else i // 2, o if o == 10 else o // 2) for i, o in pairs]
            assert half[kind] == expected
    assert sorted(features("vgg16_imagenet", 0.01)[nnx.Linear]) == [(20, 41), (41, 10), (41, 41)]


def test_width_is_rounded_and_at_least_one_channel():
    assert layers.scaled(64, 0.3) == 19
    assert layers.scaled(64, 0.29) == 19
    assert layers.scaled(64, 1.5) == 96
    assert layers.scaled(16, 0.001) == 1


@pytest.mark.parametrize("name", SMALLEST)
def test_a_width_that_is_not_a_factor_is_refused(name):
    for width in (0.0, -0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^width is {width}; it must be a finite number"):
            getattr(models, name)(10, width=width, rngs=nnx.Rngs(0))


def test_layer_paths():
    def convolutions(name):
        return {
            "/".join(map(str, path))
            for path, module in nnx.iter_modules(abstract(name))
            if isinstance(module, nnx.Conv)
        }

    vgg = convolutions("vgg16")
    assert len(vgg) == 13
    assert {"blocks/0/layers/0/conv", "blocks/4/layers/2/conv"} <= vgg
    cifar = convolutions("resnet56")
    assert len(cifar) == 55
    assert {"stem", "blocks/1/layers/4/conv2"} <= cifar
    bottleneck = convolutions("resnet50")
    assert len(bottleneck) == 53
    assert {"stem", "blocks/0/layers/0/shortcut", "blocks/3/layers/2/conv3"} <= bottleneck


def test_option_a_shortcut():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    expected = np.zeros((2, 3, 3, 8), np.float32)
    expected[..., :3] = x[:, [0, 2, 4]][:, :, [0, 2, 4]]
    np.testing.assert_array_equal(option_a_shortcut(jnp.asarray(x), 8, 2), expected)
    np.testing.assert_array_equal(option_a_shortcut(jnp.asarray(x), 3, 1), x)


@pytest.mark.parametrize("unit", [BasicUnit, BottleneckUnit])
def test_imagenet_units_start_as_their_shortcut(unit):
    @nnx.jit
    def start(x):
        inputs = 4 * unit.expansion
        same = unit(inputs, 4, stride=1, dtype=jnp.float32, rngs=nnx.Rngs(0))
        half = unit(inputs, 8, stride=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        assert not same.projects
        assert half.projects
        return same(x), half(x), nnx.relu(half.shortcut_norm(half.shortcut(x)))

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4 * unit.expansion))
    same, half, shortcut = start(x)
    np.testing.assert_array_equal(same, nnx.relu(x))
    np.testing.assert_allclose(half, shortcut, rtol=1e-5, atol=1e-6)


def clipped(x, top=jnp.inf):
    return jnp.clip(x, 0.0, top)


def highest(x, size, padding):
    """The highest of each window of so many columns, with stride 2."""
    x = jnp.pad(x, ((0, 0), *[(padding, padding)] * 2, (0, 0)), constant_values=-jnp.inf)
    h, w = ((n - size) // 2 * 2 + 1 for n in x.shape[1:3])
    shifts = np.ndindex(size, size)
    return functools.reduce(jnp.maximum, (x[:, i : i + h : 2, j : j + w : 2] for i, j in shifts))


def vgg_as_published(model, x):
    for block in model.blocks:
        for unit in block.layers[:-1]:
            x = clipped(unit.norm(unit.conv(x)))
        x = highest(x, 2, padding=0)
    return x


def resnet_as_published(model, x):
    x = clipped(model.stem_norm(model.stem(x)))
    x = x if isinstance(model, CifarResNet) else highest(x, 3, padding=1)
    for unit in (unit for block in model.blocks for unit in block.layers):
        y, shortcut = unit.norm1(unit.conv1(x)), x
        for i in (2, 3):
            if hasattr(unit, f"conv{i}"):
                y = getattr(unit, f"norm{i}")(getattr(unit, f"conv{i}")(clipped(y)))
        if isinstance(model, CifarResNet):
            shortcut = option_a_shortcut(x, y.shape[-1], x.shape[1] // y.shape[1])
        elif unit.projects:
            shortcut = unit.shortcut_norm(unit.shortcut(x))
        x = clipped(y + shortcut)
    return x


def mobilenet_as_published(model, x):
    x = clipped(model.stem_norm(model.stem(x)), 6)
    *units, last = (unit for block in model.blocks for unit in block.layers)
    for unit in units:
        y = clipped(unit.expand_norm(unit.expand(x)), 6) if unit.expands else x
        y = unit.project_norm(unit.project(clipped(unit.depthwise_norm(unit.depthwise(y)), 6)))
        x = x + y if x.shape == y.shape else y
    return clipped(last.norm(last.conv(x)), 6)


@pytest.mark.parametrize(
    ("name", "last_map", "side"),
    [
        ("small_vgg", vgg_as_published, 10),  # its second pool leaves a row and a column out
        ("small_resnet20", resnet_as_published, 8),
        ("small_resnet50", resnet_as_published, 32),
        ("resnet18", resnet_as_published, 32),
        ("small_mobilenet", mobilenet_as_published, 8),
    ],
)
def test_what_lies_between_the_layers_is_as_published(name, last_map, side):
    model = trained(name, in_channels=3, image_size=side, width=0.25)
    model.eval()
    images = 30.0 * jax.random.normal(jax.random.key(0), (2, side, side, 3))  # relu6 has its limit

    @nnx.jit
    def both(model, images):
        return model(images), model.head(last_map(model, images).mean((1, 2)))

    logits, expected = both(model, images)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_kernels_are_he_normal_by_fan_out():
    kernel = layers.conv(64, 128, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.shape == (3, 3, 64, 128)
    assert float(kernel.std()) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)


def small_vgg(dtype, rngs):
    head = nnx.Linear(16, 10, dtype=dtype, rngs=rngs)
    return VGG(((2, 32), (1, 16)), global_mean, head, in_channels=3, dtype=dtype, rngs=rngs)


def small_resnet(dtype, rngs):
    return CifarResNet(1, 10, in_channels=3, width=1.0, dtype=dtype, rngs=rngs)


@functools.cache
def first_state(build):
    return jax.tree.map(np.array, nnx.state(build(jnp.float32, nnx.Rngs(0))))


def concrete(build, dtype):
    """Returns a freshly initialised model; the keys are drawn once, since they are slow."""
    model = nnx.eval_shape(lambda: build(dtype, nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(jnp.asarray, first_state(build)))
    return model


@nnx.jit
def call(model, images):
    return model(images)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("build", [small_vgg, small_resnet])
def test_training_updates_the_statistics_and_evaluation_uses_them(build, dtype):
    model = concrete(build, dtype)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3)) + 1.0

    def statistics():
        return jax.tree.map(np.array, nnx.state(model, nnx.BatchStat))

    def unchanged(old):
        return jax.tree.map(np.array_equal, old, statistics())

    start = statistics()
    model.eval()
    before = call(model, images)
    assert jax.tree.all(unchanged(start))

    model.train()
    training = call(model, images)
    assert not any(jax.tree.leaves(unchanged(start)))
    # The first convolution sees the images as they are, so its mean can be told from outside.
    if build is small_vgg:
        conv, norm = model.blocks[0].layers[0].conv, model.blocks[0].layers[0].norm
    else:
        conv, norm = model.stem, model.stem_norm
    expected = 0.1 * np.asarray(conv(images), np.float32).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(norm.mean[...], expected, rtol=1e-3, atol=1e-4)

    model.eval()
    after = call(model, images)
    assert not np.allclose(before, after)
    assert not np.allclose(training, after)
    # In evaluation an example's logits do not depend on its batch.
    np.testing.assert_allclose(call(model, images[:1])[0], after[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("build", [small_vgg, small_resnet])
def test_half_precision_agrees_with_single(build):
    # XLA's CPU compiler of jaxlib 0.12.0 turns bfloat16 conv-relu-conv-relu-pool into
    # zeros or NaN without a word, so the units rectify in float32.
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3)) + 1.0
    logits = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = concrete(build, dtype)
        model.eval()
        logits.append(call(model, images))
    assert logits[0].std() > 0.1
    np.testing.assert_allclose(logits[1], logits[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("build", [small_vgg, small_resnet])
def test_the_first_gradient_is_finite(build, dtype):
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))

    @nnx.jit
    def gradient(model):
        return nnx.grad(lambda model: -jax.nn.log_softmax(model(images))[:, 0].mean())(model)

    for leaf in jax.tree.leaves(gradient(concrete(build, dtype))):
        assert leaf.dtype == jnp.float32
        assert np.isfinite(leaf).all()
        assert np.any(leaf)


def test_dropout_of_the_imagenet_head_follows_the_mode():
    model = abstract("vgg16_imagenet", image_size=32)
    layers = [x for x in model.head.layers if isinstance(x, nnx.Dropout)]
    assert [x.rate for x in layers] == [0.5, 0.5]
    assert model.head.layers[1] is model.head.layers[4] is nnx.relu
    model.eval()
    assert all(x.deterministic for x in layers)
    model.train()
    assert not any(x.deterministic for x in layers)
