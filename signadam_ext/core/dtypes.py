"""The dtypes that kernels read and write, and what others call them."""

import torch

#: The numbers of ``Format`` in csrc/core/formats.h and of triton_kernels/formats.py.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
