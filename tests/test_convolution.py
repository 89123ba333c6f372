import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax

from dynprune_jax.convolution import convolve, training_options
from dynprune_jax.models.layers import conv

LAYOUT = ("NHWC", "HWIO", "NHWC")
SIDES = st.integers(1, 5)


@st.composite
def convolutions(draw):
    """Shapes of maps and kernels of any size, larger than the map or not, and how to convolve."""
    kernel = (draw(SIDES), draw(SIDES))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    some = st.tuples(st.integers(0, 3), st.integers(0, 3))
    options = {
        "window_strides": (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        "padding": draw(st.sampled_from(["SAME", "VALID"]) | st.tuples(some, some)),
        "rhs_dilation": draw(st.sampled_from([None, (1, 1), (1, 1), (2, 1)])),
        "feature_group_count": groups,
    }
    x = (draw(st.integers(0, 2)), draw(SIDES), draw(SIDES), 2 * groups)
    return x, (*kernel, 2, 2 * groups), options


@settings(max_examples=15)
@given(convolutions(), st.integers(0, 2**31 - 1))
def test_it_is_the_same_function_and_has_the_same_gradients(case, seed):
    x_shape, kernel_shape, options = case
    keys = jax.random.split(jax.random.key(seed), 3)
    # Small whole numbers: float32 sums of their products are exact in any order.
    x, kernel = (
        jax.random.randint(key, shape, -4, 5).astype(jnp.float32)
        for key, shape in zip(keys, (x_shape, kernel_shape), strict=False)
    )

    def theirs(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=LAYOUT, **options)

    def ours(x, kernel):
        return convolve(x, kernel, dimension_numbers=LAYOUT, **options)

    shape = jax.eval_shape(theirs, x, kernel).shape
    assume(np.prod(shape[1:]) > 0)
    weights = jax.random.randint(keys[2], shape, -4, 5).astype(jnp.float32)
    results = []
    for function in (theirs, ours):
        y, vjp = jax.vjp(function, x, kernel)
        results.append((y, *vjp(weights)))
    for expected, got in zip(*results, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("options", [{}, training_options()], ids=["", "training_options"])
def test_barriers_stay_in_a_step_of_training_alone(options):
    layers = [conv(4, 4, rngs=nnx.Rngs(0)) for _ in range(2)]

    def loss(x):
        return jnp.sum(layers[1](nnx.relu(layers[0](x))))

    step = jax.jit(jax.grad(loss), compiler_options=options).lower(jnp.ones((1, 8, 8, 4)))
    assert ("opt-barrier" in step.compile().as_text()) == bool(options)
