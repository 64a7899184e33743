"""What a model must show before it is released."""

from typing import Literal

from pydantic import Field

from shared.experiment.sections import Section


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
