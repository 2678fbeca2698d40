"""Builds signadam_ext._C: C++ always, CUDA whenever nvcc is found. The module contains and links no torch.

SIGNADAM_CUDA=1        demand CUDA; without nvcc the build fails. =0 leaves it out.
SIGNADAM_CUDA_ARCHS    compute capabilities, such as "90" or "80;90". Default: those of the visible GPUs, otherwise
                       80, 90 and 100. PTX of the last is added for newer devices.
SIGNADAM_SANITIZE      sanitizers of the host compiler, such as "address,undefined": C++ alone, at -O1 with frame
                       pointers, and undefined behaviour ends the process. A Python that loads such a module needs the
                       sanitizers' runtime preloaded; tests/sanitized.sh does all of it.
MAX_JOBS               compilers at a time, passed to ninja.

The version is that of the tag v<version> at this commit. Between tags it is a preview of the version that the changelog
names first, counted in commits; an sdist keeps its own. SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SIGNADAM_EXT sets another.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools_scm.version import ScmVersion, guess_next_dev_version
except ModuleNotFoundError as error:
    raise SystemExit("setup.py needs setuptools-scm: pip install setuptools-scm pybind11 ninja.") from error

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = (80, 90, 100)
X86_FLAGS = {
    "kernels_avx2": ["-mavx2", "-mf16c"],
    "kernels_avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mprefer-vector-width=512"],
}
# One rounding per operation, everywhere; comparisons and square roots may be vectorised, as no one reads errno or
# floating-point exceptions.
ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *ARITHMETIC]

if sys.platform == "win32":
    raise SystemExit(
        "signadam_ext supports Linux (x86-64, aarch64) and, for its CPU kernels, macOS; on Windows use WSL 2."
    )


def output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def changelog_version() -> str:
    """What the top heading of the changelog prepares."""
    return re.search(r"^## (\d+\.\d+\.\d+) - ", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE).group(1)


def scm_version(found: ScmVersion) -> str:
    """The version of what git describes: see above. No tag counts as v0.0."""
    if found.exact:
        return found.format_with("{tag}")
    if str(found.tag) == changelog_version():  # nobody has begun the next version's heading
        return guess_next_dev_version(found)
    return f"{changelog_version()}.dev{found.distance or 0}"


def commit() -> str:
    """The commit this tree is at. An sdist knows none: .ci/wheels tells it by SIGNADAM_COMMIT."""
    if not (ROOT / ".git").exists():
        return os.environ.get("SIGNADAM_COMMIT", "unknown")
    changed = "+changes" if output("git", "status", "--porcelain", "--untracked-files=no").strip() else ""
    return (output("git", "rev-parse", "--short=12", "HEAD").strip() or "unknown") + changed


def sanitizers() -> str:
    """What SIGNADAM_SANITIZE names, for -fsanitize; nothing where it is not set."""
    wanted = os.environ.get("SIGNADAM_SANITIZE", "").replace(" ", "")
    if not re.fullmatch(r"([a-z-]+(,[a-z-]+)*)?", wanted):
        raise SystemExit(f'SIGNADAM_SANITIZE={wanted!r}: give names for -fsanitize, such as "address,undefined".')
    if wanted and os.environ.get("SIGNADAM_CUDA", "").strip() == "1":
        raise SystemExit("SIGNADAM_SANITIZE builds C++ alone: leave SIGNADAM_CUDA unset, or set it to 0.")
    return wanted


def find_nvcc() -> str | None:
    """nvcc, or None where CUDA is turned off or not there."""
    wanted = os.environ.get("SIGNADAM_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        raise SystemExit(
            f"SIGNADAM_CUDA={wanted!r}: use 1 (demand CUDA), 0 (leave it out) or nothing (use it if nvcc is there)."
        )
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    if wanted == "1":
        raise SystemExit(
            "SIGNADAM_CUDA=1, but there is no nvcc: install the CUDA toolkit and put nvcc on PATH, or set CUDA_HOME to "
            f"the toolkit's folder. Looked at: {', '.join(c for c in candidates if c)}."
        )
    return None


def cuda_archs(nvcc: str) -> list[int]:
    supported = sorted({int(n) for n in re.findall(r"sm_(\d+)\b", output(nvcc, "--list-gpu-code"))})
    text = os.environ.get("SIGNADAM_CUDA_ARCHS", "")
    if text.strip():
        words = [w for w in re.split(r"[;,\s]+", text) if w]
        if not all(re.fullmatch(r"(sm_)?\d+\.?\d?", w) for w in words):
            raise SystemExit(f'SIGNADAM_CUDA_ARCHS={text!r}: give compute capabilities such as "90" or "8.0;9.0".')
        archs = sorted({int(w.removeprefix("sm_").replace(".", "")) for w in words})
        if unsupported := [a for a in archs if supported and a not in supported]:
            raise SystemExit(
                f"SIGNADAM_CUDA_ARCHS={text!r}: {nvcc} does not compile for {unsupported}, but for {supported}."
            )
        return archs
    visible = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    archs = sorted({int(major + minor) for major, minor in re.findall(r"(\d+)\.(\d)", visible)})
    archs = [a for a in archs or DEFAULT_ARCHS if not supported or a in supported]
    return archs or supported[-1:]


def ninja_path(path: Path | str) -> str:
    """A path as a ninja build statement wants it; in commands ninja quotes $in and $out itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


