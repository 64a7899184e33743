"""What the arms say: the attacks by mask ratio, and the difference that masking makes, paired by seed."""

from collections.abc import Sequence
from typing import Any

from benchmarks.leakage.training import RATIOS
from shared.student import mean_interval

STAGES = ("pre-trained", "fine-tuned")
COLUMNS = ("auc_calibrated", "auc_loss", "auc_pia", "tpr", "copied", "unseen_loss")
"""Areas under the ROC curve of three membership attacks, members found at 1 percent false ones, copies, and quality."""


def table(rows: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """Print the means of every ratio and stage; one line of the differences, and whether masking lowers the risk."""
    print(f"{'arm':8} {'stage':12} seeds " + " ".join(f"{each:>14}" for each in COLUMNS))
    for stage in STAGES:
        for arm in RATIOS:
            found = [row["scores"][stage] for row in rows if row["arm"] == arm]
            if found:
                means = [sum(each[key] for each in found) / len(found) for key in COLUMNS]
                print(f"{arm:8} {stage:12} {len(found):5} " + " ".join(f"{value:14.4f}" for value in means))
    for arm in RATIOS:
        inverted = [row["inversion"] for row in rows if row["arm"] == arm]
        if inverted:
            parts = {key: sum(each[key] for each in inverted) / len(inverted) for key in inverted[0]}
            print(f"{arm:8} inversion    " + ", ".join(f"{key} {value:.4f}" for key, value in parts.items()))
    parts, is_lower = [], []
    for stage in STAGES:
        text, lower = difference(rows, stage)
        parts.append(f"{stage}: {text}")
        is_lower.append(lower)
    return "; ".join(parts), all(is_lower)


def difference(rows: Sequence[dict[str, Any]], stage: str) -> tuple[str, bool]:
    """AUC of the calibrated attack at ratio 0.9 less that at 0, seed by seed; whether its interval is below 0."""
    by_arm = {
        arm: {row["seed"]: row["scores"][stage]["auc_calibrated"] for row in rows if row["arm"] == arm}
        for arm in RATIOS
    }
    seeds = sorted(by_arm["whole"].keys() & by_arm["most"].keys())
    changes = [by_arm["most"][seed] - by_arm["whole"][seed] for seed in seeds]
    if len(changes) < 2:
        return f"{len(changes)} seeds with ratios 0 and 0.9, at least two are needed", False
    mean, low, high = mean_interval(changes)
    return f"AUC at ratio 0.9 less that at 0 {mean:+.3f} [{low:+.3f}, {high:+.3f}] over {len(changes)} seeds", high < 0
