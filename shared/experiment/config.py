"""The experiment: one TOML file describing one stage (masked pre-training, DSM, or a federated fine-tuning)."""

import math
import tomllib
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from shared.errors import InputError
from shared.experiment.base import Section, explain
from shared.experiment.federation import FederationConfig
from shared.experiment.release import ReleaseConfig
from shared.experiment.sections import (
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    PrivacyConfig,
    TrainConfig,
)

__all__ = ["Experiment", "Section", "explain", "load_experiment", "parse_experiment"]


class Experiment(Section):
    """One stage, complete. Cross-section rules are checked here, before anything is written."""

    train: TrainConfig = TrainConfig()
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    release: ReleaseConfig = ReleaseConfig()

    @property
    def grid_size(self) -> int:
        """Patches per image side."""
        return self.model.image_size // (2 if self.data.wavelet else 1) // self.model.patch_size

    @property
    def required_audits(self) -> tuple[str, ...]:
        """Audits that a release needs from every site."""
        if self.release.audits != "auto":
            return self.release.audits
        return ("membership", "memorisation") if self.privacy.mechanism == "none" else ("canaries",)

    @property
    def in_channels(self) -> int:
        """Channels that enter the network: 3, or 12 wavelet bands."""
        return 12 if self.data.wavelet else 3

    @property
    def sequences(self) -> tuple[int, ...]:
        """Channels of each sequence of tokens: all in one, or 3 of the approximation and 9 of the details."""
        return (3, self.in_channels - 3) if self.data.wavelet_tokens == "split" else (self.in_channels,)

    @property
    def num_tokens(self) -> int:
        """Patches of an image over all sequences, without a mask."""
        return len(self.sequences) * self.grid_size**2

    @model_validator(mode="after")
    def _fits(self) -> Self:
        side = self.model.image_size // (2 if self.data.wavelet else 1)
        if self.data.wavelet and self.model.image_size % 2:
            raise ValueError(f"model.image_size {self.model.image_size} is odd: a wavelet halves it, give an even size")
        if side % self.model.patch_size:
            near = max(self.model.patch_size, side // self.model.patch_size * self.model.patch_size)
            near *= 2 if self.data.wavelet else 1
            raise ValueError(
                f"model.image_size {self.model.image_size} is not a multiple of patch_size {self.model.patch_size}"
                f"{' after the wavelet' if self.data.wavelet else ''}: give {near} for example"
            )
        if (self.train.objective == "msm") != (self.mask.kind != "none"):
            raise ValueError(
                f"train.objective {self.train.objective!r} does not go with mask.kind {self.mask.kind!r}: "
                "msm needs a mask, dsm takes none"
            )
        if self.model.backbone == "unet" and self.mask.kind not in ("none", "crop", "crops"):
            raise ValueError(
                f"mask.kind {self.mask.kind!r} does not go with model.backbone 'unet': a convolution needs one square, "
                "give 'crop'"
            )
        if self.data.wavelet_tokens == "split" and (
            self.model.backbone == "unet" or self.mask.kind in ("crop", "crops")
        ):
            raise ValueError(
                f"data.wavelet_tokens 'split' does not go with model.backbone {self.model.backbone!r} and mask.kind "
                f"{self.mask.kind!r}: it needs 'uvit' and no mask, 'patch' or 'block'"
            )
        if self.model.backbone == "unet" and self.model.patch_init != "normal":
            raise ValueError("model.patch_init 'uniform' does not go with model.backbone 'unet': it embeds no patches")
        if self.model.backbone == "unet" and self.privacy.mechanism == "dp-sgd" and self.privacy.draws > 1:
            raise ValueError(
                f"privacy.draws {self.privacy.draws} does not go with model.backbone 'unet': a convolution cannot keep "
                "draws of one image apart, give 1"
            )
        if self.federation.min_replies > (self.federation.sites_per_round or math.inf):
            raise ValueError(
                f"federation.min_replies {self.federation.min_replies} is above sites_per_round "
                f"{self.federation.sites_per_round}: lower it"
            )
        if self.privacy.mechanism == "dp-sgd" and self.federation.weighting != "equal":
            raise ValueError("federation.weighting 'examples' does not go with privacy dp-sgd: counts leak, use equal")
        if self.evaluation.steps > self.diffusion.timesteps:
            raise ValueError(
                f"evaluation.steps {self.evaluation.steps} is above diffusion.timesteps {self.diffusion.timesteps}: "
                f"at most {self.diffusion.timesteps}"
            )
        return self

    @model_validator(mode="after")
    def _mask_fits(self) -> Self:
        if self.mask.kind == "block" and self.grid_size % self.mask.block_size:
            raise ValueError(
                f"mask.block_size {self.mask.block_size} does not divide the {self.grid_size} x {self.grid_size} patch "
                "grid: give one that does"
            )
        if self.mask.kind == "crops" and self.privacy.mechanism == "dp-sgd":
            raise ValueError(
                "mask.kind 'crops' does not go with privacy dp-sgd: its batches must have one shape, give 'crop'"
            )
        if self.mask.kind == "crops" and self.grid_size % 4:
            raise ValueError(
                f"mask.kind 'crops' needs a patch grid that divides by 4, not {self.grid_size} x {self.grid_size}: "
                "change model.image_size or patch_size"
            )
        if self.mask.kind != "none" and self.num_visible in (0, self.grid_size**2):
            raise ValueError(
                f"mask.ratio {self.mask.ratio} leaves {self.num_visible} of {self.grid_size**2} patches visible "
                f"with kind {self.mask.kind!r} and block_size {self.mask.block_size}: "
                f"{'lower' if self.num_visible == 0 else 'raise'} the ratio or take smaller blocks"
            )
        return self

    @property
    def num_visible(self) -> int:
        """Visible patches V per image and sequence: fixed, so that shapes are static.

        Blocks use the authors' rounding (hidden blocks = int(ratio N) // b^2); a crop is the largest square that
        hides at least the ratio. Of `crops` it is the mean over batches, rounded.
        """
        num_patches = self.grid_size**2
        match self.mask.kind:
            case "none":
                return num_patches
            case "patch":
                return num_patches - int(self.mask.ratio * num_patches)
            case "block":
                hidden = int(self.mask.ratio * num_patches) // self.mask.block_size**2
                return num_patches - hidden * self.mask.block_size**2
            case "crops":
                return round((1 - self.mask.ratio) * num_patches)
            case "crop":
                return math.isqrt(num_patches - math.ceil(self.mask.ratio * num_patches)) ** 2

    @property
    def realised_mask_ratio(self) -> float:
        """Hidden share after rounding, in [0, 1)."""
        return 1 - self.num_visible / self.grid_size**2

    def to_toml(self) -> str:
        """Every field, defaults included, so that a stored experiment does not change with the code's defaults."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json"))


def parse_experiment(text: str, overrides: list[str] | None = None, name: str = "experiment") -> Experiment:
    """Parse TOML text, apply `section.key=value` overrides and check everything.

    Raises:
        InputError: bad TOML, unknown key, or a value out of range; the line names the key.
    """
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise InputError(f"{name}: not valid TOML ({error})") from error
    for override in overrides or []:
        _apply(tree, override)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{name}: {explain(error, Experiment)}") from error


def load_experiment(path: Path, overrides: list[str] | None = None) -> Experiment:
    """Read an experiment file; see `parse_experiment`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"experiment {path}: not a text file in UTF-8; give a TOML file") from error
    except OSError as error:
        raise InputError(
            f"experiment {path}: {error.strerror}; `maskfed-server experiments list` shows names"
        ) from error
    return parse_experiment(text, overrides, path.name)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    section, dot, field = key.strip().partition(".")
    if not (equals and dot and field):
        raise InputError(f"--set {override!r}: give it as section.key=value")
    try:
        tree_of_value = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        tree_of_value = {"value": value.strip()}
    if len(tree_of_value) > 1:
        raise InputError(f"--set {override!r}: sets more than one value: give each with a --set of its own")
    parsed = tree_of_value["value"]
    if not isinstance(tree.setdefault(section, {}), dict):
        raise InputError(f"--set {override!r}: {section!r} is no section of the experiment")
    tree[section][field] = parsed
