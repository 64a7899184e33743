"""The sections of an experiment, each with the rules that need no other section."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared.experiment.wavelet_filters import filters


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a typo must never train the wrong thing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrainConfig(Section):
    """What is minimised, for how long."""

    objective: Literal["msm", "dsm"] = "dsm"
    """`msm`: masked score matching (Eq. 4), `dsm`: denoising score matching on whole images (Eq. 1)."""
    steps: int = Field(1000, ge=0)
    """Optimizer steps of a central training; ignored by `finetune`, whose length is `federation`."""
    batch: int = Field(32, ge=1)
    """Images per optimizer step, over all ranks and micro-batches."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per optimizer step and rank; `batch` is split over them."""
    init: str = ""
    """Checkpoint whose EMA weights the stage starts from; empty: random initialisation."""
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto` is decided once at the start of a run and written back into its `experiment.toml`."""
    compile: Literal["auto", "never"] = "auto"
    """`torch.compile` on GPUs (`auto`); never on CPUs, where it gains nothing at mask ratio 0."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    sample_every: int = Field(1000, ge=1)
    """Steps between sample grids."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints that are kept."""
    keep_every: int = Field(0, ge=0)
    """Also keep every checkpoint whose step or round is a multiple of this; 0: none."""


class ModelConfig(Section):
    """The network."""

    backbone: Literal["uvit", "unet"] = "uvit"
    size: Literal["T", "S", "B", "L"] = "T"
    image_size: int = Field(32, ge=8)
    """Height and width of the images in pixels."""
    patch_size: int = Field(4, ge=1)
    """Patch side; in pixels, or in coefficients when `data.wavelet` is set."""


class MaskConfig(Section):
    """Which patches the network sees (Eq. 3)."""

    kind: Literal["none", "patch", "block", "crop"] = "none"
    ratio: float = Field(0.0, ge=0.0, lt=1.0)
    """Hidden share asked for; blocks floor it, and the realised ratio is reported."""
    block_size: int = Field(4, ge=1)
    """Patches per block side, for `block`."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.kind == "none") != (self.ratio == 0.0):
            raise ValueError(f"mask.kind {self.kind!r} does not go with mask.ratio {self.ratio}: give both or neither")
        return self


class DiffusionConfig(Section):
    """The forward process and what the network predicts."""

    schedule: Literal["linear", "cosine"] = "cosine"
    timesteps: int = Field(1000, ge=2)
    prediction: Literal["eps", "v", "x_0"] = "eps"


class DataConfig(Section):
    """How images become tensors."""

    horizontal_flip: bool = True
    wavelet: str = ""
    """One-level orthogonal wavelet of PyWavelets, e.g. `haar`; empty: pixels."""

    @field_validator("wavelet")
    @classmethod
    def _orthogonal(cls, wavelet: str) -> str:
        if wavelet:
            filters(wavelet)
        return wavelet


class OptimConfig(Section):
    """AdamW and the moving average."""

    lr: float = Field(2e-4, gt=0)
    betas: tuple[float, float] = (0.99, 0.99)
    weight_decay: float = Field(0.03, ge=0)
    warmup_steps: int = Field(0, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = Field(0.999, ge=0, lt=1)


class FederationConfig(Section):
    """The rounds of `finetune`."""

    rounds: int = Field(4, ge=1)
    local_steps: int = Field(100, ge=1)
    """Optimizer steps per site and round."""
    sites_per_round: int = Field(0, ge=0)
    """Sites asked in each round, drawn by seed; 0: all registered."""
    sites_fraction: float = Field(0.0, ge=0, le=1)
    """... or this share of the registered ones, rounded up; 0: `sites_per_round` decides."""
    min_available: int = Field(2, ge=1)
    """Sites that must be online before a round starts."""
    min_replies: int = Field(2, ge=1)
    """Good replies below which a round leaves the weights as they are."""
    available_deadline_seconds: float = Field(300.0, gt=0)
    round_deadline_seconds: float = Field(3600.0, gt=0)
    weighting: Literal["equal", "examples"] = "equal"
    max_examples: int = Field(100_000, ge=1)
    """A site's claimed number of images is clamped to this."""
    examples_grid: int = Field(100, ge=1)
    """... and rounded up to a multiple of this, a public grid."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    trainable: tuple[str, ...] = ("*",)
    """Shell patterns over tensor names, or `attention`; only these tensors are trained and travel."""
    max_update_norm: float = Field(0.0, ge=0)
    """Largest L2 norm of one site's update; 0: no bound."""
    update_norm_action: Literal["clip", "reject"] = "reject"
    proximal_mu: float = Field(0.0, ge=0)
    """FedProx: mu / 2 times the squared distance to the round's start is added to the local loss."""
    server_optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    server_lr: float = Field(1.0, gt=0)
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """FedAvgM's momentum and FedAdam's beta_1."""
    server_beta_2: float = Field(0.99, ge=0, lt=1)
    server_tau: float = Field(1e-3, gt=0)
    """FedAdam's adaptivity."""
    central_noise_multiplier: float = Field(0.0, ge=0)
    """Client-level DP by the coordinator: noise of this times `max_update_norm` on each round's sum; 0: none."""
    central_delta: float = Field(1e-5, gt=0, lt=1)
    """Delta of the epsilon that client-level DP reports."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if self.sites_fraction and self.sites_per_round:
            raise ValueError(
                f"sites_fraction {self.sites_fraction} and sites_per_round {self.sites_per_round}: give one"
            )
        return self

    @model_validator(mode="after")
    def _central(self) -> Self:
        if not self.central_noise_multiplier:
            return self
        for is_wrong, key, value, why in (
            (
                not self.max_update_norm,
                "max_update_norm",
                self.max_update_norm,
                "noise needs a bound: give one above 0",
            ),
            (self.update_norm_action != "clip", "update_norm_action", self.update_norm_action, "use clip"),
            (self.weighting != "equal", "weighting", self.weighting, "one site must not weigh more: use equal"),
            (not self.sites_per_round, "sites_per_round", 0, "the denominator must be a public number: give it"),
        ):
            if is_wrong:
                raise ValueError(f"{key} {value!r} does not go with central_noise_multiplier: {why}")
        return self


class PrivacyConfig(Section):
    """DP-SGD at the sites; `none` trains without. Public constants only: nothing may derive from a private count."""

    mechanism: Literal["none", "dp-sgd"] = "none"
    unit: Literal["image", "person"] = "image"
    noise_multiplier: float = Field(1.0, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    sample_rate: float = Field(0.01, gt=0, le=1)
    """Poisson sampling rate q of units per step."""
    expected_batch: int = Field(64, ge=1)
    """The normaliser of the gradient sum."""
    delta: float = Field(1e-5, gt=0, lt=1)
    draws: int = Field(1, ge=1)
    """K noise draws per unit and step, folded into the token axis."""
    micro_batch: int = Field(64, ge=1)
    """Units per physical batch, for memory."""
    clipping: Literal["fast", "hooks"] = "fast"


class EvaluationConfig(Section):
    """How checkpoints are sampled and measured."""

    num_images: int = Field(1000, ge=2)
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddim"
    steps: int = Field(250, ge=1)
    eta: float = Field(1.0, ge=0, le=1)
    """Stochasticity of DDIM; the authors' evaluation default is 1."""
    clip_x_0: bool = True
    extractor: str = "inception-v3-compat"
    batch: int = Field(64, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    every_rounds: int = Field(1, ge=0)
    """Rounds between evaluations of a federated run; 0: only by hand."""


class ReleaseConfig(Section):
    """What a model must show before it is released."""

    audits: Literal["auto"] | tuple[Literal["membership", "memorisation", "canaries"], ...] = "auto"
    """Audits that must have passed at every site that took part; `auto`: `canaries` where the plan trains with DP, for
    they cost nothing, else `membership` and `memorisation`, each of which is charged."""
    max_copy_rate: float = Field(0.05, ge=0, le=1)
    """Largest share of a site's units that samples may copy, beyond the share among its held-out units."""
    max_auc: float = Field(0.60, ge=0.5, le=1)
    """Largest AUC of the counts of trained against held-out units; 0.5 is chance."""
    max_tpr: float = Field(0.05, ge=0, le=1)
    """Largest share of members found at 1 percent false positives, where a site's operator has released exact figures:
    counts with noise cannot resolve it."""
