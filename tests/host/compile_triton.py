"""Compiles Triton kernels ahead of time, without a device: ``python compile_triton.py FOLDER < jobs.json``.

A job is ``[target, {constant of the kernel: its value}]``, the rule by name, and of a kernel that is not that of
triton_kernels.update also its name. What Triton makes of it is written to
``FOLDER/<number of the job>.<kind>``, and to ``.json`` what a launch of it must know. It is a process of its own, since
Triton decides on import whether it interprets; ``compile_triton`` in tests/support/toolchain.py starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import triton
from support.toolchain import TRITON_STEP_ARGUMENTS, TRITON_TENSORS, TRITON_VOTE_ARGUMENTS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from signadam_ext.backends.triton import STEP_OPTIONS, launch_options
from signadam_ext.backends.votes.triton import LAUNCH_OPTIONS
from signadam_ext.triton_kernels import begin, norm, rules, vote
from signadam_ext.triton_kernels.update import update

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100)} | {"gfx942": GPUTarget("hip", "gfx942", 64)}


STEP_KERNELS = {"begin": begin.begin, "norm": norm.norm}


def compile_one(target: str, constants: dict[str, Any], name: str = "update") -> triton.compiler.CompiledKernel:
    if name == "update":
        kernel, arguments = update, TRITON_TENSORS
        options = launch_options(constants, nvidia=target.startswith("sm_"))
        constants = {**constants, "RULE": getattr(rules, constants["RULE"])}
    elif name in STEP_KERNELS:
        kernel, arguments, options = STEP_KERNELS[name], TRITON_STEP_ARGUMENTS[name], STEP_OPTIONS[name]
    else:
        kernel, arguments, options = getattr(vote, name), TRITON_VOTE_ARGUMENTS[name], LAUNCH_OPTIONS
        if name == "read_votes" and constants["BITS"] > 4:
            arguments = {**arguments, "result": f"*i{constants['BITS']}"}
    names = [parameter.name for parameter in kernel.params]
    # No hint about the arguments' alignment: the wide accesses must not depend on where the tables happen to lie.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        source = ASTSource(kernel, {name: arguments[name] for name in names if name in arguments}, constants)
    else:
        source = ASTSource(
            kernel,
            {name: arguments.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
        )
    return triton.compile(source, target=TARGETS[target], options=options)


for number, job in enumerate(json.load(sys.stdin)):
    compiled = compile_one(*job)
    for kind, made in compiled.asm.items():
        if kind in ("ptx", "cubin", "amdgcn"):
            Path(sys.argv[1], f"{number}.{kind}").write_bytes(made if isinstance(made, bytes) else made.encode())
    needed = {name: getattr(compiled.metadata, name) for name in ("name", "num_warps", "shared")}
    Path(sys.argv[1], f"{number}.json").write_text(json.dumps(needed))
