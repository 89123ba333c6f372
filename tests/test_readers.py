import jax
import jax.numpy as jnp
import numpy as np
import own
import pytest
from flax import nnx
from networks import trained

import dynprune_jax
from dynprune_jax import find_links, measure, predict_channels
from dynprune_jax.models import mobilenet_v2_cifar
from dynprune_jax.models.links import column_blocks, has_links, links
from dynprune_jax.models.resnet_cifar import CifarResNet
from dynprune_jax.pruning.dynamic_conv import PruneRatio
from dynprune_jax.pruning.removal import FixedFiltersError, removable

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("small_vgg", 8),
        ("vgg16_imagenet", 64),
        ("small_resnet20", 8),
        ("small_resnet50", 16),
        ("small_mobilenet", 8),
    ],
)
def test_the_links_of_our_models_are_found(name, side):
    model = trained(name, image_size=side, in_channels=3, width=0.25)
    found = find_links(model, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
    assert list(found.items()) == list(links(model).items())


def test_what_leaves_the_last_unit_of_a_mobilenet_is_no_part_of_a_sum():
    model = nnx.eval_shape(lambda: mobilenet_v2_cifar(10, width=0.1, rngs=nnx.Rngs(0)))
    unit = "blocks/4/layers/3/project"
    assert links(model)[unit] == (f"{unit}_norm", "blocks/4/layers/4/conv")


def test_of_a_subclass_nothing_is_known():
    class Other(CifarResNet):
        """It may compute something else."""

    options = {"in_channels": 3, "width": 0.25, "dtype": jnp.float32}
    model = nnx.eval_shape(lambda: Other(1, 10, **options, rngs=nnx.Rngs(0)))
    assert not has_links(model)
    for known in (links, column_blocks):
        with pytest.raises(ValueError, match="Other is none of VGG, ResNet, CifarResNet, Mobile"):
            known(model)


@pytest.mark.parametrize("debugging", [jax.disable_jit, jax.checking_leaks])
def test_links_are_found_while_somebody_debugs(debugging):
    model = trained("small_vgg", image_size=8, in_channels=3, width=0.25)
    with debugging():
        assert find_links(model, IMAGES) == links(model)


class Chain(nnx.Module):
    """A convolution, its norm, something between, and what reads the result."""

    def __init__(self, between, reader=(8, 12)):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.zero = nnx.BatchNorm(8, scale_init=nnx.initializers.zeros, rngs=rngs)
        self.side = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.other = nnx.LayerNorm(8, rngs=rngs)
        self.reader = (
            nnx.Conv(*reader, (3, 3), rngs=rngs)
            if reader[0] < 64
            else nnx.Linear(*reader, rngs=rngs)
        )
        self.between = nnx.static(between)

    def __call__(self, x):
        return self.reader(self.between(self, self.norm(self.conv(x)), x))


class Told(Chain):
    def __call__(self, x, train=False):
        y = self.norm(self.conv(x), use_running_average=not train)
        return self.reader(self.between(self, y, x))


class Branches(Chain):
    def __call__(self, x):
        y = nnx.relu(self.norm(self.conv(x)))
        return self.reader(y) + self.between(self, y, x)


def pooled(y):
    return nnx.max_pool(y, (2, 2), (2, 2))


@pytest.mark.parametrize(
    "model",
    [
        Chain(lambda _, y, x: nnx.relu(y)),
        Told(lambda _, y, x: nnx.relu(y)),
        Chain(lambda _, y, x: nnx.silu(pooled(y))),
        Chain(lambda _, y, x: nnx.leaky_relu(nnx.max_pool(y, (3, 3)))),
        Chain(lambda chain, y, x: chain.dropout(nnx.gelu(y))),
        Chain(lambda _, y, x: y * jax.nn.sigmoid(y.mean((1, 2), keepdims=True))),
        Chain(lambda chain, y, x: y * chain.side(x)),
        Chain(lambda _, y, x: pooled(y).reshape(len(x), -1), (128, 5)),
        Chain(lambda _, y, x: nnx.remat(lambda y: nnx.relu(y))(y)),
    ],
)
def test_a_reader_that_finds_zeros_is_found_and_loses_nothing(model):
    found = find_links(model, IMAGES)
    assert found == {"conv": ("norm", "reader")}
    dynamic = predict_channels(model, {"conv": 0.5}, found, layers="conv")
    dynamic.eval()
    x = jax.random.normal(jax.random.key(0), IMAGES.shape)
    logits, usage = measure(dynamic, x)
    kept = {layer.name: layer.kept_channels.tolist() for layer in usage.layers}
    if isinstance(dynamic.reader, nnx.Conv):  # a linear layer skips nothing
        assert kept["reader"] == [4, 4]
        dynamic.reader.channel_ratio = PruneRatio(jnp.float32(0.0))
        np.testing.assert_array_equal(dynamic(x), logits)


def butterfly(y):
    one, other = jnp.split(y, 2, axis=-1)
    return jnp.concatenate([one + other, one - other], axis=-1)


@pytest.mark.parametrize(
    "model",
    [
        Chain(lambda _, y, x: nnx.sigmoid(y)),
        Chain(lambda _, y, x: y + 1.0),
        Chain(lambda _, y, x: nnx.softmax(y)),
        Chain(lambda chain, y, x: chain.other(y)),
        Chain(lambda chain, y, x: y + chain.side(x)),
        # A branch that starts at zero, as residual branches do, is none to count on.
        Chain(lambda chain, y, x: y + chain.zero(chain.side(x))),
        Chain(lambda _, y, x: jnp.concatenate([y, x], axis=-1), (11, 12)),
        Chain(lambda _, y, x: y[..., ::-1]),
        Chain(lambda _, y, x: y + jnp.roll(y, 2, axis=-1)),
        Chain(lambda _, y, x: butterfly(y)),
        Chain(lambda chain, y, x: chain.reader(nnx.relu(y)), (8, 8)),
        Chain(lambda _, y, x: pooled(y).transpose(0, 3, 1, 2).reshape(len(x), -1), (128, 5)),
        Branches(lambda _, y, x: y.sum()),
        Branches(lambda chain, y, x: chain.side(y[..., :3])[..., :1]),
    ],
)
def test_what_mixes_channels_or_is_read_twice_is_no_link(model):
    with pytest.raises(ValueError, match=r"has no convolution with a batch normalization"):
        find_links(model, IMAGES)


class Unbiased(nnx.Module):
    """Nothing but what a mean is below lets a map survive a relu."""

    def __init__(self, by_place=False):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List(
            [nnx.Conv(n, 16, (3, 3), use_bias=False, rngs=rngs) for n in (3, 16, 16, 16)]
        )
        self.norms = nnx.List([nnx.BatchNorm(16, use_bias=False, rngs=rngs) for _ in range(4)])
        self.head = nnx.Linear(16, 5, rngs=rngs)
        self.by_place = by_place

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
            if self.by_place and conv is self.convs[0]:
                x = x * jnp.linspace(1.0, 3.0, x.shape[-1]).reshape(1, 1, 1, -1)
        return self.head(x.mean((1, 2)))


def test_maps_live_on_in_a_deep_network_without_biases():
    found = find_links(Unbiased(), IMAGES)
    readers = ("convs/1", "convs/2", "convs/3", "head")
    assert found == {f"convs/{i}": (f"norms/{i}", reader) for i, reader in enumerate(readers)}
    assert removable(Unbiased(), found, IMAGES) == found
    with pytest.raises(FixedFiltersError, match="without them it answers as another model"):
        removable(Unbiased(by_place=True), {"convs/0": found["convs/0"]}, IMAGES)


def test_where_layers_cannot_be_watched_is_said():
    def looped(chain, y, x):
        return jax.lax.scan(lambda y, _: (chain.reader(y)[..., :8], None), y, None, length=2)[0]

    with pytest.raises(ValueError, match="layers of Chain are called within a transformation"):
        find_links(Chain(looped), IMAGES)


def test_a_grouped_convolution_cannot_choose():
    model = nnx.Sequential(
        nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=nnx.Rngs(0)),
    )
    found = find_links(model, jnp.ones((1, 6, 6, 8)))
    assert found == {"layers/2": ("layers/3", "layers/4")}


