"""A network without gates elsewhere: timed in PyTorch, ONNX Runtime and OpenVINO, or as ONNX.

The packages are an extra, `pip install dynprune_jax[compare]`; without them nothing is
timed and nothing written, so they are imported only where they are used.
"""

import contextlib
import copy
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt8

from dynprune_jax.models import mobilenet, resnet, resnet_cifar, vgg
from dynprune_jax.pruning.plan import available_cores

# The packages that each needs: the last two read ONNX, which is exported from the PyTorch network.
_RUNTIMES = {
    "PyTorch": ("torch",),
    "ONNX Runtime": ("torch", "onnx", "onnxruntime"),
    "OpenVINO": ("torch", "onnx", "openvino"),
}


def other_runtimes(
    model: nnx.Module,
    images: Float32[np.ndarray, "batch height width channels"],
    threads: int | None = None,
) -> tuple[dict[str, Callable[[], np.ndarray]], list[str]]:
    """Builds the model's dense network in other runtimes, on the CPU.

    They compute what the model does in evaluation mode, in float32 whatever its compute dtype,
    with each batch normalization folded into its convolution. Of a model with gates by attention
    it is the dense network; predicted ones are part of the network, and left out with a note. The
    images are laid out for each runtime here, once.

    Args:
      model: one of the architectures of `dynprune_jax.models`.
      images: what every call classifies.
      threads: CPU threads of each runtime, all it may use by default; for PyTorch this
        is a setting of the whole process.

    Returns:
      functions: by name ("PyTorch", "PyTorch channels last", "ONNX Runtime", "OpenVINO"), each
        computes the logits of the images, float32 (batch, classes).
      notes: a line for each runtime that was left out, and why.
    """
    threads = threads or available_cores()
    # Without this package OpenVINO tells nobody that it is imported: here it is not asked for.
    sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType, reportCallIssue]  None bars an import
    notes = {name: why for name, needed in _RUNTIMES.items() if (why := _absent(needed))}
    network = None
    if "PyTorch" not in notes:
        try:
            network = _torch_network(model)
        except NotImplementedError as error:
            notes = dict.fromkeys(_RUNTIMES, str(error))
    functions: dict[str, Callable[[], np.ndarray]] = {}
    if network is not None:
        import torch  # pyright: ignore[reportMissingImports]  optional

        torch.set_num_threads(threads)
        planes = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        last: Any = {"memory_format": torch.channels_last}
        functions["PyTorch"] = _in_torch(network, planes)
        functions["PyTorch channels last"] = _in_torch(
            copy.deepcopy(network).to(**last), planes.to(**last)
        )
        for name, build in (("ONNX Runtime", _in_onnxruntime), ("OpenVINO", _in_openvino)):
            if name not in notes:
                try:
                    functions[name] = build(network, planes, threads)
                except Exception as error:  # exporters and importers raise many kinds
                    notes[name] = _line(error)
    return functions, [f"{name} left out: {why}" for name, why in notes.items()]


def onnx_network(
    model: nnx.Module,
    images: UInt8[np.ndarray, "batch height width channels"],
    mean: Sequence[float],
    std: Sequence[float],
) -> bytes:
    """The same network as an ONNX file, from uint8 images to logits.

    It computes what `other_runtimes` does, for any number of `images`, as they are stored,
    `(batch, height, width, channels)`, and gives `logits`, `(batch, classes)`.

    Args:
      model: one of the architectures of `dynprune_jax.models`.
      images: of the size that it is to be called with.
      mean: of images scaled to [0, 1], by channel or one for all, as for `augment.normalise`.
      std: likewise.

    Raises:
      ImportError: without PyTorch and ONNX.
      NotImplementedError: for a model, a unit or a layer that is not one of the package's own.
    """
    for package in ("torch", "onnx"):
        importlib.import_module(package)
    import torch  # pyright: ignore[reportMissingImports]  optional

    class Prepared(torch.nn.Module):
        """Normalises images first."""

        def __init__(self, network: Any):
            super().__init__()
            self.network = network
            for name, values in (("mean", mean), ("std", std)):
                array = torch.tensor(np.asarray(values, np.float32).reshape(1, -1, 1, 1))
                self.register_buffer(name, array)

        def forward(self, images: Any) -> Any:
            planes = images.permute(0, 3, 1, 2).float()
            return self.network((planes / 255.0 - self.mean) / self.std)

    # Two of them, for PyTorch takes one to mean that there is always one.
    example = torch.tensor(np.repeat(images[:1], 2, axis=0))
    with _exported(Prepared(_torch_network(model)).eval(), example, any_number=True) as path:
        return Path(path).read_bytes()


