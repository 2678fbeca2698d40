"""Optimizers whose workers vote on the update: each has a momentum of its own gradients, and no gradient is sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends
from .._version import __version__
from ..backends import votes
from ..backends.votes import Casting, VoteKernels, VoteTable, words_of
from ..core import checks, hyperparameters, shards, tensors
from ..core.dynamo import untraced
from ..core.formats import outside_inference_mode
from ..core.memory_order import is_dense, order_of, restrided, same_strides
from ..core.options import BACKENDS
from ..core.random_bits import tensor_keys
from ..optimizers.base import Params
from ..optimizers.groups import label
from ..optimizers.ranks import shown
from .exchange import Exchange
from .votes import NONFINITE, RESULTS, compare, kernels_for

PARAM_STORAGES = ("nearest", "stochastic")


class _Voter(NamedTuple):
    """A parameter as a step takes it."""

    label: str
    param: Tensor
    group: Mapping[str, Any]
    param_id: int


class DistributedOptimizer(Optimizer):
    """What optimizers share whose workers vote on the update. A subclass says how a worker comes to its vote.

    The model is the same on all workers, and not wrapped: DistributedDataParallel would average the gradients. In each
    step a worker moves its own momentum by its own gradient, and casts the sign of its update, 2 bits an entry. The
    result, the same for all, moves the parameters, which stay equal on all workers; momenta do not. A parameter that
    has no gradient on any worker stays; one that has none here moves by the votes of the others.

    ``param.grad`` is only read. The momentum is fp32 in ``state[param]["exp_avg"]``; it differs between workers: each
    saves its own ``state_dict()``. An entry of a gradient that is not finite leaves the momentum as it is.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that cannot be used; at the first step, on all workers, versions, hyperparameters or
            parameters that differ between them, which are not made equal here; a GradScaler.
    """

    #: What a worker keeps, and the hyperparameters beside those that all have.
    MEMORY: ClassVar[str]
    HYPERPARAMETERS: ClassVar[hyperparameters.Checks]

    # A GradScaler hands its scale to such an optimizer instead of leaving steps out, on one worker and not on others.
    _step_supports_amp_scaling = True

    def __init__(self, params: Params, given: dict[str, Any], process_group: Any, backend: str) -> None:
        checks.one_of("backend", backend, ("auto", *BACKENDS))
        backends.check_usable(backend)
        self._backend, self._process_group = backend, process_group
        self._begin()
        defaults = {**given, "betas": tuple(given["betas"])}
        _read(type(self), defaults)
        super().__init__(params, defaults)

    def _begin(self) -> None:
        self._exchange: Exchange | None = None
        self._trained: list[int] = []
        self._layout: tuple[list[tuple[int, ...]], list[int], int] = ([], [], 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; hyperparameters it does not name take the optimizer's defaults.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that cannot be served; the optimizer is unchanged.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _read(type(self), group)
            _refuse_others(group, self.param_groups[0])
            for i, param in enumerate(group["params"]):
                if param.requires_grad:
                    _check(label(group, len(self.param_groups) - 1, i), param)
        except BaseException:
            self.param_groups.pop()
            raise
        self._begin()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step, with all other workers.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            TypeError, ValueError: a parameter, gradient or hyperparameter that cannot be served; nothing has been
                written, and the other workers wait for this one until their time-out.
            RuntimeError: see the class.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_with_others()
        return loss

    @untraced
    def _step_with_others(self) -> None:
        if getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                f"{type(self).__name__} takes no step for a GradScaler: workers would have to agree on its scale; "
                "train in bf16, which needs none"
            )
        voters = self._voters()
        if voters:
            self._vote(voters)

    def _voters(self) -> list[_Voter]:
        """The parameters that are trained, checked, and their hyperparameters as Python numbers."""
        voters, param_id = [], 0
        for index, group in enumerate(self.param_groups):
            with hyperparameters.of_group(index):
                read = _read(type(self), group)
                _refuse_others(group, self.param_groups[0])
            for i, param in enumerate(group["params"]):
                if param.requires_grad:
                    name = label(group, index, i)
                    _check(name, param)
                    if param.grad is not None:
                        tensors.gradient(name, param.grad, param)
                    voters.append(_Voter(name, param, read, param_id))
                param_id += 1
        return voters

    def _vote(self, voters: Sequence[_Voter]) -> None:
        device = voters[0].param.device
        if any(voter.param.device != device for voter in voters):
            raise ValueError(f"{type(self).__name__} takes parameters of one device: found another than {device}")
        kernels = kernels_for(self._backend, [voter.param for voter in voters])
        exchange = self._compared(voters)
        first_words, words = self._laid_out(voters)
        codes = exchange.room(words, device)
        # Whether anyone has a gradient is voted on too, so that nobody has to be asked.
        present = torch.tensor([float(voter.param.grad is not None) for voter in voters]).to(device)
        presence, none = VoteTable([present], first_words=[first_words[-1]]), votes.scalars_of([{}], device)
        kernels.cast(presence, none, Casting(), codes)
        self._cast(voters, first_words, kernels, codes)
        result = exchange.whole(codes, kernels)
        kernels.read(presence, none, None, "WRITE", exchange.bits, exchange.divisor, result)
        self._move(voters, first_words, kernels, present > 0, result)

    def _cast(self, voters: Sequence[_Voter], first_words: Sequence[int], kernels: VoteKernels, codes: Tensor) -> None:
        """Moves momenta and casts votes; a parameter without a gradient here has none."""
        by_dtype: dict[torch.dtype, list[int]] = defaultdict(list)
        for i, voter in enumerate(voters):
            if voter.param.grad is not None:
                by_dtype[voter.param.grad.dtype].append(i)
        for places in by_dtype.values():
            gradients, momenta, rows = [], [], []
            for i in places:
                param, group = voters[i].param, voters[i].group
                momentum = self._state_of(voters[i])["exp_avg"]
                grad = param.grad
                assert grad is not None
                gradients.append(grad if same_strides(grad, param.stride()) else restrided(grad, param))
                momenta.append(momentum)
                beta1, beta2 = group["betas"][0], group["betas"][-1]
                rows.append(
                    {
                        "threshold": group.get("alpha", 0.0),
                        "beta1": beta1,
                        "one_minus_beta1": 1 - beta1,
                        "beta2": beta2,
                        "one_minus_beta2": 1 - beta2,
                    }
                )
            table = VoteTable(gradients, momenta, first_words=[first_words[i] for i in places])
            casting = Casting(
                memory=self.MEMORY,
                maximize=voters[0].group["maximize"],
                abstains=voters[0].group["nonfinite"] == "abstain",
            )
            kernels.cast(table, votes.scalars_of(rows, table.device), casting, codes)

    def _move(
        self,
        voters: Sequence[_Voter],
        first_words: Sequence[int],
        kernels: VoteKernels,
        present: Tensor,
        result: Tensor,
    ) -> None:
        """Moves parameters by the result, where anyone had a gradient."""
        assert self._exchange is not None
        lr, decay = votes.SCALARS.index("lr"), votes.SCALARS.index("decay")
        by_kind: dict[tuple[torch.dtype, str], list[int]] = defaultdict(list)
        for i, voter in enumerate(voters):
            by_kind[voter.param.dtype, voter.group["param_storage"]].append(i)
        for (_, storage), places in by_kind.items():
            chosen = [voters[i] for i in places]
            table = VoteTable([voter.param for voter in chosen], first_words=[first_words[i] for i in places])
            rows = [
                {"lr": voter.group["lr"], "decay": 1 - voter.group["lr"] * voter.group["weight_decay"]}
                for voter in chosen
            ]
            scalars = votes.scalars_of(rows, table.device)
            moves = present[torch.tensor(places, device=table.device)]
            scalars[:, lr] = torch.where(moves, scalars[:, lr], 0.0)
            scalars[:, decay] = torch.where(moves, scalars[:, decay], 1.0)
            steps = [self._state_of(voter)["step"].add_(1) for voter in chosen]
            use, keys = "STEP", None
            if storage == "stochastic":
                use = "STEP_STOCHASTIC"
                found = [
                    tensor_keys(voter.group["seed"], voter.param_id, int(step))
                    for voter, step in zip(chosen, steps, strict=True)
                ]
                keys = torch.tensor(found, dtype=torch.int64).to(torch.int32).to(table.device)
            kernels.read(table, scalars, keys, use, self._exchange.bits, self._exchange.divisor, result)

    def _state_of(self, voter: _Voter) -> dict[str, Any]:
        state = self.state[voter.param]
        with outside_inference_mode():  # which later steps may be
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float64)
                state["exp_avg"] = torch.zeros_like(voter.param, dtype=torch.float32)
            elif not same_strides(state["exp_avg"], voter.param.stride()):
                state["exp_avg"] = restrided(state["exp_avg"], voter.param)  # the parameter has been laid out anew
        return state

    def _laid_out(self, voters: Sequence[_Voter]) -> tuple[list[int], int]:
        """Where the words of each parameter begin, and last those of who has a gradient; and how many there are."""
        shapes = [tuple(voter.param.shape) for voter in voters]
        if shapes != self._layout[0]:
            first_words, words = [], 0
            for numel in (*(voter.param.numel() for voter in voters), len(voters)):
                first_words.append(words)
                words += words_of(numel)
            self._layout = shapes, first_words, words
        return self._layout[1:]

    def _compared(self, voters: Sequence[_Voter]) -> Exchange:
        """What sends votes; made when all workers have shown that they have the same optimizer and parameters."""
        majority = voters[0].group["vote"] == "majority"
        trained = [voter.param_id for voter in voters]
        if self._exchange is None or self._exchange.majority != majority or self._trained != trained:
            told = {
                "the version of signadam_ext": __version__,
                "the optimizer": type(self).__qualname__,
                "the number of parameters": str(len(voters)),
            }
            for index, group in enumerate(self.param_groups):
                told.update(
                    (f"{name} of group {index}", shown(group[name])) for name in sorted(_read(type(self), group))
                )
            for voter in voters:
                param = voter.param
                order = order_of(param.shape, param.stride())
                told[voter.label] = f"{tuple(param.shape)}, {param.dtype}, memory order {order}"
                told[f"the steps of {voter.label}"] = str(int(self.state[param].get("step", 0)))
                bits = param.detach().view(torch.int32 if param.dtype == torch.float32 else torch.int16)
                told[f"the sum of the bits of {voter.label}"] = str(int(bits.sum(dtype=torch.int64)))
            compare(told, type(self).__name__, self._process_group)
            self._exchange, self._trained = Exchange(self._process_group, majority), trained
        return self._exchange

    def load_state_dict(self, state_dict: Any) -> None:
        """As ``torch.optim``'s, but the momentum stays fp32 whatever the parameter is. The next step compares workers.

        Raises:
            TypeError, ValueError: state of other shapes, or that is missing; nothing has been loaded then.
        """
        saved = state_dict["state"]
        own = (param for group in self.param_groups for param in group["params"])
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        pairs = list(zip(own, numbers, strict=False))  # torch says what is wrong with their number
        for param, number in pairs:
            if number in saved:
                tensors.moment(f"parameter {number}", "exp_avg", saved[number].get("exp_avg"), param.cpu())
                checks.steps_taken(f"parameter {number}", saved[number].get("step"))
        super().load_state_dict(state_dict)
        with outside_inference_mode():
            for param, number in pairs:
                if number in saved:
                    own = saved[number]
                    momentum = torch.zeros_like(param, dtype=torch.float32)
                    self.state[param]["exp_avg"] = momentum.copy_(own["exp_avg"])
                    self.state[param]["step"] = torch.as_tensor(own["step"], dtype=torch.float64).cpu().clone()
        self._begin()  # which compares workers again

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise TypeError(f"{type(self).__name__} with a process group of its own cannot be copied or pickled")
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_exchange" not in self.__dict__:  # a copy, or a pickle, which a process group does not go into
            self._process_group = None
            self._begin()
        super().__setstate__(state)


def _read(cls: type[DistributedOptimizer], group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group, checked, as Python numbers."""
    read = {name: check(name, group[name]) for name, check in cls.HYPERPARAMETERS.items()}
    read["lr"] = checks.learning_rate("lr", group["lr"])
    read["weight_decay"] = checks.number("weight_decay", group["weight_decay"], 0.0)
    read["vote"] = checks.one_of("vote", group["vote"], RESULTS)
    read["nonfinite"] = checks.one_of("nonfinite", group["nonfinite"], NONFINITE)
    read["maximize"] = checks.flag("maximize", group["maximize"])
    read["param_storage"] = checks.one_of("param_storage", group["param_storage"], PARAM_STORAGES)
    read["seed"] = checks.seed("seed", group["seed"])
    return read


