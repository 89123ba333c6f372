"""Networks of somebody's own, as `own:NAME` in a config: nothing is known of them."""

import jax
import jax.numpy as jnp
from flax import nnx

from dynprune_jax.models.vgg import VGG, global_mean


class Own(nnx.Module):
    """A network that nobody knows, whose readers get their maps laid out in three ways."""

    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs, fixed=None):
        options = {"dtype": dtype, "rngs": rngs}
        n = round(16 * width)
        self.stem = nnx.Conv(in_channels, n, (3, 3), **options)
        self.norms = nnx.List([nnx.BatchNorm(n, **options) for _ in range(4)])
        self.blocks = nnx.List(
            [
                nnx.Conv(n, n, (3, 3), feature_group_count=n, **options),  # each reads its own
                nnx.Conv(n, n, (3, 3), **options),
                nnx.Conv(4 * n, n, (3, 3), **options),
            ]
        )
        self.head = nnx.Linear((image_size // 2) ** 2 * n, num_classes, rngs=rngs)
        self.fixed = fixed

    def __call__(self, x):
        for conv, norm in zip((self.stem, *self.blocks), self.norms, strict=True):
            if conv is self.blocks[2]:  # four columns become one
                b, h, w, c = x.shape
                x = x.reshape(b, h // 2, 2, w // 2, 2, self.fixed or c)
                x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, -1)
            told = {"mask": jnp.bool_(True)} if conv is self.stem else {}  # so it is no link
            x = nnx.relu(norm(conv(x), **told))
        return self.head(x.reshape(len(x), -1))


def counting_on_filters(num_classes, **options):
    return Own(num_classes, **options, fixed=16)


class Small(nnx.Module):
    """One convolution whose channels the head reads; `between` is what others change."""

    def __init__(self, num_classes, *, in_channels, image_size, width, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.stem = nnx.Conv(in_channels, 16, (3, 3), **options)
        self.blocks = nnx.List([nnx.Conv(16, 16, (3, 3), **options)])
        self.norm = nnx.BatchNorm(16, **options)
        self.head = nnx.Linear(16, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.between(self.norm(self.blocks[0](self.stem(x))))
        return self.head(x.mean((1, 2)))

    def between(self, x):
        return nnx.relu(x)


class Depthwise(Small):
    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.each = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)

    def between(self, x):
        return self.each(x)


class Tied(Small):
    """Two convolutions have one kernel."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.other = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.other.kernel = self.blocks[0].kernel
        self.second = nnx.Linear(16, num_classes, rngs=rngs)

    def __call__(self, x):
        return super().__call__(x) + self.second(self.other(self.stem(x)).mean((1, 2)))


class OtherHead(Small):
    """Its head is a layer that nobody counts."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)

        class Other(nnx.Linear):
            pass

        self.head = Other(16, num_classes, rngs=rngs)


class Halves(Small):
    """It knows the places of its channels."""

    def between(self, x):
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([nnx.relu(first), nnx.silu(second)], axis=-1)


class Asserting(Small):
    def between(self, x):
        if x.shape[-1] != 16:
            raise AssertionError
        return x


class AssertingInTraining(Small):
    def between(self, x):
        assert self.norm.use_running_average or x.shape[-1] == 16
        return x


class Eights(Small):
    """Half of its filters may leave, and not a fifth."""

    def between(self, x):
        return x.reshape(*x.shape[:3], -1, 8).reshape(x.shape)


class Normed(Small):
    """Its head's weights are divided by the norm of all."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.head = nnx.WeightNorm(self.head, rngs=rngs)


class Again(Small):
    """One layer is called twice."""

    def __call__(self, x):
        x = self.blocks[1](self.blocks[1](self.stem(x)))
        return self.head(nnx.relu(self.norm(self.blocks[0](x))).mean((1, 2)))

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.blocks.append(nnx.Conv(16, 16, (3, 3), rngs=rngs))


class NoNorm(Small):
    def __call__(self, x):
        return self.head(nnx.relu(self.blocks[0](self.stem(x))).mean((1, 2)))


class Jitted(Small):
    """A part of it is a program of its own, and so remembered."""

    def __call__(self, x):
        return self.head(self.first(x).mean((1, 2)))

    @nnx.jit
    def first(self, x):
        return nnx.relu(self.norm(self.blocks[0](self.stem(x))))


class Unit(nnx.Module):
    def __init__(self, conv, norm):
        self.conv, self.norm = conv, norm

    @nnx.remat
    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Rematerialised(Small):
    """A part of it is computed again for the gradient."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.blocks = nnx.List([Unit(self.blocks[0], self.norm)])
        del self.norm

    def __call__(self, x):
        return self.head(self.blocks[0](self.stem(x)).mean((1, 2)))


class RematerialisedList(Small):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class Stacked(Small):
    """Three convolutions in one, called in a loop."""

    def __init__(self, num_classes, *, rngs, **options):
        super().__init__(num_classes, rngs=rngs, **options)
        self.layers = nnx.vmap(lambda key: nnx.Conv(16, 16, (3, 3), rngs=nnx.Rngs(key)))(
            jax.random.split(jax.random.key(0), 3)
        )

    def between(self, x):
        return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.layers, x
        )


def headed(num_classes, *, in_channels, image_size, width, dtype, rngs):
    """An architecture of the package with a head that it does not know."""
    del image_size
    n = round(32 * width)
    plan = ((1, n), (1, n))
    head = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(n, num_classes, rngs=rngs))
    return VGG(plan, global_mean, head, in_channels=in_channels, dtype=dtype, rngs=rngs)


def laid_out(num_classes, *, in_channels, image_size, width, dtype, rngs):
    """An architecture of the package that lays out its last map with the channels first."""
    n, side = round(32 * width), image_size // 4
    head = nnx.Linear(n * side**2, num_classes, rngs=rngs)
    return VGG(
        ((1, n), (1, n)),
        lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
        head,
        in_channels=in_channels,
        dtype=dtype,
        rngs=rngs,
    )


class Quarters(Small):
    """It sees more maps than images."""

    def __call__(self, x):
        quarters = x.reshape(len(x) * 4, 4, 4, 1)
        return super().__call__(quarters).reshape(len(x), 4, -1).mean(1)
