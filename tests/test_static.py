import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import fill, trained
from networks import run as call

from dynprune_jax import config as config_lib
from dynprune_jax import models
from dynprune_jax.build import (
    all_links,
    build_dynamic,
    build_links,
    build_model,
    training_images,
)
from dynprune_jax.data.batches import stream_batches
from dynprune_jax.errors import UserError
from dynprune_jax.experiments import static as static_lib
from dynprune_jax.experiments.static import (
    CRITERIA,
    allot,
    l1,
    removable,
    remove_filters,
    shares,
    static,
    try_removal,
)
from dynprune_jax.experiments.study import study
from dynprune_jax.models.links import links
from dynprune_jax.pruning.layers import all_modules, conv_layers, dynamic_layers
from dynprune_jax.pruning.measure import dense_macs
from dynprune_jax.run import Run
from dynprune_jax.train import evaluate_workdir, train_and_evaluate

MODELS = {
    "vgg_digits": (16, 1),
    "vgg16_imagenet": (64, 3),
    "resnet20": (8, 3),
    "resnet50": (32, 3),
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
    small = remove_filters(model, links(model), scores, dict.fromkeys(scores, 0.4))
    layers = all_modules(model)
    for name, (norm, _) in links(model).items():
        n = len(scores[name])
        gone = np.argsort(-scores[name])[n - int(0.4 * n) :]
        for part in (layers[norm].scale, layers[norm].bias):
            part[...] = part[...].at[gone].set(0.0)
    np.testing.assert_allclose(call(small, images), call(model, images), rtol=1e-4, atol=1e-5)
    assert dense_macs(small, images) < dense_macs(model, images)


@pytest.mark.parametrize(("name", "reduction"), [("vgg_digits", 0.6), ("resnet20", 0.3)])
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


@pytest.mark.parametrize("kind", ["predicted", "attention"])
@pytest.mark.parametrize("name", ["vgg_digits", "resnet20"])
def test_filters_are_allotted_as_the_gates_that_skip_them(config, kind, name):
    config.static.allotment = "gate"
    config.gate.kind, config.model, config.gate.layers = kind, name, ("*",)
    config.gate.channel_ratio, config.gate.column_ratio = (0.25, 0.5, 0.75), ()
    model, _ = build(name, width=1.0)
    gates = dynamic_layers(build_dynamic(config, model, build_links(config, model, 3)))
    given = shares(config, links(model))
    for name, (_, reader) in links(model).items():
        gate, axis = (
            (gates[name], "feature_ratio")
            if kind == "predicted"
            else (gates.get(reader), "channel_ratio")  # none in front of the head
        )
        ratio = 0.75 if gate is None else float(getattr(gate, axis)[...])
        assert given[name] == ratio


class Own(nnx.Module):
    """A network that nobody knows, whose readers get their maps laid out in three ways."""

    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs, fixed=None):
        options = {"dtype": dtype, "rngs": rngs}
        n = round(16 * width)
        self.stem = nnx.Conv(in_channels, n, (3, 3), **options)
        self.norms = nnx.List([nnx.BatchNorm(n, **options) for _ in range(4)])
        self.blocks = nnx.List(
            [
                nnx.Conv(n, n, (3, 3), feature_group_count=n, **options),  # each reads its own
                nnx.Conv(n, n, (3, 3), **options),
                nnx.Conv(4 * n, n, (3, 3), **options),
            ]
        )
        self.head = nnx.Linear((image_size // 2) ** 2 * n, num_classes, rngs=rngs)
        self.fixed = fixed

    def __call__(self, x):
        for conv, norm in zip((self.stem, *self.blocks), self.norms, strict=True):
            if conv is self.blocks[2]:  # four columns become one
                b, h, w, c = x.shape
                x = x.reshape(b, h // 2, 2, w // 2, 2, self.fixed or c)
                x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, -1)
            told = {"mask": None} if conv is self.stem else {}
            x = nnx.relu(norm(conv(x), **told))
        return self.head(x.reshape(len(x), -1))


def counting_on_filters(num_classes, **options):
    return Own(num_classes, **options, fixed=16)


class Small(nnx.Module):
    """What becomes of the first convolution's channels until the head reads them, or another."""

    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.stem = nnx.Conv(in_channels, 16, (3, 3), **options)
        self.blocks = nnx.List([nnx.Conv(16, 16, (3, 3), **options)])
        self.norm = nnx.BatchNorm(16, **options)
        self.head = nnx.Linear(16, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.between(self.norm(self.blocks[0](self.stem(x))))
        return self.head(x.mean((1, 2)))

    def between(self, x):
        return nnx.relu(x)


class Depthwise(Small):
    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.each = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)

    def between(self, x):
        return self.each(x)


class Tied(Small):
    """Two convolutions have one kernel."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.other = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.other.kernel = self.blocks[0].kernel

    def __call__(self, x):
        return super().__call__(x) + self.head(self.other(self.stem(x)).mean((1, 2)))


class OtherHead(Small):
    """Its head is a layer that nobody counts."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)

        class Other(nnx.Linear):
            pass

        self.head = Other(16, num_classes, rngs=rngs)


class Halves(Small):
    """It knows the places of its channels."""

    def between(self, x):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([nnx.relu(first), nnx.silu(second)], axis=-1)


class Asserting(Small):
    def between(self, x):
        if x.shape[-1] != 16:
            raise AssertionError
        return x


class Again(Small):
    """One layer is called twice."""

    def __call__(self, x):
        x = self.blocks[1](self.blocks[1](self.stem(x)))
        return self.head(nnx.relu(self.norm(self.blocks[0](x))).mean((1, 2)))

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.blocks.append(nnx.Conv(16, 16, (3, 3), rngs=rngs))


class NoNorm(Small):
    def __call__(self, x):
        return self.head(nnx.relu(self.blocks[0](self.stem(x))).mean((1, 2)))


def test_of_a_network_of_ones_own_leaves_what_alone_is_read(config):
    config.model = "test_static:Own"
    model, images = trained_own(config)
    found = removable(config, model, all_links(config, model, 1))
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


def trained_own(config):
    model = build_model(config, 10, 1)
    rng = np.random.default_rng(1)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            fill(module.scale, rng.uniform(0.5, 1.5, module.scale.shape))
            fill(module.bias, rng.normal(size=module.bias.shape))
    model.eval()
    return model, jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("counting_on_filters", "its code counts on all of them: .*reshape"),
        ("Halves", "its code counts on all of them: "),
        ("Asserting", "its code counts on all of them: AssertionError$"),
        ("Depthwise", "it has no filters that can leave alone, for static pruning"),
        ("OtherHead", "it has no filters that can leave alone, for static pruning"),
        ("Tied", "neither predicted gates nor static pruning have a place in it: Tied has no"),
        ("NoNorm", "neither predicted gates nor static pruning have a place in it: NoNorm has no"),
    ],
)
def test_of_a_network_of_ones_own_what_cannot_leave_is_said(config, tmp_path, model, message):
    config.model = f"test_static:{model}"
    blocks = len(build_model(config, 10, 1).blocks)
    config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.0, 0.5)[-blocks:], ()
    config.study.methods = ("attention", "l1")
    for mode, folder in ((static, "run"), (study, "study")):
        with pytest.raises(UserError, match=message):
            mode(config, tmp_path / folder)
        assert not (tmp_path / folder).exists()