@pytest.mark.parametrize(
    ("between", "features", "link"),
    [
        (nnx.relu, 8, ("layers/1", "layers/3", "layers/4", "layers/6")),
        (nnx.sigmoid, 8, ("layers/1", "layers/3")),  # of nothing it makes something
        (nnx.relu, 16, ("layers/1", "layers/3")),  # two of each channel
    ],
)
def test_a_link_goes_on_behind_a_depthwise_convolution(between, features, link):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 8, (1, 1), rngs=rngs),
        nnx.BatchNorm(8, rngs=rngs),
        nnx.relu,
        nnx.Conv(8, features, (3, 3), feature_group_count=8, rngs=rngs),
        nnx.BatchNorm(features, rngs=rngs),
        between,
        nnx.Conv(features, 4, (1, 1), rngs=rngs),
    )
    found = find_links(model, IMAGES)
    assert found == {"layers/0": link}
    # What is not linked is computed in full.
    dynamic = predict_channels(model, 0.5, found)
    dynamic.eval()
    _, usage = measure(dynamic, jax.random.normal(jax.random.key(0), IMAGES.shape))
    kept = [layer.kept_channels.tolist() for layer in usage.layers]
    assert kept == [[3, 3], [4, 4], [4, 4] if len(link) == 4 else [features] * 2]


