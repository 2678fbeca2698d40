"""Training on the processes that torchrun has started: what differs between one process, DDP and FSDP2."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHOICES = ("off", "ddp", "fsdp2")
VOTES = ("off", "majority", "mean")


class Workers:
    """This process and the others.

    Args:
        parallel: "off" for one process; "ddp" or "fsdp2" under torchrun.
        vote: "off" averages gradients; "majority" and "mean" let workers vote on their signs.
        device: of this process's model.
    """

    def __init__(self, parallel: str, vote: str, device: torch.device) -> None:
        self.parallel, self.vote, self.device = parallel, vote, device
        self.rank, self.count = 0, 1
        if parallel != "off":
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """This worker's rows of a batch, the same in all for any number of workers that divides it."""
        return batch.chunk(self.count)[self.rank]

    def wrap(self, model: nn.Module, votes: bool) -> nn.Module:
        """What to call in the place of ``model``, before its optimizer is made."""
        vote = self.vote if votes else "off"
        if self.parallel == "ddp":
            ddp = nn.parallel.DistributedDataParallel(model)
            if vote != "off":
                from signadam_ext.distributed import VoteHook

                ddp.register_comm_hook(None, VoteHook(vote))
            return ddp
        if self.parallel == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import FSDPModule, fully_shard

            mesh = init_device_mesh(self.device.type, (self.count,))
            for block in model.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            if vote != "off":
                from signadam_ext.distributed import VoteReduceScatter

                comm = VoteReduceScatter(vote)
                for module in model.modules():
                    if isinstance(module, FSDPModule):
                        module.set_custom_reduce_scatter(comm)
        return model

    def mean(self, values: Tensor) -> Tensor:
        """The mean over workers, on all of them."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def any(self, here: bool) -> bool:
        """Whether something is so on any worker."""
        return bool(self.mean(torch.tensor(float(here), device=self.device)) > 0)

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """State of model and optimizer, whole, on every worker: what another number of workers can load."""
        if self.parallel != "fsdp2":
            return model.state_dict(), optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        return get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: tuple[Any, Any]) -> None:
        """Takes what :meth:`state` gave under the same ``parallel``."""
        if self.parallel != "fsdp2":
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        set_state_dict(
            model,
            optimizer,
            model_state_dict=state[0],
            optim_state_dict=state[1],
            options=StateDictOptions(full_state_dict=True),
        )

    def wait(self) -> None:
        """For all others, so that what the first has written is there."""
        if self.count > 1:
            dist.barrier()

    def end(self) -> None:
        if self.parallel != "off":
            dist.destroy_process_group()


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_RANK" in os.environ


def local_device(device: torch.device) -> torch.device:
    """The device of this process, where there is one for each."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this worker."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
