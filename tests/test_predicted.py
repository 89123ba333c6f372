"""Gates that decide before a convolution which of its outputs to compute."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import mixed_plan, run, trained

from dynprune_jax import compact, find_links, measure, models
from dynprune_jax.build import build_dynamic, build_links, build_model
from dynprune_jax.experiments.benchmark import _choosing, _trained_or_fresh
from dynprune_jax.models.links import column_blocks, links
from dynprune_jax.network import Network
from dynprune_jax.pruning import plan as plan_lib
from dynprune_jax.pruning.attention import inverse
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.dynamic_conv import DynamicConv, PruneRatio
from dynprune_jax.pruning.forms import Form
from dynprune_jax.pruning.handover import GatedNorm, Handover
from dynprune_jax.pruning.layers import all_modules, dynamic_layers
from dynprune_jax.pruning.masks import Masks
from dynprune_jax.pruning.plan import Plan, measure_plan
from dynprune_jax.pruning.ratios import set_ratios
from dynprune_jax.pruning.surgery import make_dynamic, predict_channels
from dynprune_jax.run import Run
from dynprune_jax.train import train_and_evaluate

NETWORKS = {
    "vgg": ("small_vgg", 8, 1),
    "resnet20": ("small_resnet20", 8, 3),
    "resnet50": ("small_resnet50", 16, 3),
    "mobilenet": ("small_mobilenet", 8, 3),
}


def predicted(name, ratio=0.4, column_ratio=None, block_columns=False, **options):
    """A model with norms as after some training, the same with predicted gates, and images."""
    of, side, channels = NETWORKS[name]
    model = trained(of, image_size=side, in_channels=channels, width=0.25)
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            for part in (module.scale, module.bias, module.mean, module.var):
                part[...] = jnp.asarray(rng.uniform(0.1, 1.0, part.shape), jnp.float32)
    blocks = column_blocks(model) if block_columns else ()
    dynamic = predict_channels(
        model,
        ratio,
        links(model),
        column_ratio,
        column_blocks=blocks,
        **options,
    )
    for layer in dynamic_layers(dynamic).values():
        if layer.feature_ratio is not None:  # saliences that differ from input to input
            drawn = rng.normal(size=layer.salience_kernel.shape)
            layer.salience_kernel[...] = jnp.asarray(drawn, jnp.float32)
    model.eval()
    dynamic.eval()
    images = jnp.asarray(rng.normal(size=(3, side, side, channels)), jnp.float32)
    return model, dynamic, images


@pytest.mark.parametrize("group", [1, 2])
def test_a_unit_is_the_slow_reference(group):
    """One convolution, norm and relu of each image, its outputs chosen by hand."""
    _, dynamic, _ = predicted("vgg", channel_group=group)
    unit = dynamic.blocks[0].layers[1]
    x = jax.random.normal(jax.random.key(2), (3, 8, 8, 8))
    x = x.at[..., 5:].set(0.0)  # what the gate in front would have left out
    found = np.asarray(unit(x))
    kernel, bias = np.asarray(unit.conv.salience_kernel[...]), np.asarray(unit.conv.salience_bias)
    dense = np.asarray(nnx.Conv.__call__(unit.conv, x))
    norm = unit.norm
    for image in range(3):
        means = np.abs(np.asarray(x[image])).mean(axis=(0, 1))
        salience = np.maximum(means / np.sqrt(8) @ kernel + bias, 0)
        groups = 8 // group
        of_groups = [salience[group * i : group * (i + 1)].mean() for i in range(groups)]
        kept = np.argsort(-np.asarray(of_groups), kind="stable")[: groups - int(0.4 * groups)]
        expected = np.zeros_like(dense[image])
        for f in (group * i + j for i in kept for j in range(group)):
            y = (dense[image, ..., f] - norm.mean[f]) / np.sqrt(norm.var[f] + norm.epsilon)
            y = (y * norm.scale[f] + norm.bias[f]) * salience[f]
            expected[..., f] = np.maximum(y, 0)
        np.testing.assert_allclose(found[image], expected, rtol=1e-4, atol=1e-5)


def test_nan_is_not_skipped():
    _, dynamic, _ = predicted("vgg")
    conv = dynamic.blocks[0].layers[1].conv
    x = jnp.ones((1, 8, 8, 8)).at[0, 3, 4, 5].set(jnp.nan)
    for layer in (conv, CompactConv(conv, Form())):
        assert np.isnan(layer.salience(x)).all()


@pytest.mark.parametrize(("name", "group"), [("vgg", 1), ("resnet20", 1), ("vgg", 4)])
def test_readers_lose_nothing(name, group):
    """What a reader skips is zero: with the readers' own gates open the answers are the same."""
    _, dynamic, images = predicted(name, channel_group=group)
    logits, usage = nnx.jit(measure)(dynamic, images)
    by_name = {layer.name: layer for layer in usage.layers}
    layers = all_modules(dynamic)
    readers = {name: reader for name, (_, reader) in links(dynamic).items()}
    for name, reader in readers.items():
        features = np.asarray(by_name[name].masks.features)
        of_groups = features.reshape(len(images), -1, group)
        np.testing.assert_array_equal(of_groups.any(axis=2), of_groups.all(axis=2))
        n = of_groups.shape[1]
        np.testing.assert_array_equal(features.sum(axis=1), group * (n - int(0.4 * n + 1e-6)))
        if isinstance(layers[reader], DynamicConv):
            np.testing.assert_array_equal(by_name[reader].kept_channels, features.sum(axis=1))
    for reader in readers.values():
        if isinstance(layers[reader], DynamicConv):
            layers[reader].channel_ratio = PruneRatio(jnp.float32(0.0))
    np.testing.assert_allclose(run(dynamic, images), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("column_ratio", [None, 0.3])
def test_a_depthwise_convolution_hands_a_choice_on(column_ratio):
    """Beside the same unit written out, with the maker's choice on both of its maps."""
    _, dynamic, _ = predicted("mobilenet", column_ratio=column_ratio)
    unit = dynamic.blocks[1].layers[0]
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, unit.expand.in_features))
    masks = unit.expand.masks(x)
    kept = np.asarray(masks.features)
    np.testing.assert_array_equal(kept.sum(axis=1), kept.shape[1] - int(0.4 * kept.shape[1]))

    def chosen(y, salience=None):
        y = y if salience is None else y * salience[:, None, None, :]
        return nnx.relu6(jnp.where(kept[:, None, None, :], y, 0.0))

    def dense(gate, y, channels=None):
        columns = gate.choose(y.shape, *gate.scores(y)).columns  # a choice of each gate's own
        return nnx.Conv.__call__(gate, Masks(channels, columns).apply(y))

    def norm(gated, y):
        return nnx.BatchNorm.__call__(gated, y)

    def written_out(x):
        first = dense(unit.expand, x, masks.channels)
        first = chosen(norm(unit.expand_norm, first), unit.expand.salience(x))
        second = chosen(norm(unit.depthwise_norm, dense(unit.depthwise, first)))
        return norm(unit.project_norm, dense(unit.project, second))

    for call in (lambda f: f(x), lambda f: jax.grad(lambda x: jnp.sum(f(x) ** 2))(x)):
        np.testing.assert_allclose(call(unit), call(written_out), rtol=1e-4, atol=1e-5)

    _, usage = measure(unit, x)
    expand, depthwise, project = usage.layers
    np.testing.assert_array_equal(depthwise.masks.features, kept)
    np.testing.assert_array_equal(depthwise.kept_channels, kept.sum(axis=1))
    np.testing.assert_array_equal(project.kept_channels, kept.sum(axis=1))
    if column_ratio is None:
        share = kept.mean(axis=1)
        of_input = np.asarray(masks.channels).mean(axis=1)  # it reads what was chosen before
        np.testing.assert_allclose(expand.macs, expand.dense_macs * share * of_input)
        for layer in (depthwise, project):
            np.testing.assert_allclose(layer.macs, layer.dense_macs * share)
        assert depthwise.gate_operations == 0


