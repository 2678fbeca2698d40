"""Steps that begin on the device: nothing of them waits for the host, and a CUDA graph can replay them.

Where only the device knows whether a step is taken (a GradScaler has found infinities, a norm is not finite), or where
nobody calls ``step()`` any more because a graph replays it, the host can neither count steps nor make scalars of the
count. So step counts lie on the device, and kernels make scalars, random bits' keys and the list of gradients there.
Where a step is skipped, that list is empty, and the kernels that update find nothing to do.

The device can refuse no count. The host reads counts where a plan is made, and a plan holds only as long as torch has
not written to one of them: what is no number of steps is refused there. Between replays of a graph nobody looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import DeviceKernels
from ..backends.bucket import Bucket
from ..backends.device import StreamGuarded, is_capturing, is_current, to_device
from ..backends.reference import rules
from ..core.program import Program, pack_operations, program_of
from ..core.rule import Group
from ..core.shards import Sharding
from .agreement import added_up, sharers_of
from .decision import CLIP_EPS, Conditions


class DeviceBucket:
    """A bucket of a plan whose steps begin on the device.

    Args:
        bucket: all of whose step counts lie on its device.
        kernels: that update it.
    """

    def __init__(self, bucket: Bucket, kernels: DeviceKernels) -> None:
        self.bucket, self.kernels = bucket, kernels
        device = bucket.device
        self._groups = sorted({entry.group for entry in bucket.entries})
        self._grads = _Upload(torch.zeros(len(bucket.entries), dtype=torch.int64, device=device))
        self._numbers = to_device(
            torch.tensor([e.index for e in bucket.entries], dtype=torch.int32, device="cpu"), device
        )
        # An entry lets its tensors go between steps; a plan holds as long as they stay where they are.
        self._steps = [0 if entry.step is None else entry.step.data_ptr() for entry in bucket.entries]
        self._formulas: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, scalar_sets: Sequence[Any]) -> None:
        raise RuntimeError("the host makes no scalars for a step that begins on the device")

    def wait(self) -> None:
        """Waits until the kernels of the last step are done."""
        if self._done is not None:
            self._done.synchronize()

    def send(self, addresses: Sequence[int], groups: Sequence[Group]) -> None:
        """Sends what this step brings: where gradients lie, and hyperparameters."""
        if (formulas := [_formulas_of(groups[index]) for index in self._groups]) != self._formulas:
            self._trace(groups)
            self._formulas = formulas
        self._grads.send([addresses[entry.index] for entry in self.bucket.entries])
        rows: list[list[float]] = []
        targets, sources = [], []
        for row, (program, index) in enumerate(zip(self._programs, self._groups, strict=True)):
            numbers = []
            for column, value in enumerate(program.values):
                source = value.source(groups[index])
                if isinstance(source, Tensor) and source.device.type != "cpu" and value.function is None:
                    targets.append(self._values.target[row, column])
                    sources.append(source.detach().reshape(()))
                    numbers.append(0.0)
                else:
                    numbers.append(value.of(groups[index]))
            rows.append([*numbers, *program.constants, *[0.0] * (self._width - program.width)])
        self._values.send(rows)
        if targets:
            torch._foreach_copy_(targets, sources)

    def norm(self, totals: Tensor) -> None:
        """Starts what leaves each gradient's sum of squares in ``totals``, at the parameter's number."""
        self.kernels.norm(self._grads.target, totals, self._numbers)

    def run(self, control: Tensor) -> None:
        """Starts what begins the step and takes it."""
        self.kernels.begin(
            self._entries, self._operations, self._results, self._values.target, control, self._grads.target
        )
        self.kernels.update()
        if self.bucket.chunk_statistics is not None and self.bucket.device.type == "cuda" and not is_capturing():
            self._done = torch.cuda.current_stream(self.bucket.device).record_event(self._done)

    def _trace(self, groups: Sequence[Group]) -> None:
        """Makes programs of the groups' formulas."""
        if self.bucket.device.type == "cuda" and is_capturing():
            raise RuntimeError(
                "a hyperparameter that chooses formulas has changed: take a step outside the graph first"
            )
        device = self.bucket.device
        self._programs: list[Program] = [program_of(self.bucket.rule, groups[index]) for index in self._groups]
        distinct = list(dict.fromkeys(self._programs))
        operations, results = pack_operations(distinct)
        self._operations, self._results = to_device(operations, device), to_device(results, device)
        self._width = max(program.width for program in self._programs)
        shape = (len(self._groups), self._width)
        self._values = _Upload(torch.zeros(shape, dtype=torch.float64, device=device))
        rows = {index: row for row, index in enumerate(self._groups)}
        entries = []
        for entry, step in zip(self.bucket.entries, self._steps, strict=True):
            row = rows[entry.group]
            seed = entry.seed - (1 << 64) if entry.seed >> 63 else entry.seed
            number = distinct.index(self._programs[row])
            entries.append([step, seed, entry.param_id, number, row])
        self._entries = to_device(torch.tensor(entries, dtype=torch.int64, device="cpu"), device)
        self._guard = StreamGuarded(
            device,
            *(self._grads.target, self._numbers, self._values.target, self._entries, self._operations, self._results),
            *self.kernels.buffers,
            *self.bucket.observations(),
        )

    def use(self) -> None:
        """Makes the stream that is current on the device wait for what lies there."""
        if self._formulas is not None:
            self._guard.use()


