"""A training that torchrun starts, and starts again where a worker was killed: FSDP2, a checkpoint every two steps.

torchrun --nproc-per-node 2 --max-restarts 1 elastic.py FOLDER STEP_AT_WHICH_RANK_1_IS_KILLED
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from support import sharded  # noqa: E402
from torch.distributed.checkpoint.state_dict import set_state_dict  # noqa: E402

STEPS = 7
OPTIONS = {"lr": 0.01, "state_dtype": "int2", "param_storage": "stochastic"}


def main(folder: Path, killed_at: int) -> None:
    torch.set_num_threads(1)
    # Under `torchrun --standalone` the store outlives a restart, with the addresses of the processes before.
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    model, optimizer = sharded.model_and_optimizer("SignAdamPP", OPTIONS, torch.bfloat16, True)
    latest, killed = folder / "latest", folder / "killed"
    begin = int(latest.read_text()) if latest.exists() else 0
    if begin:
        found = sharded.states(model, optimizer, False)
        dcp.load(found, checkpoint_id=folder / f"step-{begin}")
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    for step in range(begin, STEPS):
        if step == killed_at and dist.get_rank() == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        weights = sharded.train(model, optimizer, step, step + 1, torch.bfloat16)
        if (step + 1) % 2 == 0:
            dcp.save(sharded.states(model, optimizer, False), checkpoint_id=folder / f"step-{step + 1}")
            if dist.get_rank() == 0:
                latest.with_suffix(".partial").write_text(str(step + 1))
                latest.with_suffix(".partial").rename(latest)
            dist.barrier()
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "began": begin}, folder / "final.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
