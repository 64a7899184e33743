"""What `site.toml` says. Everything not allowed there is refused."""

import tomllib
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import Field, ValidationError

from client.home import Home
from client.limits import AuditPolicy, Ranges, SecurePolicy
from client.private_files import check_private, write_private
from shared.errors import InputError
from shared.experiment.config import Section, explain

Task = Literal["train", "statistics", "mean_image", "audit"]
Unit = Literal["image", "person"]
CURE_SIGNING_KEY = "`maskfed-client enroll ALIAS` makes it; send the coordinator the line, for `sites renew`"


class SitePolicy(Section):
    """What this site agrees to. The defaults deny everything; `maskfed-client join` writes every field out."""

    tasks: tuple[Task, ...] = ()
    """Kinds of request that are looked at at all."""
    experiments: Literal["approved", "any"] = "approved"
    """`approved`: only experiments whose digest the operator has approved; `any`: whatever the rules below allow."""
    require_dp: bool = True
    """Refuse training without DP-SGD. Updates without it can be inverted into training images."""
    non_private_after_dp: bool = False
    """Allow releases without DP after the first DP round. They void what the DP rounds have protected."""
    unit: Unit = "image"
    """What one epsilon protects: one image, or one person with all images."""
    epsilon_cap: float = Field(0.0, ge=0, le=1e6, allow_inf_nan=False)
    """Largest total epsilon of a data set, over all runs and models."""
    delta: float = Field(1e-5, ge=1e-10, le=1e-3)
    """The delta at which every epsilon of this site is computed, whatever a request says."""
    min_noise_multiplier: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Smallest noise multiplier sigma of a DP plan."""
    max_steps_per_round: int = Field(0, ge=0)
    max_rounds_per_day: int = Field(0, ge=0)
    """Rounds that may start within 24 hours, over all runs."""
    max_offers_per_day: int = Field(20, ge=0, le=1000)
    """Offers of new plans that are looked at within 24 hours; the same offer again gets the same answer."""
    min_images_train: int = Field(1, ge=1)
    """Fewer training images than this, and training is refused."""
    min_images_statistics: int = Field(1000, ge=1)
    """Fewer images than this, and no statistics and no mean image are released."""
    mean_image_norm: float = Field(0.6, gt=0, le=1)
    """Clipping norm of a unit's pixels in a mean image: their root mean square, on the scale from -1 to 1."""
    extractors: tuple[str, ...] = ()
    """Feature networks of statistics: `name`, `onnx:FILE`, or `name=FILE` with weights; requests name a sha256."""
    ranges: Ranges = Ranges()
    """Smallest and largest value of each constant that a request chooses."""
    audit: AuditPolicy = AuditPolicy()
    """How models are audited at the coordinator's request, and what that costs."""
    secure: SecurePolicy = SecurePolicy()
    """Masked updates: with whom, and how many."""
    image_count: Literal["hidden", "rounded", "exact"] = "hidden"
    """How the number of training images leaves the site; always hidden under DP."""
    image_count_grid: int = Field(100, ge=2)
    """`rounded` counts are rounded up to a multiple of this; the grid is public."""
    release_scalars: tuple[Literal["loss", "grad_norm", "seconds"], ...] = ()
    """Numbers beside the update. Under DP only `seconds` is ever sent, in whole minutes."""


class SiteConfig(Section):
    """All of `site.toml`."""

    schema_version: Literal[1] = 1
    alias: str
    """Name in the coordinator's registry."""
    address: str
    """The coordinator's door, host:port."""
    proxy: str = ""
    """HTTP proxy on the way to the coordinator, http://host:port; empty: none."""
    data: str
    """Folder or zip of images, absolute; class folders are persons."""
    identities: str = ""
    """Text file with a `<file name> <person>` line per image, absolute; empty: class folders are persons, if any."""
    person_depth: int = Field(0, ge=0)
    """Which folder below the common top is the person, from 1; 0: the first, and deeper trees are refused."""
    image_size: int = Field(ge=8, le=4096)
    """Side of the images in the private cache, in pixels; requests for another size are refused."""
    held_out_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the persons (or images) that is never trained on, for audits."""
    head_file: str
    """File, away from the ledger, that keeps its newest sequence number and hash; absolute, one per site."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(0, ge=0)
    """CPU threads of a round; 0: torch's own choice. Another number gives other last bits."""
    policy: SitePolicy = SitePolicy()


def load_settings(home: Home) -> SiteConfig:
    """Read and check `site.toml`.

    Raises:
        InputError: missing, readable by others, not TOML, an unknown key or a value out of range.
    """
    check_private(home.settings)
    return parse_settings(read_toml(home.settings), str(home.settings))


def read_toml(path: Path) -> dict[str, Any]:
    """The tree of a TOML file.

    Raises:
        InputError: it is none.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid TOML ({error})") from error


def parse_settings(tree: dict[str, Any], name: str) -> SiteConfig:
    """Check the fields of `site.toml`; `name` stands before the error.

    Raises:
        InputError: an unknown key or a value out of range.
    """
    try:
        return SiteConfig.model_validate(tree)
    except ValidationError as error:
        cure = "; for a file of an older version `maskfed-client policy migrate`" if "policy" in tree else ""
        is_unknown = error.errors()[0]["type"] == "extra_forbidden"
        raise InputError(f"{name}: {explain(error, SiteConfig)}{cure if is_unknown else ''}") from error


def save_settings(home: Home, settings: SiteConfig) -> None:
    """Write every field of `site.toml`, 0600, replacing it in one step."""
    write_private(home.settings, tomli_w.dumps(settings.model_dump(mode="json")).encode())
