"""What a study compares: each method is a few fields of the config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dynprune_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a study.

    Attributes:
      label: in tables and figures.
      fields: of the config that differ. A single number for a tuple of ratios is one for each
        block.
    """

    label: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_static(self) -> bool:
        """Whether it has no gates: `--mode=static` trains and evaluates it."""
        return "static.criterion" in self.fields

    @property
    def removes(self) -> bool:
        """Whether it removes filters."""
        return self.fields.get("static.criterion", "none") != "none"


# A study names any of these, or several joined by a plus: "predicted+distillation".
METHODS = {
    "attention": Method("dynamic, by attention"),
    # The patterns of a config are those of the convolutions with a gate in front.
    "predicted": Method("dynamic, predicted", {"gate.kind": "predicted", "gate.layers": ("*",)}),
    "unscaled": Method("whose salience only ranks", {"gate.salience_scales": False}),
    "groups": Method("channels in groups of 8", {"gate.channel_group": 8}),
    "l1": Method("static, L1 norm", {"static.criterion": "l1"}),
    "geometric_median": Method(
        "static, geometric median", {"static.criterion": "geometric_median"}
    ),
    "taylor": Method("static, Taylor", {"static.criterion": "taylor"}),
    # With a criterion: "l1+as_predicted". Gates by attention need higher ratios for a cut, up to
    # the highest there are, so that filters allotted as these are more alike in all blocks.
    "as_gates": Method("allotted as gates by attention", {"static.allotment": "gate"}),
    "as_predicted": Method(
        "allotted as predicted gates",
        {"static.allotment": "gate", "gate.kind": "predicted", "gate.layers": ("*",)},
    ),
    "random_filters": Method("static, random", {"static.criterion": "random"}),
    # Whatever the cut: what more training, or a teacher, does without any pruning.
    "trained_on": Method("dense, trained on", {"static.criterion": "none"}),
    "random": Method("random selection", {"gate.criterion": "random"}),
    "inverse": Method("inverse selection", {"gate.criterion": "inverse"}),
    "shared": Method("one choice for all inputs of a batch", {"gate.criterion": "shared"}),
    "max": Method("attention by maximum", {"gate.statistic": "max"}),
    "l2": Method("attention by L2 norm", {"gate.statistic": "l2"}),
    "channels": Method("channels only", {"gate.column_ratio": ()}),
    "columns": Method("columns only", {"gate.channel_ratio": (), "gate.column_ratio": 0.5}),
    "both": Method("channels and columns", {"gate.column_ratio": 0.5}),
    "block_columns": Method(
        "columns chosen once a block",
        {"gate.column_ratio": 0.3, "gate.block_columns": True},
    ),
    "all_layers": Method("gates on every convolution", {"gate.layers": ("*",)}),
    "no_dropout": Method("trained as long without dropout", {"gate.drop_probability": 0.0}),
    "stochastic": Method("targets dropped with probability .5", {"gate.drop_probability": 0.5}),
    "no_ascent": Method("no ascent of the ratios", {"ascent.warmup": 0.99}),
    # At the cut; --mode=sweep in the run's folder has the other ratios.
    "elastic": Method(
        "one network for all ratios up to it, batch statistics made anew",
        {"ascent.lowest_fraction": 0.0, "prune.recalibration_images": 2000},
    ),
    "distillation": Method("distilled from the dense network", {"prune.distillation": 0.7}),
}

# The fields of gates by which `static.allotment` tells how many filters each block loses.
_ALLOTTING = tuple(
    f"gate.{field}"
    for field in ("kind", "layers", "channel_ratio", "column_ratio", "block_columns")
)


def find_method(name: str) -> Method:
    """One of `METHODS`, or what several of them joined by a plus make together.

    Raises:
      KeyError: for a name that is none of them.
      UserError: for methods that contradict each other, allot filters and remove none, or change
        gates that are not there because filters are removed.
    """
    parts = [METHODS[part] for part in name.split("+")]
    fields: dict[str, Any] = {}
    for part in parts:
        for field in fields.keys() & part.fields.keys():
            if fields[field] != part.fields[field]:
                raise UserError(f"the methods {name} contradict each other in config.{field}")
        fields.update(part.fields)
    method = Method(", ".join(part.label for part in parts), fields)
    if "static.allotment" in fields and not method.removes:
        raise UserError(f"the method {name} needs one that removes filters, such as l1+{name}")
    allotting = _ALLOTTING if "static.allotment" in fields else ()
    of_gates = [field for field in fields if field.startswith(("gate.", "ascent."))]
    of_gates = [field for field in of_gates if field not in allotting]
    if method.is_static and of_gates:
        raise UserError(
            f"the method {name} removes filters and has no gates; config.{of_gates[0]} is theirs"
        )
    return method
