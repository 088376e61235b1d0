"""Compress a causal language model and save it for `from_pretrained`.

python scripts/compress_llm.py --model gpt2 --param_ratio 0.8 --output_dir gpt2-small
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hf_lowrank import Report
from hf_lowrank.cli.arguments import (
    CompressionArguments,
    PublishingArguments,
    parse_several,
    user_errors,
)
from hf_lowrank.cli.jobs import check_before_loading, compressed, name_models, save_and_publish
from hf_lowrank.cli.roles import batches_by_role
from hf_lowrank.cli.streamed_command import compress_streamed, streams
from hf_lowrank.compression.byte_budget import check_size_goal
from hf_lowrank.compression.goals import check_goal
from hf_lowrank.evaluation.samples import continue_prompts, side_by_side
from hf_lowrank.evaluation.size import model_sizes
from hf_lowrank.files import check_output_folder, write_text
from hf_lowrank.inputs.processor import processor_files
from hf_lowrank.inputs.sources import check_windows, load_causal_lm
from hf_lowrank.inputs.start_token import start_text
from hf_lowrank.measuring.distributed import current_processes
from hf_lowrank.measuring.progress import announce, working_on
from hf_lowrank.modeling.targets import find_targets
from hf_lowrank.report.page.page import comparison_page
from hf_lowrank.report.page.plots import can_draw
from hf_lowrank.report.text.table import format_report, format_sweep


def main() -> None:
    """Parses, loads, compresses, prints, saves, publishes."""
    with user_errors():
        args, publishing = parse_several((CompressionArguments, PublishingArguments), __doc__)
        with working_on(args.model):
            (compress_streamed if streams(args) else run)(args, publishing)


def run(args: CompressionArguments, publishing: PublishingArguments) -> None:
    """The whole job; see the fields of the arguments."""
    config, folder = args.to_config(), Path(args.output_dir) if args.output_dir else None
    sizes = check_before_loading(args, publishing, folder)
    announce(f"load {args.model}")
    model, tokenizer = load_causal_lm(args.model, args.dtype, args.device, args.trust_remote_code)
    processor = processor_files(args.model)
    targets = find_targets(model, config)
    for ratio in args.param_ratio or []:
        check_goal(targets, config.replace(param_ratio=ratio))
    check_size_goal(model, targets, config)
    if folder:
        num_bytes = model_sizes(model)[1] * len(sizes)
        check_output_folder(folder, args.overwrite_output_dir, num_bytes)
    texts = batches_by_role(args, model, tokenizer)
    for role, batches in texts.items():
        check_windows(model, batches, args.text_source(role))
    used = {role: args.text_source(role) for role in texts if role != "held_out"}
    if start := start_text(tokenizer):
        used["start_token"] = start
    prompts = args.prompts() if folder else []
    dense = continue_prompts(model, tokenizer, prompts)
    reports: dict[str, Report] = {}
    is_main = current_processes().is_main
    for (name, repo_id), report in zip(sizes.items(), compressed(args, model, texts), strict=True):
        if not is_main:  # under accelerate launch all processes compress, one prints and saves
            continue
        name_models(report, args.model, publishing)
        report.data = replace(report.data, **used)
        written = continue_prompts(model, tokenizer, prompts)
        report.samples = side_by_side(prompts, dense, written)
        print(format_report(report), flush=True)
        reports[name] = report
        if folder:
            save_and_publish(
                model,
                tokenizer,
                report,
                folder / name,
                repo_id,
                private=publishing.private,
                processor=processor,
                overwrite=args.overwrite_output_dir,
                page=args.html_report,
            )
    if len(reports) > 1:
        if folder and args.html_report and can_draw():
            write_text(folder / "compare.html", comparison_page(reports))
            print(f"side by side: {folder / 'compare.html'}\n")
        print(format_sweep(list(reports.values())))


if __name__ == "__main__":
    main()
