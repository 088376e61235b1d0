"""Lay the reports of several runs side by side, as a table and as HTML.

python scripts/compare_reports.py outputs/0.8 outputs/0.6 other/report.json --output compare.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_lowrank import Report
from hf_lowrank.arguments import user_errors
from hf_lowrank.errors import ConfigError
from hf_lowrank.report.page import comparison_page
from hf_lowrank.report.plots import require_matplotlib
from hf_lowrank.report.table import format_comparison
from hf_lowrank.saving import write_text


def main() -> None:
    """Parses, reads, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "reports", nargs="+", help="Folders of compressed models, or their report.json files."
    )
    parser.add_argument("--output", help="HTML file to write; needs matplotlib.")
    args = parser.parse_args()
    with user_errors():
        if args.output:
            require_matplotlib()
        reports = {name: Report.load(Path(name)) for name in args.reports}
        if len(reports) < len(args.reports):
            raise ConfigError(f"a report is named twice: {' '.join(args.reports)}.")
        print(format_comparison(reports))
        if args.output:
            write_text(Path(args.output), comparison_page(reports))
            print(f"saved to {args.output}")


if __name__ == "__main__":
    main()
