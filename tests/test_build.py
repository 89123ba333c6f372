"""From a config to a model of the user's own; what is wrong with it or with the data is said."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dynprune_jax import build
from dynprune_jax.build import build_model
from dynprune_jax.errors import UserError
from dynprune_jax.pruning.layers import dynamic_layers
from dynprune_jax.run import Run
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


def only_what_it_is_for(num_classes, *, in_channels, **options):
    """It knows its data, reads its weights, and has arrays that were made as it was imported."""
    assert (num_classes, in_channels) == (10, 1)
    model = own(num_classes, in_channels=in_channels, **options)
    model.scale = nnx.Variable(SCALE / float(jnp.max(jnp.abs(model.head.kernel[...]))))
    return model


SCALE = jnp.ones(())


def answering(answer, **attributes):
    def factory(num_classes, *, in_channels, image_size, width, dtype, rngs):
        model = Answering(answer)
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    return factory


class Answering(nnx.Module):
    def __init__(self, answer):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=nnx.Rngs(0))
        self.answer = answer

    def __call__(self, x):
        return self.answer(self.conv(x).mean((1, 2)))


class Told(nnx.Module):
    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs):
        pass

    def __call__(self, x, train):
        return x


class Blended(Own):
    """Its convolutions see one map of all images."""

    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs):
        super().__init__(num_classes, in_channels, width, dtype, rngs)

    def __call__(self, x):
        return super().__call__(x.mean(0, keepdims=True)).repeat(len(x), axis=0)


class Narrow(nnx.Module):
    def __init__(self, num_classes, *, in_channels, image_size, dtype, rngs):
        pass


def ten(y):
    return jnp.concatenate([y, y[:, :2]], axis=1)


without_blocks = answering(ten)
of_a_sequence = answering(ten, blocks=nnx.Sequential(lambda x: x))
of_eight = answering(lambda y: y)
of_a_pair = answering(lambda y: (y, y))


def for_large_images(num_classes, *, in_channels, image_size, width, dtype, rngs):
    raise ValueError(f"give {image_size + 1} pixels\nas it is written")


class Listed(nnx.Module):
    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs):
        self.blocks = [nnx.Conv(1, 8, (3, 3), rngs=rngs)]


def number(num_classes, **options):
    return num_classes


TEXT = "not a function"


def test_a_data_set_of_one_class_is_refused(config, monkeypatch):
    one = dataclasses.replace(build.build_dataset(config), class_names=("cat",))
    monkeypatch.setattr(build, "load_dataset", lambda *_, **__: one)
    with pytest.raises(UserError, match="name is 'digits'; it has one class"):
        build.build_dataset(config)


def test_a_batch_may_be_all_images_and_a_mean_that_of_all_channels(config):
    config.batch_size = 128
    build.build_dataset(config)
    config.batch_size = 129
    with pytest.raises(UserError, match=r"batch_size is 129; it must be at most .* examples, 128"):
        build.build_dataset(config)
    config.data.mean = (0.5,)
    build.check_channels(config, 3)
    config.data.mean = (0.5, 0.5)
    with pytest.raises(UserError, match=r"config\.data\.mean has 2 values; digits has 3 channels"):
        build.check_channels(config, 3)


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


def test_a_factory_is_called_for_its_data_alone_and_not_within_a_trace(config, tmp_path):
    config.model = "test_build:only_what_it_is_for"
    config.gate.kind, config.gate.layers = "predicted", ("*",)
    run = Run.open(config, tmp_path)
    gates = dynamic_layers(run.dynamic.bind())
    chosen = [name for name, gate in gates.items() if gate.feature_ratio is not None]
    assert chosen == ["blocks/0/first", "blocks/1/first"]


def test_a_module_that_makes_arrays_is_imported_outside_of_traces(config, tmp_path, monkeypatch):
    text = "from test_build import own, jnp\nSCALE = jnp.ones(()) * 2\n"
    (tmp_path / "makes_arrays.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config.model = "makes_arrays:own"
    Run.open(config, tmp_path / "run")
    assert float(sys.modules["makes_arrays"].SCALE) == 2


def test_it_is_the_factory_that_draws_the_weights(config):
    config.seed, config.width = 3, 0.5
    model, same = build_model(config, 10, 1), Own(10, 1, 0.5, jnp.float32, nnx.Rngs(3))
    pairs = zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(same)), strict=True)
    assert all((a == b).all() for a, b in pairs)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_module:own", "there is no module 'no_such_module' in the current folder, in PY"),
        ("test_build.py:own", "there is no module 'test_build.py' in the current"),
        ("broken:own", r"'broken:own'; broken cannot be imported: No module named 'numpyy'"),
        ("numpyy_too:own", r"; numpyy_too cannot be imported: No module named 'numpyy'"),
        ("unfinished:own", r"'unfinished:own'; .*\(unfinished.py, line 1\)"),
        ("test_build:nothing", "config.model is 'test_build:nothing'; .*no attribute 'nothing'"),
        ("test_build:TEXT", "'test_build:TEXT'; it is of type str, and must be a function"),
        (
            "test_build:Narrow",
            r"it is called with \(num_classes, in_channels=, image_size=, width=, dtype=, rngs=\):"
            " got an unexpected keyword argument 'width'",
        ),
        ("test_build:number", "it returned int: no nnx.Module with a __call__"),
        ("test_build:for_large_images", "'test_build:for_large_images'; give 9 pixels$"),
        ("test_build:Listed", "'test_build:Listed'; Found .*list[^\n]*$"),
        ("test_build:Told", "its model is called with images alone: missing a .* 'train'"),
        (
            "test_build:of_eight",
            r"shape \(1, 8, 8, 1\) its model gives \(1, 8\), and not .*10",
        ),
        ("test_build:Blended", "its work cannot be counted: .* sees maps of the shape"),
        ("own:Quarters", "its work cannot be counted: .* sees maps of the shape"),
        ("test_build:of_a_pair", r"its model gives tuple, and not logits of the shape \(1, 10\)"),
        ("test_build:without_blocks", "has no attribute `blocks` that is an nnx.List: give it"),
        ("test_build:of_a_sequence", "has no attribute `blocks` that is an nnx.List: give it"),
    ],
)
def test_what_is_wrong_with_it_is_said(config, tmp_path, monkeypatch, model, message):
    for name in ("broken", "numpyy_too"):
        (tmp_path / f"{name}.py").write_text("import numpyy")
    (tmp_path / "unfinished.py").write_text("def own(:")
    monkeypatch.syspath_prepend(tmp_path)
    config.model = model
    with pytest.raises(UserError, match=message):
        Run.open(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_architecture_of_which_nothing_is_known_can_be_one_of_the_package_s(
    config, tmp_path, monkeypatch
):
    config.gate.kind, config.gate.layers, config.gate.column_ratio = "predicted", ("*",), ()
    known = Run.open(config, tmp_path).links
    monkeypatch.setattr(build.known_links, "has_links", lambda model: False)
    assert Run.open(config, tmp_path).links == known


def raises(num_classes, *, in_channels, image_size, width, dtype, rngs):
    raise RuntimeError("oh no")


class OfColours(nnx.Module):
    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs):
        self.head = nnx.Linear(3, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("raises", "'test_build:raises'; it raised this when it made the model"),
        ("OfColours", "its model raised this when it was called with 1x8x8x1 float32"),
    ],
)
def test_an_error_of_ones_own_code_says_whose_it_is(config, model, told):
    config.model = f"test_build:{model}"
    with pytest.raises((RuntimeError, TypeError)) as error:
        build_model(config, 10, 1)
    assert told in error.value.__notes__[-1]


def test_an_error_of_ones_own_module_says_whose_it_is(config, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("raise RuntimeError('oh no')")
    monkeypatch.syspath_prepend(tmp_path)
    config.model = "failing:own"
    with pytest.raises(RuntimeError, match="oh no") as error:
        build_model(config, 10, 1)
    assert error.value.__notes__[-1].endswith("failing raised this when it was imported")


def test_what_is_known_of_our_models_alone_is_not_guessed(config, tmp_path):
    config.gate.column_ratio, config.gate.block_columns = (0.5, 0.5), True
    with pytest.raises(UserError, match="Own is none of VGG, ResNet, CifarResNet, MobileNetV2, of"):
        Run.open(config, tmp_path)
