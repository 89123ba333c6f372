"""From a config to a model of the user's own; what is wrong with it or with the data is said."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dynprune_jax import build
from dynprune_jax.build import build_dynamic, build_model
from dynprune_jax.errors import UserError
from dynprune_jax.pruning.layers import dynamic_layers
from dynprune_jax.train import train_and_evaluate


class Stage(nnx.Module):
    """Two convolutions, of which the second reads the first alone, and a way around both."""

    def __init__(self, n, dtype, rngs):
        self.first = nnx.Conv(n, n, (3, 3), dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(n, dtype=dtype, rngs=rngs)
        self.second = nnx.Conv(n, n, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return x + self.second(nnx.relu(self.norm(self.first(x))))


class Own(nnx.Module):
    def __init__(self, num_classes, in_channels, width, dtype, rngs):
        n = round(8 * width)
        self.stem = nnx.Conv(in_channels, n, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Stage(n, dtype, rngs), Stage(n, dtype, rngs)])
        self.head = nnx.Linear(n, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def own(num_classes, *, in_channels, image_size, width, dtype, rngs):
    return Own(num_classes, in_channels, width, dtype, rngs)


def without_blocks(num_classes, *, in_channels, image_size, width, dtype, rngs):
    return nnx.Sequential(nnx.Conv(8, 8, (3, 3), rngs=rngs))


def for_large_images(num_classes, *, in_channels, image_size, width, dtype, rngs):
    raise ValueError(f"give {image_size + 1} pixels")


def without_width(num_classes, *, in_channels, image_size, dtype, rngs):
    pass


def number(num_classes, **options):
    return num_classes


TEXT = "not a function"


def test_a_data_set_of_one_class_is_refused(config, monkeypatch):
    one = dataclasses.replace(build.build_dataset(config), class_names=("cat",))
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: one)
    with pytest.raises(UserError, match="name is 'digits'; it has one class"):
        build.build_dataset(config)


@pytest.fixture
def config(config):
    config.model = "test_build:own"
    config.gate.channel_ratio, config.gate.column_ratio = (0.25, 0.5), ()
    return config


@pytest.mark.usefixtures("short_reports")
def test_it_is_trained_and_pruned(config, tmp_path):
    report = train_and_evaluate(config, tmp_path / "run")
    # The stem at 4 x 4 columns; 2 and 4 of 8 channels pruned in front of each block's two.
    convolution = 16 * 9 * 8 * 8
    dense = 16 * 9 * 8 + 4 * convolution + 8 * 10
    assert report["dense_macs_per_image"] == dense
    macs = report["pruned"]["macs_per_image"]["mean"]
    assert macs == dense - 2 * (0.25 + 0.5) * convolution


def test_predicted_gates_are_where_trial_finds_that_a_layer_reads(config):
    config.gate.kind, config.gate.layers = "predicted", ("*",)
    dynamic = nnx.eval_shape(lambda: build_dynamic(config, build_model(config, 10, 1), 1))
    chosen = [n for n, gate in dynamic_layers(dynamic).items() if gate.feature_ratio is not None]
    assert chosen == ["blocks/0/first", "blocks/1/first"]


def test_it_is_the_factory_that_draws_the_weights(config):
    config.seed, config.width = 3, 0.5
    model, same = build_model(config, 10, 1), Own(10, 1, 0.5, jnp.float32, nnx.Rngs(3))
    pairs = zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(same)), strict=True)
    assert all((a == b).all() for a, b in pairs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:own", "config.model is 'no_such_module:own'; No module named"),
        ("test_build:nothing", "config.model is 'test_build:nothing'; .*no attribute 'nothing'"),
        ("test_build:TEXT", "config.model is 'test_build:TEXT'; it must be a function"),
        (".build:own", "config.model is '.build:own'; .*relative"),
        (
            "test_build:without_width",
            r"it is called with \(num_classes, in_channels=, image_size=, width=, dtype=, rngs=\):"
            " got an unexpected keyword argument 'width'",
        ),
        ("test_build:number", "it returned int, and no nnx.Module"),
        ("test_build:for_large_images", "config.data.image_size: give 9 pixels"),
        ("test_build:without_blocks", "the model of test_build:without_blocks has no `blocks`"),
    ],
)
def test_what_is_wrong_with_it_is_said(config, model, message):
    config.model = model
    with pytest.raises(UserError, match=message):
        build_dynamic(config, build_model(config, 10, 1), 1)


def test_what_is_known_of_our_models_alone_is_not_guessed(config):
    config.gate.column_ratio, config.gate.block_columns = (0.5, 0.5), True
    with pytest.raises(UserError, match="is known of VGG, ResNet, CifarResNet alone"):
        build_dynamic(config, build_model(config, 10, 1), 1)
