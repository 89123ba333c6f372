"""The dense network in other runtimes: the same logits, and what is left out."""

import importlib.util
import math
import sys
from importlib import metadata

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dynprune_jax
from dynprune_jax import models
from dynprune_jax.data.augment import normalise
from dynprune_jax.experiments.other_runtimes import onnx_network, other_runtimes
from dynprune_jax.models.vgg import VGG, VGGUnit

RUNTIMES = ["PyTorch", "PyTorch channels last", "ONNX Runtime", "OpenVINO"]


def trained(name, **kwargs):
    """Returns a model in evaluation mode with every array drawn, as if it had been trained."""
    # Drawn by NumPy: a factory's own draws would be compiled, for longer than all the rest.
    model = nnx.eval_shape(lambda: getattr(models, name)(10, rngs=nnx.Rngs(0), **kwargs))
    model.eval()
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv | nnx.Linear):
            *fan_in, _ = layer.kernel.shape
            fill(layer.kernel, rng, scale=math.sqrt(2 / math.prod(fan_in)))
        if isinstance(layer, nnx.BatchNorm | nnx.Linear):
            fill(layer.bias, rng, scale=0.2)
        if isinstance(layer, nnx.BatchNorm):
            fill(layer.mean, rng, scale=0.2)
            fill(layer.var, rng, scale=0.5, least=0.5)
            fill(layer.scale, rng, scale=0.3, least=0.8)
        if isinstance(layer, nnx.Dropout):
            layer.rngs = None
    return model


def fill(variable, rng, scale, least=None):
    """Draws an array around 0, or from `least` upwards."""
    values = draw(rng, scale, variable.shape)
    variable.set_value(jnp.asarray(values if least is None else least + abs(values)))


@nnx.jit
def call(model, images):
    return model(images)


def draw(rng, scale, shape):
    return rng.normal(scale=scale, size=shape).astype(np.float32)


def batch(side, channels=3):
    return draw(np.random.default_rng(1), 1.0, (2, side, side, channels))


def assert_same_logits(functions, model, images):
    expected = call(model, images)
    assert expected.std() > 0.1
    assert np.ptp(expected, axis=0).max() > 0.01  # the two images are told apart
    for function in functions.values():
        logits = function()
        assert type(logits) is np.ndarray
        assert logits.dtype == np.float32
        # Sums that cancel out are rounded as what they are sums of.
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=atol)
        np.testing.assert_array_equal(function(), logits)


def without_the_first_exporter(monkeypatch):
    import torch

    export = torch.onnx.export

    def without_the_first(*args, dynamo, **kwargs):
        if not dynamo:
            raise TypeError("unexpected keyword argument 'dynamo'")
        return export(*args, dynamo=True, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", without_the_first)


@pytest.fixture
def packages():
    for package in ("torch", "onnx", "onnxruntime", "openvino"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "width", "side"),
    [
        ("vgg16", 0.125, 32),
        ("vgg16_imagenet", 0.0625, 32),
        ("vgg16_imagenet", 0.0625, 64),  # a last map of 2x2, so the order of the vector counts
        ("resnet20", 1.0, 32),
        ("resnet20", 0.3, 31),  # odd sides: where a stride starts counts
        ("resnet18", 0.25, 64),
        ("resnet18", 0.1, 59),
        ("resnet50", 0.125, 64),
        ("mobilenet_v2", 0.25, 37),
    ],
)
def test_every_runtime_agrees(name, width, side):
    model = trained(name, width=width, image_size=side)
    images = batch(side)
    functions, notes = other_runtimes(model, images, threads=1)
    assert list(functions) == RUNTIMES
    assert notes == []
    assert_same_logits(functions, model, images)


@pytest.mark.usefixtures("packages")
def test_read_only_grey_images_of_an_odd_side():
    model = trained("vgg_digits", width=0.25, image_size=13)
    images = batch(13, channels=1)
    images.flags.writeable = False
    functions, notes = other_runtimes(model, images)
    assert notes == []
    assert_same_logits(functions, model, images)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["resnet20", "vgg16_imagenet", "mobilenet_v2"])
