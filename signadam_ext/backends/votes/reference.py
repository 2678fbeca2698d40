"""Votes in whole-tensor operations of torch: what the kernels are held to, bit for bit, and what serves any device."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import formats
from ...core.memory_order import flat
from ...core.random_bits import bits_of_keys
from ...core.shard_index import WHOLE
from .table import CODES_PER_WORD, SCALARS, Casting, VoteTable, words_of


class ReferenceVotes:
    def cast(self, table: VoteTable, scalars: Tensor, casting: Casting, codes: Tensor) -> None:
        for i, value in enumerate(table.values):
            s = dict(zip(SCALARS, scalars[i].unbind(), strict=True))
            g = flat(value).float()
            g = -g if casting.maximize else g
            u = g
            gates_first = casting.memory == "GATED_SIGNS"
            kept = m = None
            if table.momenta is not None:
                m = flat(table.momenta[i])
                x = _gated_sign(g, s["threshold"]) if gates_first else g
                u = s["beta1"] * m + s["one_minus_beta1"] * x
                kept = s["beta2"] * m + s["one_minus_beta2"] * x
            if table.residuals is not None:
                u = u + flat(table.residuals[i])
            finite = g.isfinite() & u.isfinite()
            c = _gated_sign(u, torch.zeros_like(s["threshold"]) if gates_first else s["threshold"])
            if m is not None and kept is not None:
                m.copy_(torch.where(finite, kept, m))
            if table.residuals is not None:
                r = flat(table.residuals[i])
                r.copy_(torch.where(finite, u - s["scale"] * c, r))
            code = torch.where(finite, c.to(torch.int64), 0 if casting.abstains else _spoiled(2))
            begin = table.first_words[i]
            codes[begin : begin + words_of(value.numel())] = _pack(code, 2)

    def count(self, codes: Tensor, bits: int, majority: bool, result: Tensor) -> None:
        votes = torch.stack([_unpack(own, 2) for own in codes])
        counted = votes.sum(0)
        counted = counted.sign() if majority else counted
        spoiled = (votes == _spoiled(2)).any(0)
        result.copy_(_pack(torch.where(spoiled, _spoiled(bits), counted), bits))

    def read(
        self, table: VoteTable, scalars: Tensor, keys: Tensor | None, use: str, bits: int, divisor: int, result: Tensor
    ) -> None:
        for i, value in enumerate(table.values):
            s = dict(zip(SCALARS, scalars[i].unbind(), strict=True))
            numel = value.numel()
            begin, end = (word * bits // 2 for word in (table.first_words[i], table.first_words[i] + words_of(numel)))
            code = _unpack(result[begin:end], bits)[:numel]
            # By a tensor, since a GPU divides by a number by multiplying with its inverse.
            by = torch.full((), divisor, dtype=torch.float32, device=result.device)
            vote = torch.where(code == _spoiled(bits), torch.nan, code.float() / by)
            target = flat(value)
            if use == "WRITE":
                formats.store_param("nearest", vote, None, target, None)
                continue
            p = target.float()
            new = torch.where(vote.isnan(), p, p * s["decay"] - s["lr"] * vote)
            storage = "nearest"
            random = None
            if use == "STEP_STOCHASTIC":
                storage = formats.effective_param_storage("stochastic", value.dtype)
                assert keys is not None
                h0, h1 = (key & 0xFFFFFFFF for key in keys[i].tolist())
                random = bits_of_keys((h0, h1), WHOLE, numel, value.device)
            formats.store_param(storage, new, random, target, None)


def _gated_sign(x: Tensor, threshold: Tensor) -> Tensor:
    return (x > threshold).float() - (x < -threshold).float()


def _spoiled(bits: int) -> int:
    return -(1 << (bits - 1))


def _pack(code: Tensor, bits: int) -> Tensor:
    """Codes, int64, in words of 16 codes of 2 bits or in the ``bits / 2`` words that wider ones fill."""
    in_word = 32 // bits
    padded = code.new_zeros(-(-code.numel() // CODES_PER_WORD) * CODES_PER_WORD)
    padded[: code.numel()] = code & ((1 << bits) - 1)
    shifts = bits * torch.arange(in_word, device=code.device)
    return (padded.view(-1, in_word) << shifts).sum(1).to(torch.int32)  # which wraps around


def _unpack(words: Tensor, bits: int) -> Tensor:
    shifts = bits * torch.arange(32 // bits, device=words.device)
    field = words.to(torch.int64)[:, None] >> shifts & ((1 << bits) - 1)
    return (field - (field >> (bits - 1) << bits)).flatten()
