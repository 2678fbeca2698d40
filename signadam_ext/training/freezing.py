"""GradES: matrices stop training one by one, each when its own statistic has fallen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import checks, shards
from ..core.dynamo import untraced
from ..core.rule import Group, Rule, rule_of
from ..optimizers.base import SignOptimizer
from ..optimizers.groups import given_name, label

#: What may fall: mean |m|, or the share of entries that pass the threshold.
STATISTICS = ("mean_momentum", "passed")


def is_matrix(name: str, param: Tensor) -> bool:
    """What is watched unless something else is asked for: two dimensions or more."""
    return param.dim() >= 2


class GradES:
    r"""Freezes matrices, each when its statistic falls below a threshold: GradES, on what steps have gathered anyway.

    It hooks itself into the optimizer: after each step that is looked at, a parameter whose statistic is below ``tau``
    is frozen: ``requires_grad`` is turned off, its gradient dropped, and no later step moves or decays it. Autograd
    then leaves out its gradient, which is where time is saved; state stays, for checkpoints. Who turns
    ``requires_grad`` on again frees the parameter, which may be frozen again later.

    Args:
        optimizer: of this package. It is observed from now on, see ``observe``.
        tau: at least 0, in units of the statistic.
        grace_steps: steps of this object's life in which nothing is frozen, at least 0: the paper takes a share of the
            run. Momentum begins at 0, so that 0 would freeze at once. Default: 100.
        every: steps are looked at every so often, at least 1. A look waits for the device. Default: 10.
        statistic: "mean_momentum", the mean of ``|m|``: the size of the averaged gradient. Where momentum averages
            signs or normalized gradients (``SignAdamPP``, ``SignAdam``, ``LaProp``, ``ADOPT``) it is how much these
            agree, and falls only where they do not. Or "passed", the share of entries beyond the threshold, of
            optimizers that have one. Default: "mean_momentum".
        watches: which parameters may be frozen, a function of the name (or what errors call one without a name) and the
            parameter. Those without elements, of which there is no statistic, are not. Default: those of two dimensions
            or more.

    Attributes:
        steps: calls of ``step()`` so far, skipped ones among them.

    Raises:
        TypeError, ValueError: an argument outside its range; a statistic that a group's rule does not have; parameters
            that go by one name; nothing to watch. A step that is to be looked at raises the same of groups that were
            added, and RuntimeError where nobody observes any more, before anything is written.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = Signum(model.named_parameters(), lr=1e-2, beta=0.5)
        >>> stopping = GradES(optimizer, tau=0.05, grace_steps=20, every=5)
        >>> while not stopping.done and stopping.steps < 1000:
        ...     optimizer.zero_grad()
        ...     model(torch.eye(4)).square().mean().backward()
        ...     optimizer.step()
        >>> stopping.frozen
        ['weight']

    The paper [GE, Alg. 1] looks at the mean of ``|g|`` of one mini-batch, or of its change. Here it is the momentum's:
    an average over steps, in which noise has mostly gone and what is left is direction. A threshold found for one is
    none for the other. A step that was skipped, for its norm or by a ``GradScaler``, is not looked at. Looking is no
    part of a graph: ``torch.compile`` breaks its own at a step, and refuses it with ``fullgraph=True``. A copy of the
    optimizer is not watched: torch leaves hooks out of copies, and so out of ``copy.deepcopy``.

    Of a sharded parameter the parts are added up over its ranks, in one message for all that lie alike. DDP must be
    told that parameters may get no gradient (``find_unused_parameters=True``), since its buckets wait for all. Under
    FSDP2 gradients of frozen parameters are still taken, and dropped: only their steps are saved.

    Source: [GE] Wen et al., arXiv 2509.01842, Alg. 1.
    """

    def __init__(
        self,
        optimizer: SignOptimizer,
        tau: float,
        *,
        grace_steps: int = 100,
        every: int = 10,
        statistic: str = "mean_momentum",
        watches: Callable[[str, Tensor], bool] = is_matrix,
    ) -> None:
        if not isinstance(optimizer, SignOptimizer):
            raise TypeError(f"optimizer is a {checks.class_name(optimizer)}: must be one of signadam_ext's")
        if not callable(watches):
            raise TypeError(f"watches={checks.shown(watches)}: must be a function of a name and a parameter")
        self.tau = checks.number("tau", tau, 0.0)
        self.grace_steps = _count("grace_steps", grace_steps, 0)
        self.every = _count("every", every, 1)
        self.statistic = checks.one_of("statistic", statistic, STATISTICS)
        self.optimizer, self.watches = optimizer, watches
        self.steps = 0
        self._frozen: dict[str, Tensor] = {}
        self._looked_at: dict[str, Tensor] = {}  # at the step that runs
        self._skipped = 0  # before it
        self._check_rules()
        if not self._watched():
            raise ValueError("nothing to watch: no parameter is one of those asked for")
        optimizer.observe()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def frozen(self) -> list[str]:
        """Names of those frozen, in the order in which they were."""
        return list(self._frozen)

    @property
    def done(self) -> bool:
        """Whether nothing that is watched takes a gradient any more, so that training may end."""
        return not any(param.requires_grad for param in self._watched().values())

    def remove(self) -> None:
        """Takes the hooks out of the optimizer, which goes on observing. What is frozen stays frozen."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: ``steps``, and the names in ``frozen``."""
        return {"steps": self.steps, "frozen": self.frozen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from :meth:`state_dict`: those frozen then are frozen now, and what only this has frozen is free.

        Raises:
            TypeError, ValueError: no such dictionary, or names that are not watched here; nothing has been changed
                then.
        """
        if not isinstance(state_dict, Mapping) or {"steps", "frozen"} - set(state_dict):
            raise ValueError("no state of GradES: must be a dictionary with 'steps' and 'frozen'")
        names = state_dict["frozen"]
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"frozen={checks.shown(names)}: must be a list of names")
        steps, watched = _count("steps", state_dict["steps"], 0), self._watched()
        if unknown := [name for name in names if name not in watched]:
            raise ValueError(f"frozen: {', '.join(map(repr, unknown))} are none of the parameters that are watched")
        for param in self._frozen.values():
            param.requires_grad_(True)
        self.steps, self._frozen = steps, {}
        for name in names:
            self._freeze(name, watched[name])

    def _check_rules(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            rule = rule_of(type(self.optimizer), group)
            if self.statistic == "mean_momentum" and (not rule.moments or rule.starts_as_param is not None):
                raise ValueError(
                    f"statistic='mean_momentum' with group {index}: the state of {rule.name!r} does not begin with a "
                    "momentum, so there is none to watch"
                )
            if self.statistic == "passed" and not _has_threshold(rule, group):
                raise ValueError(f"statistic='passed' with group {index}, whose rule {rule.name!r} has no threshold")

    def _watched(self) -> dict[str, Tensor]:
        """By name, all that are watched, frozen or not.

        Raises:
            TypeError: a part of a flat parameter.
            ValueError: parameters that go by one name.
        """
        found: dict[str, Tensor] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for i, param in enumerate(group["params"]):
                name = given_name(group, i) or label(group, index, i)
                if (param.numel() or shards.is_flattened(param)) and self.watches(name, param):
                    if shards.is_flattened(param):
                        raise TypeError(
                            f"{name!r} is part of a flat parameter of FullyShardedDataParallel, of which each rank "
                            "may freeze its own part: shard with fully_shard"
                        )
                    if name in found:
                        raise ValueError(f"two parameters are called {name!r}: nothing tells which one to freeze")
                    found[name] = param
        return found

    # Dynamo would make constants of what they look at.
    @untraced
    def _before(self, *_: Any) -> None:
        steps = self.steps + 1
        looks = steps > self.grace_steps and steps % self.every == 0
        self._looked_at = self._checked() if looks else {}
        self.steps = steps
        for name, param in list(self._frozen.items()):
            if param.requires_grad:
                del self._frozen[name]
            else:
                param.grad = None
        if looks:
            self._skipped = int(self.optimizer.skipped_steps)

    def _checked(self) -> dict[str, Tensor]:
        """What is watched, where a step will tell the statistic of it.

        Raises:
            TypeError, ValueError, RuntimeError: it will not.
        """
        if not self.optimizer.runtime.observes:
            raise RuntimeError("GradES looks at what steps gather, and nothing is observed: call optimizer.observe()")
        self._check_rules()
        return self._watched()

    @untraced
    def _after(self, *_: Any) -> None:
        looked_at, self._looked_at = self._looked_at, {}
        if not looked_at or int(self.optimizer.skipped_steps) > self._skipped:
            return
        watched = {name: param for name, param in looked_at.items() if param.requires_grad}
        for name, value in self._statistics(watched).items():
            if value < self.tau:
                self._freeze(name, watched[name])

    @torch.no_grad()
    def _statistics(self, watched: Mapping[str, Tensor]) -> dict[str, float]:
        """Of those that took part in the last step, over all ranks that have parts of one."""
        told = {each.name: each for each in self.optimizer.statistics().tensors}
        found = {name: getattr(told[name], self.statistic) for name in watched if name in told}
        alike: dict[Any, list[str]] = {}
        for name, param in watched.items():
            if (sharding := shards.sharding_of(name, param)) is not None:
                alike.setdefault((sharding.mesh, tuple(sharding.placements)), []).append(name)
        for (mesh, placements), names in alike.items():
            sums = torch.zeros(2, len(names), dtype=torch.float64, device="cpu")
            for i, name in enumerate(names):
                if name in told:  # a rank may have nothing of it
                    sums[0, i], sums[1, i] = found[name] * told[name].numel, told[name].numel
            sums = sums.to(shards.local(watched[names[0]]).device)
            for dimension, placement in enumerate(placements):
                if not placement.is_replicate():
                    torch.distributed.all_reduce(sums, group=mesh.get_group(dimension))
            total, count = sums.tolist()
            found.update({name: total[i] / count[i] for i, name in enumerate(names) if count[i]})
        return found

    def _freeze(self, name: str, param: Tensor) -> None:
        param.requires_grad_(False)
        param.grad = None
        self._frozen[name] = param


def _has_threshold(rule: Rule, group: Group) -> bool:
    """Whether a group's alpha is a threshold, as kernels take it, and no other number of that name."""
    return "alpha" in group and "alpha" in rule.scalars(group, 1)


def _count(name: str, value: Any, least: int) -> int:
    found = checks.plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name}={checks.shown(value)}: must be a whole number of at least {least}")
    return found
