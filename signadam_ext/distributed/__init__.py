"""Workers that vote: 2 bits for each entry of a gradient or an update, instead of 16 or 32."""

from .ddp import VoteHook
from .fsdp import VoteAllReduce, VoteReduceScatter
from .lion import DistributedLion
from .sign_adam_pp import DistributedSignAdamPP
from .signum import DistributedSignum

__all__ = [
    "DistributedLion",
    "DistributedSignAdamPP",
    "DistributedSignum",
    "VoteAllReduce",
    "VoteHook",
    "VoteReduceScatter",
]
