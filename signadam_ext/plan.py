"""From lists of tensors to launches: checked once, cached, and brought up to date with each step.

A plan holds every parameter of an optimizer, cut into buckets that share a launch: same device, same rule. Building it
looks at each tensor; a step only compares addresses and reads gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from ._extension import load
from .backends.device import Resident, refuse_capture
from .confidence import backend_for, name_of
from .dtypes import FORMATS
from .observed import COLUMNS
from .reader import ListReader, make_reader
from .rule import Group, Rule
from .storage import WEIGHTS, Form, effective_weights

_C = load()


@dataclass(slots=True)
class State:
    """What a parameter's step reads and writes beside the parameter, as stored.

    Attributes:
        moments: in the forms of its item.
        beside: low bits or master copy of the parameter, with its strides, or None.
        gate: 0-dim float64 on the parameter's device, what the threshold is made of, or None.
        step: 0-dim fp32 on the CPU, the number of steps taken; None where nobody counts.
    """

    moments: tuple[Tensor, ...]
    beside: Tensor | None = None
    gate: Tensor | None = None
    step: Tensor | None = None


@dataclass(slots=True)
class Entry:
    """One parameter that takes part, and its state.

    Attributes:
        slot: index of the parameter in the plan, and of its gradient in the reader.
        param: the parameter itself.
        work: what kernels update: ``param``, or a dense copy when its elements do not fill a run of memory.
        grad_dtype: dtype of its gradient.
        forms, moments: how the moments are stored, and the stored tensors.
        weights, beside: how the parameter is stored, and what lies beside it.
        variance: of the gradient, with the strides of ``work``, for a rule that reads it: ``param.grad_variance``, or a
            buffer into which every step copies it; None where it has not been asked for yet.
        gate, step: as in :class:`State`.
        group: index of its parameter group.
        seed, number, first: what its random bits are made of: the seed, the number under which ``state_dict()`` lists
            the parameter, and the index of the first element in the unsharded tensor.
    """

    slot: int
    param: Tensor
    work: Tensor
    grad_dtype: torch.dtype
    forms: tuple[Form, ...]
    moments: tuple[Tensor, ...]
    weights: str
    beside: Tensor | None
    variance: Tensor | None
    gate: Tensor | None
    step: Tensor | None
    group: int
    seed: int
    number: int
    first: int

    def operands(self) -> list[Tensor | None]:
        """What kernels call ``m``, ``v`` and ``x``."""
        found: list[Tensor | None] = [*self.moments, None, None, None][:3]
        if self.variance is not None:
            found[2] = self.variance
        return found


@dataclass(slots=True)
class Bucket:
    """Entries of one launch, with their table in C++; ``gappy`` are those whose ``work`` is a copy.

    ``observed``, where it is wanted, holds a row of :data:`signadam_ext.observed.COLUMNS` for each chunk.
    """

    rule: Rule
    device: torch.device
    entries: list[Entry]
    observes: bool
    gappy: list[Entry] = field(init=False)
    table: Any = field(init=False)
    observed: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.gappy = [entry for entry in self.entries if entry.work.data_ptr() != entry.param.data_ptr()]
        self.table = _C.Table(rows_by_step=self.rule.uses_step)
        for entry in self.entries:
            addresses = [0 if x is None else x.data_ptr() for x in entry.operands()]
            formats = [form.number for form in entry.forms] + [FORMATS[torch.float32]] * 3
            self.table.add(
                param=entry.work.data_ptr(),
                low=0 if entry.beside is None else entry.beside.data_ptr(),
                exp_avg=addresses[0],
                exp_avg_sq=addresses[1],
                third=addresses[2],
                gate=0 if entry.gate is None else entry.gate.data_ptr(),
                step=0 if entry.step is None else entry.step.data_ptr(),
                numel=entry.work.numel(),
                first=entry.first,
                param_format=FORMATS[entry.work.dtype],
                grad_format=FORMATS[entry.grad_dtype],
                exp_avg_format=formats[0],
                exp_avg_sq_format=formats[1],
                third_format=formats[2],
                weights=WEIGHTS[entry.weights],
                group=entry.group,
                slot=entry.slot,
                seed=entry.seed,
                number=entry.number,
            )
        self.table.finish(statistics=self.rule.statistics != "NONE")
        if self.observes:
            shape = (self.table.chunks, len(COLUMNS))
            self.observed = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def observations(self) -> tuple[Tensor, ...]:
        return () if self.observed is None else (self.observed,)


@dataclass(slots=True)
class Item:
    """A parameter as it is handed to a plan.

    Only where it takes part ``check_state`` is called, which raises on state that does not fit, and then, when all
    parameters have passed, ``state``, which makes what is missing. ``variance`` gives what a rule that reads it finds
    beside the gradient. The rest is as in :class:`Entry`.
    """

    label: str
    param: Tensor
    group: int
    rule: Rule
    backend: str
    takes_part: bool
    check_state: Callable[[], None]
    state: Callable[[], State]
    watched_state: Callable[[], dict[str, Any] | None]
    forms: tuple[Form, ...]
    variance: Callable[[], Any] = lambda: None
    weights: str = "as_is"
    seed: int = 0
    number: int = 0
    first: int = 0


class Plan:
    """All that a step needs to know, for one list of parameters.

    Args:
        items: every parameter, in order.
        groups: the parameter groups, read anew each step.
        grads: gradients beside the parameters, for the functional forms; None reads ``param.grad``.
        observes: whether steps gather what ``optimizer.statistics()`` tells.

    Raises:
        TypeError, ValueError: a tensor that cannot be served; nothing has been written then.
    """

    __slots__ = (
        "__weakref__",
        "_buffers",
        "_copies",
        "_given",
        "_grad_dtypes",
        "_has_checks",
        "_reader",
        "_strides",
        "_variances",
        "_versioned",
        "entries",
        "groups",
        "labels",
        "launches",
        "params",
        "round",
    )

    def __init__(
        self,
        items: Sequence[Item],
        groups: Sequence[Group],
        grads: Sequence[Tensor | None] | None = None,
        observes: bool = False,
    ):
        self.groups = groups
        self.round = 0  # the number of the optimizer's step that this plan has last taken
        self.labels = [item.label for item in items]
        self.params = [item.param for item in items]
        self._given = grads
        self._copies: dict[int, Tensor] = {}
        # Before a plan or state is made, which a capture would take into its graph's memory.
        refuse_capture(
            {x.param.device for slot, x in enumerate(items) if x.takes_part or self._raw_grad(slot) is not None}
        )
        chosen: list[backends.Backend | None] = []
        for slot, item in enumerate(items):
            grad = self._raw_grad(slot)
            if grad is not None:
                checks.gradient(item.label, grad, item.param)
            if not (item.takes_part or grad is not None):
                chosen.append(None)
                continue
            checks.parameter(item.label, item.param)
            item.check_state()
            if item.rule.reads_variance and grad is not None:
                checks.variance(item.label, item.variance(), item.param)
            confidence = item.rule.confidence
            wanted = item.backend
            if confidence is not None:
                wanted = backend_for(confidence, item.backend)
                if (reason := backends.get(wanted).unusable(item.param.device)) is not None:
                    raise RuntimeError(
                        f"confidence={name_of(confidence)} needs backend={wanted!r}, which cannot serve {item.label} "
                        f"on {item.param.device}: {reason}; a Python function of torch operations runs everywhere"
                    )
            chosen.append(backends.choose(wanted, item.param.device, item.label))

        self.entries: list[Entry] = []
        self._variances: list[tuple[Item, Entry, int | None]] = []  # None: a buffer of ours
        self._strides: list[tuple[int, ...]] = [()] * len(items)
        self._grad_dtypes: list[torch.dtype | None] = [None] * len(items)
        waves = _waves([None if backend is None else item.param for item, backend in zip(items, chosen, strict=True)])
        buckets: dict[tuple[Any, ...], list[Entry]] = {}
        for slot, (item, backend) in enumerate(zip(items, chosen, strict=True)):
            if backend is None:
                continue
            grad = self._raw_grad(slot)
            dense = checks.is_dense(item.param)
            work = item.param if dense else torch.empty_like(item.param)
            state = item.state()
            entry = Entry(
                slot,
                item.param,
                work,
                item.param.dtype if grad is None else grad.dtype,
                item.forms,
                state.moments,
                effective_weights(item.weights, item.param.dtype),
                state.beside,
                _variance(item, work, grad is not None) if item.rule.reads_variance else None,
                state.gate,
                # Should someone swap the tensor's data, the table's address stays valid.
                None if state.step is None else state.step.detach(),
                item.group,
                item.seed,
                item.number,
                item.first,
            )
            if item.rule.reads_variance:
                given = item.variance()
                is_given = given is not None and entry.variance is given
                self._variances.append((item, entry, given.data_ptr() if is_given else None))
            self._strides[slot] = work.stride()
            self._grad_dtypes[slot] = entry.grad_dtype
            self.entries.append(entry)
            formats = (work.dtype, entry.grad_dtype, entry.forms, entry.weights) if backend.splits_formats else None
            key = (backend, item.param.device, item.rule, waves[slot], formats)
            buckets.setdefault(key, []).append(entry)

        ordered = sorted(buckets.items(), key=lambda keyed: keyed[0][3])
        self.launches = []
        for (backend, device, rule, *_), entries in ordered:
            bucket = Bucket(rule, device, entries, observes)
            self.launches.append((bucket, backend.prepare(bucket, self.grad)))
        self._buffers = self._own_buffers()
        self._has_checks = any(isinstance(launch, backends.CheckedLaunch) for _, launch in self.launches)
        self._versioned = [entry.param for entry in self.entries if not entry.param.is_inference()]
        self._reader = make_reader() if grads is None else ListReader(grads)
        for slot, item in enumerate(items):
            dtype = self._grad_dtypes[slot]
            watched = item.watched_state() if dtype is not None else None
            self._reader.watch(item.param, item.group, self._strides[slot], dtype, watched)

    def _own_buffers(self) -> list[Resident]:
        """Copies of parameters and variances, by device: a later step may run on another stream than made them."""
        made: dict[torch.device, list[Tensor]] = {}
        for bucket, _ in self.launches:
            made.setdefault(bucket.device, []).extend(entry.work for entry in bucket.gappy)
        for _, entry, address in self._variances:
            if address is None and entry.variance is not None:
                made.setdefault(entry.param.device, []).append(entry.variance)
        return [Resident(device, *tensors) for device, tensors in made.items() if device.type == "cuda" and tensors]

    def grad(self, slot: int) -> Tensor:
        """The gradient of a slot in the memory order of its parameter, for backends that take tensors."""
        found = self._copies.get(slot)
        if found is None:
            found = self._raw_grad(slot)
        assert found is not None
        return found

    def read(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any] | None) -> bool:
        """Reads this step's gradients; False when the plan no longer holds and a new one must be made.

        Args:
            param_groups: as the optimizer holds them now.
            state: the optimizer's, to be looked through for what has moved; None when nobody else can have touched it.
        """
        self._copies.clear()
        for buffers in self._buffers:
            buffers.use()
        self.groups = param_groups
        odd = self._reader.read(param_groups, state)
        return odd is not None and (not odd or self._adopt(odd)) and (not self._variances or self._read_variances())

    @torch.no_grad()
    def _read_variances(self) -> bool:
        """Brings the variances of this step's gradients where kernels read them; False where one has moved."""
        gradients = self._reader.addresses()
        present = [found for found in self._variances if gradients[found[1].slot]]
        for item, entry, address in present:
            given = item.variance()
            checks.variance(item.label, given, item.param)
            if entry.variance is None:
                return False
            if address is not None and not (_is_readable(given, entry.work) and given.data_ptr() == address):
                return False
        for item, entry, address in present:
            if address is None:
                assert entry.variance is not None
                entry.variance.copy_(item.variance())
        return True

    @torch.no_grad()
    def _adopt(self, odd: list[int]) -> bool:
        """Makes gradients usable that cannot be read where they lie; False where only a new plan will do."""
        for slot in odd:
            grad = self._raw_grad(slot)
            assert grad is not None
            checks.gradient(self.labels[slot], grad, self.params[slot])
            if grad.dtype != self._grad_dtypes[slot]:
                return False
            if grad.is_neg() or not checks.same_strides(grad, self._strides[slot]):
                copy = torch.empty_strided(grad.shape, self._strides[slot], dtype=grad.dtype, device=grad.device)
                self._copies[slot] = grad = copy.copy_(grad)
            self._reader.replace(slot, grad.data_ptr() or 1)  # without elements it has no address, but takes part
        return True

    def run(self) -> None:
        """Takes the step whose gradients :meth:`read` has found."""
        self.round = 0  # until it is taken
        source = self._reader.source
        prepared = []
        for bucket, launch in self.launches:
            rows = [_row(bucket.rule, self.groups[group], t) for group, t in bucket.table.begin(source)]
            if rows:
                prepared.append((bucket, launch, rows))
        if self._has_checks:
            for _, launch, rows in prepared:
                if isinstance(launch, backends.CheckedLaunch):
                    launch.check(rows)
        for bucket, launch, rows in prepared:
            # Around each launch by itself: a parameter may share memory with one of an earlier launch.
            gappy = self._present(bucket.gappy)
            for entry in gappy:
                entry.work.copy_(entry.param.detach())
            launch(rows)
            bucket.table.commit()
            for entry in gappy:
                entry.param.detach().copy_(entry.work)
        # Raw writes go unnoticed by autograd until the version counters say so.
        torch.autograd.graph.increment_version(self._written())
        self._reader.release()
        self._copies.clear()

    def _present(self, entries: list[Entry]) -> list[Entry]:
        if not entries:
            return entries
        gradients = self._reader.addresses()
        return [entry for entry in entries if gradients[entry.slot]]

    def _written(self) -> list[Tensor]:
        if self._reader.present() == len(self.entries):
            return self._versioned
        return [entry.param for entry in self._present(self.entries) if not entry.param.is_inference()]

    def _raw_grad(self, slot: int) -> Tensor | None:
        return self.params[slot].grad if self._given is None else self._given[slot]


