import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import dynprune_jax
from dynprune_jax.pruning import native
from dynprune_jax.pruning.attention import random
from dynprune_jax.pruning.pallas_conv import kept_groups_conv

SHAPE = (2, 8, 8, 1)


@pytest.fixture(scope="module")
def dynamic():
    model = dynprune_jax.models.vgg_digits(10, image_size=8, width=0.25, rngs=nnx.Rngs(0))
    dynamic = dynprune_jax.make_dynamic(model, 0.5, 0.3)
    dynamic.eval()
    return dynamic


def test_the_package_does_without_the_back_end_of_the_pallas_kernel():
    program = "import sys; sys.modules['jax.experimental.pallas.triton'] = None"
    subprocess.run([sys.executable, "-c", f"{program}; import dynprune_jax"], check=True)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), SHAPE)


@pytest.fixture(scope="module")
def compiled(dynamic, images):
    """A compact model whose gated convolutions all are of the compiled form."""
    form = dynprune_jax.Form("native", channels=True, columns=True)
    plan = dynprune_jax.Plan(dict.fromkeys(dynprune_jax.dynamic_layers(dynamic), form))
    return dynprune_jax.compact(dynamic, images, plan=plan)


_CALLER = """
import sys
import numpy as np
from dynprune_jax import load_exported
images, data, logits = sys.argv[1:]
np.save(logits, load_exported(open(data, "rb").read())(np.load(images)))
"""


@pytest.mark.skipif(bool(native.why_not()), reason=f"{native.why_not()}")
def test_another_process_answers_as_the_compact_model(compiled, images, tmp_path):
    names = [tmp_path / name for name in ("images.npy", "model", "logits.npy")]
    np.save(names[0], images)
    names[1].write_bytes(dynprune_jax.export_model(compiled, images))
    subprocess.run([sys.executable, "-c", _CALLER, *map(str, names)], check=True)
    np.testing.assert_array_equal(np.load(names[2]), nnx.jit(compiled)(images))


@pytest.mark.skipif(bool(native.why_not()), reason=f"{native.why_not()}")
def test_without_a_compiler_it_says_what_is_missing(compiled, images, monkeypatch):
    data = dynprune_jax.export_model(compiled, images)
    monkeypatch.setattr(native, "why_not", lambda: "no C++ compiler")
    with pytest.raises(RuntimeError, match="the compiled kernel for CPUs: no C"):
        dynprune_jax.load_exported(data)


def test_a_model_that_draws_answers_every_time_alike(images):
    model = dynprune_jax.models.vgg_digits(10, image_size=8, width=0.25, rngs=nnx.Rngs(0))
    model = dynprune_jax.make_dynamic(model, 0.5, 0.3, criterion=random)
    model.eval()
    call = dynprune_jax.load_exported(dynprune_jax.export_model(model, images))
    logits = nnx.jit(lambda model: model(images))(model)  # with its first draw
    for _ in range(2):
        np.testing.assert_allclose(call(images), logits, rtol=1e-5, atol=1e-6)
    assert np.abs(model(images) - logits).max() > 1e-3


class _OfGroups(nnx.Module):
    """A layer as compact execution has it on an NVIDIA GPU."""

    def __call__(self, images):
        groups = jnp.zeros((len(images), 1), jnp.int32)
        kernel = jnp.ones((3, 3, 32, 16))
        padding = ((1, 1), (1, 1))
        return kept_groups_conv(images, kernel, groups, group_size=16, padding=padding)


# JAX deprecates the back end from 0.12 on.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_the_form_for_nvidia_gpus_can_be_exported():
    h100 = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    images = jax.ShapeDtypeStruct((2, 8, 8, 32), jnp.float32)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        data = dynprune_jax.export_model(_OfGroups(), images, platforms=("cuda",))
    assert jax.export.deserialize(bytearray(data)).platforms == ("cuda",)


def test_a_compact_model_is_for_one_platform(compiled, images):
    with pytest.raises(ValueError, match=r"platforms is \('cuda',\); a compact model is exported"):
        dynprune_jax.export_model(compiled, images, platforms=("cuda",))
    some = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 8, 8, 1"), jnp.float32)
    with pytest.raises(ValueError, match=r"shape \(n, 8, 8, 1\); a compact model is exported for"):
        dynprune_jax.export_model(compiled, some)
    with pytest.raises(ValueError, match="platforms is 'cuda'; give several names, such as"):
        dynprune_jax.export_model(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), images, platforms="cuda")


@pytest.mark.usefixtures("symbolic_shapes")
def test_a_masked_model_is_exported_for_any_batch_and_platform(dynamic, images):
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 8, 8, 1"), jnp.float32)
    dynamic = nnx.clone(dynamic)
    dynamic.train()
    data = dynprune_jax.export_model(dynamic, shape, platforms=("cpu", "cuda", "tpu"))
    assert not dynamic.blocks[0].layers[0].norm.use_running_average  # its mode stays
    dynamic.eval()
    call = dynprune_jax.load_exported(data)
    for some in (images, images[:1]):
        np.testing.assert_allclose(call(some), nnx.jit(dynamic)(some), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", [b"", b"something else", bytes(100)])
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError, match="this is no exported model that"):
        dynprune_jax.load_exported(data)
