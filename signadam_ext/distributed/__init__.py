"""Workers that vote: 2 bits for each entry of a gradient or an update, instead of 16 or 32."""

from .ddp import VoteHook
from .fsdp import VoteAllReduce, VoteReduceScatter

__all__ = ["VoteAllReduce", "VoteHook", "VoteReduceScatter"]
