"""The Triton twins of the kernels in csrc: same names, same order of operations, same bits.

Imported as ``signadam_ext.triton_kernels`` only: a second copy under another name would be compiled and cached twice.
"""

if __name__ != "signadam_ext.triton_kernels":
    raise ImportError("import these kernels as signadam_ext.triton_kernels, from the repository's root too")
