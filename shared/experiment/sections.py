"""The sections of an experiment, each with the rules that need no other section."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.experiment.base import Section
from shared.experiment.wavelet_filters import filters

MAX_ALPHA_BAR_END = 1e-2
CROPPED_SHARE = 0.6 * (1 - 1 / 4) + 0.4 * (1 - 1 / 16)
"""Hidden on average by a square of half or a quarter of the side, three to two."""
Beta = Annotated[float, Field(ge=0, lt=1)]


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
    """Whether query, key and value of the attention have a bias; the authors' network on wavelet bands has one of query
    and value, and one of the key changes no attention."""
    patch_init: Literal["normal", "uniform"] = "normal"
    """Start of the patch embedding: a truncated normal of deviation 0.02 and bias 0, as of every other layer, or
    weights and bias uniform within 1 / sqrt(values of a patch), as the authors' convolution starts."""


class MaskConfig(Section):
    """Which patches the network sees (Eq. 3)."""

    kind: Literal["none", "patch", "block", "crop", "crops"] = "none"
    """Random patches, random blocks of patches, one square, one square whose side is drawn for each batch, or no mask.
    """
    ratio: float = Field(0.0, ge=0.0, lt=1.0)
    """Hidden share asked for; blocks floor it, and the realised ratio is reported. Of `crops` it is the mean."""
    block_size: int = Field(4, ge=1)
    """Patches per block side, for `block`."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.kind == "none") != (self.ratio == 0.0):
            raise ValueError(f"mask.kind {self.kind!r} does not go with mask.ratio {self.ratio}: give both or neither")
        if self.kind == "crops" and self.ratio > CROPPED_SHARE:
            raise ValueError(
                f"mask.ratio {self.ratio} is above {CROPPED_SHARE:g}, what 'crops' hide where every batch is cropped"
            )
        return self

    @property
    def crop_sides(self) -> dict[int, float]:
        """Of `crops`: what the image's side is divided by, and how probable that is.

        Patch Diffusion (arXiv 2304.12526): the whole image or, three to two, half or a quarter of its side; it shows
        the whole image to half of the batches, which is a ratio of 0.4125.
        """
        cropped = self.ratio / CROPPED_SHARE
        return {1: 1 - cropped, 2: 0.6 * cropped, 4: 0.4 * cropped}


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
    wavelet_tokens: Literal["joint", "split"] = "joint"
    """`joint`: a token holds one place of all bands. `split`, as the authors have it: the approximation, in [-1, 3],
    and the details, in [-1, 1], are two sequences of tokens with masks of their own, and the loss is the sum of their
    means."""

    @field_validator("wavelet")
    @classmethod
    def _orthogonal(cls, wavelet: str) -> str:
        if wavelet:
            filters(wavelet)
        return wavelet

    @model_validator(mode="after")
    def _has_bands_to_split(self) -> Self:
        if self.wavelet_tokens == "split" and not self.wavelet:
            raise ValueError("wavelet_tokens 'split' needs wavelet bands: give wavelet 'haar', or 'joint'")
        return self


class OptimConfig(Section):
    """The optimizer and the moving average."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW; or Muon for the matrices of the U-ViT's blocks, with steps as long as AdamW's, and AdamW for the rest."""
    lr: float = Field(2e-4, gt=0)
    """Learning rate after the warm-up."""
    betas: tuple[Beta, Beta] = (0.99, 0.99)
    """AdamW's decay of both moments."""
    weight_decay: float = Field(0.03, ge=0)
    """Of matrices; positions, norms and biases are not decayed unless `decay_all` is set."""
    decay_all: bool = False
    """Decay every trained number, as the authors do."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly; in a federated run at the start of each round, or of the run
    where `federation.warmup` says so."""
    warmup_from_zero: bool = False
    """Begin the warm-up with a step of learning rate 0, as the authors do; else with the first share of it."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Of the moving average per step; samples are drawn from the average."""
    ema_warmup: Literal["ratio", "power"] = "ratio"
    """How the decay rises in a central training: (1 + s) / (10 + s) after s steps; or, as in the authors' ema_pytorch,
    copies until s = 100, then 1 - (s - 99)^(-2/3)."""
    ema_every: int = Field(1, ge=1)
    """Steps of a central training from one update of the moving average to the next."""


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
    rederive_eps: bool = True
    """Whether DDIM goes on with the noise that belongs to the clipped clean image; else with what a network of
    `prediction` eps predicted, as the authors' does."""
    ddim_grid: Literal["rounded", "truncated"] = "rounded"
    """How DDIM's time steps become whole numbers where `steps` does not divide T; the authors truncate."""
    extractor: str = "inception-v3-compat"
    """Feature network of distances, by name or `onnx:FILE`."""
    batch: int = Field(64, ge=1)
    """Images that are generated at once."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Image k is drawn from seed + k."""
    every_rounds: int = Field(1, ge=0)
    """Rounds between evaluations of a federated run; 0: only by hand."""


def _linear_alpha_bar_end(timesteps: int) -> float:
    """alpha_bar_T of T betas from 1e-4 to 0.02, as `shared.diffusion.schedule` has them; 0 where it is far below."""
    total = 0.0
    for step in range(timesteps):
        total += math.log1p(-(1e-4 + (0.02 - 1e-4) * step / (timesteps - 1)))
        if total < math.log(MAX_ALPHA_BAR_END):
            return 0.0
    return math.exp(total)
