"""Who is compared: torch's optimizers, a plain stream, and ours; and on which workloads."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .harness import (
    ADAMW,
    STREAM,
    Candidate,
    Case,
    Step,
    Traffic,
    Workload,
    gpt2_small,
    llama_1b,
    many_small,
    one_large,
)


def _torch(optimizer: type[torch.optim.Optimizer], options: dict[str, Any], work: Workload) -> Step:
    return optimizer(work.params, **options).step


def _ours(name: str, options: dict[str, Any], observes: bool, work: Workload) -> Step:
    import signadam_ext  # not at the top: the references must work where the package does not

    if options.get("variance") == "minibatch":
        for param in work.params:
            assert param.grad is not None
            param.grad_variance = param.grad.float().square()  # type: ignore[attr-defined]
    optimizer = getattr(signadam_ext, name)(work.params, **options)
    if observes:
        optimizer.observe()
    return optimizer.step


def _adamw(label: str, **options: Any) -> Candidate:
    return Candidate(label, "torch", Traffic(state=4), partial(_torch, torch.optim.AdamW, options))


def _fp32_adamw(work: Workload) -> Step:
    return torch.optim.AdamW(work.fp32_params(), fused=True).step


#: What every candidate is measured beside: one AdamW, in fp32, whatever the parameters are.
REFERENCES = (
    Candidate(STREAM, "torch", Traffic(), lambda work: partial(work.a.add_, work.b)),
    Candidate(ADAMW, "torch", Traffic(state=4), _fp32_adamw),
)
FUSED = _adamw(ADAMW, fused=True)
#: With 16-bit weights, gradients and moments, which no one trains with as it is; torch offers nothing else.
FUSED_HALF = _adamw("AdamW fused, 16-bit moments", fused=True)
FOREACH = _adamw("AdamW foreach", foreach=True)
LOOP = _adamw("AdamW loop", foreach=False)

_sgd = partial(_torch, torch.optim.SGD)
SGD = (
    Candidate("SGD fused", "torch", Traffic(), partial(_sgd, {"fused": True})),
    Candidate("SGD fused, momentum", "torch", Traffic(state=2), partial(_sgd, {"fused": True, "momentum": 0.9})),
)

# label, class, options, accesses of the gradient, accesses of the fp32 state
_RULES: tuple[tuple[str, str, dict[str, Any], int, int], ...] = (
    ("SignAdamPP", "SignAdamPP", {}, 1, 2),
    ("SignAdamPP adaptive_delayed", "SignAdamPP", {"confidence": "adaptive_delayed"}, 1, 2),
    ("SignAdamPP adaptive", "SignAdamPP", {"confidence": "adaptive"}, 2, 2),
    ("SignAdam", "SignAdam", {}, 1, 4),
    ("SignAdam analytic", "SignAdam", {"second_moment": "analytic"}, 1, 2),
    ("Signum", "Signum", {}, 1, 2),
    ("SignSGD", "SignSGD", {}, 1, 0),
)
#: The methods they are compared with; the state of a minibatch form includes the variance that it reads.
_FIELD: tuple[tuple[str, str, dict[str, Any], int, int], ...] = (
    ("SignAdamPP sparsity", "SignAdamPP", {"confidence": "sparsity", "target": 0.1}, 1, 2),
    ("MSGD", "MSGD", {}, 1, 2),
    ("SVAG", "SVAG", {}, 1, 4),
    ("MSVAG", "MSVAG", {}, 1, 4),
    ("MSVAG minibatch", "MSVAG", {"variance": "minibatch"}, 1, 5),
    ("AdamStar", "AdamStar", {}, 1, 4),
    ("AdamStar without momentum", "AdamStar", {"momentum": False}, 1, 4),
    ("AdamStar minibatch", "AdamStar", {"variance": "minibatch"}, 1, 5),
    ("AdamW", "AdamW", {}, 1, 4),
    ("AdamW amsgrad", "AdamW", {"amsgrad": True}, 1, 6),
    ("Lion", "Lion", {}, 1, 2),
)
#: The rules that came after them. The state of MARS includes the last gradient.
_LATER: tuple[tuple[str, str, dict[str, Any], int, int], ...] = (
    ("Signum Nesterov", "Signum", {"nesterov": True}, 1, 2),
    ("AdamS", "AdamS", {}, 1, 2),
    ("BCOS", "BCOS", {}, 1, 2),
    *((f"LionK {kappa}", "LionK", {"kappa": kappa}, 1, 2) for kappa in ("threshold", "huber", "softsign")),
    ("MARSLion", "MARSLion", {}, 1, 2),
    *((name, name, {}, 1, 4) for name in ("Ano", "Anolog", "Grams", "LaProp", "ADOPT", "AdaMomentum", "AdaBound")),
    ("AMSBound", "AMSBound", {}, 1, 6),
    ("AdEMAMix", "AdEMAMix", {}, 1, 6),
    ("MARSAdamW, max_norm=None", "MARSAdamW", {"max_norm": None}, 1, 6),
    ("FOCUS", "FOCUS", {}, 1, 4),
    ("ScheduleFreeAdamW", "ScheduleFreeAdamW", {}, 1, 4),
    ("ScheduleFreeSign", "ScheduleFreeSign", {}, 1, 2),
)
OBSERVED = ", with statistics()"


def ours(backend: str, *labels: str) -> list[Candidate]:
    """Our sign-based optimizers on `backend`; all of them when none is named."""
    return _candidates(backend, [rule for rule in _RULES if not labels or rule[0] in labels])


def field(backend: str, *labels: str) -> list[Candidate]:
    """The methods they are compared with, and what statistics() costs; all when none is named."""
    found = [*_candidates(backend, _FIELD), *_candidates(backend, _RULES[:1], observes=True)]
    return [candidate for candidate in found if not labels or candidate.optimizer in labels]


def later(backend: str, *labels: str) -> list[Candidate]:
    """The rules that came later; all when none is named. Not in the plan of a GPU, whose time is short."""
    return _candidates(backend, [rule for rule in _LATER if not labels or rule[0] in labels])


def _candidates(
    backend: str, rules: Sequence[tuple[str, str, dict[str, Any], int, int]], observes: bool = False
) -> list[Candidate]:
    return [
        Candidate(
            label + (OBSERVED if observes else ""),
            backend,
            Traffic(grad=grad, state=state, state_bits=32),
            partial(_ours, name, options | {"backend": backend}, observes),
        )
        for label, name, options, grad, state in rules
    ]


# label, class, state_dtype, bits of the momentum
_STORED: tuple[tuple[str, str, str, int], ...] = (
    ("SignAdamPP bf16 stochastic", "SignAdamPP", "bf16", 16),
    ("SignAdamPP int8 stochastic", "SignAdamPP", "int8", 8),
    ("SignAdamPP int4 stochastic", "SignAdamPP", "int4", 4),
    ("SignAdamPP int2 stochastic", "SignAdamPP", "int2", 2),
    ("Signum int8 stochastic", "Signum", "int8", 8),
)


def stored(backend: str, *labels: str) -> list[Candidate]:
    """Our optimizers in few bits, for 16-bit parameters, on `backend`; all when none is named."""
    return [
        Candidate(
            label,
            backend,
            Traffic(state=2, state_bits=bits),
            partial(_ours, name, {"state_dtype": state, "param_storage": "stochastic", "backend": backend}, False),
        )
        for label, name, state, bits in _STORED
        if not labels or label in labels
    ]


Plan = Iterator[tuple[Case, torch.dtype, list[Candidate]]]


def plan(device: str, quick: bool = False) -> Plan:
    """The workloads of `device` and who runs on each, the most telling first: a time limit cuts the tail."""
    return _gpu_plan(quick) if device == "cuda" else _cpu_plan(quick)


def _cases(quick: bool, gpu: bool) -> tuple[Case, Case, Case, Case]:
    if quick:
        return one_large(1_000_000), many_small(100), gpt2_small(16), llama_1b(32)
    return one_large(), many_small(), gpt2_small(), llama_1b(_llama_scale() if gpu else 4)


def _llama_scale() -> int:
    """The largest Llama whose fp32 workload (params, grads, stream, states of two AdamW) fits half the GPU."""
    free, _ = torch.cuda.mem_get_info()
    return next(scale for scale in (1, 2, 4, 8, 16) if llama_1b(scale).elements * 32 < free / 2)


def _cpu_plan(quick: bool) -> Plan:
    large, small, gpt2, llama = _cases(quick, gpu=False)
    kernels = ours("cpu")
    everyone = [*kernels, FUSED, FOREACH, LOOP, *SGD]
    yield large, torch.float32, [*kernels, *field("cpu"), *later("cpu"), *everyone[len(kernels) :]]
    yield small, torch.float32, [*everyone, *ours("reference", "SignAdamPP")]
    yield gpt2, torch.float32, everyone
    yield llama, torch.float32, everyone
    few_bits = stored("cpu")
    yield large, torch.bfloat16, [*few_bits, *kernels, FUSED_HALF]
    yield gpt2, torch.bfloat16, [*few_bits, *kernels, FUSED_HALF]


def _gpu_plan(quick: bool) -> Plan:
    large, small, gpt2, llama = _cases(quick, gpu=True)
    kernels = [*ours("cuda"), *ours("triton")]
    others = [*field("cuda"), *field("triton")]
    yield large, torch.float32, [*kernels, *others, FUSED, FOREACH, LOOP, *SGD]
    yield small, torch.float32, [*kernels, FUSED, FOREACH, LOOP, *SGD]
    for case, dtype in (
        (large, torch.bfloat16),
        (llama, torch.bfloat16),
        (gpt2, torch.float32),
        (llama, torch.float32),
        (large, torch.float16),
        (gpt2, torch.bfloat16),
        (small, torch.bfloat16),
    ):
        if dtype == torch.float32:
            yield case, dtype, [*kernels, FUSED, FOREACH]
        else:
            yield case, dtype, [*stored("cuda"), *stored("triton"), *kernels, FUSED_HALF]