class Separable(nnx.Module):
    """What a MobileNet is made of; each of its halves is called within `around`."""

    def __init__(self, rngs, around=lambda part: part):
        self.expand, self.norm1 = nnx.Conv(3, 8, (1, 1), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm2, self.project = nnx.BatchNorm(8, rngs=rngs), nnx.Conv(8, 4, (1, 1), rngs=rngs)
        self.norm1.bias[...] = jnp.ones(8).at[2].set(-9.0)  # zero behind the relu, of any image
        self.norm2.bias[...] = jnp.ones(8)
        self.first = around(lambda self, x: nnx.relu(self.norm1(self.expand(x))))
        self.second = around(lambda self, x: nnx.relu(self.norm2(self.depthwise(x))))

    def __call__(self, x):
        return self.project(self.second(self, self.first(self, x)))


SEPARABLE = {"expand": ("norm1", "depthwise", "norm2", "project")}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("ratio", "drop_probability"), [(0.12, 1.0), (0.5, 0.0)])
def test_what_is_zero_by_itself_is_not_left_out(mode, ratio, drop_probability):
    """Of 8 channels a ratio of .12 prunes none, and a target that is never dropped stays."""
    model, x = Separable(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    assert find_links(model, x) == SEPARABLE
    dynamic = predict_channels(model, ratio, SEPARABLE, drop_probability=drop_probability)
    for each in (model, dynamic):
        getattr(each, mode)()
    kept = 4 if mode == "eval" and ratio == 0.5 else 8
    logits, usage = nnx.jit(measure)(dynamic, x)
    assert usage.layers[1].kept_channels.tolist() == [kept, kept]
    if kept == 8:
        np.testing.assert_allclose(logits, nnx.jit(lambda model, x: model(x))(model, x), atol=1e-5)


class TwiceSeparable(nnx.Module):
    """Two depthwise convolutions one behind the other."""

    def __init__(self, rngs):
        self.expand, self.norm1 = nnx.Conv(3, 8, (1, 1), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.depthwise1, self.depthwise2 = (
            nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs) for _ in range(2)
        )
        self.norm2, self.norm3 = (nnx.BatchNorm(8, rngs=rngs) for _ in range(2))
        self.project = nnx.Conv(8, 4, (1, 1), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.expand(x)))
        x = nnx.relu(self.norm2(self.depthwise1(x)))
        return self.project(nnx.relu(self.norm3(self.depthwise2(x))))


