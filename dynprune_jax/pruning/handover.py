"""From a convolution that leaves outputs out to the normalization that reads them.

And what every module here that stands in for another needs: to take over all that it holds.
"""

from typing import Any

import jax
import jax.extend.core
from flax import nnx
from jaxtyping import Array, Float

from dynprune_jax.pruning.masks import Masks


def take_over(new: nnx.Module, old: nnx.Module) -> None:
    """Gives a module all that another holds: the very same parameters under the same names."""
    for name, value in vars(old).items():
        if not name.startswith("_"):  # names with an underscore belong to NNX's own machinery
            setattr(new, name, value)


class Absent(jax.ShapeDtypeStruct):
    """Stands where a parameter was, of which only the shape and dtype are still read."""

    @property
    def value(self) -> "Absent":
        """For code that asks what is behind it."""
        return self

    def get_value(self) -> "Absent":
        """The same."""
        return self

    def __getitem__(self, index: Any) -> "Absent":
        if index is not ...:
            raise TypeError("a part of a parameter that is not there any more was asked for")
        return self


def absent(parameter: Any) -> Any:
    """What takes the place of a parameter."""
    if parameter is None:
        return None
    return nnx.static(Absent(parameter.shape, parameter.dtype))


class Handover:
    """Takes what is wanted of a convolution's outputs to the normalization that reads them.

    It holds it between two calls of one forward pass, together with the very map that it
    belongs to, so that no other map can be taken for that one. What a depthwise convolution behind
    the normalization is to know is held without a map, which a relu has changed by then. So two
    threads must not trace one model at a time, and calls of a model and a clone take turns.

    Args:
      maker: the name of the convolution, for messages.
      goes_on: whether a depthwise convolution behind the normalization takes the choice too.
    """

    def __init__(self, maker: str = "a convolution", goes_on: bool = False):
        self.maker = maker
        self.goes_on = goes_on
        self._held: tuple[Any, Masks] | None = None
        self._choice: tuple[Any, Any] | None = None
        self._lost = False

    def __getstate__(self) -> dict[str, Any]:  # no copy takes a map along
        return vars(self) | {"_held": None, "_choice": None, "_lost": False}

    def put(self, y: Any, masks: Masks) -> None:
        """Leaves what belongs to the map `y`, in place of what was left before."""
        self._lost |= self.waits
        self._held = (y, masks)
        self._choice = None

    def take(self, y: Any) -> Masks:
        """What was left for the map `y`, once; masks of nothing if nothing was left.

        Raises:
          ValueError: if it was left for another map.
        """
        if self._held is None:
            return Masks()
        if self._held[0] is not y:
            raise self.error()
        masks, self._held = self._held[1], None
        self._choice = (masks.features, _trace()) if self.goes_on else None
        return masks

    def take_choice(self, shape: tuple[int, ...]) -> Any:
        """The channels that the normalization has taken as wanted, once.

        Args:
          shape: of what is wanted, `(*batch, channels)`.

        Raises:
          ValueError: if there are none, or they are of another trace, or for other images.
        """
        (choice, trace), self._choice = self._choice or (None, None), None
        if choice is None or trace != _trace() or choice.shape != shape:
            raise ValueError(
                f"what {self.maker} leaves out does not reach the depthwise convolution behind it,"
                " which is called in another nnx.jit or nnx.remat, or with other maps: give a link"
                " that ends there"
            )
        return choice

    def error(self) -> ValueError:
        """What is wrong where something was left and the normalization cannot take it."""
        return ValueError(
            f"the outputs that {self.maker} leaves out are not left out: its"
            " normalization does not read the convolution's own output, but something made of it,"
            " or reads it in another nnx.jit or nnx.remat"
        )

    def clear(self) -> None:
        """Forgets what was left, and whether it was taken."""
        self._held, self._choice, self._lost = None, None, False

    @property
    def waits(self) -> bool:
        """Whether something was left and not taken: no normalization has read that map."""
        return self._lost or self._held is not None


def _trace() -> Any:
    """Which trace is under way: no value of one can be used in another."""
    return jax.extend.core.get_opaque_trace_state(convention="nnx")


class GatedNorm(nnx.BatchNorm):
    """A batch normalization whose outputs are scaled by their salience, and 0 where not wanted.

    Its statistics are those of all outputs, wanted or not (Gao et al. 2018, arXiv 1810.05331,
    equation 6). A scale of its own stays, for a trained network to start as it was: scale and bias
    are divided by what the convolution's saliences start with.

    Args:
      norm: the normalization to take over, with its parameters.
      handover: of the convolution in front of it, which chooses its outputs.
      start: what its saliences start with, if the outputs are multiplied by them.
    """

    def __init__(
        self,
        norm: nnx.BatchNorm,
        handover: Handover,
        start: Float[Array, " features"] | None = None,
    ):
        take_over(self, norm)
        self.handover = nnx.static(handover)
        if start is not None:
            if self.scale is None:
                self.scale = nnx.data(nnx.Param(1.0 / start))
            else:
                self.scale = _divided(self.scale, start)
            if self.bias is not None:
                self.bias = _divided(self.bias, start)

    def __call__(
        self,
        x: Float[Array, "*batch height width channels"],
        use_running_average: bool | None = None,
        *,
        mask: Array | None = None,
    ) -> Float[Array, "*batch height width channels"]:
        """Normalizes, then scales what is wanted and leaves out all else.

        Raises:
          ValueError: if the map is not the one that the convolution has made.
        """
        wanted = self.handover.take(x)
        return wanted.apply_to_output(super().__call__(x, use_running_average, mask=mask))


def _divided(parameter: Any, start: Float[Array, " features"]) -> Any:
    """A parameter like another, of its kind and dtype."""
    return parameter.replace((parameter[...] / start).astype(parameter.dtype))