def _refuse_others(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raises unless a group votes as the first one does."""
    for name in ("vote", "nonfinite", "maximize"):
        if group[name] != first[name]:
            raise ValueError(f"{name}={group[name]!r}: groups vote together, and the first has {first[name]!r}")


def _check(name: str, param: Tensor) -> None:
    if shards.is_sharded(param):
        raise TypeError(
            f"{name} is a DTensor: workers that vote on updates hold whole parameters; use VoteReduceScatter with FSDP2"
        )
    tensors.parameter(name, param, at_step=False)
    if not is_dense(param):
        raise ValueError(f"{name} has gaps between its elements (strides {param.stride()}): optimize a .contiguous()")


def given(
    lr: float | Tensor,
    betas: Iterable[float],
    weight_decay: float | Tensor,
    vote: str,
    nonfinite: str,
    maximize: bool,
    param_storage: str,
    seed: int,
    **own: Any,
) -> dict[str, Any]:
    """A group's hyperparameters as a constructor was given them; ``own`` are those of its class."""
    return {
        "lr": lr,
        "betas": betas,
        **own,
        "weight_decay": weight_decay,
        "vote": vote,
        "nonfinite": nonfinite,
        "maximize": maximize,
        "param_storage": param_storage,
        "seed": seed,
    }
