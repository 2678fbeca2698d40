"""Every candidate on every CPU workload. The references run before each round, in the setup that is not timed."""

from typing import Any

from .harness import Candidate, Row, Trial
from .verify import verify


def test_step(benchmark: Any, trial: Trial, candidate: Candidate, seconds: float, rows: list[Row]) -> None:
    if candidate.backend not in ("torch", "reference"):
        verify(candidate.optimizer, candidate.backend, trial.workload.dtype)
    benchmark.group = f"{trial.workload.case.summary}, {trial.workload.dtype}"
    rounds = trial.calibrate(seconds)
    benchmark.pedantic(trial.step, setup=trial.time_references, rounds=rounds)
    if benchmark.disabled:
        return
    row = trial.row(benchmark.stats.stats.data)
    benchmark.extra_info.update({key: row[key] for key in ("bytes_per_parameter", "bytes_count", "gb_per_s")})
    benchmark.extra_info.update({key: row[key]["median"] for key in ("to_stream", "to_fused_adamw")})
    rows.append(row)
