"""The dtypes that kernels read and write, and what others call them."""

import torch

#: The numbers of ``Format`` in csrc/dtypes.h and of triton_kernels/dtypes.py.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