class DeviceSteps:
    """All buckets of such a plan.

    Args:
        buckets: with the kernels that update each.
        params: how many parameters there are.
        shardings: how DTensors are sharded, by their numbers.

    Attributes:
        skipped: 0-dim int64 on the device of the first bucket, counts steps that were left out.
        norm: 0-dim float64 there, of all gradients at the last step.
    """

    def __init__(
        self, buckets: Sequence[tuple[Bucket, DeviceKernels]], params: int, shardings: Mapping[int, Sharding]
    ) -> None:
        self.buckets = [DeviceBucket(bucket, kernels) for bucket, kernels in buckets]
        devices = list(dict.fromkeys(bucket.device for bucket, _ in buckets))
        self._device = devices[0]
        self._totals = {device: torch.zeros(params, dtype=torch.float64, device=device) for device in devices}
        self._controls = {device: torch.tensor([1.0, 0.0], dtype=torch.float64, device=device) for device in devices}
        self.skipped = torch.zeros((), dtype=torch.int64, device=self._device)
        self.norm = torch.zeros((), dtype=torch.float64, device=self._device)
        # Those of one mesh, by where they lie.
        self._shared = {
            group: torch.tensor(indices, device=self._device) for group, indices in sharers_of(shardings).items()
        }
        self._guards = [
            StreamGuarded(device, self._totals[device], self._controls[device], self.skipped, self.norm)
            for device in devices
        ]

    def counting_on(self, before: Tensor | None) -> Tensor:
        """``skipped``, with what an earlier plan has counted."""
        if before is not None and before is not self.skipped:
            self.skipped.add_(before.to(self._device, non_blocking=True))
        return self.skipped

    @torch.no_grad()
    def run(self, addresses: Sequence[int], groups: Sequence[Group], conditions: Conditions) -> None:
        """Starts a step.

        Args:
            addresses: of each parameter's gradient, 0 where there is none.
            groups: the parameter groups, in numbers or, on the device, tensors of one.
            conditions: under which the step is taken.
        """
        for guard in self._guards:
            guard.use()
        for own in self.buckets:
            with is_current(own.bucket.device):
                own.use()
                own.send(addresses, groups)
        self._decide(conditions)
        for own in self.buckets:
            with is_current(own.bucket.device):
                own.run(self._controls[own.bucket.device])

    def _decide(self, conditions: Conditions) -> None:
        """As :func:`signadam_ext.engine.decision.decide`, by operations on the device."""
        device = self._device

        def number(value: Any) -> Tensor:
            given = (
                value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64, device="cpu")
            )
            return given.detach().reshape(()).to(device, torch.float64, non_blocking=True)

        one = torch.ones((), dtype=torch.float64, device=device)
        factor = one if conditions.scale is None else one / number(conditions.scale)
        skips = torch.zeros((), dtype=torch.bool, device=device)
        if conditions.found_inf is not None:
            skips = number(conditions.found_inf) != 0
        if conditions.max_norm is not None:
            norm = rules.double_root(rules.ordered_sum(self._whole_totals())) * factor
            self.norm.copy_(norm)
            skips = skips | ~torch.isfinite(norm)
            clipping = torch.full_like(one, conditions.max_norm) / (norm + CLIP_EPS)
            factor = factor * torch.minimum(one, clipping)
        if conditions.scale is not None:
            skips = skips | ~torch.isfinite(factor.float())
        self.skipped.add_(skips)
        control = torch.stack([factor, skips.double()])
        for own in self._controls.values():
            own.copy_(control, non_blocking=True)

    def _whole_totals(self) -> Tensor:
        """The sum of squares of each gradient, over all ranks that have a part of it."""
        for totals in self._totals.values():
            totals.zero_()
        for own in self.buckets:
            with is_current(own.bucket.device):
                own.norm(self._totals[own.bucket.device])
        totals = self._totals[self._device]
        for device, others in self._totals.items():
            if device != self._device:  # of other parameters: one of the two numbers is 0
                totals.add_(others.to(self._device, non_blocking=True))
        for group, indices in self._shared.items():
            totals.index_copy_(0, indices, added_up(totals.index_select(0, indices), group))
        return totals


class _Upload:
    """A tensor on the device that the host fills at each step.

    A graph that is captured reads its own copy of the numbers, from memory that nobody writes to again.
    """

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self._captured: list[Tensor] = []
        self._spare: Tensor | None = None
        self._make_spare()

    def _make_spare(self) -> None:
        if self.target.device.type == "cuda" and self._spare is None:
            self._spare = torch.empty(self.target.shape, dtype=self.target.dtype, device="cpu", pin_memory=True)

    def send(self, numbers: Any) -> None:
        """Copies numbers of the target's shape.

        Raises:
            RuntimeError: a second graph is captured without a step between.
        """
        host = torch.tensor(numbers, dtype=self.target.dtype, device="cpu").reshape(self.target.shape)
        if self.target.device.type == "cpu":
            self.target.copy_(host)
        elif is_capturing():
            if self._spare is None:
                raise RuntimeError("two graphs are captured without a step between them: take one outside of a graph")
            kept, self._spare = self._spare, None
            self._captured.append(kept.copy_(host))
            self.target.copy_(kept, non_blocking=True)
        else:
            self._make_spare()
            self.target.copy_(host.pin_memory(), non_blocking=True)


def _formulas_of(group: Group) -> Any:
    """What of a group is part of its programs: everything but numbers, and which hyperparameters are numbers."""
    return [
        (name, None if isinstance(value, (float, int, Tensor)) and not isinstance(value, bool) else _kind(value))
        for name, value in group.items()
        if name != "params" and name != "param_names"
    ]


def _kind(value: Any) -> Any:
    return len(value) if isinstance(value, tuple) and not any(isinstance(item, str) for item in value) else value
