"""A site's policy in words, for its operator."""

from client.settings import SitePolicy


def describe(policy: SitePolicy) -> str:
    """The policy in one sentence per rule."""
    private = (
        f"training with DP only, at most epsilon {policy.epsilon_cap:g} at delta {policy.delta:g} per {policy.unit}"
        if policy.require_dp
        else "TRAINING WITHOUT DP IS ALLOWED: images can be reconstructed from such updates, and the ledger then says "
        f"`unbounded`; DP rounds up to epsilon {policy.epsilon_cap:g} at delta {policy.delta:g} per {policy.unit}"
    )
    asks = "each experiment needs your approval" if policy.experiments == "approved" else "any experiment within this"
    audit = policy.audit
    audits = (
        f"; at most {audit.max_per_run} audits of a run's models, each charged like one step of noise "
        f"{audit.noise_multiplier:g} on all data"
        if "audit" in policy.tasks
        else ""
    )
    return (
        f"tasks {', '.join(policy.tasks) or 'none'}; {private}; noise multiplier from {policy.min_noise_multiplier:g}; "
        f"at most {policy.max_steps_per_round} steps per round and {policy.max_rounds_per_day} rounds per day; {asks}"
        f"{audits}"
    )
