"""The variance of a mini-batch's gradient, from the gradients of its samples, for the rules that divide by it.

Everything that can fail comes before the first write: gradients go to accumulators of this call, and only when the last
chunk has passed are the results copied to where optimizers look for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..core import memory_order, shards, tensors
from ..engine.overlap import overlap_levels

#: What the gradients of a chunk's samples may take where no ``chunk_size`` is given, in bytes.
CHUNK_BYTES = 512 << 20


def per_sample_variance(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: Any,
    *,
    chunk_size: int | None = None,
) -> None:
    """Fills ``p.grad_variance`` of each trainable parameter with the variance of the mini-batch's gradient.

    That is the estimate of the mini-batch form of [BH0] (Alg. 3, 5)::

        s_hat = sum_k (g_k - g)**2 / (B*(B-1))

    over the gradients ``g_k`` of the B samples and their mean ``g``, element by element. Call it before ``step()``,
    before or after ``backward()``, with the batch of that backward::

        loss_fn(model(inputs), targets).backward()
        per_sample_variance(model, loss_fn, (inputs, targets))
        optimizer.step()

    It costs about another forward and backward of the batch. ``grad_variance`` is an fp32 tensor of the parameter's
    shape, in the memory order of ``torch.empty_like(p)``. A tensor of that kind that is there already is written in
    place, so that its address stays; anything else is replaced. Parameters that the loss does not reach get zeros.
    Frozen parameters are left alone, whatever they hold. So are ``p.grad``, the batch, buffers, and the model's
    attributes and mode: what a forward writes to buffers and inputs goes to copies, and what it assigns is undone.
    Only what it or a hook puts into containers of its own stays, as tensors of ``torch.func`` that are dead.

    Each sample is run as a batch of one, and its loss is ``loss_fn`` of that. Hence:

    - ``loss_fn`` must be the plain mean of the samples' losses. Beyond the shape of what it returns this **cannot be
      checked**. ``cross_entropy`` with ``weight`` or with ignored targets is another mean, whose weights cancel in a
      batch of one. For k times the mean (a scaled loss) give ``loss_fn`` times k, and ``s_hat`` is k*k times as large.
    - Samples that see each other have no gradients of their own. BatchNorm that takes its statistics from the batch is
      refused; a module of other making that does the like **goes unnoticed**.
    - In train mode dropout draws a mask for each sample: random as in the backward that made ``p.grad``, but not the
      same. ``s_hat`` then includes the variance of the masks. The draws come from the global generator and advance it;
      after ``torch.manual_seed`` they are the same for the same ``chunk_size``, and others for another. A model that
      draws nothing leaves the generator as it is.
    - Hooks on parameters (``Tensor.register_hook``) do not see these gradients, and neither does a ``GradScaler``.

    The gradients have their parameters' dtypes, as in ``backward()``; all arithmetic with them is fp32. The chunks'
    sums of squares are merged about a running mean, so the result for one ``chunk_size`` differs from that for another
    by rounding alone, and equal gradients have the variance 0 exactly. Deviations beyond 1.8e19 overflow to infinity,
    below 3e-23 they vanish. NaN and infinite gradients give NaN.

    Args:
        model: its trainable parameters in fp32, bf16 or fp16.
        loss_fn: takes the model's outputs and the targets, and returns their mean loss: a scalar tensor.
        batch: ``(inputs, targets)``, each a tensor or a tuple of tensors with the samples in the first dimension. The
            model is called with the inputs as its positional arguments; targets go to ``loss_fn`` as they are given.
        chunk_size: how many samples are evaluated at once, by ``torch.func.vmap``. Memory is needed for their
            gradients, that is for ``chunk_size`` times the trainable parameters, beside three times those in fp32 for
            the sums. None: as many as keep the gradients within 512 MiB, and at least one. 1: without ``torch.func``,
            one sample after another, which is slow but lets the model do what it likes (control flow that depends on
            values, activation checkpointing, ...).

    Raises:
        TypeError: arguments or parameters of other kinds.
        ValueError: fewer than two samples, unequal numbers of them, no trainable parameter, a module whose samples
            depend on each other or that is a wrapper for several devices or processes, or a loss that is no scalar.
        RuntimeError: the model or the loss cannot be evaluated for several samples at once.

    After any of these no ``grad_variance`` has changed.

    Example:
        >>> model, loss_fn = torch.nn.Linear(10, 1), torch.nn.functional.mse_loss
        >>> inputs, targets = torch.randn(4, 10), torch.randn(4, 1)
        >>> per_sample_variance(model, loss_fn, (inputs, targets))
        >>> model.weight.grad_variance.shape
        torch.Size([1, 10])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: must be a torch.nn.Module")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn is a {type(loss_fn).__name__}: must be callable, as torch.nn.functional.mse_loss is")
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size={chunk_size!r}: must be an int, or None")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size!r}: must be at least 1")
    with_loss = _ModuleWithLoss(model, loss_fn)
    for name, module in with_loss.named_modules():
        _refuse(name, module)
    params = {f"model.{name}": param for name, param in model.named_parameters() if param.requires_grad}
    if not params:
        raise ValueError("model has no parameter that requires grad: there is nothing to take the variance of")
    for name, param in params.items():
        tensors.parameter(f"parameter {name.removeprefix('model.')!r}", param)
    samples, count = _samples_of(batch)
    if chunk_size is None:
        chunk_size = max(1, CHUNK_BYTES // max(1, 4 * sum(param.numel() for param in params.values())))
    chunk_size = min(chunk_size, count)

    with _modes():
        evaluate = _one_by_one if chunk_size == 1 else _at_once
        leaves = {name: param.detach() for name, param in params.items()}
        spreads: dict[str, _Welford] = {}
        for first in range(0, count, chunk_size):
            with _as_it_was(with_loss):
                grads = evaluate(with_loss, leaves, _rows(samples, first, chunk_size))
            if not spreads:
                spreads = {name: _Welford(grads[name][0]) for name in params}
            for name in params:
                spreads[name].add(grads.pop(name))
        places = _write_buffers(list(params.values()))
    for (name, param), place in zip(params.items(), places, strict=True):
        place.copy_(spreads.pop(name).variance_of_mean())
        param.grad_variance = place  # type: ignore[attr-defined]


class _Welford:
    """Mean and sum of squared deviations of the gradients so far of one parameter, in fp32.

    The mean starts at the first gradient, and a chunk is taken about the mean so far: where gradients lie close
    together their differences are exact, whatever their size.
    """

    def __init__(self, first: Tensor) -> None:
        self.count = 0
        self.mean = first.to(torch.float32, copy=True)
        self.squares = torch.zeros_like(self.mean)

    def add(self, grads: Tensor) -> None:
        """Takes in gradients of shape ``(n, *shape)`` and any dtype (Chan, Golub, LeVeque 1979)."""
        n = len(grads)
        total = self.count + n
        deviations = grads.to(torch.float32) - self.mean
        shift = deviations.mean(0)
        self.squares += deviations.sub_(shift).square_().sum(0)
        self.squares += shift.square().mul_(self.count * n / total)
        self.mean += shift.mul_(n / total)
        self.count = total

    def variance_of_mean(self) -> Tensor:
        return self.squares.div_(self.count * (self.count - 1))


class _ModuleWithLoss(nn.Module):
    """Model and loss as one module, so that functional_call reaches weights and buffers in either.

    The gradients are taken in it as well, where ``leaves`` are given: what a backward computes again must meet the same
    buffers.
    """

    def __init__(self, model: nn.Module, loss_fn: Any) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, inputs: Any, targets: Any, leaves: list[Tensor] | None = None) -> Any:
        loss = _checked(self.loss_fn(self.model(*inputs), targets))
        if leaves is None:
            return loss
        if not loss.requires_grad:
            return (None,) * len(leaves)
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    def buffer_copies(self) -> dict[str, Tensor]:
        """Copies of the buffers, which a forward may write to."""
        return {name: buffer.detach().clone() for name, buffer in self.named_buffers()}


