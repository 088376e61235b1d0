r"""Compress an embedding model without labels, and save it for SentenceTransformer.

python scripts/compress_encoder.py --model all-MiniLM-L6-v2 --param_ratio 0.5 \
    --calibration sentences.txt --sts_file sts-dev.tsv --output_dir minilm-half
"""

from __future__ import annotations

from hf_lowrank.cli.arguments import PublishingArguments, parse_several, user_errors
from hf_lowrank.cli.encoder_arguments import EncoderArguments
from hf_lowrank.cli.encoder_command import compress_encoder
from hf_lowrank.measuring.progress import working_on


def main() -> None:
    """Parses and runs."""
    with user_errors():
        args, publishing = parse_several((EncoderArguments, PublishingArguments), __doc__)
        with working_on(args.model):
            compress_encoder(args, publishing)


if __name__ == "__main__":
    main()
