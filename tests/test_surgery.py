import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from networks import trained

import dynprune_jax
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.layers import dynamic_layers
from dynprune_jax.pruning.ratios import least_factor, scale_ratios, scaled, set_ratios
from dynprune_jax.pruning.surgery import make_dynamic


class Block(nnx.Module):
    """A residual unit with its convolutions in plain attributes."""

    def __init__(self, features, rngs):
        self.conv1 = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), rngs=rngs)

    def __call__(self, x):
        return x + self.conv2(nnx.relu(self.conv1(x)))


class Zoo(nnx.Module):
    """Convolutions in an attribute, a list, a dict, a Sequential, and one that is shared."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(8, rngs), nnx.Sequential(Block(8, rngs), nnx.relu)])
        self.tail = nnx.Sequential(nnx.Conv(8, 12, (1, 1), strides=2, rngs=rngs), nnx.relu)
        self.named = nnx.Dict(depthwise=nnx.Conv(12, 12, (3, 3), feature_group_count=12, rngs=rngs))
        self.shared = self.blocks[0].conv1
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = self.named["depthwise"](self.tail(self.shared(x)))
        return self.head(x.mean((1, 2)))


@pytest.fixture
def zoo():
    return Zoo(nnx.Rngs(0))


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def test_every_convolution_but_the_first_becomes_dynamic(zoo):
    model = make_dynamic(zoo, 0.5, 0.25)
    assert list(dynamic_layers(model)) == [
        "blocks/0/conv1",
        "blocks/0/conv2",
        "blocks/1/layers/0/conv1",
        "blocks/1/layers/0/conv2",
        "named/depthwise",
        "tail/layers/0",
    ]
    assert type(model.stem) is nnx.Conv
    assert model.shared is model.blocks[0].conv1
    assert not dynamic_layers(zoo)  # the model given is as it was


def test_ratio_zero_is_bit_identical_to_the_original(zoo, images):
    model = make_dynamic(zoo, 0.0, 0.0)
    np.testing.assert_array_equal(model(images), zoo(images))
    np.testing.assert_array_equal(nnx.jit(model)(images), nnx.jit(zoo)(images))
    logits, _ = dynprune_jax.measure(model, images)
    np.testing.assert_array_equal(logits, zoo(images))
    assert not np.array_equal(make_dynamic(zoo, 0.5)(images), zoo(images))


def test_parameters_are_shared_under_their_paths(zoo):
    model = make_dynamic(zoo, 0.5)
    before, after = nnx.state(zoo, nnx.Param), nnx.state(model, nnx.Param)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert model.tail.layers[0].kernel is zoo.tail.layers[0].kernel


def test_ratios_by_number_by_block_and_by_pattern(zoo):
    def ratios(model):
        return {
            name: (
                None if gate.channel_ratio is None else round(float(gate.channel_ratio[...]), 3),
                None if gate.column_ratio is None else round(float(gate.column_ratio[...]), 3),
            )
            for name, gate in dynamic_layers(model).items()
        }

    assert set(ratios(make_dynamic(zoo, 0.5)).values()) == {(0.5, None)}
    assert ratios(make_dynamic(zoo, (0.1, 0.2), layers="*conv2")) == {
        "blocks/0/conv2": (0.1, None),
        "blocks/1/layers/0/conv2": (0.2, None),
    }
    second = {"blocks/1/layers/0/conv1": (0.2, None), "blocks/1/layers/0/conv2": (0.2, None)}
    assert ratios(make_dynamic(zoo, (None, 0.2))) == second
    mixed = make_dynamic(zoo, {"*": 0.3, "blocks/1/*": 0.6}, {"tail/*": 0.5})
    assert ratios(mixed)["blocks/0/conv1"] == (0.3, None)
    assert ratios(mixed)["blocks/1/layers/0/conv2"] == (0.6, None)
    assert ratios(mixed)["tail/layers/0"] == (0.3, 0.5)
    chosen = make_dynamic(zoo, 0.5, layers=lambda name, conv: conv.feature_group_count > 1)
    assert list(ratios(chosen)) == ["named/depthwise"]


def test_set_ratios_changes_the_masks_in_place(zoo, images):
    model = make_dynamic(zoo, 0.0)
    set_ratios(model, {"blocks/0/conv1": 0.5})
    kept = {
        layer.name: int(layer.kept_channels[0])
        for layer in dynprune_jax.measure(model, images)[1].layers
    }
    assert kept["blocks/0/conv1"] == 4
    assert kept["blocks/0/conv2"] == 8
    for column_ratio, message in (
        (0.5, "column_ratio cannot be set: no layer has a gate on that axis"),
        (
            {"blocks/0/conv1": 0.5},
            "column_ratio of blocks/0/conv1 cannot be set: it has no gate",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            set_ratios(model, channel_ratio=0.7, column_ratio=column_ratio)
    ratios = {float(gate.channel_ratio[...]) for gate in dynamic_layers(model).values()}
    assert ratios == {0.0, 0.5}  # a mistake changes nothing
    plan = dynprune_jax.Plan({"blocks/0/conv1": dynprune_jax.Form()})
    with pytest.raises(ValueError, match="ratios of a compact model are fixed"):
        set_ratios(dynprune_jax.compact(model, images, plan=plan), 0.2)


@pytest.mark.parametrize("cut", [0.2, 0.6])
@pytest.mark.parametrize("predicted", [False, True])
def test_ratios_are_scaled_to_a_budget(cut, predicted):
    """In proportion, as little as it takes: with a little less the cut is missed."""
    model = trained("small_vgg")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    if predicted:
        found = dynprune_jax.find_links(model, images)
        model = dynprune_jax.predict_channels(model, (0.2, 0.4), found, (None, 0.1))
    else:
        model = make_dynamic(model, (0.2, 0.4), (None, 0.1))
    model.train()
    before = nnx.state(model, dynprune_jax.PruneRatio)
    scale_ratios(model, cut, images)
    assert not model.blocks[0].layers[1].conv.deterministic  # its mode stays
    after = nnx.state(model, dynprune_jax.PruneRatio)
    factors = jax.tree.map(lambda old, new: float(new / old), before, after)
    np.testing.assert_allclose(jax.tree.leaves(factors), jax.tree.leaves(factors)[0], rtol=2e-3)
    model.eval()
    assert dynprune_jax.measure(model, images)[1].mac_reduction >= cut
    nnx.update(model, jax.tree.map(lambda ratio: 0.998 * ratio, after))
    assert dynprune_jax.measure(model, images)[1].mac_reduction < cut


@pytest.mark.parametrize("tenths", range(1, 9))
def test_a_cut_that_can_be_made_exactly_is_not_exceeded(tenths):
    class One(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(10, 4, (1, 1), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.conv(x)

    model = make_dynamic(One(), channel_ratio=0.3)
    images = jnp.ones((1, 4, 4, 10))
    scale_ratios(model, tenths / 10, images)
    usage = dynprune_jax.measure(model, images)[1]
    assert usage.layers[0].kept_channels[0] == 10 - tenths


@pytest.mark.parametrize("ratios", [(0.5,), (1e-6, 0.5, 0.0), (0.9, 0.5)])
def test_the_least_factor_is_found_whatever_the_proportions(ratios):
    assert least_factor(ratios, lambda factor: 0.5 * factor >= 0.3) == pytest.approx(0.6, rel=1e-3)
    assert least_factor(ratios, lambda factor: True) == pytest.approx(1e-4 / max(ratios))
    assert least_factor(ratios, lambda factor: False) is None
    smallest = min(filter(None, ratios))
    most = least_factor(ratios, lambda factor: scaled(smallest, factor) == 0.95)
    assert most == pytest.approx(0.95 / smallest)


def test_a_budget_that_cannot_be_kept_changes_nothing(zoo, images):
    model = make_dynamic(zoo, {"blocks/0/conv1": 0.5})
    for cut, message in (
        (0.9, r"cut is 0.9; with all ratios that are not 0 at 0.95 the gates cut \d.*%"),
        (1.0, r"cut is 1.0; it must be in \(0, 1\)"),
        (float("nan"), "cut is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_ratios(model, cut, images)
    assert float(dynamic_layers(model)["blocks/0/conv1"].channel_ratio[...]) == 0.5
    set_ratios(model, 0.0)
    with pytest.raises(ValueError, match="no gate has a prune ratio above 0"):
        scale_ratios(model, 0.1, images)
    plan = dynprune_jax.Plan({"blocks/0/conv1": dynprune_jax.Form()})
    with pytest.raises(ValueError, match="ratios of a compact model are fixed"):
        scale_ratios(dynprune_jax.compact(model, images, plan=plan), 0.2, images)


def test_a_ratio_may_be_traced():
    """So a schedule can be part of the compiled step."""
    model = dynprune_jax.models.vgg_digits(10, image_size=8, width=0.25, rngs=nnx.Rngs(0))
    model = make_dynamic(model, 0.5)
    traces = []

    @nnx.jit
    def step(model, ratio):
        traces.append(ratio)
        set_ratios(model, {"*": ratio, "blocks/1/*": 0.25})
        set_ratios(model, (None, None, 2 * ratio))

    for ratio in (0.125, 0.375):
        step(model, jnp.float32(ratio))
        for name, gate in dynamic_layers(model).items():
            expected = {"0": ratio, "1": 0.25, "2": 2 * ratio}[name.split("/")[1]]
            assert float(gate.channel_ratio[...]) == expected
    assert len(traces) == 1


def test_numpy_and_jax_numbers_are_ratios_too(zoo):
    for ratio in (np.float32(0.5), jnp.float32(0.5), np.array([0.5, 0.5])):
        gate = dynamic_layers(make_dynamic(zoo, ratio))["blocks/0/conv1"]
        assert float(gate.channel_ratio[...]) == 0.5


def test_the_convolution_of_the_image_is_gated_only_by_name(zoo):
    assert "stem" not in dynamic_layers(make_dynamic(zoo, 0.5, layers="*"))
    assert list(dynamic_layers(make_dynamic(zoo, 0.5, layers="stem"))) == ["stem"]


def test_a_new_gate_is_as_at_test_time_until_the_model_trains(zoo, images):
    model = make_dynamic(zoo, 0.5, drop_probability=0.5)
    np.testing.assert_array_equal(model(images), model(images))
    model.train()
    assert not np.array_equal(model(images), model(images))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channel_ratio": 1.0}, r"channel_ratio for \* is 1.0; .* \[0, 1\)"),
        ({"column_ratio": (0.5, -0.1)}, "column_ratio for block 1 is -0.1"),
        ({"channel_ratio": (0.5, "a")}, "channel_ratio for block 1 is 'a'"),
        ({"channel_ratio": (None, None)}, "give channel_ratio"),
        ({"channel_ratio": "half"}, "channel_ratio for .* is 'half'"),
        (
            {"channel_ratio": (0.1, 0.2), "layers": "blocks/1/*"},
            "channel_ratio for block 0 is 0.1, and no convolution chosen",
        ),
        ({"channel_ratio": (0.5,)}, "channel_ratio has 1 values; this model has 2 blocks"),
        ({"channel_ratio": 0.5, "layers": ()}, r"layers is \(\); it must be a pattern"),
        ({"channel_ratio": {"block/*": 0.5}}, r"'block/\*' matches none of the 6 convolutions"),
        ({"channel_ratio": 0.5, "layers": "conv9"}, "'conv9' matches none.*blocks/0/conv"),
        ({"channel_ratio": 0.5, "layers": lambda *_: False}, "selects no convolution"),
        ({}, "give channel_ratio, column_ratio or both"),
        (
            {"channel_ratio": 0.5, "channel_group": 8, "layers": "blocks/*"},
            "channel_group is 8, .* at most 8: no channel would be skipped",
        ),
    ],
)
def test_mistakes_are_refused(zoo, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_dynamic(zoo, **kwargs)


def test_a_large_channel_group_is_refused_only_where_nothing_would_be_skipped(zoo):
    def skips(**kwargs):
        return {
            name
            for name, gate in dynamic_layers(make_dynamic(zoo, **kwargs)).items()
            if gate.column_ratio is not None or gate.group_size(gate.in_features) < gate.in_features
        }

    assert "blocks/0/conv1" in skips(channel_ratio=0.5, channel_group=7, layers="blocks/*")
    assert skips(channel_ratio=0.5, channel_group=512) == {"named/depthwise"}
    assert "blocks/0/conv1" in skips(column_ratio=0.5, channel_group=512)


def test_a_name_may_have_brackets_and_a_statistic_is_a_function(zoo, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a user has it
    conv = nnx.Dict({"a[1]": nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))})
    (gate,) = dynamic_layers(make_dynamic(conv, {"a[1]": 0.25})).values()
    assert float(gate.channel_ratio[...]) == 0.25
    for name in ("statistic", "criterion"):
        with pytest.raises(ValueError, match=f"{name} is 'max'; it must be a function, such as"):
            make_dynamic(zoo, 0.5, **{name: "max"})
    for links in ({}, None):
        with pytest.raises(ValueError, match=f"links is {links}; it must be a mapping, as"):
            dynprune_jax.predict_channels(zoo, 0.5, links)


def test_layers_in_a_tuple_are_refused(images):
    class Pair(nnx.Module):
        def __init__(self):
            self.convs = nnx.data(
                (nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0)), nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(1)))
            )

        def __call__(self, x):
            return self.convs[1](self.convs[0](x))

    message = "a layer of Pair is in a tuple, .* put its layers in an nnx.List"
    with pytest.raises(ValueError, match=message):
        make_dynamic(Pair(), 0.5)
    plan = dynprune_jax.Plan({"convs/1": dynprune_jax.Form("patches")})
    with pytest.raises(ValueError, match=message):
        dynprune_jax.compact(Pair(), images, plan=plan)


def test_two_layers_of_one_name_are_refused():
    convs = [nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    model = nnx.Dict({"a": nnx.Dict({"b": convs[0]}), "a/b": convs[1]})
    with pytest.raises(ValueError, match=r"two layers have the name 'a/b', for a key"):
        make_dynamic(model, 0.5)


def test_a_model_without_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no 2-D nnx\.Conv"):
        make_dynamic(nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), 0.5)


def test_a_lone_convolution_can_be_the_model(images):
    conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    assert isinstance(make_dynamic(conv, 0.5), DynamicConv)
    x = jnp.ones((1, 4, 4, 8))
    np.testing.assert_array_equal(make_dynamic(conv, 0.0)(x), conv(x))


def test_blocks_may_be_convolutions_themselves_and_need_an_order():
    class Blocks(nnx.Module):
        def __init__(self, blocks):
            self.blocks = blocks

    convs = [nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)) for _ in range(2)]
    gates = dynamic_layers(make_dynamic(Blocks(nnx.List(convs)), (0.25, 0.5)))
    assert {name: float(g.channel_ratio[...]) for name, g in gates.items()} == {
        "blocks/0": 0.25,
        "blocks/1": 0.5,
    }
    for blocks in (nnx.Sequential(*convs), nnx.Dict(first=convs[0], second=convs[1])):
        with pytest.raises(ValueError, match="has 2 values; this model has 0 blocks"):
            make_dynamic(Blocks(blocks), (0.25, 0.5))


def test_stacked_layers_get_no_gate():
    make = nnx.vmap(lambda key: nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(key)))
    model = nnx.Dict(stacked=make(jax.random.split(jax.random.key(0), 3)))
    with pytest.raises(ValueError, match=r"has no 2-D nnx\.Conv with more than 4.*are stacked"):
        make_dynamic(model, 0.5)


def test_an_empty_batch_passes(zoo):
    assert make_dynamic(zoo, 0.5, 0.25)(jnp.zeros((0, 8, 8, 3))).shape == (0, 5)


def test_a_budget_is_that_of_test_time_whatever_mode_a_model_is_in(zoo, images):
    model = make_dynamic(zoo, {"blocks/0/conv1": 0.5, "blocks/0/conv2": 0.1}, drop_probability=0.0)
    model.train()
    scale_ratios(model, 0.01, images)
    model.eval()
    assert dynprune_jax.measure(model, images)[1].mac_reduction >= 0.01
    with pytest.raises(ValueError, match=r"0\.95 the gates cut") as caught:
        scale_ratios(model, 0.99, images)
    set_ratios(model, {"blocks/0/conv1": 0.95, "blocks/0/conv2": 0.95})
    most = dynprune_jax.measure(model, images)[1].mac_reduction
    assert str(caught.value).endswith(f"the gates cut {most:.1%}")