def _absent(packages: Sequence[str]) -> str | None:
    """Why the first of these packages that cannot be imported cannot be."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return _line(error)
    return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _in_torch(network: Any, planes: Any) -> Callable[[], np.ndarray]:
    import torch  # pyright: ignore[reportMissingImports]  optional

    def logits() -> np.ndarray:
        with torch.inference_mode():
            return network(planes).numpy()

    return logits


def _in_onnxruntime(network: Any, planes: Any, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime  # pyright: ignore[reportMissingImports]  optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with _exported(network, planes) as path:
        session: Any = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
    inputs = {session.get_inputs()[0].name: planes.numpy()}

    def logits() -> np.ndarray:
        return session.run(None, inputs)[0]

    return logits


def _in_openvino(network: Any, planes: Any, threads: int) -> Callable[[], np.ndarray]:
    import openvino  # pyright: ignore[reportMissingImports]  optional

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    with _exported(network, planes) as path:
        compiled = openvino.Core().compile_model(path, "CPU", options)
    request, inputs = compiled.create_infer_request(), planes.numpy()

    def logits() -> np.ndarray:
        return request.infer({0: inputs})[0]

    return logits


@contextlib.contextmanager
def _exported(network: Any, images: Any, any_number: bool = False) -> Iterator[str]:
    """The path of the network as ONNX, for images like these or any number; it is deleted after."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # it may be mapped
        path = os.path.join(folder, "network.onnx")
        _export(network, images, any_number, path)
        yield path


def _export(network: Any, images: Any, any_number: bool, path: str) -> None:
    """Writes the network as ONNX."""
    import torch  # pyright: ignore[reportMissingImports]  optional

    names: Any = {"input_names": ["images"], "output_names": ["logits"]}

    def export(**kind: Any) -> None:
        torch.onnx.export(network, (images,), path, verbose=False, **names, **kind)

    axes: Any = {"images": {0: "batch"}, "logits": {0: "batch"}} if any_number else None
    dims: Any = ({0: torch.export.Dim("batch")},) if any_number else None
    with warnings.catch_warnings():
        # Both exporters announce the end of something, and of that they use themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            export(dynamo=False, dynamic_axes=axes)  # quicker, and needs no onnxscript
        except Exception:  # PyTorch is to drop that exporter, without saying when
            export(dynamo=True, dynamic_shapes=dims, external_data=False)


