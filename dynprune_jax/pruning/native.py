"""For CPUs: a convolution that multiplies only what is kept, in C++ behind XLA's FFI.

XLA has no product that reads the kept rows of a kernel in place: it would copy them for every
image first. `native.cc` has. The machine's own compiler compiles it, once and in a few seconds;
the result is kept in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from dynprune_jax.geometry import Geometry
from dynprune_jax.pruning.masks import Masks

_SOURCE = Path(__file__).with_name("native.cc")
TARGETS = ("dynprune_convolve", "dynprune_keep")
_PANEL = 32  # features side by side, as in the source
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT = 300  # seconds
_ONE_AT_A_TIME = threading.Lock()
_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")


@jax.jit
def kernel_panels(
    kernel: Float[Array, "kernel_height kernel_width channels features"],
) -> Float[Array, "panels taps channels 32"]:
    """Lays a kernel out as `kept_conv` reads it: panels of 32 features, the last filled with 0."""
    height, width, channels, features = kernel.shape
    panels = -(-features // _PANEL)
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, panels * _PANEL - features)))
    return kernel.reshape(height * width, channels, panels, _PANEL).transpose(2, 0, 1, 3)


@jax.jit
def kernel_pairs(
    kernel: Float[Array, "kernel_height kernel_width channels features"],
) -> Float[Array, "features channels taps"]:
    """Lays a kernel out for images that want few features: all taps of a pair side by side."""
    *_, channels, features = kernel.shape
    return kernel.transpose(3, 2, 0, 1).reshape(features, channels, -1)


def kept_conv(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "panels taps channels 32"] | Float[Array, "features channels taps"],
    masks: Masks,
    geometry: Geometry,
    *,
    features: int,
) -> Float[Array, "batch out_height out_width features"]:
    """Convolves what the masks keep of each image, on a CPU and in float32.

    Equal, to rounding, to the dense convolution of `x` with all else set to zero, and 0 where the
    output is not wanted. It has no gradient: it is for inference.

    Args:
      x: the maps.
      kernel: from `kernel_panels`, or from `kernel_pairs` where the masks have features.
      masks: what is kept of the maps and wanted of the output.
      geometry: of the convolution on maps of this size.
      features: of the kernel.

    Raises:
      RuntimeError: with the reason, if `why_not` has one.
      ValueError: for maps of float64, and for a kernel in pairs where all features are wanted.
    """
    _demand()
    if x.dtype == jnp.float64:
        raise ValueError("our compiled kernel multiplies in float32; the maps are float64")
    pairs = kernel.ndim == 3
    if pairs and masks.features is None:
        raise ValueError("a kernel in pairs is for masks that tell which features are wanted")
    everything = jnp.zeros(0, bool)
    (top, _), (left, _) = geometry.padding
    both_sides = (masks.channels, masks.columns, masks.features, masks.out_columns)
    call = jax.ffi.ffi_call(
        "dynprune_convolve",
        jax.ShapeDtypeStruct((x.shape[0], *geometry.out, features), jnp.float32),
        vmap_method="sequential",
    )
    return call(
        x.astype(jnp.float32),
        kernel.astype(jnp.float32),
        *(everything if mask is None else mask for mask in both_sides),
        geometry=np.array(
            [*geometry.kernel, *geometry.strides, *geometry.dilation, top, left, pairs],
            np.int64,
        ),
    )


def keep_highest(scores: Float[Array, "*batch n"], count: int) -> Bool[Array, "*batch n"]:
    """Marks the `count` highest scores of each row, as `masks.keep_highest` does.

    Args:
      scores: float32.
      count: from 1 to `n`.

    Raises:
      RuntimeError: with the reason, if `why_not` has one.
    """
    _demand()
    scores = lax.stop_gradient(scores)
    flat = scores.astype(jnp.float32).reshape(-1, scores.shape[-1])
    call = jax.ffi.ffi_call(
        "dynprune_keep", jax.ShapeDtypeStruct(flat.shape, bool), vmap_method="sequential"
    )
    return call(flat, count=np.int64(count)).reshape(scores.shape)


def _demand() -> None:
    if reason := why_not():
        raise RuntimeError(f"the compiled kernel for CPUs is not to be had: {reason}")


def why_not() -> str | None:
    """Compiles and registers the kernel if need be; if that fails, says why in one line.

    Two environment variables matter: `CXX` names the compiler, by default the first there is of
    `c++`, `g++` and `clang++`; `XDG_CACHE_HOME` is where the compiled kernel is kept, by default
    `~/.cache`.
    """
    with _ONE_AT_A_TIME:  # a second copy of the kernel would not be registered
        return _why_not()


@functools.cache
def _why_not() -> str | None:
    if jax.default_backend() != "cpu":
        return f"it runs on CPUs, and the default device is a {jax.default_backend()}"
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        return f"CXX is {os.environ['CXX']!r}: {error}"
    choices = [named] if named else [[name] for name in _COMPILERS]
    compiler = next((words for words in choices if shutil.which(words[0])), None)
    if compiler is None:
        return (
            f"no C++ compiler was found under the name {' '.join(named) or ', '.join(_COMPILERS)}"
        )
    try:
        library = _load(compiler)
        for target in TARGETS:
            handler = jax.ffi.pycapsule(getattr(library, target))
            jax.ffi.register_ffi_target(target, handler, platform="cpu")
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()] or [str(error)]
        telling = next((line for line in lines if "error" in line), lines[0])
        return f"{compiler[0]} failed: {telling}"
    except (OSError, AttributeError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _load(compiler: list[str]) -> ctypes.CDLL:
    """Loads the kernel, compiled before by this compiler for this processor and JAX, or now."""
    # All that this processor has; by themselves compilers use half of its widest registers.
    native = ["-march=native", "-mprefer-vector-width=512"]
    if platform.machine() in ("arm64", "aarch64"):
        native = ["-mcpu=native"]
    command = [*compiler, *_FLAGS, *native, "-isystem", jax.ffi.include_dir(), str(_SOURCE)]

    def run(arguments: list[str]) -> str:
        done = subprocess.run(
            arguments, check=True, capture_output=True, text=True, timeout=_TIMEOUT
        )
        return done.stdout

    # The macros tell the compiler's version, and what `native` means on this processor.
    macros = run([*compiler, *native, "-dM", "-E", "-x", "c++", os.devnull])
    made_of = "\n".join([*command, jaxlib.version.__version__, macros, _SOURCE.read_text()])
    name = f"native-{_digest(made_of.encode())}"

    def compile_into(folder: str) -> Path:
        run([*command, "-o", f"{folder}/{name}.so"])
        return Path(f"{folder}/{name}.so")

    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dynprune_jax"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = cache.stat()
        if about.st_uid != os.getuid() or about.st_mode & 0o022:
            raise PermissionError(f"others may write to {cache}")  # and we would run what they did
        # A file's name ends with its digest: to load a damaged one would be a crash.
        for kept in cache.glob(f"{name}-*.so"):
            if kept.stem == f"{name}-{_digest(kept.read_bytes())}":
                return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(dir=cache) as unfinished:
            library = compile_into(unfinished)
            kept = cache / f"{name}-{_digest(library.read_bytes())}.so"
            os.replace(library, kept)  # whole, or not there
        return ctypes.CDLL(str(kept))
    except (OSError, RuntimeError):  # nowhere safe to keep it: for this process alone
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(compile_into(folder)))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
