"""What programs write: JSON whose diffs show what changed, and files that are there whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write(path: Path, text: str) -> None:
    """Writes the file whole or, when that fails, leaves what was there."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def rounded(value: Any, digits: int = 5) -> Any:
    """The same JSON with floats cut to so many digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def compact_json(content: dict[str, Any]) -> str:
    """JSON with a line for every entry of the second level, so that a diff shows what changed."""
    parts = []
    for key, value in content.items():
        if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f" {json.dumps(key)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
