import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune_jax.pruning import native
from dynprune_jax.pruning.attention import random
from dynprune_jax.pruning.compact_conv import CompactConv
from dynprune_jax.pruning.dynamic_conv import DynamicConv
from dynprune_jax.pruning.forms import Form, candidates, possible
from dynprune_jax.pruning.masks import Masks


def drawn(seed, *shape):
    """Normal numbers from NumPy: JAX would compile its draw for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@st.composite
def cases(draw):
    """A dynamic convolution of any geometry and gates, and maps for it."""
    kernel = (draw(st.sampled_from([1, 3, 5, 7])), draw(st.sampled_from([1, 3, 5, 7])))
    dilation = draw(st.sampled_from([1, 1, 2]))
    spans = [(k - 1) * dilation + 1 for k in kernel]
    padding = draw(
        st.sampled_from(["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", 0, 2])
        | st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 2)
    )
    # A map that the kernel fits into, whatever the padding.
    height, width = (draw(st.integers(span, span + 5)) for span in spans)
    channels, features = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, channels]))
    if groups == channels:
        features = channels  # depthwise
    elif groups > 1:
        channels, features = channels * groups, features * groups
    seed = draw(st.integers(0, 99))
    conv = nnx.Conv(
        channels,
        features,
        kernel,
        feature_group_count=groups,
        strides=draw(st.sampled_from([1, 2, (2, 1), (1, 2)])),
        padding=padding,
        kernel_dilation=dilation,
        use_bias=draw(st.booleans()),
        kernel_init=lambda key, shape, dtype: drawn(seed, *shape),
        bias_init=lambda key, shape, dtype: drawn(seed, *shape),
        rngs=nnx.Rngs(0),
    )
    ratios = st.none() | st.floats(0, 0.95)
    gate = DynamicConv(
        conv,
        channel_ratio=draw(ratios),
        column_ratio=draw(ratios),
        feature_ratio=None if groups > 1 else draw(ratios),
        channel_group=draw(st.integers(1, 3)),
        column_patch=draw(st.integers(1, 3)),
        rngs=nnx.Rngs(0),
    )
    return gate, drawn(seed + 1, draw(st.integers(1, 16)), height, width, channels)


def all_forms(gate, x):
    """Every form that can execute a layer here, some of them a few images at a time too."""
    forms = set()
    for form in possible_forms(gate):
        if form.product in ("patches", "rows", "taps"):
            forms |= {dataclasses.replace(form, images=n) for n in (0, 1, 2, 4) if n < len(x)}
        elif not form.compiled or native.why_not() is None:
            forms.add(form)  # Pallas is for GPUs; here it is interpreted
    return forms


def possible_forms(gate):
    fixed = CompactConv(gate, Form())
    ratios = {
        "channels": fixed.channel_ratio,
        "columns": fixed.column_ratio,
        "features": fixed.feature_ratio,
    }
    return possible(gate, **{axis: ratio is not None for axis, ratio in ratios.items()})


def relative_error(y, reference):
    y, reference = np.asarray(y, np.float64), np.asarray(reference, np.float64)
    return np.max(np.abs(y - reference)) / max(np.max(np.abs(reference)), 1e-30)


@settings(max_examples=30)
@given(cases(), st.data())
def test_every_form_equals_masked_execution(case, data):
    gate, x = case
    form = data.draw(st.sampled_from(sorted(all_forms(gate, x))))
    run = jax.jit(lambda x: (CompactConv(gate, form)(x), gate(x), gate.masks(x).features))
    y, reference, features = run(x)
    assert y.shape == reference.shape
    assert y.dtype == reference.dtype
    assert np.isfinite(y).all()  # where it is not wanted too: the layer behind makes that 0
    if features is not None:
        y, reference = (np.where(features[:, None, None, :], a, 0) for a in (y, reference))
    assert relative_error(y, reference) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "strides", "padding", "at_least", "dtype"),
    [
        (1, 1, "SAME", 34, jnp.float32),
        (3, 1, ((1, 2), (0, 1)), 50, jnp.float32),
        (3, 1, ((1, 2), (0, 1)), 50, jnp.bfloat16),
        (3, 2, "SAME", 34, jnp.bfloat16),
        (4, 1, "CIRCULAR", 34, jnp.float32),  # of an even one the sides differ
    ],
)
def test_all_forms_of_a_few_convolutions(kernel, strides, padding, at_least, dtype):
    base = nnx.Conv(
        8, 5, (kernel, kernel), strides=strides, padding=padding, dtype=dtype, rngs=nnx.Rngs(0)
    )
    ratios = {"channel_ratio": 0.5, "column_ratio": 0.4, "feature_ratio": 0.4}
    gate = DynamicConv(base, **ratios, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (5, 6, 7, 8)).astype(dtype)
    wanted = gate.masks(x).features[:, None, None, :]
    # bfloat16 keeps 8 bits, and the masked execution rounds once as well.
    limit = 1e-5 if dtype == jnp.float32 else 2**-7
    forms = sorted(all_forms(gate, x))
    assert len(forms) >= at_least
    run = jax.jit(lambda x: (gate(x), [CompactConv(gate, form)(x) for form in forms]))
    reference, results = run(x)
    for form, y in zip(forms, results, strict=True):
        assert y.dtype == dtype
        pair = (jnp.where(wanted, a.astype(jnp.float32), 0.0) for a in (y, reference))
        error = relative_error(*pair)
        assert error < limit, form


def test_what_is_worth_measuring_depends_on_the_platform_and_the_compiler(monkeypatch):
    conv = nnx.Conv(32, 8, (3, 3), rngs=nnx.Rngs(0))

    def products(**options):
        found = candidates(conv, 8, columns=False, **options)
        return {(form.product, form.channels, form.images) for form in found}

    monkeypatch.setattr(native, "why_not", lambda: None)
    with_compiler = products(group_size=1, platform="cpu")
    assert ("native", True, 0) in with_compiler
    assert {images for _, _, images in with_compiler} == {0}
    both = candidates(conv, 8, group_size=1, columns=True, platform="cpu")
    gathered = {(f.channels, f.columns) for f in both if f.product == "native"}
    assert gathered == {(False, False), (True, True)}
    monkeypatch.setattr(native, "why_not", lambda: "there is none")
    without = products(group_size=1, platform="cpu")
    assert without > {form for form in with_compiler if form[0] != "native"}
    assert {images for _, _, images in without} == {0, 1, 2, 4}
    on_gpu = products(group_size=16, platform="gpu")
    assert on_gpu == {form for form in without if not form[2]} | {("pallas", True, 0)}
    assert products(group_size=8, platform="gpu") == on_gpu - {("pallas", True, 0)}
    assert not {form for form in products(group_size=0, platform="tpu") if form[1]}


def test_a_depthwise_convolution_is_measured_in_two_forms():
    conv = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=nnx.Rngs(0))
    for group_size, columns in ((0, False), (1, True)):
        found = candidates(conv, 8, group_size=group_size, columns=columns, platform="cpu")
        assert list(found) == [Form(), Form("shifts")]


def test_a_grouped_convolution_is_compiled_group_by_group(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda: None)

    def forms(groups):
        conv = nnx.Conv(130, 260, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))
        return list(candidates(conv, 8, group_size=130 // groups, columns=True, platform="cpu"))

    compiled = [Form("native"), Form("native", channels=True, columns=True)]
    assert forms(2) == forms(26) == [Form(), *compiled]
    assert forms(65) == forms(130) == [Form()]  # a call for each would be too many


def test_one_image_without_a_batch_axis_and_several_batch_axes():
    gate = DynamicConv(
        nnx.Conv(6, 4, (3, 3), rngs=nnx.Rngs(0)),
        channel_ratio=0.5,
        column_ratio=0.5,
        rngs=nnx.Rngs(1),
    )
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 5, 6))
    for form in (Form("rows", channels=True, images=2), Form("taps", columns=True)):
        fast = nnx.jit(CompactConv(gate, form))
        np.testing.assert_allclose(fast(x), gate(x), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fast(x[0, 0]), gate(x)[0, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [Form(), Form("patches"), Form("rows", channels=True)])
def test_what_is_asked_for_as_the_result_s_type_is_returned(form):
    types = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    conv = nnx.Conv(6, 4, (3, 3), use_bias=False, **types, rngs=nnx.Rngs(0))
    gate = DynamicConv(conv, channel_ratio=0.5, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 6)).astype(jnp.bfloat16)
    y = CompactConv(gate, form)(x)
    assert y.dtype == gate(x).dtype == jnp.float32
    np.testing.assert_allclose(y, gate(x), rtol=1e-5, atol=1e-5)  # rounded nowhere between


def test_every_form_takes_no_images():
    ratios = {"channel_ratio": 0.5, "column_ratio": 0.4, "feature_ratio": 0.4}
    gate = DynamicConv(nnx.Conv(8, 5, (3, 3), rngs=nnx.Rngs(0)), **ratios, rngs=nnx.Rngs(1))
    none = jnp.zeros((0, 6, 7, 8))
    for form in all_forms(gate, jnp.zeros((5, 6, 7, 8))):
        y = jax.eval_shape(CompactConv(gate, form), none)
        assert (y.shape, y.dtype) == ((0, 6, 7, 5), jnp.float32), form
        if form.compiled:  # its gate is compiled too
            assert CompactConv(gate, form)(none).shape == y.shape


def test_a_kernel_mask_stays():
    mask = jnp.zeros((3, 3, 4, 2)).at[1].set(1.0)
    base = nnx.Conv(4, 2, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    np.testing.assert_allclose(CompactConv(base, Form("rows"))(x), base(x), rtol=1e-4, atol=1e-6)


def test_dilated_inputs_are_left_to_xla():
    base = nnx.Conv(4, 4, (3, 3), input_dilation=2, padding=1, rngs=nnx.Rngs(0))
    gate = DynamicConv(base, channel_ratio=0.5, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    assert all_forms(gate, x) == {Form()}
    np.testing.assert_array_equal(CompactConv(gate, Form())(x), gate(x))


@pytest.mark.skipif(native.why_not() is not None, reason="there is no compiler")
def test_groups_and_columns_that_an_image_leaves_out_are_not_multiplied():
    conv = nnx.Conv(6, 9, (3, 3), feature_group_count=3, use_bias=False, rngs=nnx.Rngs(0))
    gate = DynamicConv(conv, channel_ratio=0.3, column_ratio=0.1, rngs=nnx.Rngs(1))
    layer = CompactConv(gate, Form("native", channels=True, columns=True))
    kept = jnp.array([[True, True, False, False, True, True]])
    columns = jnp.ones((1, 4, 4), bool).at[0, 1, 2].set(False)
    read = kept[:, None, None] & columns[..., None]
    x = jnp.where(read, jnp.ones((1, 4, 4, 6)), jnp.nan)  # NaN times 0 is NaN
    y = layer.convolve(x, Masks(kept, columns, out_columns=columns))
    np.testing.assert_array_equal(y[..., 3:6], 0.0)
    expected = jnp.where(columns[..., None], conv(jnp.where(read, x, 0.0)), 0.0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_random_selection_works_in_every_form():
    base = nnx.Conv(8, 4, (3, 3), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 8))
    for form in (Form(), Form("rows", channels=True, images=2)):
        gate = DynamicConv(base, channel_ratio=0.5, criterion=random, rngs=nnx.Rngs(3))
        same = DynamicConv(base, channel_ratio=0.5, criterion=random, rngs=nnx.Rngs(3))
        np.testing.assert_allclose(CompactConv(gate, form)(x), same(x), rtol=1e-4, atol=1e-5)
