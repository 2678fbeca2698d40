"""Code that reads addresses is never traced, however it is reached."""

import types

import torch

from signadam_ext.core.dynamo import untraced

_frame_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback


@untraced
def _seen(x: torch.Tensor) -> tuple[bool, bool]:
    return torch.compiler.is_compiling(), _frame_callback() is not None


def _copy_that_is_skipped() -> types.FunctionType:
    """A copy of :func:`_seen` that the tracer passes over, but not what it calls."""
    copy = types.FunctionType(_seen.__code__.replace(co_name="copy"), _seen.__globals__, closure=_seen.__closure__)
    torch._dynamo.eval_frame.skip_code(copy.__code__)
    return copy


def test_untraced_is_not_traced_inside_a_traced_function() -> None:
    def traced(x: torch.Tensor) -> tuple[torch.Tensor, tuple[bool, bool], bool]:
        return x + 1, _seen(x), torch.compiler.is_compiling()

    assert traced(torch.ones(2))[1:] == ((False, False), False)
    assert torch.compile(traced, backend="eager")(torch.ones(2))[1:] == ((False, False), True)


def test_untraced_is_not_traced_where_the_tracer_passes_over_it() -> None:
    skipped = _copy_that_is_skipped()

    @torch._disable_dynamo(recursive=False)
    def calls(x: torch.Tensor) -> tuple[tuple[bool, bool], bool]:
        return skipped(x), _frame_callback() is not None

    seen, is_tracer_on = torch.compile(lambda x: calls(x), backend="eager")(torch.ones(2))
    assert is_tracer_on
    assert seen == (False, False)


def test_untraced_keeps_the_name_of_its_function() -> None:
    assert _seen.__name__ == "_seen"