def _at_once(with_loss: _ModuleWithLoss, params: dict[str, Tensor], chunk: Any) -> dict[str, Tensor]:
    """The gradients of a chunk's samples, by name of the parameter, with the samples in the first dimension."""

    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], sample: Any) -> Tensor:
        return functional_call(with_loss, (params, buffers), _each(_batch_of_one, sample))

    try:
        with torch.no_grad():
            gradients = vmap(grad(loss), in_dims=(None, None, 0), randomness="different")
            return gradients(params, with_loss.buffer_copies(), chunk)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"the gradients of single samples could not be computed: {error}\n"
            "The samples of a chunk are evaluated at once by torch.func.vmap, under which a model may not branch on "
            "values, call .item(), or write in place to tensors that its samples share. If that is the reason, "
            "chunk_size=1 evaluates them one by one, without torch.func"
        ) from error


def _one_by_one(with_loss: _ModuleWithLoss, params: dict[str, Tensor], chunk: Any) -> dict[str, Tensor]:
    """What :func:`_at_once` does, for a chunk of one sample and by plain autograd."""
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        grads = functional_call(with_loss, (leaves, with_loss.buffer_copies()), (*chunk, list(leaves.values())))
    return {
        name: torch.zeros_like(leaf)[None] if grad is None else grad.to_dense()[None]
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }


