import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dynprune_jax.convolution import DEPTHWISE, convolve, training_options
from dynprune_jax.models.layers import conv

LAYOUT = ("NHWC", "HWIO", "NHWC")
SIDES = st.integers(1, 5)


@st.composite
def convolutions(draw):
    """Shapes of maps and kernels of any size, larger than the map or not, and how to convolve."""
    kernel = (draw(SIDES), draw(SIDES))
    groups, each = draw(st.sampled_from([(1, 2), (1, 2), (2, 2), (2, 1), (3, 1)]))
    some = st.tuples(st.integers(0, 3), st.integers(0, 3))
    both = st.lists(some, min_size=2, max_size=2)
    options = {
        "window_strides": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": draw(st.sampled_from(["SAME", "VALID"]) | both),
        "rhs_dilation": draw(st.sampled_from([None, (1, 1), (1, 1), (2, 1)])),
        "feature_group_count": groups,
    }
    if not isinstance(options["padding"], str):  # lax knows no other with it
        options["lhs_dilation"] = draw(st.sampled_from([None, (1, 1), (1, 1), (2, 1)]))
    x = (draw(st.integers(0, 2)), draw(SIDES), draw(SIDES), each * groups)
    return x, (*kernel, each, each * groups), options


@pytest.mark.parametrize(
    "changed",
    [{"dtype": jnp.bfloat16}, {"preferred_element_type": jnp.bfloat16}, {"padding": (1, 1)}],
)
def test_it_refuses_what_the_other_refuses(changed):
    """Of a map smaller than the kernel too, which goes another way on a CPU."""
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT} | changed
    x, kernel = jnp.ones((2, 2, 2, 3), options.pop("dtype", jnp.float32)), jnp.ones((3, 3, 3, 4))
    for function in (lax.conv_general_dilated, convolve):
        with pytest.raises((TypeError, ValueError)):
            function(x, kernel, **options)


APART = {"window_strides": (1, 1), "padding": [(1, 1)] * 2, "lhs_dilation": (2, 1)}


