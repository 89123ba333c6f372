"""A finished run's network as files for inference, by `jax.export` and as ONNX."""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dynprune_jax import processes
from dynprune_jax.build import evaluation_images
from dynprune_jax.config import Config, is_own
from dynprune_jax.errors import UserError
from dynprune_jax.experiments.other_runtimes import onnx_network
from dynprune_jax.experiments.static import trained as static_trained
from dynprune_jax.network import Network, Values
from dynprune_jax.pruning.compact import compact
from dynprune_jax.pruning.exported import export_model
from dynprune_jax.run import Run
from dynprune_jax.writers import progress_bar, say, write_bytes

_PLATFORMS = ("cpu", "cuda", "tpu")


def export(config: Config, workdir: str | os.PathLike) -> list[Path]:
    """Exports the network of a finished run for inference.

    Writes `exported.bin`, which runs on CPUs, GPUs and TPUs and takes any number of images (of
    somebody's own model that does not, `exported_N.bin` for each batch size), and
    for each of `config.benchmark.batch_sizes` `exported_compact_N.bin`, which skips what the gates
    leave out, on the device at hand; on CPUs it needs this package and a C++ compiler. All take
    uint8 images, `(batch, side, side, channels)` with the side `config.data.image_size`, which they
    normalise, and give logits, `(batch, classes)`. `dynprune_jax.load_exported` reads them. How
    each layer of a compact one is executed is measured, and kept in `plan_batch_N.json`; a plan
    that is there is followed. Where all gates are predicted ones, none of columns, also
    `exported_static.bin`, which runs where `exported.bin` does: the network of `make_static`, whose
    accuracy the report tells. Of a static run it is the network with fewer filters that is
    exported. Networks without gates, of our own architectures, are also written as ONNX
    (`exported.onnx` or `exported_static.onnx`, with the same images and logits, in float32) if
    PyTorch and ONNX are installed.

    Returns:
      The files.

    Raises:
      UserError: for a mistake in the config, if the run is not finished, for a plan that does not
        fit it, or for many processes.
    """
    processes.check_alone("export")
    run = Run.open(config, workdir)
    network, values = static_trained(run) or _trained(run)
    model = network.bind(run.recalibrated(network, values))
    model.eval()
    prepare = functools.partial(evaluation_images, config)
    # A plan that does not fit is found before anything is written.
    compacts = {size: _compact(run, model, size) for size in config.benchmark.batch_sizes}
    static = run.made_static(values) if network is run.dynamic else None
    written = _for_all_platforms(run, "exported", nnx.Sequential(prepare, model))
    if network is not run.dynamic:
        written += _as_onnx(run, "exported", model)
    if static is not None:
        written += _for_all_platforms(run, "exported_static", nnx.Sequential(prepare, static))
        written += _as_onnx(run, "exported_static", static)
    for size, fast in compacts.items():
        stored = jax.ShapeDtypeStruct((size, *run.one_image.shape[1:]), jnp.uint8)
        written.append(
            _write(
                run.workdir / f"exported_compact_{size}.bin",
                export_model(nnx.Sequential(prepare, fast), stored),
                f"batches of {size}, compact, on {jax.devices()[0].device_kind}",
            )
        )
    say("dynprune_jax.load_exported(BYTES_OF_A_FILE) is a function of uint8 images")
    return written


def _trained(run: Run) -> tuple[Network, Values]:
    dense, pruned = run.trained_values()
    network, values = (run.dense, dense) if run.dynamic is None else (run.dynamic, pruned)
    assert values is not None  # config.check has seen to it
    return network, values


def _for_all_platforms(run: Run, name: str, model: nnx.Module) -> list[Path]:
    """Exports a model that is not compact, for any number of images if its code allows that."""

    def exported(batch: Any) -> bytes:
        images = jax.ShapeDtypeStruct((batch, *run.one_image.shape[1:]), jnp.uint8)
        return export_model(model, images, platforms=_PLATFORMS)

    place, places = run.workdir, f"on {', '.join(_PLATFORMS)}"
    try:
        (any_number,) = jax.export.symbolic_shape("batch")
        data = exported(any_number)
    except Exception as error:  # whatever somebody's own code does with a number that is none
        if not is_own(run.config.model):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        say(
            f"{name}.bin is left out: {run.config.model} is for a given number of images ({reason})"
        )
        return [
            _write(place / f"{name}_{size}.bin", exported(size), f"batches of {size}, {places}")
            for size in run.config.benchmark.batch_sizes
        ]
    return [_write(place / f"{name}.bin", data, f"any number of images, {places}")]


def _as_onnx(run: Run, name: str, model: nnx.Module) -> list[Path]:
    """Exports a model without gates as ONNX, if it can be."""
    images, data = np.zeros(run.one_image.shape, np.uint8), run.config.data
    try:
        written = onnx_network(model, images, data.mean, data.std)
    except Exception as error:  # PyTorch's exporters raise many kinds
        cure = " (pip install torch onnx)" if isinstance(error, ImportError) else ""
        say(f"{name}.onnx is left out: {type(error).__name__}: {error}".splitlines()[0] + cure)
        return []
    where = "any number of images, for other runtimes, in float32"
    return [_write(run.workdir / f"{name}.onnx", written, where)]


def _compact(run: Run, model: nnx.Module, size: int) -> nnx.Module:
    seen = jax.ShapeDtypeStruct((size, *run.one_image.shape[1:]), run.one_image.dtype)
    plan = run.workdir / f"plan_batch_{size}.json"
    given = plan.exists()
    with progress_bar(f"batch {size}: measuring the forms of each layer") as progress:
        try:
            return compact(model, seen, plan=plan, progress=progress)
        except ValueError as error:
            if given:  # and it is no plan, or another network's
                raise UserError(str(error)) from error
            raise


def _write(path: Path, data: bytes, what: str) -> Path:
    write_bytes(path, data)
    say(f"{path}: {len(data) / 2**20:.1f} MB; {what}")
    return path
