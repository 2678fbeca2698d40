"""Every candidate on every CPU workload. The references run before each round, in the setup that is not timed."""

from typing import Any

from .harness import Candidate, Samples, Trial
from .verify import verify


def test_step(benchmark: Any, trial: Trial, candidate: Candidate, seconds: float, turn: int, samples: Samples) -> None:
    if turn == 0 and candidate.backend not in ("torch", "reference"):
        verify(candidate.optimizer, candidate.backend, trial.workload.dtype)
    benchmark.group = f"{trial.workload.case.summary}, {trial.workload.dtype}"
    rounds = trial.calibrate(seconds)
    benchmark.pedantic(trial.step, setup=trial.time_references, rounds=rounds)
    if not benchmark.disabled:
        trial.add(benchmark.stats.stats.data, samples)
