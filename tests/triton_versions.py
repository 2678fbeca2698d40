"""Compiles the Triton kernels with other versions of Triton, without a GPU.

    python tests/triton_versions.py 3.2.0 3.6.0

Each version is fetched by pip (about 250 MB) into a temporary folder, and used by a process of its own. Before a
release the oldest that pyproject.toml allows and one of each later minor version are compiled.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.toolchain import compile_triton, rules

from signadam_ext.core.native import compiled

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


def jobs() -> list[tuple[str, dict[str, object], str]]:
    """:data:`KERNELS` with all their constants, and what begins a step on the device, for sm_90."""
    formats = ("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "AUX")
    found: list[tuple[str, dict[str, object], str]] = [("sm_90", {}, "begin")]
    found += [("sm_90", {"GRAD": compiled.FORMATS[name][0]}, "norm") for name in ("fp32", "bf16")]
    for given in KERNELS:
        rule = rules()[str(given["RULE"])]
        constants: dict[str, object] = {
            **dict.fromkeys(formats, "fp32"),
            **{
                "PARAM_STORAGE": "nearest",
                "THRESHOLD_PASS": 0,
                "OBSERVES": False,
                "CONFIDENCE": None,
                "RUNS": False,
                "SCALE": None,
            },
            **{"MOMENTS": rule.moments, "READS_VARIANCE": rule.reads_variance},
            **given,
        }
        constants |= {name: compiled.FORMATS[str(constants[name])][0] for name in formats}
        constants["PARAM_STORAGE"] = compiled.PARAM_STORAGES[str(constants["PARAM_STORAGE"])]
        found.append(("sm_90", constants, "update"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    failed = []
    for version in parser.parse_args().versions:
        with tempfile.TemporaryDirectory() as folder:
            packages, made = Path(folder, "packages"), Path(folder, "made")
            made.mkdir()
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(packages)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
            try:
                paths = compile_triton(jobs(), made, before=[str(packages)])
            except AssertionError as error:
                print(version, error)
                failed.append(version)
            else:
                print(version, sum(path.with_suffix(".cubin").exists() for path in paths), "of", len(paths), "kernels")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
