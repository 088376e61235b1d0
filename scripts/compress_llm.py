"""Compress a causal language model and save it for `from_pretrained`.

python scripts/compress_llm.py --model gpt2 --param_ratio 0.8 --output_dir gpt2-small
"""

from __future__ import annotations

from pathlib import Path

from hf_lowrank import Report
from hf_lowrank.arguments import CompressionArguments, parse_arguments, user_errors
from hf_lowrank.compression import check_goal, model_sizes
from hf_lowrank.data.roles import read_texts
from hf_lowrank.distributed import current_processes
from hf_lowrank.evaluation.samples import continue_prompts, side_by_side
from hf_lowrank.jobs import check_before_loading, compressed
from hf_lowrank.publishing import publish
from hf_lowrank.report.page import comparison_page
from hf_lowrank.report.plots import can_draw
from hf_lowrank.report.table import format_report, format_sweep
from hf_lowrank.saving import check_output_folder, save_compressed, write_text
from hf_lowrank.sources import check_windows, hub_id, load_causal_lm
from hf_lowrank.targets import find_targets


def main() -> None:
    """Parses, loads, compresses, prints, saves, publishes."""
    args = parse_arguments(CompressionArguments, __doc__)
    with user_errors():
        run(args)


def run(args: CompressionArguments) -> None:
    """The whole job; see the fields of `CompressionArguments`."""
    config, folder = args.to_config(), Path(args.output_dir) if args.output_dir else None
    sizes = check_before_loading(args, folder)
    model, tokenizer = load_causal_lm(args.model, args.dtype, args.device)
    targets = find_targets(model, config)
    for ratio in args.param_ratio or []:
        check_goal(targets, config.replace(param_ratio=ratio))
    if folder:
        num_bytes = model_sizes(model)[1] * len(sizes)
        check_output_folder(folder, args.overwrite_output_dir, num_bytes)
    texts = read_texts(args, tokenizer)
    for role, batches in texts.items():
        check_windows(model, batches, args.text_source(role))
    prompts = args.prompts() if folder else []
    dense = continue_prompts(model, tokenizer, prompts)
    reports: dict[str, Report] = {}
    is_main = current_processes().is_main
    for (name, repo_id), report in zip(sizes.items(), compressed(args, model, texts), strict=True):
        if not is_main:  # under accelerate launch all processes compress, one prints and saves
            continue
        report.model, report.base_model = args.model, hub_id(args.model)
        report.data |= {role: args.text_source(role) for role in ("calibration", "evaluation")}
        written = continue_prompts(model, tokenizer, prompts)
        report.samples = side_by_side(prompts, dense, written)
        print(format_report(report), flush=True)
        reports[name] = report
        if folder:
            save_compressed(
                model,
                tokenizer,
                report,
                folder / name,
                overwrite=args.overwrite_output_dir,
                repo_id=repo_id,
                page=args.html_report,
            )
            print(f"saved to {folder / name}\n", flush=True)
        if folder and repo_id:
            print(f"published as {publish(folder / name, repo_id, args.private)}\n", flush=True)
    if len(reports) > 1:
        if folder and args.html_report and can_draw():
            write_text(folder / "compare.html", comparison_page(reports))
            print(f"side by side: {folder / 'compare.html'}\n")
        print(format_sweep(list(reports.values())))


if __name__ == "__main__":
    main()
