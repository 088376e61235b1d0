"""A whole output folder: model, tokenizer, report, model card and page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank.files import atomic_folder
from hf_lowrank.report.card.card import model_card
from hf_lowrank.report.page.page import report_page
from hf_lowrank.report.page.plots import can_draw
from hf_lowrank.report.schema import Report


def save_compressed(
    model: nn.Module,
    tokenizer: Any,  # noqa: ANN401
    report: Report,
    folder: Path,
    *,
    overwrite: bool = False,
    repo_id: str | None = None,
    page: bool = True,
    processor: Mapping[str, bytes] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes model, tokenizer, report and model card into a folder, all or nothing.

    Args:
        model: The compressed model.
        tokenizer: Its tokenizer, or None.
        report: Becomes `report.json`, `README.md` (the model card) and `report.html`.
        folder: Where to.
        overwrite: Whether an existing folder is replaced.
        repo_id: The model's id on the Hub, for the card; by default the folder.
        page: Whether to write `report.html`, which needs matplotlib; without it there is none.
        processor: Files to lie beside the weights by name, see `processor_files`; what the
            tokenizer has written stays.
        finish: Writes more into the folder before it takes its name.

    Raises:
        StorageError: Writing failed; nothing is left.
    """
    with atomic_folder(folder, overwrite) as temporary:
        model.save_pretrained(temporary)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for name, content in (processor or {}).items():
            if not (temporary / name).exists():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_bytes(content)
        report.save(temporary / "report.json")
        has_page = page and can_draw()
        place = folder.name if folder.is_absolute() else folder.as_posix()
        model_card(report, repo_id or place, has_page).save(temporary / "README.md")
        if has_page:
            (temporary / "report.html").write_text(report_page(report), encoding="utf-8")
        if finish is not None:
            finish(temporary)
