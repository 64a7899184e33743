"""The arms of the laboratory: each says what it changes; all share start, images, time steps and noise."""

from dataclasses import dataclass, replace
from typing import Literal

from shared.updates.int8_blocks import BLOCK, num_bytes

Wire = Literal["float32", "bfloat16", "int8", "int4"]
STEPS, ROUND_STEPS, WARMUP = 1200, 150, 30
"""As in the study `federated` at scale `cpu`: eight rounds, a fifth of a round's steps is its warm-up."""


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        division: of the images: one pool, sites by person, or sites at random.
        batch: images of a site's step.
        synchronised: whether the sites' gradients are averaged in every step.
        alone: whether sites never meet.
        keep: AdamW's moments over the rounds: dropped, kept at the site, or averaged by the server (3 x the bytes).
        warmup: in each round, or once in the run.
        decay: of the learning rate to 0: over the run by a cosine or a line, over its last two fifths, over each round.
        local_steps: of a round, H.
        steps: of the run.
        start: steps of masked pre-training before it, in thousands.
        server: `fedavg`, `fedavgm`, `fedadam` (the product's), or `nesterov` (SGD of DiLoCo, arXiv 2311.08105).
        up: numbers of an update; as int8 or int4 with what was lost added to the next one.
        down: numbers of the global weights; as int8 or int4 those of the change since they were sent last.
        optimizer: at the sites: AdamW, the same with the second moment that all sites' batches together would have
            (`pooled`), or Muon for the matrices of the blocks (as in MuLoCo, arXiv 2505.23725).
        push: share of the global weights' last change that a site makes again, spread over its steps (as FedCM,
            arXiv 2106.10874).
        uneven: sites of 1, 10, 10 and about 100 parts of the images; half of the sites in each round; one that does a
            tenth of a round's steps; one that joins after half of the run.
        weighting: of the sites in the mean: alike, by images, or by their root; always times the steps done.
    """

    name: str
    division: Literal["pool", "person", "random"] = "person"
    batch: int = 4
    synchronised: bool = False
    alone: bool = False
    keep: Literal["no", "site", "averaged"] = "no"
    warmup: Literal["round", "run"] = "round"
    decay: Literal["none", "cosine", "linear", "end", "round"] = "none"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.99, 0.99)
    local_steps: int = ROUND_STEPS
    steps: int = STEPS
    start: int = 1
    server: Literal["fedavg", "fedavgm", "fedadam", "nesterov"] = "fedavg"
    server_lr: float = 1.0
    server_momentum: float = 0.9
    up: Wire = "float32"
    down: Wire = "float32"
    optimizer: Literal["adamw", "pooled", "muon"] = "adamw"
    push: float = 0.0
    uneven: Literal["no", "sizes", "half", "straggler", "joiner"] = "no"
    weighting: Literal["equal", "sqrt", "examples"] = "equal"

    @property
    def num_sites(self) -> int:
        """Sites that train."""
        return 1 if self.division == "pool" else 4

    @property
    def images(self) -> int:
        """Seen in the run, by all sites."""
        return self.steps * self.batch * self.num_sites

    @property
    def bytes_per_weight(self) -> float:
        """That a site sends and receives in the run; what one site alone would save does not count."""
        each = {"float32": 4.0, "bfloat16": 2.0, "int8": num_bytes(BLOCK) / BLOCK}
        each["int4"] = each["int8"] - 0.5
        moments = 4.0 * each["float32"] if self.keep == "averaged" else 0.0
        return -(-self.steps // self.local_steps) * (each[self.up] + each[self.down] + moments)


_ONE = Arm("one", division="pool", batch=16)
_ONE_KEPT = replace(_ONE, name="one-kept", keep="site", warmup="run", local_steps=50)
"""Rounds of one site that keeps its moments change nothing but how often it is averaged over."""
_FOUR = Arm("four")
_KEPT = replace(_FOUR, name="four-kept", keep="site", warmup="run")
_KEPT_COSINE = replace(_KEPT, name="four-kept-cosine", decay="cosine")
_OFTEN = replace(_KEPT, name="four-int8-h40", up="int8", down="int8", local_steps=40)
"""As many bytes as 8 rounds in float32: an array of int8 with its scales is a quarter."""
_PRODUCT = replace(_KEPT, name="four-product", up="int8", down="bfloat16", local_steps=58, lr=2e-3, betas=(0.9, 0.99))
_MUON = replace(_PRODUCT, name="four-product-muon", optimizer="muon", betas=(0.99, 0.99))
_FEW = replace(_KEPT, name="four-int4-h20", up="int4", down="int4", local_steps=20, lr=2e-3, betas=(0.9, 0.99))
"""60 rounds in the bytes of 8: not in the product."""
_ONE_COSINE = replace(_ONE_KEPT, name="one-kept-cosine", decay="cosine")

ARMS = (
    # What the study measures, and the two ends of the scale between its arms.
    _ONE,
    _FOUR,
    replace(_ONE, name="one-b4", batch=4),
    replace(_FOUR, name="four-synchronised", synchronised=True),
    # Moments, warm-up and decay, each for itself.
    _KEPT_COSINE,
    _KEPT,
    replace(_KEPT_COSINE, name="four-kept-cosine-lr-double", lr=2e-3),
    _ONE_KEPT,
    replace(_FOUR, name="four-restart-warm-once", warmup="run"),
    # What a site gains; the best known, which every excess is counted from.
    replace(_KEPT, name="alone-kept", alone=True),
    replace(_ONE_COSINE, name="one-long", lr=2e-3, steps=2 * STEPS),
    # The recipe's other constants, each for itself.
    replace(_KEPT, name="four-kept-h50", local_steps=50),
    replace(_KEPT, name="four-nesterov-50", local_steps=50, server="nesterov", server_lr=0.7),
    replace(_KEPT, name="four-kept-lr-double", lr=2e-3),
    replace(_ONE_KEPT, name="one-kept-lr-double", lr=2e-3),
    replace(_KEPT, name="four-kept-lr-half", lr=5e-4),
    replace(_ONE_COSINE, name="one-kept-cosine-lr-double", lr=2e-3),
    _ONE_COSINE,
    replace(_KEPT, name="four-fedadam", server="fedadam", server_lr=1e-2),
    replace(_KEPT, name="four-random", division="random"),
    replace(_KEPT, name="four-slow-betas", betas=(0.9975, 0.9975)),
    replace(_FOUR, name="four-kept-warm-each", keep="site"),
    replace(_KEPT, name="four-b16", batch=16),
    replace(_KEPT, name="four-nesterov", server="nesterov", server_lr=0.7),
    replace(_KEPT, name="four-kept-end", decay="end"),
    replace(_KEPT, name="four-kept-decay-in-round", decay="round"),
    replace(_KEPT, name="four-averaged-moments", keep="averaged"),
    replace(_FOUR, name="alone", alone=True),
    replace(_KEPT, name="four-kept-linear", decay="linear"),
    replace(_FOUR, name="four-restart-cosine", warmup="run", decay="cosine"),
    replace(_KEPT, name="four-nesterov-mild", server="nesterov", server_lr=0.7, server_momentum=0.5),
    replace(_KEPT, name="four-fedadam-low", server="fedadam", server_lr=3e-3),
    replace(_KEPT, name="four-fedavgm", server="fedavgm", server_lr=0.5, server_momentum=0.5),
    *(replace(_KEPT, name=f"four-kept-h{steps}", local_steps=steps) for steps in (10, 300, 1200, 1)),
    # More averages for the same bytes, and what makes a batch of 4 walk as far as one of 16.
    _OFTEN,
    replace(_OFTEN, name="four-int8-h40-lr-double", lr=2e-3),
    replace(_OFTEN, name="four-int8-h40-lr-one-and-half", lr=1.5e-3),
    replace(_OFTEN, name="four-int8-h40-pooled", optimizer="pooled"),
    replace(_OFTEN, name="four-int8-h40-push", push=0.5),
    replace(_OFTEN, name="four-int8-h40-push-more", push=0.75),
    replace(_OFTEN, name="four-int8-h40-lr-double-push", lr=2e-3, push=0.5),
    replace(_OFTEN, name="four-int8-h40-lr-four", lr=4e-3),
    replace(_OFTEN, name="four-int8-h40-pooled-lr-double", optimizer="pooled", lr=2e-3),
    replace(_OFTEN, name="four-int8-h40-lr-double-beta", lr=2e-3, betas=(0.9, 0.99)),
    replace(_ONE_KEPT, name="one-kept-lr-double-beta", lr=2e-3, betas=(0.9, 0.99)),
    replace(_OFTEN, name="four-int8-h40-lr-four-beta", lr=4e-3, betas=(0.9, 0.99)),
    replace(_ONE_KEPT, name="one-kept-lr-four-beta", lr=4e-3, betas=(0.9, 0.99)),
    replace(_ONE_KEPT, name="one-kept-lr-four", lr=4e-3),
    replace(_ONE_KEPT, name="one-kept-push", push=0.5),
    replace(_OFTEN, name="four-int8-h40-muon-lr-double", optimizer="muon", lr=2e-3),
    replace(_ONE_KEPT, name="one-muon-lr-double", optimizer="muon", local_steps=40, lr=2e-3),
    replace(_OFTEN, name="four-int8-h40-further", server_lr=1.5),
    replace(_OFTEN, name="four-int8-h40-momentum", server="nesterov", server_lr=1.0, server_momentum=0.5),
    replace(_OFTEN, name="four-mixed-h58-lr-double", down="bfloat16", local_steps=58, lr=2e-3),
    _FEW,
    replace(_FEW, name="four-int4-h20-lr-four", lr=4e-3),
    replace(_OFTEN, name="four-int8-h40-beta-further", lr=2e-3, betas=(0.9, 0.99), server_lr=1.3),
    # The product's wire: weights whole, as bfloat16.
    _PRODUCT,
    replace(_PRODUCT, name="four-product-lr-half-more", lr=3e-3),
    replace(_PRODUCT, name="four-product-mild", server="nesterov", server_lr=1.0, server_momentum=0.3),
    _MUON,
    replace(_ONE_COSINE, name="one-long-muon", optimizer="muon", lr=2e-3, steps=2 * STEPS),
    replace(_KEPT, name="four-kept-muon", optimizer="muon", lr=2e-3),
    replace(_ONE_KEPT, name="one-muon-lr-four", optimizer="muon", lr=4e-3),
    replace(_MUON, name="four-product-muon-lr-four", lr=4e-3),
    replace(_KEPT, name="alone-muon", alone=True, optimizer="muon", lr=2e-3),
    *(replace(_MUON, name=f"four-muon-{world}", uneven=world) for world in ("half", "straggler", "joiner", "sizes")),
    replace(_MUON, name="four-muon-sizes-sqrt", uneven="sizes", weighting="sqrt"),
    replace(_MUON, name="four-muon-sizes-examples", uneven="sizes", weighting="examples"),
    replace(_MUON, name="four-muon-float32", up="float32", down="float32"),
    replace(_MUON, name="four-muon-bfloat16", up="bfloat16", down="bfloat16"),
    replace(_FEW, name="four-int4-h20-muon", optimizer="muon", betas=(0.99, 0.99)),
    replace(_KEPT, name="alone-kept-lr-double-beta", alone=True, lr=2e-3, betas=(0.9, 0.99)),
    replace(_OFTEN, name="four-int8-h40-muon", optimizer="muon"),
    replace(_ONE_KEPT, name="one-muon", optimizer="muon", local_steps=40),
    # A longer start.
    replace(_FOUR, name="four-long-start", start=3),
    replace(_ONE, name="one-long-start", start=3),
)
