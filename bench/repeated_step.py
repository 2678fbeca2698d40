"""Takes steps on tensors of 64 elements, for callgrind to count: `python -m bench.repeated_step TENSORS STEPS`."""

import sys

import torch

import signadam_ext


def main(tensors: int, steps: int) -> None:
    torch.set_num_threads(1)  # another one would count its waiting
    params = [torch.nn.Parameter(torch.ones(64)) for _ in range(tensors)]
    for param in params:
        param.grad = torch.ones(64)
    optimizer = signadam_ext.SignAdamPP(params, backend="cpu")
    for _ in range(steps):
        optimizer.step()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