class BuildWithNinja(build_ext):
    """One build.ninja for host and device code, so both compile side by side."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        machine = platform.machine().lower()
        sanitize = sanitizers()
        nvcc = find_nvcc() if sys.platform.startswith("linux") and not sanitize else None
        archs = cuda_archs(nvcc) if nvcc else []
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (Path(self.build_temp) / "signadam").resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        headers = (pybind11.get_include(), sysconfig.get_paths()["include"])
        includes = [f"-isystem {shlex.quote(path)}" for path in headers]
        if not sanitize:
            # pybind11 would ask the interpreter at every reference that is taken or dropped whether the lock is held.
            includes.append("-DPYBIND11_NO_ASSERT_GIL_HELD_INCREF_DECREF")
        defines = [f"-DSIGNADAM_VERSION={self.distribution.get_version()}", f"-DSIGNADAM_COMMIT={commit()}"]
        # A capability is baked in as machine code; the last also as PTX, which the driver compiles for newer devices.
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        if nvcc:
            gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            release = re.search(r"release ([\d.]+)", output(nvcc, "--version"))
            names = "+".join([f"sm_{a}" for a in archs] + [f"compute_{archs[-1]}"])
            defines += [
                "-DSIGNADAM_CUDA",
                f"-DSIGNADAM_NVCC={release.group(1) if release else 'unknown'}",
                f"-DSIGNADAM_CUDA_ARCHS={names}",
            ]

        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        common, checking = COMMON, ""
        if sanitize:
            checking = f" -fsanitize={sanitize}"
            common = [*(flag for flag in COMMON if flag != "-O3"), "-O1", "-g", "-fno-omit-frame-pointer"]
            common += [checking.strip(), "-fno-sanitize-recover=undefined"]
        device = ["-std=c++17", "-O3", "-fmad=false", *gencode, f"-ccbin {compiler}", "--threads=2"]
        device += ["-Xcompiler=" + ",".join(["-fPIC", "-fvisibility=hidden", *ARITHMETIC])]
        lines = [
            "ninja_required_version = 1.5",
            f"flags = {' '.join(common)}",
            "rule host",
            f"  command = {compiler} -MMD -MF $out.d $flags $extra -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule device",
            f"  command = {nvcc} -MMD -MF $out.d {' '.join(device)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        link = (
            f"{nvcc} -shared -cudart static -ccbin {compiler} {' '.join(gencode)} -Xlinker --exclude-libs=ALL"
            if nvcc
            else f"{compiler} -shared{checking}"
        )
        link += " -undefined dynamic_lookup" if sys.platform == "darwin" else " -lpthread -ldl"
        lines += ["rule link", f"  command = {link} $in -o $out"]

        objects = []
        for source in map(Path, ext.sources):
            if source.suffix == ".cu" and not nvcc:
                continue
            obj = f"{'_'.join(source.with_suffix('').parts[1:])}.o"
            extra = X86_FLAGS.get(source.stem, []) if machine in ("x86_64", "amd64") else []
            if source.parts[1] == "python":
                extra = [*includes, *(defines if source.stem in ("bindings", "votes") else ())]
            objects.append(obj)
            lines.append(f"build {obj}: {'device' if source.suffix == '.cu' else 'host'} {ninja_path(ROOT / source)}")
            if extra:
                lines.append(f"  extra = {' '.join(extra)}")
        lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
        (build / "build.ninja").write_text("\n".join(lines) + "\n")

        built = ", ".join(f"sm_{a}" for a in archs) if nvcc else "left out (no nvcc, or SIGNADAM_CUDA=0)"
        print(f"signadam_ext: CPU kernels for {machine}; CUDA {built}" + (f"; under {sanitize}" if sanitize else ""))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(build), *jobs], check=True)


def sources() -> list[str]:
    found = (path for suffix in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


setup(
    # The Triton kernels lie at the top of the repository, where no search finds them by this name.
    packages=[*find_packages(include=["signadam_ext", "signadam_ext.*"]), "signadam_ext.triton_kernels"],
    # The commit is part of the module, which says it beside the version.
    use_scm_version={
        "version_scheme": scm_version,
        "local_scheme": "no-local-version",
        "fallback_version": f"{changelog_version()}.dev0",
        "git_describe_command": ["git", "describe", "--dirty", "--tags", "--long", "--match", "v[0-9]*"],
    },
    ext_modules=[Extension("signadam_ext._C", sources=sources())],
    cmdclass={"build_ext": BuildWithNinja},
)
