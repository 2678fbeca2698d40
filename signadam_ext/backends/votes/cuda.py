"""Votes by the CUDA kernels, each pass one launch on the stream that is current on the tensors' device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.native import compiled as _C
from .table import Casting, VoteTable


class CudaVotes:
    def cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        stream = torch.cuda.current_stream(table.device)
        table.resident.use_on(stream)
        _C.cuda_cast_votes(
            entries=table.entries.data_ptr(),
            entry_of_chunk=table.entry_of_chunk.data_ptr(),
            chunks=table.chunks,
            scalars=scalars.data_ptr(),
            memory=getattr(_C.VoteMemory, casting.memory),
            residual=casting.residual,
            maximize=casting.maximize,
            abstains=casting.abstains,
            format=table.format,
            codes=codes.data_ptr(),
            device=stream.device_index,
            stream=stream.cuda_stream,
        )

    def count(self, codes: Tensor, bits: int, majority: bool, result: Tensor) -> None:
        stream = torch.cuda.current_stream(codes.device)
        workers, words = codes.shape
        _C.cuda_count_votes(
            codes=codes.data_ptr(),
            workers=workers,
            words=words,
            bits=bits,
            majority=majority,
            result=result.data_ptr(),
            device=stream.device_index,
            stream=stream.cuda_stream,
        )

    def read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        stream = torch.cuda.current_stream(table.device)
        table.resident.use_on(stream)
        _C.cuda_read_votes(
            entries=table.entries.data_ptr(),
            entry_of_chunk=table.entry_of_chunk.data_ptr(),
            chunks=table.chunks,
            scalars=scalars.data_ptr(),
            keys=0 if keys is None else keys.data_ptr(),
            use=getattr(_C.VoteUse, use),
            format=table.format,
            bits=bits,
            divisor=divisor,
            result=result.data_ptr(),
            device=stream.device_index,
            stream=stream.cuda_stream,
        )