def test_no_allotment_reaches_everything():
    model, images = build("resnet20", width=1.0)
    with pytest.raises(ValueError, match="no removal of filters takes 99"):
        allot(model, links(model), images, 0.99, dict.fromkeys(links(model), 1.0))


def test_an_allotment_of_nothing_is_refused():
    model, images = build("resnet20")
    with pytest.raises(ValueError, match="all shares are 0"):
        allot(model, links(model), images, 0.1, dict.fromkeys(links(model), 0.0))


def conv_with(rows):
    """A two-layer network whose first convolution has these 1x1 filters."""
    model, _ = build("resnet20")
    name = next(iter(links(model)))
    conv = conv_layers(model)[name]
    kernel = np.zeros(conv.kernel.shape, np.float32)
    kernel[0, 0, : rows.shape[1]] = rows.T
    conv.kernel[...] = jnp.asarray(kernel)
    return model, name


@pytest.fixture
def run(config, tmp_path):
    return Run.open(config, tmp_path)


def test_l1_and_the_geometric_median_by_hand(run):
    model, name = conv_with(np.array([[3.0, -4.0], [1.0, 0.0]]))
    np.testing.assert_allclose(static_lib.l1(model, links(model))[name], [7, 1])
    model, name = conv_with(np.array([[0.0, 0.0], [3.0, 4.0]]))
    scores = static_lib.geometric_median(model, links(model), run)
    np.testing.assert_allclose(scores[name], [5, 5])


