"""Lay the reports of several runs side by side, as a table and as HTML.

python scripts/compare_reports.py outputs/0.8 outputs/0.6 other/report.json --output compare.html
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hf_lowrank import Report
from hf_lowrank.cli.arguments import HelpFormatter, user_errors
from hf_lowrank.errors import ConfigError
from hf_lowrank.files import write_text
from hf_lowrank.report.page.page import comparison_page
from hf_lowrank.report.page.plots import require_matplotlib
from hf_lowrank.report.text.table import format_comparison


def short_names(paths: list[str]) -> dict[str, Path]:
    """The paths by what tells them apart: their part below the folder that all of them share."""
    full = [os.path.abspath(path) for path in paths]
    shared = os.path.commonpath([os.path.dirname(path) for path in full])
    return {os.path.relpath(path, shared): Path(path) for path in full}


def main() -> None:
    """Parses, reads, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "reports", nargs="+", help="Folders of compressed models, or their report.json files."
    )
    parser.add_argument("--output", help="HTML file to write; needs matplotlib.")
    args = parser.parse_args()
    with user_errors():
        if args.output:
            require_matplotlib()
        reports = {name: Report.load(path) for name, path in short_names(args.reports).items()}
        if len(reports) < len(args.reports):
            raise ConfigError(f"a report is named twice: {' '.join(args.reports)}.")
        print(format_comparison(reports))
        if args.output:
            write_text(Path(args.output), comparison_page(reports))
            print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
