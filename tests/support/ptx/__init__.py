"""A functional emulator of PTX: executes what the compilers emit, and finds what no launch may do.

    program = Program(text, threads=256)
    memory = Memory()
    memory.register("x", x.data_ptr(), 4096)
    program.run(grid=4, parameters=struct.pack("<Qi", x.data_ptr(), 1024), memory=memory)

Addresses are those of this process, so tensors on the CPU serve as device memory. PTX is documented, and so is each of
its instructions; one that is not known here is an error with its line (:class:`Unknown`). :class:`Fault` is what
a launch must not do: an access outside of the regions, misaligned, or to what may only be read; a race; shared memory
that is read but was never written; a barrier that some threads do not reach.

Not modelled: time, caches, weak orders of memory (a race is reported instead), payloads of NaN beyond the one
that PTX gives, grids and blocks of more than one dimension, local memory, calls.
"""

from .machine import SCHEDULES, Access, Block, Counts, Program
from .memory import Fault, Memory, Region
from .parser import Unknown, parse

__all__ = ["SCHEDULES", "Access", "Block", "Counts", "Fault", "Memory", "Program", "Region", "Unknown", "parse"]