def test_the_geometric_median_is_the_slow_sum_of_distances(run):
    model, _ = build("vgg_digits")
    fast = static_lib.geometric_median(model, links(model), run)
    for name, n in filters(model).items():
        rows = np.asarray(conv_layers(model)[name].kernel[...]).reshape(-1, n).T
        slow = [sum(np.linalg.norm(a - b) for b in rows) for a in rows]
        np.testing.assert_allclose(fast[name], slow, rtol=1e-4)


def test_taylor_is_the_change_of_the_loss_for_a_small_gate(config, run):
    """Against finite differences of the loss of single images."""
    model = models.vgg_digits(10, image_size=8, width=0.125, rngs=nnx.Rngs(0))
    model.eval()
    found = static_lib.taylor(model, links(model), run)
    assert found.keys() == links(model).keys()

    keys = jax.random.split(jax.random.key(config.seed), 8)
    batches = stream_batches(run.dataset.train, config.batch_size, config.seed, threads=0)
    name, (norm_name, _) = list(links(model).items())[2]
    norm = all_modules(model)[norm_name]

    def losses(images, labels):
        chosen = jax.nn.log_softmax(model(images))
        return -np.asarray(jnp.take_along_axis(chosen, labels[:, None], axis=1))[:, 0]

    changes = np.zeros(filters(model)[name])
    scale, bias = norm.scale[...], norm.bias[...]
    for key, batch in zip(keys, batches, strict=False):
        images, labels = (
            training_images(config, key, jnp.asarray(batch["image"])),
            jnp.asarray(batch["label"]),
        )
        for i in range(len(changes)):
            sides = []
            for step in (1e-2, -1e-2):
                gate = jnp.ones_like(scale).at[i].add(step)
                norm.scale[...], norm.bias[...] = scale * gate, bias * gate
                sides.append(losses(images, labels))
            changes[i] += np.mean(np.abs(sides[0] - sides[1])) / 2e-2 / 8
        norm.scale[...], norm.bias[...] = scale, bias
    np.testing.assert_allclose(found[name], changes, rtol=2e-2, atol=1e-5)


@pytest.mark.usefixtures("short_reports")
def test_a_static_run_has_the_macs_of_the_dynamic_one(config, tmp_path, monkeypatch):
    epochs, config.prune.epochs = config.prune.epochs, 0
    dense = train_and_evaluate(config, tmp_path / "dense")
    config.prune.epochs, config.prune.start = epochs, "checkpoint"
    config.prune.checkpoint = str(tmp_path / "dense")
    config.static.criterion = "taylor"
    dynamic = Run.open(config, tmp_path / "dynamic")  # whatever its gates choose costs the same
    gated = dynamic.evaluate(dynamic.dynamic, dynamic.gated(dynamic.start_state().values))
    identity = Run.identity

    def older(run, phase, filters_removed_by=None):  # it did not tell how it was pruned
        told = identity(run, phase, filters_removed_by)
        return {name: value for name, value in told.items() if name != "filters removed by"}

    with monkeypatch.context() as patch:
        patch.setattr(Run, "identity", older)
        report = static(config, tmp_path / "static")
    assert report == json.loads((tmp_path / "static" / "report.json").read_text())
    assert report["dense"] == dense["dense"]
    assert report["dense_macs_per_image"] == dense["dense_macs_per_image"]
    aim = gated.usage.mac_reduction
    assert aim - 1e-6 <= report["pruned"]["mac_reduction"] < aim + 0.05
    assert report["pruned"]["macs_per_image"]["min"] == report["pruned"]["macs_per_image"]["max"]
    assert report["pruned"]["examples"] == 100
    # The same command again trains nothing.
    assert static(config, tmp_path / "static")["parameters_digest"] == report["parameters_digest"]


