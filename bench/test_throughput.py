"""Every candidate on every CPU workload. The references run before each round, in the setup that is not timed."""

from functools import cache
from typing import Any

from .harness import Candidate, Samples, Trial
from .verify import verify

#: Once, and again where it failed: no turn of a wrong kernel is timed.
verified = cache(verify)


def test_step(benchmark: Any, trial: Trial, candidate: Candidate, seconds: float, turn: int, samples: Samples) -> None:
    if candidate.backend not in ("torch", "reference"):
        verified(candidate.optimizer, candidate.backend, trial.workload.dtype)
    benchmark.group = f"{trial.workload.case.summary}, {trial.workload.dtype}"
    rounds = trial.calibrate(seconds)
    benchmark.pedantic(trial.step, setup=trial.time_references, rounds=rounds)
    if not benchmark.disabled:
        trial.add(benchmark.stats.stats.data, samples)
