"""Compiles the Triton kernels with other versions of Triton, without a GPU.

    python tests/triton_versions.py 3.2.0 3.6.0

Each version is fetched by pip (about 250 MB) into a temporary folder, and used by a process of its own. Before a
release the oldest that pyproject.toml allows and one of each later minor version are compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Every storage form of both operands, each way to find a threshold, a given variance, statistics.
KERNELS = (
    {"RULE": "sign_adam_pp"},
    {"RULE": "sign_adam_pp", "PARAM": "bf16", "EXP_AVG": "int2", "PARAM_STORAGE": "stochastic"},
    {"RULE": "sign_adam_pp", "PARAM": "bf16", "EXP_AVG": "int4", "PARAM_STORAGE": "split8", "THRESHOLD_PASS": 1},
    {"RULE": "sign_adam_pp", "PARAM": "bf16", "GRAD": "bf16", "THRESHOLD_PASS": 2},
    {"RULE": "signum", "PARAM": "bf16", "EXP_AVG": "block8", "PARAM_STORAGE": "master", "OBSERVES": True},
    {"RULE": "sign_adam", "PARAM": "bf16", "EXP_AVG": "int8", "EXP_AVG_SQ": "bf16", "PARAM_STORAGE": "split16"},
    {"RULE": "adam_amsgrad", "PARAM": "fp16", "GRAD": "fp16", "AUX": "bf16"},
    {"RULE": "msvag_minibatch"},
)


def compile_all() -> None:
    """Compiles :data:`KERNELS` with the Triton that is imported."""
    import triton
    from support.toolchain import TRITON_TENSORS, rules
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from signadam_ext.backends.triton import launch_options
    from signadam_ext.core.formats import PARAM_STORAGES
    from signadam_ext.core.native import compiled
    from signadam_ext.triton_kernels import rules as functions
    from signadam_ext.triton_kernels.update import update

    known = rules()
    names = [parameter.name for parameter in update.params]
    for given in KERNELS:
        rule = known[given["RULE"]]
        constants = {
            **dict.fromkeys(("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "AUX"), "fp32"),
            **{"PARAM_STORAGE": "nearest", "THRESHOLD_PASS": 0, "OBSERVES": False, "CONFIDENCE": None},
            **{"MOMENTS": rule.moments, "READS_VARIANCE": rule.reads_variance},
            **given,
        }
        for name in ("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "AUX"):
            constants[name] = compiled.FORMATS[constants[name]][0]
        constants["PARAM_STORAGE"] = PARAM_STORAGES[constants["PARAM_STORAGE"]]
        options = launch_options(constants, nvidia=True)
        constants["RULE"] = getattr(functions, given["RULE"])
        if triton.__version__ < "3.3":
            tensors = {name: TRITON_TENSORS[name] for name in names if name in TRITON_TENSORS}
            source = ASTSource(update, tensors, constants=constants)
        else:
            signature = {name: TRITON_TENSORS.get(name, "constexpr") for name in names}
            by_place = {(names.index(name),): value for name, value in constants.items()}
            source = ASTSource(update, signature, constexprs=by_place)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"], given
    print(json.dumps({"triton": triton.__version__, "kernels": len(KERNELS)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    failed = []
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
            subprocess.run([*pip, f"triton=={version}"], check=True)
            paths = (folder, str(ROOT), str(ROOT / "tests"))
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": f"{folder}/cache"}
            code = "import triton_versions; triton_versions.compile_all()"
            done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        print(version, done.stdout.strip() if done.returncode == 0 else done.stderr[-2000:])
        if done.returncode != 0:
            failed.append(version)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
