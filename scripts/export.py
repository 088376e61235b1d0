"""Write a compressed or dense model as files that another engine runs.

python scripts/export.py --model outputs/demo --to openvino --output_dir outputs/demo-openvino
"""

from __future__ import annotations

from hf_lowrank.cli.arguments import parse_arguments, user_errors
from hf_lowrank.cli.export_command import ExportArguments, export
from hf_lowrank.measuring.progress import working_on


def main() -> None:
    """Parses and runs."""
    with user_errors():
        args = parse_arguments(ExportArguments, __doc__)
        with working_on(args.model):
            export(args)


if __name__ == "__main__":
    main()
