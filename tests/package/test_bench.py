"""What the benchmark makes of times: rows, turns, and candidates that fail."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import sm_90

pytest.importorskip("matplotlib")

from bench import (
    cuda_instructions,
    instructions,
    predicted,
    readme,
    scaling,
    sharded_step,
    summary,
    throughput,
    triton_instructions,
)
from bench.candidates import REFERENCES
from bench.harness import ADAMW, STREAM, Candidate, Case, Samples, Traffic, Trial, Workload, row, spread
from reporting import machine

CASE = Case("tiny", ((4, 5), (10,)), "2 tensors")


def test_spread_is_median_and_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
    assert spread([7.0]) == {"low": 7.0, "median": 7.0, "high": 7.0}


def test_a_row_pairs_times_within_rounds() -> None:
    samples = Samples(own=[1.0, 2.0, 4.0], references={STREAM: [2.0, 2.0, 2.0], ADAMW: [3.0, 8.0, 4.0]}, passes=2)
    samples.other_programs = [0.0, 0.5]
    candidate = Candidate("mine", "cpu", Traffic(state=2, state_bits=8), lambda work: lambda: None)
    found = row(CASE, torch.bfloat16, "cpu", candidate, samples)
    # Two accesses of a parameter and one of a gradient with 2 bytes each, two of a state with 1: 8 bytes an element.
    assert found["bytes_per_parameter"] == 8 and found["elements"] == 30
    assert found["gb_per_s"] == pytest.approx(8 * 30 / 2.0 / 1e9)
    assert found["stream_gb_per_s"] == pytest.approx(12 * 30 / 2.0 / 1e9)
    assert found["to_adamw"] == spread([3.0, 4.0, 1.0])
    assert found["to_stream"] == spread([8 / 12 * x for x in (2.0, 1.0, 0.5)])
    assert (found["rounds"], found["passes"]) == (3, 2)
    assert (found["other_programs"], found["other_programs_most"]) == (0.25, 0.5)


def test_turns_come_to_one_row_and_every_optimizer_follows_a_stream() -> None:
    called: list[str] = []
    ticks = itertools.count()

    def clock(step: object) -> float:
        step()  # type: ignore[operator]
        return float(next(ticks))

    def stand_in(name: str) -> Candidate:
        return Candidate(name, "torch", Traffic(), lambda work: lambda: called.append(name))

    references = [stand_in(STREAM), stand_in(ADAMW)]
    work, samples = Workload(CASE, torch.float32, "cpu"), Samples()
    for _ in range(2):
        trial = Trial(work, stand_in("mine"), references, clock)
        called.clear()
        trial.run(0.0, samples)
    turn = [STREAM, ADAMW, STREAM, "mine"]
    assert called == turn * (len(called) // 4)
    assert samples.passes == 2
    # Two warm-up rounds at most are thrown away; the times of a round are consecutive ticks of the clock.
    for stream, adamw, own in zip(samples.references[STREAM], samples.references[ADAMW], samples.own, strict=True):
        assert (adamw - stream, own - adamw) == (1.0, 1.0)


@pytest.mark.parametrize("seconds", [30.0, -1.0])
def test_a_candidate_that_fails_or_has_no_time_is_named(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    def fails(work: Workload) -> object:
        raise ValueError("not mine")

    good = Candidate("good", "torch", Traffic(), REFERENCES[0].make)
    bad = Candidate("bad", "torch", Traffic(), fails)  # type: ignore[arg-type]
    monkeypatch.setattr(throughput, "plan", lambda device, quick: [(CASE, torch.float32, [good, bad])])
    first, second = throughput.measure("cpu", seconds, quick=True)
    assert (first["optimizer"], second["optimizer"]) == ("good", "bad")
    if seconds < 0:
        assert first["left_out"] == second["left_out"] == "the time limit of -1 s"
    else:
        assert first["rounds"] >= 5 and second["error"] == "ValueError: not mine"


def test_host_time_of_sharded_steps_is_told_from_a_run(tmp_path: Path) -> None:
    assert "not measured" in scaling.host_time(tmp_path)
    assert sharded_step.main(["--quick", "--out", str(tmp_path / "here.json")]) == 0
    row = json.loads((tmp_path / "here.json").read_text())["rows"][0]
    assert row["to_plain"]["low"] <= row["to_plain"]["median"] <= row["to_plain"]["high"]
    assert f"{row['to_plain']['median']:.2f}" in scaling.host_time(tmp_path)
    assert f"{row['tensors']} tensors of {row['size']}" in scaling.host_time(tmp_path)


def test_instructions_of_the_cpu_kernels_that_grow_are_told() -> None:
    committed = {
        "fp32_per_16_elements": 10.0,
        "rows": [{"state": "int8", "weights": "master", "per_16_elements": 70.0}],
        "steps": [{"tensors": 1000, "per_step": 2_000_000}],
    }
    assert instructions.exceeding(committed, committed) == []
    grown = {
        "fp32_per_16_elements": 10.2,
        "rows": [{"state": "int8", "weights": "master", "per_16_elements": 116.0}],
        "steps": [{"tensors": 1000, "per_step": 2_100_000}],
    }
    assert instructions.exceeding(grown, committed) == [
        "fp32_per_16_elements: 10.2, committed 10.0",
        "a step on 1000 tensors: 2100000, committed 2000000",
        "int8, master: 116.0, committed 70.0",
    ]
    assert instructions.exceeding(committed, {**committed, "rows": []}) == ["int8, master: 70.0, committed None"]


def test_predicted_instructions_name_the_backend_that_is_ahead(tmp_path: Path) -> None:
    assert "not measured" in predicted.table(tmp_path)

    def rows(**instructions: float) -> list[dict[str, object]]:
        own = {"kernel": "k", "registers": 64, "blocks": 4}
        return [{"case": case, "instructions": figure, **own} for case, figure in instructions.items()]

    triton, cuda = rows(few=40.0, plain=13.0, two=15.0), rows(few=46.0, plain=13.5, two=9.0)
    # Of a step that has two launches all instructions count.
    cuda += rows(two=3.0)
    for backend, found in (("triton", triton), ("cuda", cuda)):
        (tmp_path / f"{backend}-sm_90.json").write_text(json.dumps({"executed": found}))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in predicted.table(tmp_path).splitlines()[4:]]
    assert lines == [
        ["`few`", "46.0 (64, 4)", "40.0 (64, 4)", "triton"],
        ["`plain`", "13.5 (64, 4)", "13.0 (64, 4)", "either"],
        ["`two`", "9.0 (64, 4) + 3.0 (64, 4)", "15.0 (64, 4)", "cuda"],
    ]
    assert triton_instructions.exceeding(rows(few=40.0, plain=12.0), triton) == []
    assert triton_instructions.exceeding(rows(few=40.1), triton) == ["few, k: 40.1, committed 40.0"]
    assert triton_instructions.exceeding(rows(new=1.0), triton) == ["new, k: 1.0, committed None"]


def test_a_figure_that_the_emulator_cannot_give_is_worse_than_one() -> None:
    def rows(figure: float | None) -> list[dict[str, object]]:
        return [{"case": "c", "kernel": "k", "instructions": figure}]

    exceeding = cuda_instructions.exceeding
    assert exceeding(rows(None), {"executed": rows(None)}, "executed") == []
    assert exceeding(rows(9.0), {"executed": rows(9.0)}, "executed") == []
    assert exceeding(rows(None), {"executed": rows(9.0)}, "executed") == ["executed: c, k: None, committed 9.0"]
    assert exceeding(rows(9.0), {"executed": rows(None)}, "executed") == ["executed: c, k: 9.0, committed None"]
    assert exceeding(rows(None), {"executed": []}, "executed") == ["executed: c, k: None, committed None"]


def test_the_readme_follows_the_best_rule_of_the_proof_through_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(mean: float, search: dict[str, float] | None = None) -> dict[str, object]:
        difference = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}
        own = {"label": "Best", "state_bytes_per_parameter": 4.0, "minus_adamw": difference}
        return {**own, "competes": True, "lr": 0.5, "search": search or {}}

    own = {"parameters": 2_500_000, "steps": 1000, "seeds": 3}
    parts = {
        "fresh": {
            "title": "Fresh",
            **own,
            "contenders": {"adamw": {"competes": False}, "best": entry(-0.25), "other": entry(-0.5)},
        },
        "bits": {"title": "Bits", **own, "contenders": {"best@int8": entry(0.125), "best@bf16": entry(0.25)}},
        "low": {"title": "Low", **own, "contenders": {"best": entry(0.5, {"0.5": 1.0, "1.0": 2.0})}},
        "high": {"title": "High", **own, "contenders": {"best": entry(0.5, {"0.25": 2.0, "0.5": 1.0})}},
    }
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "stage2.json").write_text(json.dumps({"best": "best", "parts": parts}))
    monkeypatch.setattr(readme, "EXPERIMENTS", tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.recipe().splitlines()[2:]]
    assert lines == [
        ["Fresh*: 2.50M, 1,000 steps, 3 seeds", "4.00", "-0.250 (-0.260 .. -0.240)"],
        ["Bits, int8, bf16 weights: 2.50M, 1,000 steps, 3 seeds", "4.00", "+0.125 (+0.115 .. +0.135)"],
        ["Bits, bf16, bf16 weights: 2.50M, 1,000 steps, 3 seeds", "4.00", "+0.250 (+0.240 .. +0.260)"],
        ["Low†: 2.50M, 1,000 steps, 3 seeds", "4.00", "+0.500 (+0.490 .. +0.510)"],
        ["High: 2.50M, 1,000 steps, 3 seeds", "4.00", "+0.500 (+0.490 .. +0.510)"],
    ]


def test_cases_that_are_not_executed_again_keep_their_figures_and_the_commit_of_their_module() -> None:
    earlier = {
        "versions": {"signadam_ext": {"commit": "old"}},
        "executed": [
            {"case": case, "instructions": figure, **own}
            for case, figure, own in (
                ("a", 1.0, {}),
                ("b", 2.0, {"commit": "older"}),
                ("c", 3.0, {}),
                ("gone", 4.0, {}),
            )
        ],
    }
    rows = [
        {"case": "c", "instructions": 5.0},
        {"case": "c", "instructions": 6.0},
        {"case": "new", "instructions": 7.0},
    ]
    found = cuda_instructions.renewed(rows, "now", ["new", "a", "b", "c"], earlier)
    assert [(row["case"], row["instructions"], row["commit"]) for row in found] == [
        ("new", 7.0, "now"),
        ("a", 1.0, "old"),
        ("b", 2.0, "older"),
        ("c", 5.0, "now"),
        ("c", 6.0, "now"),
    ]
    alone = cuda_instructions.renewed(rows[:1], "now", ["c"], None)
    assert alone == [{"case": "c", "instructions": 5.0, "commit": "now"}]


def test_figures_of_another_module_are_not_written_as_the_loaded_ones(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    with pytest.raises(SystemExit, match="--module may not name others"):
        instructions.main(["--device", "cuda", "--module", "other.cubin", "--out", str(out)])
    assert not out.exists()


def test_the_emulator_learns_where_the_cases_of_a_switch_begin() -> None:
    listing = (
        "  10   1898  .nv.constant2._Zcut_in_a_tabl\n.nv.constant2._Zfirst\n0x00000f40 0x00000f60 \n0x00002d60 \n\n"
        ".section .rela.nv.constant2._Zfirst\tRELA\n\n.nv.shared._Zfirst\n0x00000001\n"
        ".nv.constant2._Zsecond\n0x00000010\n"
    )
    assert sm_90.jump_tables(listing) == {"_Zfirst": [0xF40, 0xF60, 0x2D60], "_Zsecond": [0x10]}

    known: dict[str, Any] = {"LDC": ("memory", lambda d: "as before")}
    emulator = SimpleNamespace(
        Fault=IndexError,
        Unknown=NotImplementedError,
        OPERATIONS=known,
        operation=lambda kind, name: lambda decode: known.update({name: (kind, decode)}),
    )
    sm_90.teach_switches(emulator, listing)
    thread = SimpleNamespace(R=[4, 0xF60])

    def decoded(name: str, *operands: str) -> Any:
        code = [SimpleNamespace(address=0xE70), SimpleNamespace(address=0xE80)]
        return known[name.partition(".")[0]][1](
            SimpleNamespace(
                has=lambda modifier: name.endswith(f".{modifier}"),
                operands=operands,
                kernel=SimpleNamespace(name="_Zfirst", code=code, index={0xF60: 7}),
                after=1,
                raw=lambda register: lambda t: t.R[int(register[1:])],
                register=lambda at: int(operands[at][1:]),
                copy=lambda register, read: lambda t: t.R.__setitem__(register, read(t)),
            )
        )

    assert decoded("LDC", "R1", "c[0x0][0x4]") == "as before"
    for place, address in (("R0", 0xF60), ("0x8", 0x2D60), ("R0+0x4", 0x2D60), ("R0+-0x4", 0xF40)):
        decoded("LDC", "R1", f"c[0x2][{place}]")(thread)
        assert thread.R[1] == address
    for place in ("R0+0x8", "R0+-0x8", "R0+0x1"):
        with pytest.raises(IndexError, match="of 0xc bytes"):
            decoded("LDC", "R1", f"c[0x2][{place}]")(thread)
    with pytest.raises(NotImplementedError, match="64"):
        decoded("LDC.64", "R1", "c[0x2][R0]")
    thread.R[1] = 0xF60
    assert decoded("BRX", "R1 -0xe80")(thread) == 7


def test_aims_of_cuda_kernels_stand_beside_what_was_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not measured" in predicted.aims(tmp_path)
    monkeypatch.setattr(predicted, "AIMS", {"plain": 18, "two": 28})
    own = {"kernel": "k", "registers": 64, "blocks": 4}
    found = [("plain", 18.0), ("two", 28.1), ("two", 3.0)]
    report = {
        "versions": {"signadam_ext": {"commit": "0123456789ab"}},
        "executed": [{"case": case, "instructions": figure, **own} for case, figure in found],
    }
    (tmp_path / "cuda-sm_90.json").write_text(json.dumps(report))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in predicted.aims(tmp_path).splitlines()[4:]]
    assert lines == [["`plain`", "18", "18.0", "4", "yes"], ["`two`", "28", "28.1", "4", "no"]]


@pytest.mark.skipif(not summary.RESULTS.is_dir(), reason="the source distribution holds no results")
def test_trainings_of_an_unknown_module_are_refused_and_their_page_is_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    report = summary.training("gpt")
    assert summary.CONVERGENCE / "gpt.md" in summary.pages()
    summary.require_commits()
    unknown = {**report, "environments": [{**report["environments"][0], "commit": "0123456789ab+changes"}]}
    monkeypatch.setattr(summary, "training", lambda name: unknown)
    with pytest.raises(machine.NotCommitted, match=r"\+changes"):
        summary.require_commits()
    # What the page shows is in the JSON: another module, another page.
    assert summary.pages()[summary.CONVERGENCE / "gpt.md"] != (summary.CONVERGENCE / "gpt.md").read_text()
