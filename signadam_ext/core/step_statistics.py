"""What kernels gather of a step, chunk by chunk, for ``optimizer.statistics()``."""

from .native import load

#: Of a row for each chunk.
COLUMNS: tuple[str, ...] = load().CHUNK_STATISTICS
