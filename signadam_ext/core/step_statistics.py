"""What kernels gather of a step, chunk by chunk, for ``optimizer.statistics()``."""

#: Of a row for each chunk, in the order of ``ChunkStatistics`` in csrc/core/table.h.
COLUMNS = ("passed", "squares", "passed_squares", "flips", "magnitude", "threshold")
