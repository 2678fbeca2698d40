"""Quantize the GPT of train_gpt.py to 4 bits by SignRound: signed gradient descent on how each weight is rounded.

python examples/train_gpt.py                   first: trains a model, about two minutes on two CPU cores
python examples/quantize_gpt.py                then: a minute
python examples/quantize_gpt.py --bits 2       coarser
python examples/quantize_gpt.py --run runs/adamw.pt --steps 400

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516.
Block by block, the offsets V in [-1/2, 1/2] that are added before rounding, and two factors in [0, 1] of each group's
range, are trained by SignSGD so that the block's output stays what it was. The sign is what matters here: with a rate
that falls from 1/steps to 0, `steps` steps of one sign take an offset from 0 to just the end of its range.
"""

from __future__ import annotations

import argparse
import copy
import json
import pickle
import sys
from pathlib import Path
from typing import Any

try:
    import torch
    import torch.nn.functional as F
    from gpt import GPT, Block
    from torch import Tensor, nn
    from tqdm import tqdm
    from train_gpt import PRESETS, Preset, evaluate, positive, read_corpus, training_batch

    from signadam_ext import SignSGD
except ImportError as error:
    sys.exit(f'{error}\nIn the root of the repository, run: pip install ".[examples]"')

CALIBRATION = 16  # batches of the preset, of the training text
SEED = 7_000  # of calibration batches, which training did not have in this order


class Rounded(nn.Module):
    """A linear layer whose weight is rounded to `bits` bits, in groups of `group_size` columns with a range each."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if weight.shape[1] % group_size:
            raise ValueError(f"{weight.shape[1]} columns are no whole groups of {group_size}")
        self.levels = 2**bits - 1
        self.register_buffer("weight", weight.view(len(weight), -1, group_size))
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.low = nn.Parameter(torch.ones_like(self.weight[..., :1]))
        self.high = nn.Parameter(torch.ones_like(self.low))

    def rounded(self) -> Tensor:
        """The weight that integers of `bits` bits, a scale and a zero point of each group stand for."""
        low = self.weight.amin(-1, keepdim=True).clamp(max=0) * self.low
        high = self.weight.amax(-1, keepdim=True).clamp(min=0) * self.high
        scale = ((high - low) / self.levels).clamp(min=1e-8)
        zero = straight_through(-low / scale)
        code = (straight_through(self.weight / scale + self.offset) + zero).clamp(0, self.levels)
        return ((code - zero) * scale).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded())

    @torch.no_grad()
    def clamp(self) -> None:
        self.offset.clamp_(-0.5, 0.5)
        self.low.clamp_(0, 1)
        self.high.clamp_(0, 1)


def straight_through(x: Tensor) -> Tensor:
    """`x` rounded, whose gradient is that of `x`."""
    return x + (x.round() - x).detach()


def linears(block: Block) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of each linear layer of a block."""
    return [
        (module, name)
        for module in block.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]


def quantize(block: Block, bits: int, group_size: int) -> list[Rounded]:
    """Puts rounded layers in the place of the linear ones: to nearest at first."""
    found = []
    for module, name in linears(block):
        layer = Rounded(getattr(module, name), bits, group_size)
        setattr(module, name, layer)
        found.append(layer)
    return found


def tune(
    block: Block,
    layers: list[Rounded],
    inputs: Tensor,
    targets: Tensor,
    rope: tuple[Tensor, Tensor],
    steps: int,
    batch_size: int,
) -> tuple[float, float]:
    """Trains a block's rounding, and leaves the best of it. Returns the error that it began and ended with."""
    optimizer = SignSGD([param for layer in layers for param in layer.parameters()], lr=1 / steps)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(SEED)

    @torch.no_grad()
    def error() -> float:
        parts = zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        return sum(F.mse_loss(block(x, *rope), y).item() * len(x) for x, y in parts) / len(inputs)

    first = best = error()
    kept = copy.deepcopy([layer.state_dict() for layer in layers])
    for step in range(steps):
        index = torch.randint(len(inputs), (batch_size,), generator=generator)
        optimizer.zero_grad()
        F.mse_loss(block(inputs[index], *rope), targets[index]).backward()
        optimizer.step()
        schedule.step()
        for layer in layers:
            layer.clamp()
        if step % 20 == 19 or step == steps - 1:
            if (now := error()) < best:
                best, kept = now, copy.deepcopy([layer.state_dict() for layer in layers])
    for layer, state in zip(layers, kept, strict=True):
        layer.load_state_dict(state)
    return first, best


