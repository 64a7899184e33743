"""The ledger's epsilon: a published plan to 0.01, and the PRV accountant against Google's PLD on 50 plans.

Twenty rounds of 50 steps at q = 64/3000, sigma 1.0254, delta 1e-5 must give 3.996 and round 21 must be refused under a
cap of 4. `dp-accounting` comes with the development requirements.
"""

import itertools
import sys

from benchmarks.measure import verdict, without_options
from benchmarks.scratch import scratch
from client.privacy.accounting import epsilon
from client.records.ledger import BudgetError, open_ledger
from client.records.spending import Charge, Spending

SEED = 0
ROUNDS = 1
DELTA = 1e-5
EXPECTED, CAP, SIGMA, RATE, STEPS = 3.996, 4.0, 1.0254, 64 / 3000, 50
SIGMAS, RATES, LENGTHS = (0.7, 0.8, 1.0, 1.5, 3.0), (0.002, 0.01, 0.02, 0.05, 0.2), (50, 1000)
RELATIVE, ABSOLUTE = 0.01, 0.012


def main() -> int:
    """Print the plan's epsilon by round and the largest disagreement; 0 when both figures are reached."""
    reached_rounds, spent = rounds_until_refused()
    print(f"sigma {SIGMA}, q 64/3000: {reached_rounds} rounds of {STEPS} steps spend {spent:.3f}, the next is refused")
    worst, at = worst_disagreement()
    text = (
        f"20 rounds {spent:.3f} (needs {EXPECTED} within 0.01), round {reached_rounds + 1} refused under {CAP:g}; "
        f"PRV against PLD over 50 plans: excess {worst:.4f} at sigma {at[0]}, q {at[1]}, {at[2]} steps (needs <= 0)"
    )
    return verdict("epsilon", text, reached=reached_rounds == 20 and abs(spent - EXPECTED) <= 0.01 and worst <= 0)


def rounds_until_refused() -> tuple[int, float]:
    """Rounds that a real ledger accepts under the cap, and the epsilon after the last."""
    done, total = 0, 0.0
    with scratch() as folder:
        home = folder / "home"
        with open_ledger(home / "ledger.jsonl", folder / "head" / "head.json") as ledger:
            while True:
                try:
                    entry, spent = ledger.reserve(plan(done + 1), cap=CAP, delta=DELTA, epsilon_of=epsilon)
                except BudgetError:
                    return done, total
                ledger.commit(entry)
                done, total = done + 1, spent.epsilon


def plan(server_round: int) -> Charge:
    """One round of the published plan."""
    return Charge(
        dataset_id="data",
        fingerprint="none",
        task="train",
        run="run",
        server_round=server_round,
        request_digest=str(server_round),
        plan_digest="plan",
        mechanism="dp-sgd",
        noise_multiplier=SIGMA,
        sample_rate=RATE,
        steps=STEPS,
    )


def worst_disagreement() -> tuple[float, tuple[float, float, int]]:
    """Largest |PRV - PLD| beyond what is allowed, and the plan it occurs at; negative when all agree."""
    worst, at = -1.0, (0.0, 0.0, 0)
    for sigma, rate, steps in itertools.product(SIGMAS, RATES, LENGTHS):
        ours, theirs = epsilon([Spending(sigma, rate, steps)], DELTA), pld_epsilon(sigma, rate, steps)
        excess = abs(ours - theirs) - (RELATIVE * theirs + ABSOLUTE)
        print(f"sigma {sigma:4.1f} q {rate:5.3f} steps {steps:4d}: PRV {ours:9.4f} PLD {theirs:9.4f}", flush=True)
        if excess > worst:
            worst, at = excess, (sigma, rate, steps)
    return worst, at


def pld_epsilon(sigma: float, rate: float, steps: int) -> float:
    """Google's privacy loss distributions, at their default discretisation."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps))
    return float(accountant.get_epsilon(DELTA))


if __name__ == "__main__":
    sys.exit(without_options(main, __doc__))
