"""Pages whose figures are made from results."""


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
