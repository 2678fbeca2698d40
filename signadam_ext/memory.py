"""What training with an optimizer of this package keeps in memory, computed from its storage forms.

``signadam memory`` prints it; :func:`estimate` and :func:`bytes_per_parameter` are the same for programs.
"""

from __future__ import annotations

import argparse
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import optimizers
from .core import checks, tensors
from .core.formats import BF16, BOUNDED, FP32, PARAM_STORAGES, RESIDUALS, Format, effective_param_storage
from .core.hyperparameters import checked
from .core.renamed import names_today, warn_user
from .core.rule import rule_of
from .optimizers.base import SignOptimizer
from .state.checkpoint import STEP_DTYPE

OPTIMIZERS: dict[str, type[SignOptimizer]] = {
    name: found for name, found in vars(optimizers).items() if isinstance(found, type) and name in optimizers.__all__
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRADIENTS = ("all", "released")

NOT_COUNTED = (
    "activations and buffers; the objects that torch, Python and this package keep for each tensor, a few KB in all; "
    "copies that a step makes of parameters with gaps between their elements and of gradients with other strides than "
    "their parameters'; grad_variance of the mini-batch forms, 4 bytes for each parameter, and what fills it"
)


DIVIDED = (
    "everything divided evenly, which sharded training (FSDP2) comes near: what it gathers of a layer comes on "
    "top, and data parallel training keeps all of it on every GPU"
)


@dataclass(frozen=True)
class Estimate:
    """Bytes of tensors, over all parameters.

    Attributes:
        parameters: how many numbers the model has.
        weights: the parameters themselves.
        residual: low bits or master copies of them.
        moments: the optimizer's.
        scalars: step counts, and what thresholds are made of; one for each tensor.
        gradients: those that exist at the same time.
    """

    parameters: int
    weights: int
    residual: int
    moments: int
    scalars: int
    gradients: int

    @property
    def state(self) -> int:
        """What the optimizer adds to the weights."""
        return self.residual + self.moments + self.scalars

    @property
    def resident(self) -> int:
        """What is there between two steps, with the gradients dropped."""
        return self.weights + self.state

    @property
    def total(self) -> int:
        return self.resident + self.gradients

    def each(self, nbytes: int) -> float:
        """Bytes per parameter."""
        return nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Kept:
    """What is kept for a tensor: dtypes and forms of all that has its shape, and bytes of what has not."""

    param: torch.dtype
    residual: torch.dtype | None
    moments: tuple[Format, ...]
    scalars: int
    grad: torch.dtype

    def estimate(self, numels: Sequence[int], largest: int | None) -> Estimate:
        numel = sum(numels)
        return Estimate(
            parameters=numel,
            weights=numel * self.param.itemsize,
            residual=numel * self.residual.itemsize if self.residual is not None else 0,
            moments=sum(form.nbytes(n) for form in self.moments for n in numels),
            scalars=len(numels) * self.scalars,
            gradients=(numel if largest is None else largest) * self.grad.itemsize,
        )


def estimate(
    shapes: Iterable[Sequence[int]],
    optimizer: str | type[SignOptimizer] = "SignAdamPP",
    *,
    state_dtype: str | torch.dtype | tuple[str | torch.dtype, ...] | None = None,
    param_storage: str = "nearest",
    param_dtype: str = "fp32",
    grad_dtype: str | None = None,
    gradients: str = "all",
    largest: int | None = None,
    **hyperparameters: Any,
) -> Estimate:
    """Bytes of all tensors while a model of these shapes is trained, once the first step has been taken.

    Args:
        shapes: of the parameters.
        optimizer: a class of this package, or its name.
        state_dtype, param_storage: as its constructor takes them; None for the fp32 that it starts with.
        param_dtype: "fp32", "bf16" or "fp16".
        grad_dtype: the same for the gradients; None for the parameters'.
        gradients: "all" at once, or "released": only the largest, see :func:`signadam_ext.release_gradients`.
        largest: elements of the largest gradient that exists by itself; None for that of the shapes.
        hyperparameters: others that decide what is kept: ``second_moment``, ``confidence``, ``caution``, ``betas``.

    Raises:
        TypeError, ValueError: names that do not exist, and forms that do not go together, as from the constructor.

    Example:
        >>> shapes = [(50257, 768), (768, 768)]
        >>> found = estimate(shapes, "SignAdamPP", state_dtype="int2", param_storage="stochastic", param_dtype="bf16")
        >>> found.moments, found.each(found.moments)
        (9796800, 0.25)
    """
    numels = [math.prod(shape) for shape in shapes]
    found = kept(optimizer, state_dtype, param_storage, param_dtype, grad_dtype, hyperparameters)
    checks.one_of("gradients", gradients, GRADIENTS)
    if gradients == "all":
        return found.estimate(numels, None)
    return found.estimate(numels, max(numels, default=0) if largest is None else largest)


def bytes_per_parameter(
    optimizer: str | type[SignOptimizer] = "SignAdamPP",
    *,
    state_dtype: str | torch.dtype | tuple[str | torch.dtype, ...] | None = None,
    param_storage: str = "nearest",
    param_dtype: str = "fp32",
    grad_dtype: str | None = None,
    **hyperparameters: Any,
) -> dict[str, float]:
    """Bytes of ``weights``, ``residual``, ``moments`` and ``gradients`` for each parameter of a large tensor.

    Arguments and errors as of :func:`estimate`.

    Example:
        >>> bytes_per_parameter("AdamW", param_dtype="bf16", param_storage="master")
        {'weights': 2.0, 'residual': 4.0, 'moments': 8.0, 'gradients': 2.0}
    """
    # A whole number of runs and of bytes of every form, so that nothing is padded.
    numel = 1 << 20
    found = kept(optimizer, state_dtype, param_storage, param_dtype, grad_dtype, hyperparameters).estimate(
        [numel], None
    )
    return {part: found.each(getattr(found, part)) for part in ("weights", "residual", "moments", "gradients")}


def adamw(
    shapes: Iterable[Sequence[int]], param_dtype: str = "fp32", *, grad_dtype: str | None = None, mixed: bool = False
) -> Estimate:
    """Bytes with ``torch.optim.AdamW``, whose moments have the dtype of what it updates.

    Args:
        shapes: of the parameters.
        param_dtype: "fp32", "bf16" or "fp16".
        grad_dtype: the same for the gradients, all of which exist at once; None for the parameters'.
        mixed: whether it updates fp32 copies of the parameters, as mixed precision usually does.
    """
    numels = [math.prod(shape) for shape in shapes]
    dtype = checks.look_up("param_dtype", param_dtype, DTYPES)
    grad = dtype if grad_dtype is None else checks.look_up("grad_dtype", grad_dtype, DTYPES)
    mixed = mixed and dtype != torch.float32
    # fp16 is no form of ours; all that counts here is its width.
    form = FP32 if mixed or dtype == torch.float32 else BF16
    found = Kept(dtype, torch.float32 if mixed else None, (form, form), torch.float32.itemsize, grad)
    return found.estimate(numels, None)


def even_shapes(parameters: int, tensors: int) -> list[tuple[int]]:
    """So many parameters in so many tensors, as even as can be: for want of the true shapes.

    Raises:
        ValueError: fewer parameters than tensors.
    """
    if not 0 < tensors <= parameters:
        raise ValueError(f"tensors={tensors}: must be from 1 to the number of parameters, {parameters}")
    size, larger = divmod(parameters, tensors)
    return [(size + 1,)] * larger + [(size,)] * (tensors - larger)


def _name(optimizer: str) -> str:
    """The name as it is written, of one in any case."""
    return {name.lower(): name for name in OPTIMIZERS}.get(optimizer.lower(), optimizer)


def kept(
    optimizer: str | type[SignOptimizer],
    state_dtype: str | torch.dtype | tuple[str | torch.dtype, ...] | None,
    param_storage: str,
    param_dtype: str,
    grad_dtype: str | None,
    hyperparameters: Mapping[str, Any],
) -> Kept:
    """What training keeps of each tensor; arguments and errors as of :func:`estimate`."""
    cls = checks.look_up("optimizer", _name(optimizer), OPTIMIZERS) if isinstance(optimizer, str) else optimizer
    param = checks.look_up("param_dtype", param_dtype, DTYPES)
    grad = param if grad_dtype is None else checks.look_up("grad_dtype", grad_dtype, DTYPES)
    # The base class takes its defaults from its subclasses, which all have them.
    group = {**cls([torch.empty(0)]).defaults, "param_storage": param_storage}  # type: ignore[call-arg]
    # The old name of param_storage comes with the others.
    named = (
        names_today(hyperparameters)
        if state_dtype is None
        else {"state_dtype": state_dtype, **names_today(hyperparameters)}
    )
    for name, value in named.items():
        if name not in group:
            known = ", ".join(sorted(group.keys() & {"state_dtype", *cls.HYPERPARAMETERS}))
            raise ValueError(f"{name}={value!r}: {cls.__name__} has no such argument, only {known}")
        group[name] = value
    group = checked(cls, group)
    tensors.param_storage("a parameter", group["param_storage"], param)
    rule = rule_of(cls, group)
    effective = effective_param_storage(group["param_storage"], param)
    # The step count, and what a threshold is made of.
    scalars = STEP_DTYPE.itemsize + (torch.float64.itemsize if rule.threshold_state is not None else 0)
    return Kept(param, RESIDUALS[effective][1] if effective in RESIDUALS else None, rule.forms(group), scalars, grad)


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model").add_argument
    model("--params", type=_count, metavar="N", help="how many parameters: 7e9, 124_439_808")
    model("--tensors", type=_count, metavar="N", help="in how many tensors, taken to be of equal size (default 1)")
    model("--shapes", type=_shapes, metavar="S", help="instead of both, exactly: 50257x768,1024x768,12*768x3072, ...")
    model("--param-dtype", default="bf16", metavar="D", help=f"{', '.join(DTYPES)} (default %(default)s)")
    model("--grad-dtype", metavar="D", help="the same for gradients (default: the parameters')")
    model("--gradients", default="all", metavar="G", help="all at once (default), or released inside backward")
    model("--largest", type=_count, metavar="N", help="elements of the largest tensor, for released gradients")
    add = parser.add_argument_group("the optimizer").add_argument
    add("--optimizer", default="SignAdamPP", metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (default %(default)s)")
    add("--state", metavar="D[,D]", help=f"state_dtype: {', '.join(BOUNDED)}; or one for each moment")
    storages = ", ".join(PARAM_STORAGES)
    add("--param-storage", default="nearest", metavar="S", help=f"{storages} (default %(default)s)")
    add("--weights", action=_Renamed, dest="param_storage", help=argparse.SUPPRESS)
    add("--betas", type=_betas, metavar="B,B", help="where they decide what may be stored: of LaProp")
    add("--caution", metavar="C", help="exact or delayed")
    add("--second-moment", metavar="M", help="of SignAdam: exact or analytic")
    add("--confidence", metavar="C", help="of SignAdamPP: fixed, adaptive, adaptive_delayed or sparsity")
    add("--amsgrad", action="store_true", default=None, help="of Adam and AdamW")
    add("--variance", metavar="V", help="of MSVAG and AdamStar: ema or minibatch")
    machine = parser.add_argument_group("the machine").add_argument
    machine("--gpus", type=_count, default=1, metavar="N", help="that share all of it evenly (default %(default)s)")


def table(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        TypeError, ValueError: arguments that make no sense, or not together.
    """
    shapes = _model(options)
    others = {
        name: getattr(options, name)
        for name in ("betas", "caution", "second_moment", "confidence", "amsgrad", "variance")
    }
    if options.confidence == "sparsity":
        others["target"] = 0.5  # any will do
    found = estimate(
        shapes,
        options.optimizer,
        state_dtype=tuple(options.state.split(",")) if options.state and "," in options.state else options.state,
        param_storage=options.param_storage,
        param_dtype=options.param_dtype,
        grad_dtype=options.grad_dtype,
        gradients=options.gradients,
        largest=options.largest,
        **{name: value for name, value in others.items() if value is not None},
    )
    how = "all at once" if options.gradients == "all" else "the largest alone"
    parts = [
        (f"weights, {options.param_dtype}", found.weights),
        ("master copies" if options.param_storage == "master" else "low bits of weights", found.residual),
        ("moments", found.moments),
        ("scalars of each tensor", found.scalars),
        ("without gradients", found.resident),
        (f"gradients, {options.grad_dtype or options.param_dtype}, {how}", found.gradients),
        ("with gradients", found.total),
    ]
    gpus = options.gpus
    rows = [["", "bytes/parameter", "GB", "GiB", *[f"GB on each of {gpus} GPUs"] * (gpus > 1)]]
    rows += [_row(name, nbytes, found, gpus) for name, nbytes in parts if nbytes]
    for name, other in _adamw(shapes, options.param_dtype):
        rows.append([""] * len(rows[0]))
        rows.append(_row(f"{name}, without gradients", other.resident, other, gpus))
        rows.append(_row(f"{name}, with all {options.param_dtype} gradients", other.total, other, gpus))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    tensors = f"{len(shapes):,} tensors" if len(shapes) > 1 else "one tensor"
    if options.shapes is None and len(shapes) > 1:
        tensors += " of equal size"
    title = f"{_name(options.optimizer)}, {found.parameters:,} parameters in {tensors}"
    notes = [f"Not counted: {NOT_COUNTED}."] + [f"On each GPU: {DIVIDED}."] * (gpus > 1)
    return "\n".join([title, "", *(line.rstrip() for line in lines), "", *(textwrap.fill(note, 100) for note in notes)])


class _Renamed(argparse.Action):
    """An option by the name of an earlier version."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        warn_user(f"{option} is now called --{self.dest.replace('_', '-')}", DeprecationWarning)
        setattr(namespace, self.dest, values)


def _row(name: str, nbytes: int, found: Estimate, gpus: int) -> list[str]:
    each = [f"{nbytes / gpus / 1e9:.3f}"] * (gpus > 1)
    return [name, f"{found.each(nbytes):.5g}", f"{nbytes / 1e9:.3f}", f"{nbytes / 2**30:.3f}", *each]


def _adamw(shapes: list[tuple[int, ...]], param_dtype: str) -> list[tuple[str, Estimate]]:
    plain = [(f"AdamW in {param_dtype}", adamw(shapes, param_dtype))]
    if param_dtype == "fp32":
        return plain
    return [("AdamW, fp32 master copies and moments", adamw(shapes, param_dtype, mixed=True)), *plain]


def _model(options: argparse.Namespace) -> list[tuple[int, ...]]:
    if options.shapes is not None:
        if options.params is not None or options.tensors is not None:
            raise ValueError(
                "--shapes says how many parameters and tensors there are: leave out --params and --tensors"
            )
        return list(options.shapes)
    if options.params is None:
        raise ValueError("give --params or --shapes")
    if options.gradients == "released" and options.largest is None:
        raise ValueError("--gradients released needs --largest or --shapes: only the largest gradient exists by itself")
    if options.largest is not None and options.largest > options.params:
        raise ValueError(f"--largest {options.largest}: more elements than the model has parameters, {options.params}")
    return [*even_shapes(options.params, options.tensors or 1)]


def _count(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number such as 7e9, not {text!r}")
    return int(text) if text.replace("_", "").isdecimal() else int(value)


def _betas(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers such as 0.9,0.95, not {text!r}") from None


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for word in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(?:(\d+)\*)?(\d+(?:x\d+)*)", word)
        if match is None:
            raise argparse.ArgumentTypeError(f"{word!r} is no shape: write 768x3072, or 12*768x3072 for twelve of them")
        shapes += [tuple(map(int, match[2].split("x")))] * int(match[1] or 1)
    return shapes
