"""The section `federation` of an experiment: how rounds go, and what one site may do in them."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shared.experiment.base import Section

MAX_CENTRAL_NOISE = 2.0**20
"""Deviation of the noise of client-level DP on a sum of 64-bit integers in steps of 2^-36: 32 of it fit."""


FEDADAM_LR = 1e-2
"""With `server_tau` 1e-3 the first step is about as long as updates of 1e-3 per weight; more in arXiv 2003.00295,
appendix D: 1e-3 to 1e-1."""
MIN_SECURE = 3
"""Fewest updates in a sum that hides them."""
OF_TWO = "of a sum of two each site could take its own away"


class FederationConfig(Section):
    """The rounds of `finetune`."""

    rounds: int = Field(4, ge=1)
    """Rounds of a run."""
    local_steps: int = Field(100, ge=1)
    """Optimizer steps per site and round."""
    warmup: Literal["round", "run"] = "round"
    """Whether the learning rate rises at the start of each round, or once in the run."""
    keep_moments: bool = False
    """Whether AdamW's moments stay at each site from round to round; else each round starts without. Nothing more
    travels."""
    sites_per_round: int = Field(0, ge=0)
    """Sites asked in each round, drawn by seed; 0: all registered."""
    sites_fraction: float = Field(0.0, ge=0, le=1)
    """... or this share of the registered ones, rounded up; 0: `sites_per_round` decides.

    Under client-level DP the probability of each site for itself (0: all are asked), and `sites_per_round` is only the
    denominator.
    """
    min_available: int = Field(2, ge=1)
    """Sites that must be online before a round starts."""
    min_replies: int = Field(2, ge=1)
    """Good replies below which a round leaves the weights as they are; 3 with `secure`."""
    max_unchanged_rounds: int = Field(0, ge=0)
    """Rounds in a row that may leave the weights as they are before the run stops; 0: 1 under DP-SGD, 3 without."""
    quorum: int = Field(0, ge=0)
    """Good replies after which a round waits only `quorum_grace_seconds` for the others; 0: it waits for all."""
    quorum_grace_seconds: float = Field(60.0, ge=0)
    """How long a round waits for the others once `quorum` is reached."""
    available_deadline_seconds: float = Field(300.0, gt=0)
    """How long a round waits for `min_available` sites."""
    round_deadline_seconds: float = Field(3600.0, gt=0)
    """How long a round waits for replies."""
    weighting: Literal["equal", "examples"] = "equal"
    """How updates are averaged: alike, or by the number of images that a site tells."""
    max_examples: int = Field(100_000, ge=1)
    """Most images that a site may have; an update's claim is clamped to it, statistics that claim more are rejected."""
    examples_grid: int = Field(100, ge=1)
    """Weights count in these, rounded up: a public grid, about the images of a small site."""
    max_weight: int = Field(4, ge=1)
    """Largest weight of a site by examples, where the smallest is 1: nobody checks what a site claims."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers of weights and updates as they travel."""
    trainable: tuple[Annotated[str, Field(max_length=256)], ...] = Field(("*",), max_length=64)
    """Shell patterns over tensor names, or `attention`; only these tensors are trained and travel."""
    max_update_norm: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Largest L2 norm of one site's update; `auto`: the longest that AdamW can make in the steps; 0: no bound."""
    update_norm_action: Literal["clip", "reject"] = "reject"
    """What becomes of an update beyond `max_update_norm`; `clip`, by the site itself, with `secure`."""
    max_held_out_rise: float = Field(0.25, gt=0)
    """Largest rise of a held-out loss in one round, as a share of what it was before; beyond it the round is undone."""
    keep_replies: bool = True
    """Whether a round's updates lie on the coordinator's disk until its held-out check, to name the site behind a jump.
    """
    max_norm_ratio: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """An update may be so many times as long as the median of the sites' a round before; what is longer is shortened.
    0: not looked at; `auto`: 1.25, and 0 where nobody may look, with `secure` and with client-level DP."""
    max_persistence: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = "auto"
    """How far above the median of all sites the persistence of one may be; a site beyond it is named and left out.

    Persistence is the mean cosine, between rounds, of what sets a site's updates apart from the others'. 0: not looked
    at; `auto`: 0.1, and 0 where nobody may look, with `secure` and with client-level DP.
    """
    proximal_mu: float = Field(0.0, ge=0)
    """FedProx: mu / 2 times the squared distance to the round's start is added to the local loss."""
    server_optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    """What the coordinator makes of the average of the updates (arXiv 2003.00295)."""
    server_lr: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Of the coordinator's step; `auto`: 1 for FedAvg, 1 - `server_momentum` for FedAvgM, 0.01 for FedAdam, whose unit
    is not the update's. A run whose first step is more than 10 times as long as the sites' mean update is refused."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """FedAvgM's momentum and FedAdam's beta_1."""
    server_beta_2: float = Field(0.99, ge=0, lt=1)
    """FedAdam's beta_2."""
    server_tau: float = Field(1e-3, gt=0)
    """FedAdam's adaptivity."""
    central_noise_multiplier: float = Field(0.0, ge=0)
    """Client-level DP by the coordinator: noise of this times `max_update_norm` on each round's sum; 0: none."""
    central_delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the epsilon that client-level DP reports."""
    secure: bool = False
    """Whether sites mask their updates, so that the coordinator sees the sum of a round's updates only."""
    secure_bits: Literal[32, 64] = 64
    """Of one masked number: 64 sums as exactly as open updates do, 32 travels as they do and rounds more coarsely."""
    secure_colluding: int = Field(0, ge=0, le=62)
    """Sites that may work together with the coordinator; each takes away half a drop-out that a round can stand."""

    @property
    def server_step(self) -> float:
        """`server_lr` as a number."""
        if self.server_lr != "auto":
            return self.server_lr
        return {"fedavg": 1.0, "fedavgm": 1 - self.server_momentum, "fedadam": FEDADAM_LR}[self.server_optimizer]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_secure(cls, fields: Any) -> Any:  # noqa: ANN401  # whatever pydantic is handed
        """What is not said follows `secure`, which alone turns masks on; what is said stays, and may be refused."""
        if isinstance(fields, dict) and fields.get("secure") is True:
            return {"update_norm_action": "clip", "min_replies": MIN_SECURE, **fields}
        return fields

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.sites_fraction and self.sites_per_round and not self.central_noise_multiplier:
            raise ValueError(
                f"sites_fraction {self.sites_fraction} and sites_per_round {self.sites_per_round}: give one"
            )
        return self

    @model_validator(mode="after")
    def _quorum_decides(self) -> Self:
        if self.quorum and self.quorum < self.min_replies:
            raise ValueError(f"quorum {self.quorum} is below min_replies {self.min_replies}: raise it")
        return self

    def _looks(self, why: str) -> list[tuple[bool, str, object, str]]:
        """What compares single updates with one another, where that must not be."""
        return [
            (value not in ("auto", 0), key, value, f"{why}: leave it out")
            for key, value in (("max_norm_ratio", self.max_norm_ratio), ("max_persistence", self.max_persistence))
        ]

    @model_validator(mode="after")
    def _secure(self) -> Self:
        """What takes more than a sum, and what would make one update of it."""
        if not self.secure:
            return self
        per_round = 0 if self.central_noise_multiplier else self.sites_per_round
        for is_wrong, key, value, why in (
            (
                self.update_norm_action != "clip",
                "update_norm_action",
                self.update_norm_action,
                "nobody sees the length of one update, so each site clips its own: use clip",
            ),
            (
                self.weighting != "equal",
                "weighting",
                self.weighting,
                "nobody can check what one site claims to weigh: use equal",
            ),
            *self._looks("nobody sees one update"),
            (self.min_replies < MIN_SECURE, "min_replies", self.min_replies, f"give at least {MIN_SECURE}: {OF_TWO}"),
            (per_round, "sites_per_round", per_round, "all sites of the roster have to be asked: leave it out"),
            (
                self.sites_fraction,
                "sites_fraction",
                self.sites_fraction,
                "all sites of the roster have to be asked: leave it out",
            ),
        ):
            if is_wrong:
                raise ValueError(f"{key} {value!r} does not go with secure: {why}")
        return self

    @model_validator(mode="after")
    def _central(self) -> Self:
        if not self.central_noise_multiplier:
            return self
        bound = 0.0 if self.max_update_norm == "auto" else self.max_update_norm
        for is_wrong, key, value, why in (
            (
                not bound,
                "max_update_norm",
                self.max_update_norm,
                "noise needs a bound: give one above 0",
            ),
            *self._looks("what one site's update leads to would be told without noise"),
            (self.update_norm_action != "clip", "update_norm_action", self.update_norm_action, "use clip"),
            (self.weighting != "equal", "weighting", self.weighting, "one site must not weigh more: use equal"),
            (not self.sites_per_round, "sites_per_round", 0, "the denominator must be a public number: give it"),
            (
                self.central_noise_multiplier * bound > MAX_CENTRAL_NOISE,
                "max_update_norm",
                self.max_update_norm,
                f"their product is above {MAX_CENTRAL_NOISE:g}, more than the sum holds: lower one",
            ),
            (self.quorum, "quorum", self.quorum, "who answers must not decide what is released: leave it out"),
        ):
            if is_wrong:
                raise ValueError(f"{key} {value!r} does not go with central_noise_multiplier: {why}")
        return self
