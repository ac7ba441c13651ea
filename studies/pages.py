"""The pages that studies write: tables between marks, all figures beside them, what is by hand left as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
T_OF_THREE = 4.303  # 97.5% quantile of Student's t with two degrees of freedom


def put_tables(page: Path, title: str, tables: str, figures: Any = None) -> None:
    """Put tables between a page's marks.

    Args:
        page: a Markdown file with the marks; one with this title is made where there is none.
        title: of a new page.
        tables: what stands between the marks.
        figures: written beside the page as JSON; None: nothing is.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    if figures is not None:
        page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    text = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}", encoding="utf-8")