def test_what_is_called_twice_counts_twice(config):
    config.model = "test_static:Again"
    model, images = trained_own(config)
    found = removable(config, model, all_links(config, model, 1))
    assert found == {"blocks/0": ("norm", "head")}
    ratios = allot(model, found, images[:1], 0.1, {"blocks/0": 1.0})
    small = remove_filters(model, found, l1(model, found), ratios)
    assert 0.9 >= dense_macs(small, images) / dense_macs(model, images) > 0.85


def test_channels_that_change_places_are_no_zeros_that_stay(config):
    config.model = "test_static:Halves"
    model, images = trained_own(config)
    found = removable(config, model, all_links(config, model, 1))
    with pytest.raises(UserError, match="without them it answers as another model"):
        try_removal(config, model, found, {"blocks/0": 0.5}, images)
    try_removal(config, model, found, {"blocks/0": 0.0}, images)


@pytest.mark.usefixtures("short_reports")
def test_the_control_needs_no_filters_that_can_leave(config, tmp_path):
    config.model, config.static.criterion = "test_static:NoNorm", "none"
    config.gate.channel_ratio, config.gate.column_ratio = (0.5,), ()
    assert static(config, tmp_path)["pruned"]["mac_reduction"] == 0


def test_a_static_run_of_a_network_of_ones_own(config, tmp_path):
    config.model = "test_static:Own"
    config.static.criterion = "taylor"
    config.dense.epochs, config.prune.epochs = 1, 1
    config.gate.channel_ratio, config.gate.column_ratio = (0.0, 0.0, 0.5), ()
    config.ascent.warmup = 0.5
    report = static(config, tmp_path)
    # The gates skip 32 of the third layer's 64 channels, each of which has 16 x 9 x 16 MACs; of
    # 16 filters of the second and the third layer 13 are the most that cost no more.
    whole, left, more = (576 * (32 + 16 * n) + 576 * n * n + 160 * n for n in (16, 13, 14))
    assert left < whole - 32 * 16 * 9 * 16 < more
    assert report["dense_macs_per_image"] == whole
    assert report["pruned"]["macs_per_image"]["mean"] == left
    assert [part["kept"] for part in report["filters"].values()] == [13, 13]
    assert report["filters"].keys() == {"blocks/1", "blocks/2"}


@pytest.mark.usefixtures("short_reports")
def test_the_control_trains_a_whole_dense_network_on(config, tmp_path):
    """As a network with gates is that never drops anything in training."""
    config.static.criterion, config.prune.distillation = "none", 0.5
    report = static(config, tmp_path / "whole")
    assert report["pruned"]["mac_reduction"] == report["pruned"]["executed_mac_reduction"] == 0
    assert report["pruned_without_training"]["accuracy"] == report["dense"]["accuracy"]
    with pytest.raises(UserError, match="filters removed by is 'none' there and None here"):
        evaluate_workdir(config, tmp_path / "whole")
    config.gate.drop_probability = 0.0
    dynamic = train_and_evaluate(config, tmp_path / "dynamic")
    assert report["parameters_digest"] == dynamic["parameters_digest"]
    with pytest.raises(UserError, match="filters removed by is None there and 'none' here"):
        static(config, tmp_path / "dynamic")  # though it is the same


def test_the_criteria_of_the_config_are_those_here():
    assert set(config_lib.FILTER_CRITERIA) == set(CRITERIA)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prune.epochs", 0, "config.prune.epochs is 0"),
        ("prune.start", "scratch", "config.prune.start is 'scratch'"),
        ("gate.channel_ratio", (), "config.static.allotment is 'gate'"),
    ],
)
def test_what_cannot_be_pruned_statically_is_said(config, tmp_path, field, value, message):
    config.static.allotment = "gate"
    config[field.split(".")[0]][field.split(".")[1]] = value
    with pytest.raises(UserError, match=message):
        static(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reduction_out_of_reach_is_said_before_anything_is_trained(config, tmp_path):
    """Filters of what a block hands on stay, and with them more MACs than these gates leave."""
    config.model = "resnet20"
    config.ascent.warmup = 0.9
    config.gate.channel_ratio = config.gate.column_ratio = (0.9, 0.9, 0.9)
    with pytest.raises(UserError, match=r"config\.static\.allotment: no removal of filters takes"):
        static(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