def test_a_link_ends_at_a_depthwise_convolution_of_more_than_was_made():
    class Doubled(Chain):
        def __init__(self):
            super().__init__(lambda chain, y, x: chain.deep(jnp.concatenate([y, y], -1)), (16, 4))
            self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=nnx.Rngs(0))
            self.behind = nnx.BatchNorm(16, rngs=nnx.Rngs(0))

        def deep(self, y):
            return nnx.relu(self.behind(self.depthwise(nnx.relu(y))))

    found = find_links(Doubled(), IMAGES)
    assert found == {"conv": ("norm", "depthwise")}
    by_hand = {"conv": ("norm", "depthwise", "behind", "reader")}
    with pytest.raises(ValueError, match="'depthwise', which is no depthwise convolution of what"):
        predict_channels(Doubled(), 0.5, by_hand)


def test_a_model_with_predicted_gates_has_links_no_more():
    model = nnx.Sequential(
        nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)),
    )
    images = jnp.ones((1, 6, 6, 8))
    gated = predict_channels(model, 0.5, find_links(model, images))
    with pytest.raises(ValueError, match="layers/0 has a gate that chooses its outputs; find the"):
        find_links(gated, images)


def test_of_two_with_one_reader_there_is_one_link():
    class Product(Chain):
        def __init__(self):
            super().__init__(lambda chain, y, x: y * nnx.relu(chain.zero(chain.side(x))))

    found = find_links(Product(), IMAGES)
    assert found == {"conv": ("norm", "reader")}
    predict_channels(Product(), 0.5, found, layers="conv")


def of_kind(kind):
    options = {"in_channels": 3, "image_size": 8, "width": 1.0, "dtype": jnp.float32}
    return kind(10, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (own.Jitted, {"blocks/0": ("norm", "head")}),
        (own.Rematerialised, {"blocks/0/conv": ("blocks/0/norm", "head")}),
    ],
)
def test_what_is_a_program_of_its_own_within_a_model_is_seen_through(kind, link):
    model = of_kind(kind)
    for _ in range(2):
        assert find_links(model, IMAGES) == link


def test_what_cannot_be_held_within_a_transformation_is_said():
    with pytest.raises(ValueError, match="layers of Stacked are called within a transformation"):
        find_links(of_kind(own.Stacked), IMAGES)


def test_a_list_that_is_rematerialised_is_seen_through_or_said():
    """Flax for Python 3.11 cannot sort what is sown into one."""
    try:
        found = str(find_links(of_kind(own.RematerialisedList), IMAGES))
    except ValueError as error:
        found = str(error)
    seen = str({"blocks/0": ("norm", "head")})
    assert found == seen or "layers of RematerialisedList are called within" in found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_any_dtype_and_any_input_will_do(dtype):
    model = trained("small_resnet20", image_size=8, in_channels=3, width=0.25, dtype=dtype)

    class Named(nnx.Module):
        def __init__(self):
            self.model = model

        def __call__(self, inputs, rngs):
            assert inputs["name"] == "image"
            return {"logits": self.model(inputs["image"].astype(dtype)), "seed": rngs.params()}

    inputs = {"name": "image", "image": jax.ShapeDtypeStruct((1, 8, 8, 3), dtype)}
    expected = {name: reader for name, (_, reader) in links(model).items()}
    found = find_links(Named(), inputs, nnx.Rngs(0))
    assert {k[6:]: reader[6:] for k, (_, reader) in found.items()} == expected
    stored = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    with pytest.raises(ValueError, match="no convolution with a batch normalization"):
        find_links(nnx.Sequential(lambda x: x.astype(jnp.float32), model.stem), stored)


def test_a_mistake_of_the_model_s_own_is_its_own():
    with pytest.raises(TypeError, match="reshape"):
        find_links(Chain(lambda _, y, x: y.reshape(3, 5)), IMAGES)


def test_the_model_is_left_as_it_is():
    model = Chain(lambda _, y, x: nnx.relu(y))
    weights = (nnx.Param, nnx.BatchStat)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Any(*weights)))
    assert dynprune_jax.find_links(model, jnp.ones((1, 8, 8, 3))) == find_links(model, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Any(*weights)))
    assert not model.norm.use_running_average
