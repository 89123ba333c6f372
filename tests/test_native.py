import contextlib
import ctypes
import functools
import itertools
import os
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import dynprune_jax
from dynprune_jax.geometry import Geometry
from dynprune_jax.pruning import masks, native
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.forms import Form, candidates

needs_compiler = pytest.mark.skipif(bool(native.why_not()), reason=f"{native.why_not()}")


def dense(x, kernel, strides, dilation, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def out_of(x, kernel, *geometry):
    """Height and width of what the dense convolution makes."""
    return jax.eval_shape(lambda x, kernel: dense(x, kernel, *geometry), x, kernel).shape[1:3]


def native_and_dense(x, kernel, kept, strides=(1, 1), dilation=(1, 1), padding=None, pairs=False):
    padding = padding or ((1, 1), (1, 1))

    @jax.jit
    def both(x, kernel, kept):
        y = native.kept_conv(
            x,
            native.kernel_pairs(kernel) if pairs else native.kernel_panels(kernel),
            kept,
            Geometry(*x.shape[1:3], kernel.shape[:2], strides, dilation, padding),
            features=kernel.shape[-1],
        )
        return y, dense(kept.apply(x), kernel, strides, dilation, padding)

    y, expected = map(np.array, both(x, kernel, kept))
    if kept.features is not None:
        expected *= np.asarray(kept.features)[:, None, None, :]
    if kept.out_columns is not None:
        expected *= np.asarray(kept.out_columns)[..., None]
    return y, expected


@needs_compiler
@settings(max_examples=60)
@given(st.data())
def test_it_equals_the_dense_convolution_of_what_is_kept(data):
    """Any geometry; more features than a panel has; images that keep different numbers, or none.

    Of the output the same: what is not wanted comes as 0.
    """
    draw = data.draw
    size = st.sampled_from([1, 2, 3, 5])
    kernel_size, strides = (draw(size), draw(size)), (draw(size), draw(size))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple((draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(2))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    height, width = (draw(st.integers(span, span + 12)) for span in spans)
    batch, features = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    channels = draw(st.integers(1, 8) | st.integers(1, 40))  # few are multiplied in another way
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = jnp.asarray(rng.normal(size=(batch, height, width, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, channels, features)), jnp.float32)
    out = out_of(x, kernel, strides, dilation, padding)
    shapes = [(channels,), (height, width), (features,), out]
    shares = [draw(st.none() | st.floats(0, 1)) for _ in shapes]
    channel_mask, column_mask, feature_mask, out_column_mask = (
        None if share is None else jnp.asarray(rng.random((batch, *shape)) < share)
        for share, shape in zip(shares, shapes, strict=True)
    )
    kept = masks.Masks(
        channel_mask, column_mask, features=feature_mask, out_columns=out_column_mask
    )
    pairs = feature_mask is not None and draw(st.booleans())
    y, reference = native_and_dense(x, kernel, kept, strides, dilation, padding, pairs)
    np.testing.assert_allclose(y, reference, rtol=1e-5, atol=1e-5 * max(1, abs(reference).max()))


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "features"),
    [
        ((1, 96, 90, 48), 40),
        ((3, 64, 64, 64), 40),
        ((70, 6, 6, 16), 40),
        ((1, 8, 8, 64), 200),
        ((1, 200, 190, 3), 40),
        ((70, 16, 16, 3), 40),
    ],
    ids=["bands", "few", "many", "panels", "image", "images"],
)
def test_it_divides_the_work_of_any_shape(shape, features):
    """Maps too large for the cache go in bands of rows, many small ones several at a time.

    Of a single small one all threads share the panels of its features.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, shape[3], features)), jnp.float32)
    channel_mask = jnp.asarray(rng.random((shape[0], shape[3])) < 0.5)
    column_mask = jnp.asarray(rng.random(shape[:3]) < 0.5)
    feature_mask = jnp.asarray(rng.random((shape[0], features)) < 0.5)
    sides = ((None, channel_mask), (None, column_mask), (None, feature_mask))
    for channels, columns, wanted in itertools.product(*sides):
        kept = masks.Masks(channels, columns, features=wanted)
        for pairs in {False, wanted is not None}:
            y, reference = native_and_dense(x, kernel, kept, pairs=pairs)
            np.testing.assert_allclose(y, reference, rtol=1e-4, atol=1e-3)


@needs_compiler
@settings(max_examples=30)
@given(st.data())
def test_a_kernel_of_one_tap_equals_the_dense_convolution_too(data):
    """Its sums are the output itself, if every place of that gets a column.

    Some panels are of 32 features and the last one is not; images come one or several at a time.
    """
    draw = data.draw
    batch, channels = draw(st.sampled_from([1, 2, 20])), draw(st.sampled_from([1, 16, 50]))
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    strides = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple((draw(st.integers(0, 1)), draw(st.integers(0, 1))) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = jnp.asarray(rng.normal(size=(batch, height, width, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(1, 1, channels, 70)), jnp.float32)
    out = out_of(x, kernel, strides, (1, 1), padding)
    shapes = [(channels,), (height, width), out]
    channel_mask, column_mask, out_column_mask = (
        jnp.asarray(rng.random((batch, *shape)) < 0.5) if draw(st.booleans()) else None
        for shape in shapes
    )
    kept = masks.Masks(channel_mask, column_mask, out_columns=out_column_mask)
    y, reference = native_and_dense(x, kernel, kept, strides, (1, 1), padding)
    np.testing.assert_allclose(y, reference, rtol=1e-5, atol=1e-5 * max(1, abs(reference).max()))


@needs_compiler
def test_a_kernel_in_pairs_is_for_features():
    kernel = native.kernel_pairs(jnp.ones((3, 3, 2, 4)))
    assert kernel.shape == (4, 2, 9)
    with pytest.raises(ValueError, match="a kernel in pairs is for masks that tell"):
        native.kept_conv(
            jnp.ones((1, 3, 3, 2)),
            kernel,
            masks.Masks(),
            Geometry(3, 3, kernel=(3, 3)),
            features=4,
        )


@needs_compiler
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) != 2,
    reason="threads move where there are two cores",
)
def test_a_thread_that_moves_may_run_where_it_might_before():
    def allowed():
        found = set()
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                found.add(frozenset(os.sched_getaffinity(int(thread))))
        return found

    before = allowed()
    x, kernel = jnp.ones((1, 16, 16, 64)), native.kernel_panels(jnp.ones((3, 3, 64, 64)))
    geometry = Geometry(16, 16, (3, 3), padding=((1, 1), (1, 1)))
    run = jax.jit(lambda x: native.kept_conv(x, kernel, masks.Masks(), geometry, features=64))
    for _ in range(500):  # the more so the busier both cores are
        run(x).block_until_ready()
    soon = time.monotonic() + 10
    while allowed() != before and time.monotonic() < soon:  # a late helper may just be moving
        time.sleep(0.01)
    assert allowed() == before


@needs_compiler
def test_what_is_not_kept_is_not_read():
    x = jnp.ones((1, 3, 3, 2)).at[:, :, :, 1].set(jnp.nan).at[:, 2].set(jnp.inf)
    channels = jnp.asarray([[True, False]])
    columns = jnp.ones((1, 3, 3), bool).at[:, 2].set(False)
    y, _ = native_and_dense(x, jnp.ones((3, 3, 2, 1)), masks.Masks(channels, columns))
    # Each output sums the kept columns around it: two rows are kept.
    np.testing.assert_array_equal(y[0, :, :, 0], [[4, 6, 4], [4, 6, 4], [2, 3, 2]])


@needs_compiler
@given(
    st.lists(
        st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, float("nan")]),
        min_size=1,
        max_size=40,
    ),
    st.data(),
)
def test_it_keeps_the_same_as_the_reference(scores, data):
    rows = jnp.asarray([scores, scores[::-1]], jnp.float32)
    count = data.draw(st.integers(1, len(scores)))
    expected = masks.keep_highest(rows, count)
    assert (expected.sum(-1) == count).all()
    np.testing.assert_array_equal(native.keep_highest(rows, count), expected)


@needs_compiler
def test_ties_go_to_the_lower_index():
    kept = native.keep_highest(jnp.asarray([1.0, 2.0, 1.0, 1.0]), 2)
    np.testing.assert_array_equal(kept, [True, True, False, False])


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`why_not` as in a new process, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    # Compiled in a hurry: it is not called.
    flags = tuple("-O0" if flag == "-O3" else flag for flag in native._FLAGS)
    monkeypatch.setattr(native, "_FLAGS", flags)
    # This process has its kernel already, and XLA takes one of a name.
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **options: None)
    unknown = native._why_not.__wrapped__
    monkeypatch.setattr(native, "_why_not", functools.cache(unknown))
    return unknown


@needs_compiler
def test_it_is_compiled_once_and_kept(fresh, tmp_path):
    assert fresh() is None
    (library,) = (tmp_path / "dynprune_jax").iterdir()
    before = library.stat().st_mtime_ns
    assert fresh() is None
    assert [path.stat().st_mtime_ns for path in library.parent.iterdir()] == [before]


@needs_compiler
@pytest.mark.usefixtures("fresh")
def test_threads_that_ask_at_once_have_one_kernel(monkeypatch):
    loaded, load = [], native._load
    monkeypatch.setattr(native, "_load", lambda compiler: loaded.append(1) or load(compiler))
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: native.why_not(), range(2))) == [None, None]
    assert loaded == [1]


def test_a_compiler_that_cannot_be_read_is_told(fresh, monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "')
    assert fresh() == "CXX is 'g++ \"': No closing quotation"


@needs_compiler
def test_a_cache_folder_that_cannot_be_made_is_done_without(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert fresh() is None
    assert os.listdir(tmp_path) == ["file"]  # nothing is left behind


@needs_compiler
@pytest.mark.parametrize("others", ["may write", "own it"])
def test_a_cache_folder_of_others_is_not_trusted(fresh, monkeypatch, tmp_path, others):
    assert fresh() is None
    cache = tmp_path / "dynprune_jax"
    (planted,) = cache.iterdir()
    if others == "may write":
        cache.chmod(0o777)
    else:
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    load, loaded = ctypes.CDLL, []
    monkeypatch.setattr(ctypes, "CDLL", lambda path: loaded.append(path) or load(path))
    assert fresh() is None
    assert len(loaded) == 1
    assert not loaded[0].startswith(str(cache))
    assert list(cache.iterdir()) == [planted]


@needs_compiler
def test_a_damaged_library_is_made_anew(fresh, monkeypatch, tmp_path):
    assert fresh() is None
    (sound,) = (tmp_path / "dynprune_jax").iterdir()
    library = tmp_path / "elsewhere" / "dynprune_jax" / sound.name
    library.parent.mkdir(parents=True)
    library.write_bytes(sound.read_bytes()[:1000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert fresh() is None
    assert library.read_bytes() == sound.read_bytes()


@needs_compiler
def test_a_kernel_larger_than_its_map_leaves_nothing():
    y, reference = native_and_dense(
        jnp.ones((2, 3, 3, 4)), jnp.ones((5, 5, 4, 6)), masks.Masks(), padding=((0, 0), (0, 0))
    )
    assert y.shape == reference.shape == (2, 0, 0, 6)


def test_why_there_is_none_is_said_in_a_line(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert fresh() == "no C++ compiler was found under the name no-such-compiler"
    broken = tmp_path / "broken"
    broken.write_text(
        '#!/bin/sh\ncase "$*" in *" -E "*) exit 0;; esac\necho warning >&2\n'
        "echo error: it is broken >&2\nexit 1\n"
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    assert fresh() == f"{broken} failed: error: it is broken"
    assert os.listdir(tmp_path / "dynprune_jax") == []  # nothing half made stays


def test_without_a_compiler_the_other_forms_remain(monkeypatch):
    model = dynprune_jax.models.vgg_digits(10, image_size=8, width=0.25, rngs=nnx.Rngs(0))
    dynamic = dynprune_jax.make_dynamic(model, channel_ratio=0.5, column_ratio=0.3)
    dynamic.eval()
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    expected = nnx.jit(dynamic)(x)
    monkeypatch.setattr(native, "why_not", lambda: "there is no compiler")
    name = "blocks/1/layers/0/conv"
    gate = dynprune_jax.dynamic_layers(dynamic)[name]
    offered = list(candidates(gate, 3, group_size=1, columns=True, platform="cpu"))
    assert Form("taps", columns=True) in offered
    assert not [form for form in offered if form.compiled]
    for form in (Form("rows", channels=True), Form("taps", channels=True, columns=True)):
        fast = dynprune_jax.compact(dynamic, x, plan=dynprune_jax.Plan({name: form}))
        np.testing.assert_allclose(nnx.jit(fast)(x), expected, rtol=1e-4, atol=1e-5)
    plan = dynprune_jax.Plan({name: Form("native", channels=True, columns=True)})
    with pytest.raises(ValueError, match=f"{name}: .*'native.*there is no compiler"):
        dynprune_jax.compact(dynamic, x, plan=plan)
    with pytest.raises(RuntimeError, match="there is no compiler"):
        native.keep_highest(jnp.ones(3), 1)


@pytest.mark.parametrize("size", [8, 10_000])
def test_masks_are_the_same_with_and_without_a_compiler(monkeypatch, size):
    conv = nnx.Conv(size, 1, (1, 1), rngs=nnx.Rngs(0))
    gate = DynamicConv(conv, channel_ratio=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 1, 1, size))
    expected = gate.masks(x).channels
    fast = CompactConv(gate, Form())
    np.testing.assert_array_equal(fast.masks(x).channels, expected)
    monkeypatch.setattr(native, "why_not", lambda: "there is no compiler")
    np.testing.assert_array_equal(fast.masks(x).channels, expected)
