"""Pages whose figures are made from results, and the check that no figure stands beside them."""

import re


def replaced(
    text: str, name: str, block: str, markers: tuple[str, str] = ("<!-- {}:begin -->", "<!-- {}:end -->")
) -> str:
    """The text with `block` between the two lines that mark the place of `name`."""
    begin, end = (marker.format(name) for marker in markers)
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"the README has no lines {begin} and {end}")
    return f"{head}{begin}\n{block}\n{end}{tail}"


#: A number with the unit of something measured. What is counted or chosen (bits, bytes, steps, parameters) is none.
FIGURE = re.compile(
    r"(?<![\w.*/-])(?:\d[\d,]*(?:\.\d+)?|\.\d+)\s?"
    r"(?:x|%|[kMGT]i?B(?:/s)?|ms|us|ns|s|seconds?|minutes?|hours?|core-\w+|nats?|points?)(?![\w/(*])"
)


def hand_written_figures(text: str) -> list[str]:
    """The lines of a page that hold a figure outside generated blocks, blocks of code, and code within a line."""
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    text = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", blank, text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", blank, text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    return [f"line {i}: {line}" for i, line in enumerate(text.splitlines(), 1) if FIGURE.search(line)]