@settings(max_examples=20)
@example(((1, 2, 2, 2), (3, 3, 2, 2), APART | {"rhs_dilation": None}), 0)
@example(((1, 3, 3, 2), (3, 3, 1, 2), APART | {"feature_group_count": 2}), 0)
@given(convolutions(), st.integers(0, 2**31 - 1))
def test_it_is_the_same_function_and_has_the_same_gradients(case, seed):
    x_shape, kernel_shape, options = case
    rng = np.random.default_rng(seed)
    # Small whole numbers: float32 sums of their products are exact in any order.
    x, kernel = (
        jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in (x_shape, kernel_shape)
    )

    def theirs(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=LAYOUT, **options)

    def ours(x, kernel):
        return convolve(x, kernel, dimension_numbers=LAYOUT, **options)

    shape = jax.eval_shape(theirs, x, kernel).shape
    assume(np.prod(shape[1:]) > 0)
    weights = jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)

    @jax.jit
    def results(*given):
        """Of both: the map and its gradients."""
        made = [jax.vjp(function, *given) for function in (theirs, ours)]
        return [(y, *vjp(weights)) for y, vjp in made]

    for expected, got in zip(*results(x, kernel), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maps_smaller_than_the_kernel_are_one_matrix_product(dtype):
    x, kernel = jnp.ones((2, 2, 2, 3), dtype), jnp.ones((3, 3, 3, 4), dtype)
    given = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT}

    def primitives(x, **more):
        closed = jax.make_jaxpr(lambda x: convolve(x, kernel, **given, **more))(x)
        assert closed.out_avals[0].dtype == more.get("preferred_element_type", dtype)
        return {eqn.primitive.name for eqn in closed.eqns} & {"dot_general", "conv_general_dilated"}

    assert primitives(x) == primitives(x, preferred_element_type=jnp.float32) == {"dot_general"}
    assert primitives(jnp.ones((2, 4, 4, 3), dtype)) == {"conv_general_dilated"}
    assert primitives(jnp.ones((2, 2, 64, 3), dtype)) == {"conv_general_dilated"}  # patches of 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_depthwise_convolution_is_a_sum_of_shifted_maps(dtype):
    x, kernel = jnp.ones((2, 8, 8, 6), dtype), jnp.ones((3, 3, 1, 6), dtype)

    def primitives(x, kernel, **more):
        def ours(x, kernel):
            groups = {"dimension_numbers": LAYOUT, "feature_group_count": x.shape[-1]}
            return convolve(x, kernel, (1, 2), "SAME", **groups, **more)

        closed = jax.make_jaxpr(ours)(x, kernel)
        assert closed.out_avals[0].dtype == more.get("preferred_element_type", x.dtype)
        return {name for name in (DEPTHWISE, "conv_general_dilated") if name in str(closed)}

    assert primitives(x, kernel) == {DEPTHWISE}
    assert primitives(x, kernel, preferred_element_type=jnp.float32) == {DEPTHWISE}
    assert primitives(x, jnp.ones((3, 3, 1, 12), dtype)) == {"conv_general_dilated"}  # two of each
    assert primitives(x, jnp.ones((8, 8, 1, 6), dtype)) == {"conv_general_dilated"}  # many taps
    apart = jax.make_jaxpr(
        lambda x: convolve(
            x,
            kernel,
            (1, 1),
            "SAME",
            rhs_dilation=(2, 2),
            dimension_numbers=LAYOUT,
            feature_group_count=6,
        )
    )(x)
    assert str(apart).count("conv_general_dilated[") == 1  # XLA is fast at its gradient


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_groups_of_a_convolution_are_convolved_one_after_the_other(dtype):
    def groups_of_each(channels, groups, **more):
        x = jnp.ones((2, 8, 8, channels), dtype)
        kernel = jnp.ones((3, 3, channels // groups, 2 * channels), dtype)

        def ours(x):
            given = {"dimension_numbers": LAYOUT, "feature_group_count": groups, **more}
            return convolve(x, kernel, (1, 2), "SAME", **given)

        closed = jax.make_jaxpr(ours)(x)
        assert closed.out_avals[0].shape == (2, 8, 4, 2 * channels)
        assert closed.out_avals[0].dtype == more.get("preferred_element_type", dtype)
        calls = [eqn for eqn in closed.eqns if eqn.primitive.name == "conv_general_dilated"]
        return [eqn.params["feature_group_count"] for eqn in calls]

    assert groups_of_each(6, 3) == groups_of_each(9, 3) == [1, 1, 1]
    assert groups_of_each(6, 3, preferred_element_type=jnp.float32) == [1, 1, 1]
    assert groups_of_each(130, 65) == [65]  # many would take long to compile
    assert groups_of_each(6, 3, rhs_dilation=(2, 2)) == [1, 1, 1]
    assert groups_of_each(6, 6) == [1] * 6  # two of each channel


@pytest.mark.parametrize(("kernel", "groups"), [((9, 9, 6), 1), ((3, 3, 2), 3), ((3, 3, 1), 6)])
def test_a_sharding_that_is_asked_for_is_that_of_the_result(kernel, groups):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    options = {"dimension_numbers": LAYOUT, "feature_group_count": groups}
    options["out_sharding"] = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        x, kernel = jnp.ones((4, 8, 8, 6)), jnp.ones((*kernel, 6))
        made = jax.eval_shape(lambda x: convolve(x, kernel, (1, 1), "SAME", **options), x)
    assert made.sharding.spec[0] == "data"


def test_in_half_precision_a_depthwise_gradient_is_rounded_once():
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.normal(size=of), jnp.bfloat16) for of in ((2, 6, 6, 4), (3, 3, 1, 4))
    )

    def gradients(dtype):
        def loss(x, kernel):
            groups = {"dimension_numbers": LAYOUT, "feature_group_count": 4}
            return jnp.sum(convolve(x, kernel, (1, 1), "SAME", **groups).astype(jnp.float32))

        return jax.grad(loss, (0, 1))(x.astype(dtype), kernel.astype(dtype))

    for got, expected in zip(*map(gradients, (jnp.bfloat16, jnp.float32)), strict=True):
        np.testing.assert_array_equal(got, expected.astype(jnp.bfloat16))


def test_negative_padding_crops_a_small_map():
    x, kernel = jnp.arange(18.0).reshape(1, 3, 3, 2), jnp.arange(100.0).reshape(5, 5, 2, 2)

    def padded(x, *padding):
        return convolve(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)

    expected = padded(x[:, 1:, :2], (0, 4), (3, 0))
    np.testing.assert_array_equal(padded(x, (-1, 4), (3, -1)), expected)
    assert expected.any()


def test_a_layout_of_other_axes_is_read_as_lax_reads_it():
    x, kernel = jnp.arange(16.0).reshape(1, 4, 2, 2), jnp.arange(72.0).reshape(2, 4, 3, 3)
    expected = lax.conv_general_dilated(x, kernel, (1, 1), "SAME")
    np.testing.assert_array_equal(convolve(x, kernel, (1, 1), "SAME"), expected)


def test_barriers_stay_in_a_step_of_training_alone():
    layer = conv(4, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = jnp.ones((1, 8, 8, 4))
    kernel_gradient = jax.grad(lambda state, x: jnp.sum(nnx.merge(graph, state)(nnx.relu(x))))
    for options in ({}, training_options()):
        step = jax.jit(kernel_gradient, compiler_options=options).lower(state, x)
        assert ("opt-barrier" in step.compile().as_text()) == bool(options)