def _torch_network(model: nnx.Module) -> Any:
    """Translates a model into a `torch.nn.Module` from NCHW images to logits.

    Raises:
      NotImplementedError: for a model, a unit or a layer that is not one of the package's own.
    """
    import torch  # pyright: ignore[reportMissingImports]  optional
    from torch import nn  # pyright: ignore[reportMissingImports]  optional

    class Sum(nn.Module):
        """A branch plus its input."""

        def __init__(self, branch: Any):
            super().__init__()
            self.branch = branch

        def forward(self, x: Any) -> Any:
            return self.branch(x).add_(x)

    class Residual(nn.Module):
        """The relu of a branch plus a shortcut."""

        def __init__(self, branch: Any, shortcut: Any):
            super().__init__()
            self.branch = branch
            self.shortcut = shortcut

        def forward(self, x: Any) -> Any:
            return nn.functional.relu_(self.branch(x).add_(self.shortcut(x)))

    class OptionA(nn.Module):
        """Every `stride`-th column, with zero channels appended."""

        def __init__(self, stride: int, extra: int):
            super().__init__()
            self.stride = stride
            self.extra = extra

        def forward(self, x: Any) -> Any:
            x = x[:, :, :: self.stride, :: self.stride]
            return nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))

    class Flatten(nn.Module):
        """Lays each map out as one vector, channels last: the order that the head was given."""

        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).flatten(1)

    def filled(layer: Any, weight: np.ndarray, bias: np.ndarray) -> Any:
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        return layer

    def convolution(conv: Any, norm: Any) -> Any:
        if type(norm) is not nnx.BatchNorm:
            raise NotImplementedError(f"{type(norm).__name__} is none of a dense network")
        # In evaluation the normalization is a scale and a shift of each output channel.
        factor = np.asarray(norm.scale) / np.sqrt(np.asarray(norm.var) + norm.epsilon)
        kernel = np.asarray(conv.kernel) * factor
        shift = np.asarray(norm.bias) - np.asarray(norm.mean) * factor
        layer = nn.utils.skip_init(
            nn.Conv2d,
            conv.in_features,
            conv.out_features,
            conv.kernel_size,
            stride=conv.strides,
            # The convolutions of the models have the same padding on both sides, and no bias.
            padding=tuple(before for before, _ in conv.padding),
            groups=conv.feature_group_count,
        )
        return filled(layer, kernel.transpose(3, 2, 0, 1), shift)

    def linear(layer: Any) -> Any:
        empty = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features)
        return filled(empty, np.asarray(layer.kernel).T, np.asarray(layer.bias))

    def relu(*layers: Any) -> Any:
        return nn.Sequential(*layers, nn.ReLU(inplace=True))

    def relu6(conv: Any, norm: Any) -> Any:
        return nn.Sequential(convolution(conv, norm), nn.ReLU6(inplace=True))

    def inverted(unit: Any) -> Any:
        layers = [relu6(unit.expand, unit.expand_norm)] if unit.expands else []
        layers += [relu6(unit.depthwise, unit.depthwise_norm)]
        branch = nn.Sequential(*layers, convolution(unit.project, unit.project_norm))
        return Sum(branch) if unit.adds else branch

    def mean() -> Any:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def two_convolutions(unit: Any) -> Any:
        first = relu(convolution(unit.conv1, unit.norm1))
        return nn.Sequential(first, convolution(unit.conv2, unit.norm2))

    def three_convolutions(unit: Any) -> Any:
        first = relu(two_convolutions(unit))
        return nn.Sequential(first, convolution(unit.conv3, unit.norm3))

    def projection(unit: Any) -> Any:
        if not unit.projects:
            return nn.Identity()
        return convolution(unit.shortcut, unit.shortcut_norm)

    def option_a(unit: Any) -> Any:
        extra = unit.out_channels - unit.conv1.in_features
        return OptionA(unit.stride, extra) if unit.stride > 1 or extra else nn.Identity()

    def chain(*layers: Any) -> Any:
        return nn.Sequential(*map(translate, layers))

    counterparts: dict[Any, Callable[[Any], Any]] = {
        vgg.VGG: lambda m: chain(*m.blocks, m.to_features, m.head),
        resnet_cifar.CifarResNet: lambda m: nn.Sequential(
            relu(convolution(m.stem, m.stem_norm)), chain(*m.blocks), mean(), linear(m.head)
        ),
        resnet.ResNet: lambda m: nn.Sequential(
            relu(convolution(m.stem, m.stem_norm)),
            nn.MaxPool2d(3, stride=2, padding=1),
            chain(*m.blocks),
            mean(),
            linear(m.head),
        ),
        mobilenet.MobileNetV2: lambda m: nn.Sequential(
            relu6(m.stem, m.stem_norm),
            chain(*m.blocks),
            mean(),
            linear(m.head),
        ),
        mobilenet.InvertedUnit: inverted,
        mobilenet.LastUnit: lambda m: relu6(m.conv, m.norm),
        vgg.VGGUnit: lambda m: relu(convolution(m.conv, m.norm)),
        resnet_cifar.CifarUnit: lambda m: Residual(two_convolutions(m), option_a(m)),
        resnet.BasicUnit: lambda m: Residual(two_convolutions(m), projection(m)),
        resnet.BottleneckUnit: lambda m: Residual(three_convolutions(m), projection(m)),
        vgg.max_pool: lambda _: nn.MaxPool2d(2),
        vgg.global_mean: lambda _: mean(),
        vgg.flatten: lambda _: Flatten(),
        nnx.Sequential: lambda m: chain(*m.layers),
        nnx.Linear: linear,
        nnx.Dropout: lambda _: nn.Identity(),
        nnx.relu: lambda _: relu(),
    }

    def translate(layer: Any) -> Any:
        # By exact class: a subclass may compute something else.
        key = type(layer) if isinstance(layer, nnx.Module) else layer
        if key not in counterparts:
            name = getattr(key, "__name__", repr(key))
            raise NotImplementedError(f"{name} cannot be translated to PyTorch")
        return counterparts[key](layer)

    return translate(model).eval().requires_grad_(False)
