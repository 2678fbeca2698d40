"""From lists of tensors to launches: checked once, cached, and brought up to date with each step.

A plan knows address, memory layout and format of every parameter of an optimizer, and groups parameters into buckets:
one bucket, of one device and rule, is one launch. Building a plan looks at each tensor; a step compares, and reads
gradients. Between two steps a plan holds no reference to a tensor of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.bucket import Bucket, Entry
from ..backends.device import StreamGuarded, refuse_capture
from ..core import memory_order, shards, tensors
from ..core.modifiers import with_factor
from ..core.native import compiled as _C
from ..core.rule import Group
from ..core.shards import Sharding
from .agreement import Agreement, Sharers, agree, group_of, needs_agreement
from .decision import Conditions, Decision, decide
from .device_steps import DeviceSteps
from .gradients import GradientReader, ListReader, make_reader
from .overlap import overlap_levels
from .participants import Item, Participant, can_begin_on_device, choose, entry_of, is_readable
from .step_lock import StepLock

#: A set of scalars of which a rule reads none, in the order of kernels.
_NO_SCALARS = dict.fromkeys(_C.SCALARS, 0.0)
_TAKEN, _NO_CONDITIONS = Decision(), Conditions()

#: A group of the optimizer's and the entries that it keeps of a step.
Kept = tuple[dict[str, Any], dict[str, Any]]


class Plan:
    """All that a step needs to know, for one list of parameters.

    Args:
        items: every parameter, in order.
        grads: gradients beside the parameters, for the functional forms; None reads ``param.grad``.
        state: the optimizer's, into which the first step puts what it lacks.
        observes: whether steps gather what ``optimizer.statistics()`` tells.
        on_device: whether steps shall begin on the device, where all backends and rules can do that.

    Raises:
        TypeError, ValueError: a tensor that cannot be served; nothing has been written then.
    """

    __slots__ = (
        "__weakref__",
        "_agreements",
        "_at_rest",
        "_bound",
        "_buffers",
        "_calls_confidence",
        "_copies",
        "_given_variances",
        "_grad_dtypes",
        "_has_factors",
        "_holds_all",
        "_pending",
        "_reader",
        "_scalar_groups",
        "_shardings",
        "_sharing",
        "_strides",
        "_variances",
        "_writes_by_torch",
        "device_steps",
        "entries",
        "is_first",
        "labels",
        "launches",
        "names",
        "owns",
        "round",
    )

    def __init__(
        self,
        items: Sequence[Item],
        grads: Sequence[Tensor | None] | None = None,
        state: Any = None,
        observes: bool = False,
        on_device: bool = False,
    ):
        self.round = 0  # the number of the optimizer's step that this plan has last taken
        self.owns = True  # whether it holds references to the tensors of a step
        self.labels = [item.label for item in items]
        self.names = [item.name or item.label for item in items]
        self.entries: list[Entry] = []
        self.launches: list[tuple[Bucket, backends.Launch]] = []
        # What scalars are made of: the index of a group, and what its learning rate is multiplied by. First the
        # groups as they are.
        self._scalar_groups = [(index, 1.0) for index in range(1 + max((item.group for item in items), default=0))]
        self._has_factors = False  # whether any learning rate is multiplied by another number than 1
        self._calls_confidence = any(item.rule.confidence is not None for item in items)
        self._agreements: dict[int, Agreement] = {}  # by id of the bucket
        self._copies: dict[int, Tensor] = {}
        self.is_first = True  # whether it has taken no step
        self._holds_all = True  # until the first release: new entries refer to all their tensors
        self._strides: list[tuple[int, ...]] = [()] * len(items)
        self._grad_dtypes: list[torch.dtype | None] = [None] * len(items)
        self._shardings = {index: item.sharding for index, item in enumerate(items) if item.sharding is not None}
        self._variances: list[Entry] = []
        self._at_rest: set[int] = set()
        self._sharing: list[Entry] = []  # those that the reference computes in a copy of their storage
        self._bound: list[Entry] = []  # those whose tensors a step asks for
        self._given_variances = None if grads is None else [item.variance for item in items]
        if grads is None:
            self._reader: GradientReader = make_reader()
            grads = [item.key.grad for item in items]
        else:
            self._reader = ListReader([item.param for item in items], grads, runs_user_code=self._calls_confidence)
        # Before a plan or state is made, which a capture would take into its graph's memory.
        refuse_capture({item.param.device for item, grad in zip(items, grads, strict=True) if grad is not None})
        chosen = choose(items, grads)
        on_device = on_device and can_begin_on_device(chosen)
        for found in chosen:
            found.place_step(on_device)
        self._pending = [
            (state, found.item.key, found.item.own_state, found.fitted.changes, found.fitted.removed)
            for found in chosen
            if found.fitted.changes or found.fitted.removed
        ]
        for found in chosen:
            self._enter(found)
        self.device_steps: DeviceSteps | None = None
        self._make_launches(chosen, observes, on_device)
        self._writes_by_torch = bool(self._bound)
        self._buffers = self._own_buffers()
        self._watch(items, chosen)

    def _enter(self, found: Participant) -> None:
        """Makes the entry of a parameter, and notes what a step will compare or read for it."""
        own = found.item.group, found.item.lr_factor
        if own not in self._scalar_groups:
            self._scalar_groups.append(own)
            self._has_factors = True
        entry = entry_of(found, self._scalar_groups.index(own))
        self.entries.append(entry)
        self._strides[found.index] = entry.strides
        self._grad_dtypes[found.index] = entry.grad_dtype
        if found.item.rule.reads_variance:
            self._variances.append(entry)
            if found.item.at_rest:
                self._at_rest.add(found.index)

    def _make_launches(self, chosen: Sequence[Participant], observes: bool, on_device: bool) -> None:
        """Cuts the entries into buckets, each with its launch; those that share memory go one after the other."""
        levels = overlap_levels([found.item.param for found in chosen])
        buckets: dict[tuple[Any, ...], list[tuple[Entry, Sharding | None]]] = {}
        for found, entry, level in zip(chosen, self.entries, levels, strict=True):
            formats = (entry.dense_param.dtype, entry.grad_dtype, entry.forms, entry.param_storage, entry.shard.run > 0)
            own = formats if found.backend.splits_formats else None
            rule, sharding = found.item.rule, found.item.sharding
            agreeing = group_of(sharding) if sharding is not None and needs_agreement(rule, sharding) else None
            key = (level, found.backend, entry.param.device, rule, own, agreeing)
            buckets.setdefault(key, []).append((entry, sharding))
        begun_there: list[tuple[Bucket, backends.DeviceKernels]] = []
        for key in sorted(buckets, key=lambda key: key[0]):
            _, backend, device, rule, _, agreeing = key
            entries = [entry for entry, _ in buckets[key]]
            agreement = None if agreeing is None else Agreement(rule, agreeing, [one for _, one in buckets[key]])
            bucket = Bucket(rule if agreement is None else agreement.rule, device, entries, observes)
            if on_device and isinstance(backend, backends.DeviceBackend):
                begun_there.append((bucket, backend.device_step(bucket)))
            else:
                self.launches.append((bucket, backend.prepare(bucket, self.grad)))
            if agreement is not None:
                self._agreements[id(bucket)] = agreement
                self._bound += [] if backend.name == "reference" else [e for e in bucket.entries if e.is_dense]
            if backend.name != "reference":
                self._bound += bucket.non_dense
                continue
            self._bound += bucket.entries
            if any(levels):
                self._sharing += bucket.entries
        if begun_there:
            self.device_steps = DeviceSteps(begun_there, len(self.labels), self._shardings)
            self.launches = [(own.bucket, own) for own in self.device_steps.buckets]

    def _watch(self, items: Sequence[Item], chosen: Sequence[Participant]) -> None:
        watched = {found.index: found for found in chosen}
        for index, item in enumerate(items):
            found = watched.get(index)
            if found is None:
                self._reader.watch(item.group, None, (), torch.float32, ())
                continue
            fitted = found.fitted
            state = [
                *fitted.moments,
                *(x for x in (fitted.residual, fitted.threshold_state, fitted.step) if x is not None),
            ]
            entries = zip(item.state_names, state, strict=True) if item.state_names else ()
            dtype = self._grad_dtypes[index]
            assert dtype is not None
            self._reader.watch(
                *(item.group, item.key, self._strides[index], dtype, tuple(entries), item.sharding),
                counts_there=found.counts_on_device,
            )

    def _own_buffers(self) -> list[StreamGuarded]:
        """The plan's own copies of parameters and variances, by device, guarded for use on later streams."""
        made: dict[torch.device, list[Tensor]] = {}
        for bucket, _ in self.launches:
            made.setdefault(bucket.device, []).extend(entry.dense_param for entry in bucket.non_dense)
        for entry in self._variances:
            if entry.variance is not None and entry.variance_address is None:
                made.setdefault(entry.param.device, []).append(entry.variance)
        return [StreamGuarded(device, *own) for device, own in made.items() if device.type == "cuda" and own]

    def grad(self, index: int) -> Tensor:
        """The gradient of a parameter in the memory order of its parameter, for backends that take tensors."""
        found = self._copies.get(index)
        if found is None:
            found = self._reader.held(index)[1]
        assert found is not None
        return found

    def read(self, param_groups: Sequence[Group], state: Any) -> bool:
        """Reads this step's gradients; False when the plan no longer holds and a new one must be made.

        Args:
            param_groups: as the optimizer holds them now.
            state: the optimizer's, to be compared with what the plan knows. A plan that has taken no step does not look
                at it.
        """
        if self.labels:
            tensors.executed(self.labels[0])
        holds = False
        self.owns = True
        try:
            for buffers in self._buffers:
                buffers.use()
            self._copies.clear()
            needs_copy = self._reader.read(param_groups, None if self.is_first else state)
            if needs_copy or (needs_copy is not None and self._variances):
                # Both may run code of the user's, which may change what has been read.
                holds = (
                    self._adopt(needs_copy)
                    and (not self._variances or self._read_variances())
                    and self._reader.unchanged()
                )
            else:
                holds = needs_copy is not None
        finally:
            if not holds:
                self.release()
        return holds

    @torch.no_grad()
    def _read_variances(self) -> bool:
        """Brings the variances of this step's gradients where kernels read them; False where one has moved."""
        gradients = self._reader.addresses()
        given: list[tuple[Entry, Tensor]] = []
        for entry in self._variances:
            if gradients[entry.index]:
                param = self._reader.held(entry.index)[0]
                variance = self._variance(entry.index, param)
                if variance is None and entry.index in self._at_rest and self.is_first:
                    continue
                tensors.variance(self.labels[entry.index], variance, param)
                assert variance is not None
                given.append((entry, variance))
        for entry, variance in given:
            if entry.variance is None:
                return False
            address = entry.variance_address
            if address is not None and not (is_readable(variance, entry.strides) and variance.data_ptr() == address):
                return False
        for entry, variance in given:
            assert entry.variance is not None
            if entry.variance_address is None:
                entry.variance.copy_(
                    tensors.made_real(f"grad_variance of {self.labels[entry.index]}", variance, entry.strides)
                )
            else:
                entry.variance = variance
        return True

    def _variance(self, index: int, param: Tensor) -> Any:
        if self._given_variances is not None:
            return self._given_variances[index]
        return getattr(param, "grad_variance", None)

    @torch.no_grad()
    def _adopt(self, needs_copy: list[int]) -> bool:
        """Copies gradients that kernels cannot read in place; False where a dtype has changed: make a new plan."""
        for index in needs_copy:
            param, grad = self._reader.held(index)[:2]
            label = f"the gradient of {self.labels[index]}"
            if (sharding := self._shardings.get(index)) is not None:
                self._copies[index] = grad = shards.gradient(self.labels[index], grad, sharding)
            tensors.gradient(self.labels[index], grad, param)
            if grad.dtype != self._grad_dtypes[index]:
                return False
            strides = self._strides[index]
            if tensors.memory_fault(grad) is not None or grad.is_neg() or not memory_order.same_strides(grad, strides):
                self._copies[index] = grad = tensors.made_real(label, grad, strides)
            self._reader.replace(index, grad.data_ptr() or 1)  # without elements it has no address, but takes part
        return True

    def run(
        self,
        groups: Sequence[Group],
        lock: StepLock | None = None,
        conditions: Conditions | None = None,
        kept: Sequence[Kept] = (),
    ) -> Decision:
        """Takes the step whose gradients :meth:`read` has found, as a whole or not at all.

        On a GPU there is a window: between the launch and the commit of counts and versions, which follows it at once,
        a signal handler that raises leaves parameters updated and step counts not incremented.

        Args:
            groups: the parameter groups, in plain numbers.
            lock: of the optimizer, to be told while functions of its user run.
            conditions: under which the step is taken; None: in any case.
            kept: what groups keep of the step, written with it where it is taken.

        Returns:
            What became of it. A plan whose first step is skipped holds no longer.
        """
        try:
            if self._writes_by_torch:
                with torch.no_grad():
                    return self._run(groups, lock, conditions, kept)
            return self._run(groups, lock, conditions, kept)
        finally:
            self.release()

    def _run(
        self,
        groups: Sequence[Group],
        lock: StepLock | None,
        conditions: Conditions | None,
        kept: Sequence[Kept],
    ) -> Decision:
        begun = self._begin()
        if self._has_factors:
            groups = [with_factor(groups[index], factor) for index, factor in self._scalar_groups]
        if self.device_steps is not None:
            return self._run_on_device(self.device_steps, groups, conditions or _NO_CONDITIONS, kept)
        decision = _TAKEN
        if conditions is not None:
            launches = [(bucket, launch) for bucket, launch, _ in begun]
            decision = decide(conditions, launches, self.grad, len(self.labels), self._shardings)
            if decision.skips:
                return decision
        self.round = 0  # until it is taken
        prepared = []
        for bucket, launch, sets in begun:
            of_group, factor = bucket.rule.scalar_set, decision.factor
            prepared.append((bucket, launch, [_in_order(of_group(groups[group], t, factor)) for group, t in sets]))
        if self._bound:
            self._bind()
        agreed = self._agree(prepared) if self._agreements else {}
        operations: list[Any] = []
        for bucket, launch, scalar_sets in prepared:
            if isinstance(launch, backends.HostLaunch):
                if bucket.device.type == "cuda":
                    refuse_capture((bucket.device,))
                before, after = agreed.get(id(bucket), ([], []))
                operations += before
                if bucket.rule.confidence is None or lock is None:
                    operations += launch.operations(scalar_sets)
                else:
                    with lock.runs_user_code():
                        operations += launch.operations(scalar_sets)
                operations += after
        if self._calls_confidence and not self._reader.unchanged():
            raise RuntimeError(
                "a confidence function has changed tensors of the step that it was called in: their memory, their "
                "shape or what holds them; no parameter has been updated"
            )
        for bucket, launch, scalar_sets in prepared:
            if not isinstance(launch, backends.HostLaunch):
                # Around each launch by itself: a parameter may share memory with one of an earlier launch.
                non_dense = bucket.present_non_dense()
                before, after = agreed.get(id(bucket), ([], []))
                for entry in non_dense:
                    entry.dense_param.copy_(entry.param.detach())
                for copy, targets, results in before:
                    copy(targets, results)
                launch(scalar_sets)
                for copy, targets, results in after:
                    copy(targets, results)
                for entry in non_dense:
                    entry.param.detach().copy_(entry.dense_param)
        self._commit(operations, [launched[0].table for launched in prepared], kept)
        return decision

    def _run_on_device(
        self, steps: DeviceSteps, groups: Sequence[Group], conditions: Conditions, kept: Sequence[Kept]
    ) -> Decision:
        """Only the device will know whether the step was taken: on the host it counts as one."""
        self.round = 0
        if self._bound:
            self._bind()
        non_dense = [entry for bucket, _ in self.launches for entry in bucket.present_non_dense()]
        for entry in non_dense:
            entry.dense_param.copy_(entry.param.detach())
        steps.run(self._reader.addresses(), groups, conditions)
        for entry in non_dense:
            entry.param.detach().copy_(entry.dense_param)
        self._commit([], [], kept)
        return _TAKEN

    def _commit(self, operations: list[Any], tables: list[Any], kept: Sequence[Kept]) -> None:
        states: list[Any] = self._pending
        if kept:
            states = [*states, *((None, None, own, entries, ()) for own, entries in kept)]
        backends.commit(operations, tables, states, self._written())
        self._pending = []
        self.is_first = False

    def _agree(
        self, prepared: Sequence[tuple[Bucket, backends.Launch, Sequence[backends.ScalarSet]]]
    ) -> dict[int, tuple[list[Any], list[Any]]]:
        """What moves the thresholds that ranks agree on, by bucket: before its launch, and after it.

        Communicates, before anything of the step is written.
        """
        agreements = self._agreements
        found = {
            id(bucket): agreements[id(bucket)].rows(bucket, scalar_sets, self.grad)
            for bucket, _, scalar_sets in prepared
            if id(bucket) in agreements
        }
        by_group: dict[Sharers, list[Any]] = {}
        for key, rows in found.items():
            by_group.setdefault(agreements[key].group, []).extend(rows)
        agree(by_group)
        copies = {key: [agreements[key].copy(rows)] for key, rows in found.items()}
        return {key: (own, []) if agreements[key].comes_first else ([], own) for key, own in copies.items()}

    def _written(self) -> Any:
        """The tensors whose version this step increments: parameters, moments, residuals, threshold states."""
        written = self._reader.written()
        if self._given_variances is None:
            return written
        present = self._reader.addresses()
        others = [(*entry.moments, entry.threshold_state) for entry in self.entries if present[entry.index]]
        return [*written, *(tensor for own in others for tensor in own if tensor is not None)]

    def _begin(self) -> list[tuple[Bucket, backends.Launch, list[tuple[int, int]]]]:
        """Begins the step of each bucket that takes part, with its groups and step counts: each is a set of scalars.

        Raises:
            ValueError: a step count that no training reaches.
        """
        begun, gradients = [], self._reader.source
        try:
            for bucket, launch in self.launches:
                if sets := bucket.table.begin(gradients):
                    begun.append((bucket, launch, sets))
        except ValueError as error:
            index, count = error.args
            raise ValueError(
                f"state 'step' of {self.labels[index]} is {count!r}: must be the number of steps taken, a whole number "
                "in [0, 2^53), or in [0, 2^24) where it is kept in fp32"
            ) from None
        return begun

    def _bind(self) -> None:
        """Sets parameter and state of the entries whose backend works on tensors to those of this step."""
        present = self._reader.addresses()
        bound = [entry for entry in self._bound if present[entry.index]]
        if not self.is_first:
            for entry in bound:
                entry.bind(*self._reader.held(entry.index))
        _give_images([entry for entry in self._sharing if present[entry.index]])

    def release(self) -> None:
        """Lets go of all tensors of the user's; also where a step is not taken."""
        self._copies.clear()
        for entry in self.entries if self._holds_all else (*self._bound, *self._variances):
            entry.unbind()
        self._holds_all = False
        self._reader.release()
        self.owns = False


def _in_order(scalars: Mapping[str, Any]) -> tuple[float, ...]:
    """A rule's scalars as kernels take them."""
    return tuple({**_NO_SCALARS, **scalars}.values())


def _give_images(entries: Sequence[Entry]) -> None:
    """Copies the storages that parameters share, for the reference to compute in."""
    copies: dict[int, Any] = {}
    for entry in entries:
        storage = entry.param.untyped_storage()
        copy = copies.get(storage.data_ptr())
        if copy is None:
            copy = copies[storage.data_ptr()] = storage.clone()
        param = entry.param.detach()
        entry.image = torch.empty(0, dtype=param.dtype, device=param.device).set_(
            copy, param.storage_offset(), param.shape, param.stride()
        )