@pytest.mark.parametrize("ratio", [0.5, 0.0])
def test_a_choice_goes_through_several_depthwise_convolutions(ratio):
    """Compact too, where a gate that prunes nothing has no mask of its own."""
    model, x = TwiceSeparable(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    found = find_links(model, x)
    assert found == {"expand": ("norm1", "depthwise1", "norm2", "depthwise2", "norm3", "project")}
    dynamic = predict_channels(model, ratio, found)
    dynamic.eval()
    logits, usage = nnx.jit(measure)(dynamic, x)
    kept = [layer.kept_channels.tolist() for layer in usage.layers]
    assert kept == [[3, 3], *[[8 - int(ratio * 8)] * 2] * 3]
    plan = Plan(dict.fromkeys(["depthwise1", "depthwise2"], Form("shifts")))
    fast = compact(dynamic, x, plan=plan)
    np.testing.assert_allclose(nnx.jit(fast)(x), logits, rtol=1e-4, atol=1e-5)


def test_a_depthwise_convolution_with_a_function_of_its_own_stays_as_it_is():
    model, x = TwiceSeparable(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    found = find_links(model, x)  # as it is; of such a layer no link is found
    model.depthwise1.conv_general_dilated = functools.partial(jax.lax.conv_general_dilated)
    dynamic = predict_channels(model, 0.5, found)
    dynamic.eval()
    fast = compact(dynamic, x, plan=Plan({"depthwise2": Form("shifts")}))
    np.testing.assert_allclose(nnx.jit(fast)(x), nnx.jit(dynamic)(x), rtol=1e-4, atol=1e-5)


def test_a_choice_that_does_not_reach_a_depthwise_convolution_is_told():
    model, x = Separable(nnx.Rngs(0), around=nnx.remat), jnp.ones((2, 4, 4, 3))
    dynamic = predict_channels(model, 0.5, SEPARABLE)
    message = "what expand leaves out does not reach the depthwise convolution behind it"
    jitted = Separable(nnx.Rngs(0), around=nnx.jit)  # what is compiled is not traced again
    for each in (dynamic, dynamic, *[predict_channels(jitted, 0.5, SEPARABLE)] * 2):
        for call in (lambda model, x: model(x), nnx.jit(lambda model, x: model(x)), measure):
            with pytest.raises(ValueError, match=message):
                call(each, x)
    whole = predict_channels(model, 0.5, {"expand": SEPARABLE["expand"][:2]})  # as it says
    assert measure(whole, x)[1].layers[1].kept_channels.tolist() == [4, 4]


def test_the_cut_counts_both_sides():
    _, dynamic, images = predicted("vgg", ratio=0.5)
    _, usage = measure(dynamic, images)
    first, second = usage.layers[:2]
    np.testing.assert_allclose(first.macs, first.dense_macs / 2)  # the image keeps its channel
    np.testing.assert_allclose(second.macs, second.dense_macs / 4)
    assert second.gate_operations == 8 * 8 * 8 * 2 + 2 * 8 * 3 + 8 * 8
    assert usage.dense_macs == measure(predicted("vgg")[0], images)[1].dense_macs


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("salience_scales", [True, False])
def test_it_starts_as_the_dense_model_and_ranks_as_static_pruning(name, salience_scales):
    model, dynamic, images = predicted(name, ratio=0.0, salience_scales=salience_scales)
    for layer in dynamic_layers(dynamic).values():
        if layer.feature_ratio is not None:
            layer.salience_kernel[...] = jnp.zeros_like(layer.salience_kernel[...])
            norms = np.abs(layer.kernel[...]).sum((0, 1, 2))
            expected = np.broadcast_to(norms / norms.mean(), (len(images), len(norms)))
            inputs = jnp.ones((len(images), 4, 4, layer.in_features))
            np.testing.assert_allclose(layer.salience(inputs), expected, rtol=1e-5)
    if salience_scales:  # the norms' scales are divided by it, and it multiplies
        expected = run(model, images)
        atol = 1e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(run(dynamic, images), expected, rtol=1e-4, atol=atol)
    else:
        np.testing.assert_array_equal(dynamic(images), model(images))


def test_a_start_that_is_a_constant_of_the_program_is_computed_with_like_any_other():
    """XLA for CPUs multiplies by a constant matrix of zeros alone with whatever lies in memory."""

    class Net(Chain):
        def __init__(self):
            super().__init__(1)
            self.conv = nnx.Conv(8, 48, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(48, rngs=nnx.Rngs(0))
            self.reader = nnx.Conv(48, 8, (3, 3), rngs=nnx.Rngs(0))

    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 8))
    dynamic = predict_channels(Net(), 0.5, {"conv": ("norm", "reader")})
    dynamic.eval()
    expected = nnx.jit(lambda model, images: model(images))(dynamic, images)
    sizes = 4 * list(range(1, 2000, 7))
    junk = [jax.device_put(np.full(n, 1e30, np.float32), may_alias=False) for n in sizes]
    del junk  # and now it lies there
    np.testing.assert_allclose(nnx.jit(dynamic)(images), expected, rtol=1e-4, atol=1e-5)


def test_it_starts_as_a_model_with_plain_norms_and_dead_filters():
    conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    conv.kernel[...] = conv.kernel[...].at[..., 1].set(0.0)
    norm = nnx.BatchNorm(4, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    model = nnx.Sequential(conv, norm, nnx.Conv(4, 2, (3, 3), rngs=nnx.Rngs(1)))
    names = {"layers/0": ("layers/1", "layers/2")}
    dynamic = predict_channels(model, links=names, channel_ratio=0.0, rngs=nnx.Rngs(0))
    assert dynamic.layers[0].salience_bias[1] == np.float32(0.1)
    mask = jnp.ones((3, 3, 3, 4)).at[..., 2].set(0.0)
    masked = nnx.Conv(3, 4, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    gate = DynamicConv(masked, feature_ratio=0.5, rngs=nnx.Rngs(0))
    assert [float(x) == np.float32(0.1) for x in gate.salience_bias] == [False, False, True, False]
    images = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    np.testing.assert_allclose(dynamic(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "column_ratio", "block_columns", "sizes"),
    [
        ("vgg", None, False, {}),
        ("resnet20", 0.3, False, {}),
        ("vgg", 0.3, True, {}),
        ("resnet20", 0.3, True, {}),
        ("vgg", None, False, {"channel_group": 8}),
        ("vgg", 0.3, True, {"channel_group": 2, "column_patch": 2}),
        ("mobilenet", None, False, {}),
        ("mobilenet", 0.3, True, {"channel_group": 4}),
    ],
)
def test_compact_equals_masked(name, column_ratio, block_columns, sizes):
    _, dynamic, images = predicted(name, 0.4, column_ratio, block_columns, **sizes)
    expected = nnx.jit(dynamic)(images)
    fast = compact(dynamic, images, plan=mixed_plan(dynamic))
    np.testing.assert_allclose(nnx.jit(fast)(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(nnx.jit(dynamic)(images), expected)  # it was left as it was


def test_the_saliences_learn_and_the_dense_names_stay():
    model, dynamic, images = predicted("resnet20")
    network = Network(dynamic)
    new = network.weights.keys() - Network(model).weights.keys()
    assert network.weights.keys() > Network(model).weights.keys()
    assert {name.rsplit("/", 1)[1] for name in new} == {"salience_kernel", "salience_bias"}

    def loss(params):
        bound = network.bind(network.weights, params)
        bound.train()
        return jnp.sum(jnp.sin(bound(images)))

    gradients = jax.jit(jax.grad(loss))({name: network.weights[name] for name in new})
    for gradient in gradients.values():
        assert np.abs(gradient).max() > 0


def test_a_salience_that_only_ranks_learns_too(monkeypatch):
    monkeypatch.setattr(plan_lib, "_HOPELESS", float("inf"))
    _, dynamic, images = predicted("vgg")
    unit = dynamic.blocks[0].layers[0]
    y = np.asarray(run(unit, images))
    unit.conv.salience_scales = False
    np.testing.assert_array_equal(unit.conv.masks(images).salience, 1.0)
    salience = np.asarray(unit.conv.salience(images))[:, None, None, :]
    np.testing.assert_allclose(run(unit, images) * salience, y, rtol=1e-4, atol=1e-6)
    taken = measure_plan(unit, images, repeats=1).milliseconds["conv"]
    skipping = [form for form in taken if form.features]  # what is not wanted
    assert skipping
    forms = mixed_plan(dynamic).forms | {"blocks/0/layers/0/conv": skipping[0]}
    fast = compact(dynamic, images, plan=Plan(forms))
    np.testing.assert_allclose(run(fast, images), run(dynamic, images), rtol=1e-4, atol=1e-4)
    gradient = nnx.jit(nnx.grad(lambda unit: jnp.sum(unit(images))))(unit)
    assert np.abs(gradient.conv.salience_kernel[...]).max() > 0


def test_the_norm_sees_all_outputs_in_training():
    """Its statistics are those of the dense convolution, wanted or not."""
    model, dynamic, images = predicted("vgg")
    model.train()
    dynamic.train()
    for either in (model, dynamic):
        nnx.jit(lambda model: model(images))(either)
    np.testing.assert_allclose(
        dynamic.blocks[0].layers[0].norm.mean[...], model.blocks[0].layers[0].norm.mean[...]
    )


def test_a_salience_is_taken_once_and_by_its_own_map_only():
    handover, y = Handover(), jnp.ones(2)
    wanted = Masks(salience=jnp.ones(1))
    handover.put(y, wanted)
    with pytest.raises(ValueError, match="not left out"):
        handover.take(jnp.ones(2))
    assert handover.waits
    assert not copy.deepcopy(handover).waits  # no copy takes a map along
    assert handover.take(y) is wanted
    assert handover.take(y) == Masks()
    assert not handover.waits


def test_a_choice_is_taken_once_and_for_its_own_maps_only():
    handover, first, second = Handover("conv", goes_on=True), jnp.ones(2), jnp.ones(2)
    wanted = jnp.ones((2, 3), bool)

    def refused(shape):
        with pytest.raises(ValueError, match="what conv leaves out does not reach the depthwise"):
            handover.take_choice(shape)

    def taken(y):
        handover.put(y, Masks(features=wanted))
        handover.take(y)

    taken(first)
    assert handover.take_choice((2, 3)) is wanted
    refused((2, 3))
    taken(first)
    refused((1, 3))  # other images
    taken(first)
    handover.put(second, Masks(features=wanted))
    refused((2, 3))  # the second map has taken its place


@pytest.mark.parametrize("name", NETWORKS)
def test_columns_are_chosen_once_a_block(name):
    """All its convolutions keep and want what the first has chosen."""
    of, side, channels = NETWORKS[name]
    model = trained(of, image_size=side, in_channels=channels, width=0.5)
    blocks = column_blocks(model)
    dynamic = make_dynamic(model, column_ratio=0.4, column_blocks=blocks)
    dynamic.eval()
    images = jax.random.normal(jax.random.key(1), (3, side, side, channels))
    _, usage = nnx.jit(measure)(dynamic, images)
    layers = {layer.name: layer for layer in jax.device_get(usage).layers}
    blocks = [[n for n, _ in block if layers[n].masks.columns is not None] for block in blocks]
    assert max(len(block) for block in blocks) == {"vgg": 2, "resnet20": 2}.get(name, 3)
    for first, *rest in blocks:
        chosen = layers[first].masks
        n = chosen.columns[0].size
        np.testing.assert_array_equal(chosen.columns.sum(axis=(1, 2)), n - int(0.4 * n + 1e-6))
        np.testing.assert_array_equal(chosen.out_columns, chosen.columns)
        for other in rest:
            masks = layers[other].masks
            np.testing.assert_array_equal(masks.columns.sum(axis=(1, 2)), n - int(0.4 * n + 1e-6))
            assert not (masks.out_columns & ~chosen.columns).any()
        layer = layers[first]
        if dynamic_layers(dynamic)[first].kernel_size == (1, 1):  # what it keeps is what it wants
            share = chosen.columns.mean(axis=(1, 2))
            np.testing.assert_allclose(layer.macs, layer.dense_macs * share, rtol=1e-6)


def test_at_ratio_0_columns_chosen_once_a_block_change_nothing():
    """Not even where a map has columns of zeros by itself."""
    model = models.vgg_digits(10, image_size=8, width=0.25, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.bias[...] -= 1.0
    model.eval()
    dynamic = make_dynamic(model, column_ratio=0.0, column_blocks=column_blocks(model))
    dynamic.eval()
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    assert (model.blocks[0].layers[0](images) == 0).all(axis=-1).any()
    logits, usage = measure(dynamic, images)
    np.testing.assert_array_equal(logits, model(images))
    assert usage.mac_reduction == usage.executed_mac_reduction == 0.0


def test_a_unit_leaves_the_columns_it_skips_as_they_were():
    model = models.resnet20(10, image_size=8, width=0.5, rngs=nnx.Rngs(0))
    dynamic = make_dynamic(model, column_ratio=0.5, column_blocks=column_blocks(model))
    dynamic.eval()
    unit = dynamic.blocks[0].layers[1]
    x = nnx.relu(jax.random.normal(jax.random.key(0), (2, 8, 8, 8)))
    skipped = ~np.asarray(unit.conv1.masks(x).columns)
    y = np.asarray(unit(x))
    assert skipped.sum() == 2 * 32
    np.testing.assert_array_equal(y[skipped], np.asarray(x)[skipped])
    assert (np.abs(y - x).max(-1) > 0)[~skipped].all()


def test_columns_of_a_block_need_one_ratio_and_one_resolution():
    model = models.vgg_digits(10, image_size=8, rngs=nnx.Rngs(0))
    ratios = {"*": 0.5, "blocks/1/layers/1/conv": 0.4}
    with pytest.raises(ValueError, match="column_ratio differs between blocks/1/layers/0/conv,"):
        make_dynamic(model, column_ratio=ratios, column_blocks=column_blocks(model))
    conv = nnx.Conv(4, 4, (3, 3), strides=2, rngs=nnx.Rngs(0))
    gate = DynamicConv(conv, column_ratio=0.5, columns_of=Handover(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="makes a map of 2x2 of one of 4x4"):
        gate(jnp.ones((1, 4, 4, 4)))
    for block, message in {
        ("blocks/1/layers/9/conv", "blocks/1/layers/0/norm"): "'blocks/1/layers/9/conv', which is",
        ("blocks/1/layers/0/conv", "blocks/1/layers/0/nrm"): "'blocks/1/layers/0/nrm', which is no",
    }.items():
        with pytest.raises(ValueError, match=f"column_blocks names {message}"):
            make_dynamic(model, column_ratio=0.5, column_blocks=[[block]])
    layers = ("blocks/2/layers/0/conv", "blocks/2/layers/2/conv")
    with pytest.raises(ValueError, match="blocks/2/layers/1/conv has no gate on columns"):
        make_dynamic(model, column_ratio=0.5, layers=layers, column_blocks=column_blocks(model))
    layers = ("blocks/2/layers/0/conv", "blocks/2/layers/1/conv")  # and not the last
    gates = dynamic_layers(
        make_dynamic(model, column_ratio=0.5, layers=layers, column_blocks=column_blocks(model))
    )
    assert tuple(gates) == layers
    assert len({id(gate.columns_of) for gate in gates.values()}) == 1


def test_the_first_of_a_block_chooses_its_columns_as_a_gate_by_itself():
    conv, handover = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), Handover()
    alone, first = (
        DynamicConv(conv, column_ratio=0.5, criterion=inverse, **given, rngs=nnx.Rngs(0))
        for given in ({}, {"handover": handover, "columns_of": handover})
    )
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 4))
    np.testing.assert_array_equal(first.masks(x).columns, alone.masks(x).columns)
    follower = DynamicConv(conv, column_ratio=0.5, columns_of=handover, rngs=nnx.Rngs(0))
    assert follower(x).shape == x.shape  # what it wants itself it hands over too
    assert follower.handover.waits


def test_a_follower_wants_nothing_that_was_left_out():
    """Not to make up its count, if a kept column is all zero; nor if more than the count stay."""
    conv = nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0))
    gate = DynamicConv(
        conv,
        column_ratio=0.5,
        columns_of=Handover(),
        criterion=inverse,  # which does not apply, nor does the statistic: values are below 0
        drop_probability=0.5,
        rngs=nnx.Rngs(1),
    )
    present = np.zeros((2, 4, 4), bool)
    present[0, 1, :3] = True  # fewer than the 8 that it keeps
    present[1, :3] = True  # more
    x = jnp.repeat(jnp.where(present[..., None], -1.0, 0.0), 4, axis=-1)
    masks = gate.masks(x)
    np.testing.assert_array_equal(np.asarray(masks.columns).sum((1, 2)), [8, 8])
    np.testing.assert_array_equal(masks.out_columns[0], present[0])
    gate.deterministic = False
    np.testing.assert_array_equal(gate.masks(x).out_columns, present)
    gate.deterministic = True
    gate.column_ratio[...] = jnp.float32(0.01)  # of 16 none: what is zero was not left out
    assert gate.masks(x).out_columns.all()


def test_what_is_not_left_out_is_not_counted_as_left_out():
    class Between(nnx.Module):
        """Something comes between the convolution and its normalization."""

        def __init__(self):
            self.conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
            self.head = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.head(self.norm(self.conv(x) + 1.0))

    class Twice(Between):
        """A second map is made before the normalization reads the first."""

        def __call__(self, x):
            maps = self.conv(x), self.conv(2 * x)
            return self.head(sum(map(self.norm, maps)))

    class Never(Between):
        """The normalization is not called."""

        def __call__(self, x):
            return self.head(self.conv(x))

    def call(model, x):
        return model(x)

    for model, calls in (
        (Between(), (call, measure, measure, compact)),
        (Twice(), (call, nnx.jit(call), measure, compact)),
        (Never(), (measure, measure, compact)),
    ):
        dynamic = predict_channels(model, 0.5, {"conv": ("norm", "head")})
        for call in calls:
            with pytest.raises(ValueError, match="outputs that conv leaves out are not left out"):
                call(dynamic, jnp.ones((2, 4, 4, 8)))


class Chain(nnx.Module):
    """A convolution and a normalization, and what reads them."""

    def __init__(self, groups):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
        self.reader = nnx.Conv(8, 8, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.reader(nnx.relu(self.norm(self.conv(x))))


class Other(nnx.Conv):
    """It may compute something else."""


@pytest.mark.parametrize(
    ("groups", "together"), [(1, 1), (2, 1), (4, 1), (8, 1), (None, 1), (1, 2), (8, 2)]
)
def test_a_reader_that_cannot_skip_single_channels_loses_nothing(groups, together):
    """Of groups of several channels: the wanted ones are spread over all. Or not known to us."""
    chain = Chain(groups or 1)
    if groups is None:
        chain.reader = Other(8, 8, (3, 3), rngs=nnx.Rngs(0))
    given = {"conv": ("norm", "reader")}
    model = predict_channels(chain, 0.4, given, channel_group=together)
    model.eval()
    x = jax.random.normal(jax.random.key(0), (3, 6, 6, 8))
    logits, usage = measure(model, x)
    skips = groups in (1, 8)
    if groups is None:
        assert usage.other_macs == 36 * 72 * 8
    else:
        kept = {1: 5, 2: 6}[together]  # 5 of 8 channels, or 3 of 4 pairs
        assert usage.layers[1].kept_channels.tolist() == [kept if skips else 8] * 3
    if skips:
        model.reader.channel_ratio = PruneRatio(jnp.float32(0.0))
    np.testing.assert_array_equal(model(x), logits)


def test_a_plan_times_what_a_reader_can_skip(monkeypatch):
    monkeypatch.setattr(plan_lib, "_HOPELESS", np.inf)  # all of it, however slow
    chain = Chain(1)
    chain.eval()
    given = {"conv": ("norm", "reader")}
    x = jax.ShapeDtypeStruct((1, 4, 4, 8), jnp.float32)
    timed = measure_plan(predict_channels(chain, 0.5, given), x).milliseconds["reader"]
    assert {form.channels for form in timed} == {True, False}


def test_followers_are_found_where_equal_networks_share_a_program():
    call = nnx.jit(lambda block, x: block(x))

    class Block(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x)))

    class Apart(nnx.Module):
        def __init__(self):
            self.block = Block()
            self.reader = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.reader(call(self.block, x))

    names = {"block/conv": ("block/norm", "reader")}
    networks = [predict_channels(Apart(), 0.5, names, layers="block/conv") for _ in range(2)]
    for network in networks:
        network(jnp.ones((1, 4, 4, 3)))
    set_ratios(networks[1], 0.25)
    assert float(networks[1].block.conv.feature_ratio[...]) == 0.25
    assert float(networks[1].reader.channel_ratio[...]) == 0.25
    assert float(networks[0].reader.channel_ratio[...]) == 0.5


def test_parameters_of_a_normalization_stay_of_their_kind():
    class NoDecay(nnx.Param):
        pass

    model = Separable(nnx.Rngs(0))
    model.norm1.scale = nnx.Param(jnp.full(8, 2.0, jnp.bfloat16), group="norms")
    model.norm1.bias = NoDecay(jnp.ones(8, jnp.bfloat16))
    with jax.numpy_dtype_promotion("standard"):
        dynamic = predict_channels(model, 0.5, {"expand": SEPARABLE["expand"][:2]})
    scale, bias = dynamic.norm1.scale, dynamic.norm1.bias
    assert type(bias) is NoDecay
    assert scale.get_metadata()["group"] == "norms"
    assert scale.dtype == bias.dtype == jnp.bfloat16
    start = dynamic.expand.salience_bias[...]
    for new, old in ((scale, 2.0), (bias, 1.0)):
        np.testing.assert_allclose(new[...].astype(jnp.float32), old / start, rtol=2**-8)


def test_a_ratio_that_is_set_goes_through_a_depthwise_convolution():
    model, dynamic, images = predicted("mobilenet", 0.4)
    ratios = {"*": 0.2, "blocks/1/*": 0.7}
    expected = predict_channels(model, ratios, links(model))
    nnx.update(expected, nnx.state(dynamic, nnx.Param))
    expected.eval()
    set_ratios(dynamic, channel_ratio=ratios)
    np.testing.assert_array_equal(dynamic(images), expected(images))
    with pytest.raises(ValueError, match=r"depthwise cannot be set: .* follows"):
        set_ratios(dynamic, channel_ratio={"blocks/1/layers/0/depthwise": 0.5})


@pytest.mark.parametrize("name", ["vgg", "resnet20"])
def test_ratios_that_are_set_are_those_it_could_have_been_made_with(name):
    """What reads the chosen outputs, and what shares the columns of a block, follow."""
    model, dynamic, images = predicted(name, 0.4, 0.3, block_columns=True)
    blocks = [0.1 * i for i in range(1, len(model.blocks) + 1)]
    expected = predict_channels(
        model, blocks, links(model), 0.6, column_blocks=column_blocks(model)
    )
    nnx.update(expected, nnx.state(dynamic, nnx.Param))
    expected.eval()
    dynamic = jax.tree.map(jnp.copy, dynamic)  # what follows what is not told by shared arrays
    set_ratios(dynamic, channel_ratio=blocks, column_ratio=0.6)
    np.testing.assert_array_equal(dynamic(images), expected(images))
    followers = {
        "channel_ratio": next(reader for _, reader in links(model).values()),
        "column_ratio": [names[1][0] for names in column_blocks(model) if names[1:]][-1],
    }
    for axis, follower in followers.items():
        if axis == "column_ratio" or dynamic_layers(dynamic)[follower].feature_ratio is None:
            with pytest.raises(ValueError, match=f"{axis} of {follower} cannot be set: .* follows"):
                set_ratios(dynamic, **{axis: {follower: 0.9}})


class Concatenating(nnx.Module):
    """As in a DenseNet, the reader sees something else besides."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.reader = nnx.Conv(24, 8, (1, 1), rngs=rngs)

    def __call__(self, x):
        return self.reader(jnp.concatenate([x, nnx.relu(self.norm(self.conv(x)))], -1))


def test_a_reader_that_sees_something_else_besides_skips_nothing():
    model = Concatenating(nnx.Rngs(0))
    dynamic = predict_channels(model, 0.5, {"conv": ("norm", "reader")})
    dynamic.eval()
    assert list(dynamic_layers(dynamic)) == ["conv"]
    x = jax.random.normal(jax.random.key(1), (2, 6, 6, 8))
    _, usage = measure(dynamic, x)
    assert [int(n) for n in usage.layers[1].kept_channels] == [24, 24]
    for form in (Form(), Form("patches", features=True)):
        fast = compact(dynamic, x, plan=Plan({"conv": form}))
        np.testing.assert_allclose(fast(x), dynamic(x), rtol=1e-4, atol=1e-5)
        assert fast(x[:0]).shape == (0, 6, 6, 8)


def test_surgery_says_what_it_cannot_do():
    model, dynamic, _ = predicted("vgg")
    with pytest.raises(ValueError, match="matches none of the 4 convolutions"):
        predict_channels(model, 0.5, links(model), layers="blocks/9/*")
    for again in (
        lambda: predict_channels(dynamic, 0.5, links(model)),
        lambda: predict_channels(dynamic, 0.5, links(model), layers="blocks/0/*"),
        lambda: make_dynamic(dynamic, 0.0),
    ):
        with pytest.raises(ValueError, match=r"blocks/0/layers/./conv has a predicted gate, or"):
            again()
    with pytest.raises(ValueError, match=r"channel_group is 16, .* at most 16: no channel"):
        predict_channels(model, 0.5, links(model), channel_group=16)
    for nothing in (None, (None, None)):
        with pytest.raises(ValueError, match="give channel_ratio"):
            predict_channels(model, nothing, links(model))
    name = "blocks/0/layers/0/conv"
    norm, reader = links(model)[name]
    for link, wrong in (
        ({"conv": (norm, reader)}, "'conv', which is no Conv"),
        ({name: (reader, reader)}, f"'{reader}', which is no BatchNorm"),
        ({name: (norm, "reader")}, "'reader', which is no Module"),
    ):
        with pytest.raises(ValueError, match=f"links names {wrong}"):
            predict_channels(model, {"*": 0.5}, link)
    odd = nnx.clone(model)  # a subclass may compute something else
    all_modules(odd)[norm].__class__ = type("Odd", (nnx.BatchNorm,), {})
    with pytest.raises(ValueError, match=f"links names '{norm}', which is a subclass of BatchNorm"):
        predict_channels(odd, {"*": 0.5}, {name: (norm, reader)})
    for link in ((norm,), (norm, reader, norm)):
        said = f"for '{name}'; it must be a normalization and a reader"
        with pytest.raises(ValueError, match=said):
            predict_channels(model, {"*": 0.5}, {name: link})
    second = "blocks/0/layers/1/conv"
    both = {name: (norm, second), second: (links(model)[second][0], second)}
    with pytest.raises(ValueError, match=f"'{second}' as what reads the outputs of both"):
        predict_channels(model, 0.5, both)
    with pytest.raises(ValueError, match=f"links goes on behind '{second}', which is no depth"):
        predict_channels(model, {"*": 0.5}, {name: (norm, second, *links(model)[second])})
    with pytest.raises(ValueError, match="links goes on behind 'head', which is no depthwise"):
        predict_channels(model, {"*": 0.5}, {name: (norm, "head", *links(model)[second])})
    both[second] = (norm, links(model)[second][1])
    with pytest.raises(ValueError, match=f"{norm} is named as the normalization of several"):
        predict_channels(model, 0.5, both)
    shared = make_dynamic(model, None, 0.5, column_blocks=[[(second, links(model)[second][0])]])
    with pytest.raises(ValueError, match=f"{second} .* or shares a choice of columns: make"):
        make_dynamic(shared, 0.5, layers=second)
    chain = predict_channels(Chain(1), 0.5, {"conv": ("norm", "reader")})
    with pytest.raises(ValueError, match=r"reader .* reads what one has chosen, or shares"):
        make_dynamic(chain, 0.5, layers="reader")
    conv = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="a grouped convolution cannot choose"):
        DynamicConv(conv, feature_ratio=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="only a depthwise convolution can hand"):
        DynamicConv(conv, choice_of=Handover(), rngs=nnx.Rngs(0))
    assert not any(isinstance(m, GatedNorm) for _, m in nnx.iter_modules(model))


def test_a_block_without_a_ratio_chooses_nothing():
    model, _, _ = predicted("vgg")
    gates = dynamic_layers(predict_channels(model, (None, 0.5), links(model)))
    chosen = {name for name, gate in gates.items() if gate.feature_ratio is not None}
    assert chosen == {name for name in links(model) if not name.startswith("blocks/0/")}


def test_a_run_with_predicted_gates(config, tmp_path):
    config.gate.kind = "predicted"
    config.gate.column_ratio = (0.0, 0.2)
    config.gate.block_columns = True
    config.gate.salience_rate = 0.5
    run = Run.open(config, tmp_path / "run")
    assert run.dynamic is not None
    params = run.dynamic.values(nnx.Param)
    parts = {
        phase: len(jax.eval_shape(run.optimizer(phase).init, params))
        for phase in ("dense", "prune")
    }
    assert parts["prune"] == parts["dense"] + 1  # dense checkpoints keep their tree
    report = train_and_evaluate(config, tmp_path / "run")
    # 4 convolutions at ratios .3 and .5 of both sides; columns of one block.
    assert 0.5 < report["pruned"]["mac_reduction"] < 0.7
    assert report["pruned"]["gate_operations_per_image"] > 0
    assert set(report["pruned_by_other_criteria"]) == {"random", "inverse", "shared"}
    again = train_and_evaluate(config, tmp_path / "run")
    assert again["parameters_digest"] == report["parameters_digest"]
    assert again["pruned"] == report["pruned"]
    # A benchmark takes the trained weights, and draws the gates' own.
    trained, channels = _trained_or_fresh(config, tmp_path / "run")
    assert channels == 1
    weights = Network(trained).weights
    assert weights.keys() == Network(build_model(config, 10, 1)).weights.keys()
    fresh = build_dynamic(config, trained, build_links(config, trained, 1))
    for chooses in (False, True):
        gates = [g for g in dynamic_layers(fresh).values() if g.feature_ratio is not None]
        assert len(gates) == 4
        drawn = [np.abs(gate.salience_kernel[...]).max() > 1e-3 for gate in gates]
        assert set(drawn) == {chooses}
        fresh = _choosing(fresh)
    config.gate.channel_group, config.gate.column_patch = 8, 2
    gates = dynamic_layers(build_dynamic(config, trained, build_links(config, trained, 1))).values()
    assert {(gate.channel_group, gate.column_patch) for gate in gates} == {(8, 2)}


def test_folding_minds_no_earlier_call_and_no_norm_of_another_kind():
    class Own(nnx.BatchNorm):
        """It computes something else."""

        def __call__(self, x):
            return 2.0 * super().__call__(x)

    class Given(Chain):
        """Its normalization is called with an argument."""

        def __call__(self, x):
            return self.reader(nnx.relu(self.norm(self.conv(x), use_running_average=True)))

    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    dynamic = predict_channels(Given(1), 0.5, {"conv": ("norm", "reader")})
    dynamic.conv(x)  # by itself: nobody takes what it has left
    skipping = Plan(
        {"conv": Form("patches", features=True), "reader": Form("patches", channels=True)}
    )
    fast = compact(dynamic, x, plan=skipping)
    np.testing.assert_allclose(fast(x), dynamic(x), rtol=1e-4, atol=1e-4)
    model = Chain(1)
    model.norm = Own(8, rngs=nnx.Rngs(0))
    model.eval()
    fast = compact(model, x, plan=mixed_plan(model))
    np.testing.assert_allclose(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_plan_tells_the_ratios_of_predicted_gates():
    chain = predict_channels(Chain(1), 0.5, {"conv": ("norm", "reader")})
    told = plan_lib.circumstances(chain, jnp.ones((1, 4, 4, 8)))
    assert told["ratios"] == "channel_ratio 0.5, feature_ratio 0.5"
    pairs = predict_channels(Chain(1), 0.5, {"conv": ("norm", "reader")}, channel_group=2)
    told = plan_lib.circumstances(pairs, jnp.ones((1, 4, 4, 8)))
    assert told["ratios"] == "channel_ratio 0.5, feature_ratio 0.5, channel_group 2"


def test_a_gated_norm_takes_a_mask_as_any_norm():
    rng = np.random.default_rng(0)
    x, mask = jnp.asarray(rng.normal(size=(4, 2, 2, 8)), jnp.float32), jnp.arange(4) < 3
    norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    gated = GatedNorm(nnx.clone(norm), Handover())
    of = mask[:, None, None, None]
    np.testing.assert_array_equal(gated(x, mask=of), norm(x, mask=of))
    np.testing.assert_array_equal(gated.mean[...], norm.mean[...])


def test_a_map_that_no_norm_has_taken_stays_missed_behind_another():
    handover, first, second = Handover(), jnp.ones(2), jnp.ones(2)
    handover.put(first, Masks())
    handover.put(second, Masks())
    handover.take(second)
    assert handover.waits
    handover.clear()
    assert not handover.waits