def sign_round(model: GPT, tokens: Tensor, bits: int, group_size: int, steps: int, batch_size: int) -> list[Any]:
    """Quantizes all blocks, one after the other: each is given what the rounded ones before it make."""
    model.requires_grad_(False)
    time = tokens.shape[1]
    rope = model.cos[:time], model.sin[:time]
    given = wanted = model.embedding(tokens)
    errors = []
    for block in tqdm(model.blocks, desc="blocks", leave=False):
        with torch.no_grad():
            wanted = block(wanted, *rope)
        layers = quantize(block, bits, group_size)
        errors.append(tune(block, layers, given, wanted, rope, steps, batch_size))
        block.requires_grad_(False)
        with torch.no_grad():
            given = block(given, *rope)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/signadampp.pt"), help="a checkpoint of train_gpt.py")
    add("--bits", type=int, choices=range(2, 9), default=4, metavar="N", help="2 to 8 of a weight, 4 by default")
    add("--group-size", type=positive, default=32, metavar="N", help="columns that share a range, 32 by default")
    add("--steps", type=positive, default=200, metavar="N", help="of SignSGD for each block, 200 by default")
    add("--out", type=Path, help="a JSON file for the losses")
    args = parser.parse_args()
    if not args.run.is_file():
        parser.error(f"{args.run} is not there: run python examples/train_gpt.py first")
    if args.out is not None:
        if args.out.is_dir():
            parser.error(f"{args.out} is a folder: --out is a file")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.touch()  # rather now than when the work is done
    torch.set_num_threads(min(torch.get_num_threads(), 4))

    try:
        checkpoint = torch.load(args.run, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError):
        parser.error(f"{args.run} is no checkpoint of train_gpt.py")
    preset: Preset = PRESETS[config["preset"]]
    model = GPT(preset.model)
    model.load_state_dict(checkpoint["model"])
    corpus = read_corpus(Path(config["data"]) if config["data"] else None)
    data = torch.frombuffer(bytearray(corpus), dtype=torch.uint8)
    train_data, val_data = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    if any(getattr(module, name).in_features % args.group_size for module, name in linears(model.blocks[0])):
        parser.error(
            f"--group-size {args.group_size}: must divide {preset.model.n_embd}, the columns of the model's matrices"
        )

    losses = {"fp32": evaluate(model, val_data, preset)}
    nearest = copy.deepcopy(model)
    for block in nearest.blocks:
        quantize(block, args.bits, args.group_size)
    losses["nearest"] = evaluate(nearest, val_data, preset)
    tokens = torch.cat([training_batch(train_data, preset, SEED, step)[0] for step in range(CALIBRATION)])
    errors = sign_round(model, tokens, args.bits, args.group_size, args.steps, preset.batch_size)
    losses["SignRound"] = evaluate(model, val_data, preset)

    numel = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, Rounded))
    print(f"{numel / 1e6:.2f}M weights of {len(model.blocks)} blocks in {args.bits} bits, groups of {args.group_size}:")
    print("validation loss, nats per byte")
    for name, loss in losses.items():
        print(f"  {name:<10} {loss:.4f}  {loss - losses['fp32']:+.4f}")
    for number, (first, best) in enumerate(errors):
        print(
            f"  block {number}: squared error of its output {first:.3g} rounded to nearest, {best:.3g} after SignRound"
        )
    if args.out is not None:
        options = {"bits": args.bits, "group_size": args.group_size, "steps": args.steps, "run": config}
        args.out.write_text(json.dumps({"options": options, "losses": losses, "block_errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
