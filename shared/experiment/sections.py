"""The sections of an experiment, each with the rules that need no other section."""

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shared.experiment.wavelet_filters import filters

MAX_ALPHA_BAR_END = 1e-2
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Frozen, and an unknown key is an error: a typo must never train the wrong thing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    """Of everything that is drawn in a training, but for the noise of DP."""
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
    """U-ViT, or a convolutional U-Net for crop masks."""
    size: Literal["T", "S", "B", "L"] = "T"
    """Width and depth: T 3.4 M, S 44 M, B 99 M, L 231 M parameters."""
    image_size: int = Field(32, ge=8, le=4096)
    """Height and width of the images in pixels."""
    patch_size: int = Field(4, ge=1)
    """Patch side; in pixels, or in coefficients when `data.wavelet` is set."""
    qkv_bias: bool = False
    """Whether query, key and value of the attention have a bias, as the authors' network on wavelet bands has."""


class MaskConfig(Section):
    """Which patches the network sees (Eq. 3)."""

    kind: Literal["none", "patch", "block", "crop"] = "none"
    """Random patches, random blocks of patches, one square, or no mask."""
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
    """Of the betas: linear from 1e-4 to 0.02, or cosine."""
    timesteps: int = Field(1000, ge=2, le=100_000)
    """T, the number of noise levels."""
    prediction: Literal["eps", "v", "x_0"] = "eps"
    """What the network predicts: the noise, v, or the clean image."""

    @model_validator(mode="after")
    def _ends_in_noise(self) -> Self:
        # The linear betas are those of 1000 steps, and samples start from pure noise: too few steps do not get there.
        if self.schedule == "linear" and (left := _linear_alpha_bar_end(self.timesteps)) > MAX_ALPHA_BAR_END:
            raise ValueError(
                f"timesteps {self.timesteps} with a linear schedule leaves {left:.2g} of the signal's variance in x_T, "
                f"at most {MAX_ALPHA_BAR_END:g} is noise enough to sample from: give 1000, or schedule 'cosine'"
            )
        return self


class DataConfig(Section):
    """How images become tensors."""

    horizontal_flip: bool = True
    """Mirror each image with probability 1/2."""
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
    """Learning rate after the warm-up."""
    betas: tuple[Beta, Beta] = (0.99, 0.99)
    """AdamW's decay of both moments."""
    weight_decay: float = Field(0.03, ge=0)
    """Of matrices; positions, norms and biases are not decayed."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly; in a federated run at the start of each round, or of the run
    where `federation.warmup` says so."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Of the moving average per step; samples are drawn from the average."""


class PrivacyConfig(Section):
    """DP-SGD at the sites; `none` trains without. Public constants only: nothing may derive from a private count."""

    mechanism: Literal["none", "dp-sgd"] = "none"
    """`dp-sgd`: clipped gradients with noise at each site."""
    unit: Literal["image", "person"] = "image"
    """What one epsilon protects: one image, or one person with all images."""
    noise_multiplier: float = Field(1.0, gt=0)
    """sigma: the noise on the sum of a step is sigma times `max_grad_norm`."""
    max_grad_norm: float = Field(0.01, gt=0)
    """C, the norm that each unit's gradient is clipped to; most are longer, and Adam's steps do not depend on C."""
    sample_rate: float = Field(0.01, gt=0, le=1)
    """Poisson sampling rate q of units per step."""
    expected_batch: int = Field(64, ge=1)
    """The normaliser of the gradient sum."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Largest delta at which the plan is meant; a site counts at its own."""
    draws: int = Field(1, ge=1)
    """K noise draws per unit and step, folded into the token axis."""
    micro_batch: int = Field(64, ge=1)
    """Units per physical batch, for memory."""
    clipping: Literal["fast", "hooks"] = "fast"
    """How norms are computed: `fast` in one backward pass, `hooks` by Opacus-like hooks on layers."""
    mean_image_noise: float = Field(0.0, ge=0)
    """sigma of the one mean image that each site releases when `maskfed-server align` asks; 0: none is asked for."""

    @model_validator(mode="after")
    def _mean_image_is_private(self) -> Self:
        if self.mean_image_noise and self.mechanism == "none":
            raise ValueError(
                f"mean_image_noise {self.mean_image_noise:g} does not go with mechanism 'none': give 'dp-sgd', or 0"
            )
        return self


class EvaluationConfig(Section):
    """How checkpoints are sampled and measured."""

    num_images: int = Field(1000, ge=2)
    """Generated images of one distance."""
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddim"
    """Which solver of the reverse process."""
    steps: int = Field(250, ge=1)
    """Evaluations of the network per image."""
    eta: float = Field(1.0, ge=0, le=1)
    """Stochasticity of DDIM; the authors' evaluation default is 1."""
    clip_x_0: bool = True
    """Clip the predicted clean image to the range of images in each step."""
    extractor: str = "inception-v3-compat"
    """Feature network of distances, by name or `onnx:FILE`."""
    batch: int = Field(64, ge=1)
    """Images that are generated at once."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Image k is drawn from seed + k."""
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


def _linear_alpha_bar_end(timesteps: int) -> float:
    """alpha_bar_T of T betas from 1e-4 to 0.02, as `shared.diffusion.schedule` has them; 0 where it is far below."""
    total = 0.0
    for step in range(timesteps):
        total += math.log1p(-(1e-4 + (0.02 - 1e-4) * step / (timesteps - 1)))
        if total < math.log(MAX_ALPHA_BAR_END):
            return 0.0
    return math.exp(total)