def _checked(loss: Any) -> Tensor:
    """``loss``, if it is a number to take the gradient of."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}: must return a tensor, the mean loss")
    if loss.dim() > 0:
        raise ValueError(
            f"loss_fn returned shape {tuple(loss.shape)} for one sample: must return a scalar, the mean over samples"
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn returned dtype {loss.dtype}: must be a floating-point number")
    return loss


def _refuse(name: str, module: nn.Module) -> None:
    """Raises for modules through which a sample has no gradient of its own, or which write to their weights."""
    label = "model" if name == "model" else f"module {name.removeprefix('model.')!r}"
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        cure = "call .eval() on it" if module.running_mean is not None else "give it running statistics"
        raise ValueError(
            f"{label} is a {type(module).__name__} that takes its statistics from the batch, so single samples have no "
            f"gradients: {cure}, or use GroupNorm or LayerNorm"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        raise ValueError(
            f"{label} has max_norm={module.max_norm!r}, with which a forward rewrites its weights: limit their norm "
            "outside of the model"
        )
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and not there means not used
    sharded = fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)
    if sharded or isinstance(module, (DataParallel, DistributedDataParallel)):
        cure = "its parameters are not whole here"
        if not sharded:
            cure = "give the .module in it, and the variance will be that of this process's part of the batch"
        raise ValueError(
            f"{label} is a {type(module).__name__}, which spreads a batch over devices or processes: {cure}"
        )
    if any(shards.is_sharded(param) for param in module.parameters(recurse=False)):
        raise ValueError(
            f"{label} has DTensors as parameters, which are not whole here: a sample has no gradient of them"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{label} is a {type(module).__name__}, which torch.func cannot evaluate: give it unscripted")


def _samples_of(batch: Any) -> tuple[Any, int]:
    """Inputs as a tuple and targets as they are given, and how many samples they hold."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        raise TypeError(f"batch is {what}: must be (inputs, targets)")
    count: int | None = None
    first = ""
    parts: list[Any] = []
    for name, part in zip(("inputs", "targets"), batch, strict=True):
        several = isinstance(part, (tuple, list))
        parts.append(tuple(part) if several else part)
        for i, tensor in enumerate(part if several else (part,)):
            label = f"{name}[{i}]" if several else name
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{label} is a {type(tensor).__name__}: must be a tensor with the samples in its first dimension"
                )
            if tensor.dim() == 0:
                raise ValueError(f"{label} has no dimensions: must have the samples in its first")
            if count is None:
                count, first = len(tensor), label
            elif len(tensor) != count:
                raise ValueError(f"{label} has {len(tensor)} samples, and {first} has {count}: must be as many")
    if count is None:
        raise TypeError("batch holds no tensor: must be (inputs, targets)")
    if count < 2:
        raise ValueError(f"batch has {count} sample{'s' * (count == 0)}: a variance takes at least 2")
    inputs, targets = parts
    return (inputs if isinstance(inputs, tuple) else (inputs,), targets), count


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensor, or to each in its tuples."""
    return tuple(_each(function, v) for v in value) if isinstance(value, tuple) else function(value)


def _batch_of_one(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0)


def _rows(samples: Any, first: int, count: int) -> Any:
    """Copies of some samples, without a graph: a model may write to its inputs."""
    return _each(lambda tensor: tensor.detach()[first : first + count].clone(), samples)


def _write_buffers(params: list[nn.Parameter]) -> list[Tensor]:
    """The tensor that each result goes to: the parameter's ``grad_variance`` if it may be written, or a new one.

    Not fit is one that shares memory with a parameter, a gradient, or the place of another parameter.
    """
    given = [getattr(param, "grad_variance", None) for param in params]
    fit = [place if _fits(place, param) else None for place, param in zip(given, params, strict=True)]
    others = [param.grad for param in params if param.grad is not None and param.grad.layout == torch.strided]
    levels = overlap_levels([*params, *others, *fit])[-len(fit) :]
    # Parameters and gradients come first, and may meet each other: a place is free where it is in the first wave.
    return [
        torch.empty_like(param, dtype=torch.float32, requires_grad=False) if place is None or level > 0 else place
        for param, place, level in zip(params, fit, levels, strict=True)
    ]


def _fits(place: Any, param: Tensor) -> bool:
    return (
        isinstance(place, Tensor)
        and place.layout == torch.strided
        and place.dtype == torch.float32
        and place.shape == param.shape
        and place.device == param.device
        and not (place.requires_grad or place.is_inference() or place.is_neg())
        and memory_order.same_strides(place, memory_order.strides_of(param))
    )


@contextmanager
def _modes() -> Iterator[None]:
    """What must be off while models are evaluated here.

    Autocast would keep casts of weights that are gone, and compilers make versions for weights that no one uses again.
    """
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if "torch._dynamo" in sys.modules:  # slow to import, and not there means that nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(torch.set_autocast_cache_enabled, cached)
        torch.set_autocast_cache_enabled(False)
        yield


@contextmanager
def _as_it_was(with_loss: nn.Module) -> Iterator[None]:
    """Undoes what an evaluation assigns to modules: tensors of torch.func do not outlive it.

    Buffers that are None until a forward fills them are among it. So are parameters of a module that is registered
    under two names, of which functional_call takes the replacement under the first for the original under the second.
    """
    tables: list[dict[str, Any]] = []
    for module in with_loss.modules():
        tables += [vars(module), module._parameters, module._buffers]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