def _variance(item: Item, work: Tensor, present: bool) -> Tensor | None:
    """What kernels read the variance of the gradient from."""
    if not present:
        return None
    given = item.variance()
    return given if _is_readable(given, work) else torch.empty_like(work, dtype=torch.float32)


def _is_readable(variance: Tensor, work: Tensor) -> bool:
    return variance.dtype == torch.float32 and checks.same_strides(variance, work.stride()) and not variance.is_neg()


def _row(rule: Rule, group: Group, t: int) -> tuple[float, ...]:
    scalars = rule.row(group, t)
    return tuple(scalars.get(name, 0.0) for name in _C.SCALARS)


def _waves(params: Sequence[Tensor | None]) -> list[int]:
    """Parameters that share memory must not be updated by one launch: each goes to the one after the last it meets."""
    spans = []
    for i, param in enumerate(params):
        if param is not None and param.numel() > 0:
            last = sum(stride * (size - 1) for stride, size in zip(param.stride(), param.shape, strict=True))
            spans.append((param.data_ptr(), param.data_ptr() + (last + 1) * param.element_size(), i))
    # Runs of memory that spans cover together; nearly always each covers one of its own.
    runs: list[list[tuple[int, int, int]]] = []
    run_end = 0
    for span in sorted(spans):
        if span[0] >= run_end:
            runs.append([])
        runs[-1].append(span)
        run_end = max(run_end, span[1])

    waves = [0] * len(params)
    for run in runs:
        met: list[tuple[int, int, int]] = []
        for begin, end, i in sorted(run, key=lambda span: span[2]):
            waves[i] = 1 + max((waves[k] for b, e, k in met if b < end and begin < e), default=-1)
            met.append((begin, end, i))
    return waves
