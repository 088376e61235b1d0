"""Writes with vLLM, in a process of its own, what is asked for as JSON on stdin; prints JSON.

{"folders": [...], "options": {...}} gives {folder: rows as in expected.json, or an error's text}.
"""

import gc
import json
import os
import sys
from pathlib import Path


def rows(folder, options):
    from vllm import LLM, SamplingParams

    asked = json.loads((Path(folder) / "expected.json").read_text())
    engine = LLM(
        model=folder,
        dtype="float32",
        max_model_len=48,
        max_num_seqs=4,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **options,
    )
    length = len(asked[0]["tokens"])
    parameters = SamplingParams(
        temperature=0.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False
    )
    prompts = [{"prompt_token_ids": row["prompt"]} for row in asked]
    found = []
    for output in engine.generate(prompts, parameters, use_tqdm=False):
        tokens = list(output.outputs[0].token_ids)
        scores = [
            step[token].logprob
            for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)
        ]
        found.append({"prompt": output.prompt_token_ids, "tokens": tokens, "scores": scores})
    return found


def main():
    from vllm.distributed import cleanup_dist_env_and_memory

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's processes write to what they think is stdout, too
    asked, found = json.load(sys.stdin), {}
    for folder in asked["folders"]:
        try:
            found[folder] = rows(folder, asked["options"])
        except Exception as error:
            found[folder] = " ".join(str(error).split())
        gc.collect()
        cleanup_dist_env_and_memory()
    print(json.dumps(found), file=answer, flush=True)


if __name__ == "__main__":
    main()
