"""docs/storage.md lists what each rule's moments may be stored as: the table is the one that is made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.paper_formulas import TABLE, Row

from signadam_ext.core.formats import BLOCK8, BOUNDED, Format
from signadam_ext.core.rule import rule_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "storage.md"
HEAD = ["| optimizer | rule | state | `state_dtype` of it |", "|---|---|---|---|"]


def shown(name: str, form: Format) -> str:
    return f'"{name}"' + (" in blocks" if form is BLOCK8 else "")


def lines_of(row: Row) -> list[str]:
    """One for each moment: the names that it takes by itself, in a tuple."""
    optimizer = row.optimizer([torch.nn.Parameter(torch.zeros(1))], **row.hyperparameters)
    (group,) = optimizer.param_groups
    rule = rule_of(row.optimizer, group)
    condition = f", `betas[1]` up to {row.largest_beta2}" if row.largest_beta2 < 1 else ""
    begin = f"| `{row.optimizer.__name__}` | `{rule.name}`{condition} |"
    lines = []
    for i, moment in enumerate(rule.moments):
        taken = []
        for name in BOUNDED:
            own = tuple(name if j == i else "fp32" for j in range(len(rule.moments)))
            try:
                form = rule.forms({**group, "state_dtype": own})[i]
            except ValueError:
                continue
            if name in ("fp32", form.kind) or form is BLOCK8:  # a second moment's "int8" is bf16
                taken.append(shown(name, form))
        lines.append(f"{begin} `{moment}` | {', '.join(taken)} |")
    return lines or [f"{begin} none | |"]


def table() -> list[str]:
    return [*HEAD, *dict.fromkeys(line for row in TABLE for line in lines_of(row))]


def test_the_table_is_the_rules() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(HEAD[0]) if HEAD[0] in lines else 0
    found = lines[start : lines.index("", start)]
    assert found == table(), "docs/storage.md must say:\n" + "\n".join(table())


@pytest.mark.parametrize("name", BOUNDED)
def test_a_rule_takes_what_its_row_says(name: str) -> None:
    """A state_dtype by itself, as users give it, is taken or refused as that of the first moment."""
    for row in TABLE:
        if row.state_dtypes:
            taken = f'"{name}"' in lines_of(row)[0]
            amsgrad = row.hyperparameters.get("amsgrad", False)  # which refuses few bits in any moment
            assert taken == (name in row.state_dtypes) or amsgrad
