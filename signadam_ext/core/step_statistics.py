"""What kernels gather of a step, chunk by chunk, for ``optimizer.statistics()``."""

from .native import compiled as _C

#: Of a row for each chunk.
COLUMNS: tuple[str, ...] = _C.CHUNK_STATISTICS
