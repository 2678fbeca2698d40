"""What keeps torch.compile out of code that reads addresses, which a traced tensor has none of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

# What Dynamo does with frames of this thread; None where it leaves them alone. Not in every version of torch.
_frame_callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Like ``torch._disable_dynamo``, which takes time to switch off a tracer that is mostly not on."""
    disabled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if torch.compiler.is_compiling() or _frame_callback() is not None:
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return call
