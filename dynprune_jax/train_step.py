"""Pure training: the state, and one step of it."""

import dataclasses
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from dynprune_jax.network import Network, Values
from dynprune_jax.pruning.layers import by_name

Batch = tuple[Float[Array, "batch height width channels"], Int[Array, " batch"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step of training changes.

    Attributes:
      step: how many steps of this phase are done, int32.
      params: float32 parameters by name.
      stats: float32 batch statistics by name.
      opt_state: the optimizer's state.
    """

    step: Any
    params: dict[str, Any]
    stats: dict[str, Any]
    opt_state: PyTree

    @classmethod
    def create(
        cls, values: Values, network: Network, optimizer: optax.GradientTransformation
    ) -> "TrainState":
        """The state before the first step, from the network's parameters and batch statistics."""
        params = {name: values[name] for name in network.values(nnx.Param)}
        stats = {name: values[name] for name in network.values(nnx.BatchStat)}
        return cls(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params))

    @property
    def values(self) -> dict[str, Any]:
        """Parameters and batch statistics by name."""
        return {**self.params, **self.stats}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    network: Network,
    optimizer: optax.GradientTransformation,
    ratios: Callable[[Int[Array, ""]], Values],
    label_smoothing: float,
    settings: Values = MappingProxyType({}),
    teacher: Callable[[Float[Array, "..."]], Float[Array, "batch classes"]] | None = None,
    distillation: float = 0.0,
    temperature: float = 1.0,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    r"""One step of gradient descent, dense or with targeted dropout.

    With a teacher the loss is that of Hinton et al. 2015 (arXiv 1503.02531):

    .. math:: (1 - w) \, CE(y, p) + w \, T^2 \, KL(p^{teacher}_T \| p_T)

    where :math:`p_T` is the softmax of the logits over the temperature.

    Args:
      state: before the step.
      batch: augmented, normalised images and their labels.
      network: of a model in training mode.
      optimizer: as `state` was created with.
      ratios: a schedule: the step to the prune ratio of every gate, by name. It is traced, so
        no change of a ratio compiles anything again.
      label_smoothing: share of the target spread evenly over all classes.
      settings: the network's `settings`, if they are to be traced; the ratios come from `ratios`.
      teacher: images to the logits to learn from; None: the labels alone.
      distillation: the weight w of the teacher, in [0, 1].
      temperature: T, above 0.

    Returns:
      The state after the step, and the batch's mean `loss` and `accuracy`, float32.
    """
    images, labels = batch
    current = ratios(state.step)
    taught = None if teacher is None else jax.lax.stop_gradient(teacher(images))

    def loss_fn(params):
        model = network.bind(settings, params, state.stats, current, draw=state.step)
        logits = model(images)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32), label_smoothing
        )
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        if taught is not None:
            divergence = optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(taught / temperature)
            )
            apart = temperature**2 * jnp.mean(divergence)
            loss = (1.0 - distillation) * loss + distillation * apart
        stats = by_name(nnx.state(model, nnx.BatchStat))
        return loss, (stats, jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32))

    (loss, (stats, accuracy)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    state = TrainState(state.step + 1, params, stats, opt_state)
    return state, {"loss": loss, "accuracy": accuracy}