def test_as_onnx_it_takes_any_number_of_stored_images(name, dynamo, monkeypatch):
    import onnxruntime

    if dynamo:
        pytest.importorskip("onnxscript")
        without_the_first_exporter(monkeypatch)
    model = trained(name, width=0.25, image_size=32)
    mean, std = (0.2, 0.4, 0.6), (0.3, 0.5, 0.7)
    stored = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(onnx_network(model, stored[:1], mean, std))
    expected = call(model, normalise(jnp.asarray(stored), mean, std))
    assert np.ptp(expected, axis=0).max() > 0.01
    atol = 1e-5 * np.abs(expected).max()
    for some in (stored[:1], stored):
        (logits,) = session.run(["logits"], {"images": some})
        np.testing.assert_allclose(logits, expected[: len(some)], rtol=1e-4, atol=atol)


@pytest.mark.usefixtures("packages")
def test_nobody_is_told_that_openvino_is_imported():
    metadata.version("openvino-telemetry")  # what would tell them is there
    other_runtimes(trained("vgg_digits", width=0.1), batch(16, 1), threads=1)
    stub = sys.modules["openvino.tools.ovc.telemetry_utils"].tm
    assert stub.__name__ == "openvino.tools.ovc.telemetry_stub"


@pytest.mark.usefixtures("packages")
def test_of_a_dynamic_model_it_is_the_dense_network():
    dense = trained("resnet20", width=0.5)
    dynamic = dynprune_jax.make_dynamic(dense, channel_ratio=0.5, column_ratio=0.5)
    functions, _ = other_runtimes(dynamic, batch(32), threads=1)
    assert_same_logits(functions, dense, batch(32))


@pytest.mark.usefixtures("packages")
def test_the_newer_exporter_serves_when_the_first_fails(monkeypatch):
    pytest.importorskip("onnxscript")
    without_the_first_exporter(monkeypatch)
    model = trained("resnet20", width=0.25, image_size=8)
    functions, notes = other_runtimes(model, batch(8), threads=1)
    assert notes == []
    assert_same_logits(functions, model, batch(8))


@pytest.mark.usefixtures("packages")
def test_an_export_that_fails_is_noted(monkeypatch):
    import torch

    def fail(*args, **kwargs):
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    functions, notes = other_runtimes(trained("vgg_digits", width=0.1), batch(16, 1), threads=1)
    assert list(functions) == RUNTIMES[:2]
    why = "left out: RuntimeError: no such operator"
    assert notes == [f"ONNX Runtime {why}", f"OpenVINO {why}"]


@pytest.mark.usefixtures("packages")
def test_a_model_or_a_layer_of_another_kind_is_noted():
    class OtherUnit(VGGUnit):
        pass

    class OtherModel(VGG):
        pass

    def model(kind, to_features):
        head = nnx.Linear(4, 10, rngs=nnx.Rngs(0))
        dtype = np.float32
        return kind(((1, 4),), to_features, head, in_channels=3, dtype=dtype, rngs=nnx.Rngs(0))

    def peak(x):
        return x.max(axis=(1, 2))

    unit = model(VGG, peak)
    unit.blocks[0].layers[0] = OtherUnit(3, 4, dtype=np.float32, rngs=nnx.Rngs(0))
    for other, name in (
        (model(OtherModel, peak), "OtherModel"),
        (model(VGG, peak), "peak"),
        (unit, "OtherUnit"),
    ):
        functions, notes = other_runtimes(other, batch(8), threads=1)
        assert functions == {}
        why = f"left out: {name} cannot be translated to PyTorch"
        assert notes == [f"{runtime} {why}" for runtime in ("PyTorch", "ONNX Runtime", "OpenVINO")]


def test_absent_packages_are_noted(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    functions, notes = other_runtimes(trained("vgg_digits", width=0.1), batch(16, 1))
    assert functions == {}
    assert len(notes) == 3
    for note, name in zip(notes, ("PyTorch", "ONNX Runtime", "OpenVINO"), strict=True):
        assert note.startswith(f"{name} left out: ModuleNotFoundError: ")
        assert " torch " in note


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("package", "lost"),
    [
        ("onnx", ["ONNX Runtime", "OpenVINO"]),
        ("onnxruntime", ["ONNX Runtime"]),
        ("openvino", ["OpenVINO"]),
    ],
)
def test_the_others_serve_without_a_package(monkeypatch, package, lost):
    monkeypatch.setitem(sys.modules, package, None)
    model = trained("vgg_digits", width=0.1)
    functions, notes = other_runtimes(model, batch(16, 1), threads=1)
    assert list(functions) == [name for name in RUNTIMES if name not in lost]
    assert [note.partition(" left out: ")[0] for note in notes] == lost
    assert_same_logits(functions, model, batch(16, 1))
