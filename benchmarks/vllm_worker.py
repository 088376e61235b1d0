"""One model in vLLM, timed on request: a line of JSON in, a line of JSON out.

python -m benchmarks.vllm_worker FOLDER '{"dtype": "bfloat16"}'
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from typing import Any


def serve(folder: str, options: dict[str, Any]) -> None:
    """Answers {"prompts", "length", "new"} with the seconds that writing took."""
    with contextlib.redirect_stdout(sys.stderr):
        from vllm import LLM, SamplingParams

        engine = LLM(model=folder, skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    random.seed(0)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [
            {"prompt_token_ids": random.choices(range(vocabulary), k=asked["length"])}
            for _ in range(asked["prompts"])
        ]
        how = SamplingParams(
            temperature=0.0, max_tokens=asked["new"], ignore_eos=True, detokenize=False
        )
        with contextlib.redirect_stdout(sys.stderr):
            start, cpu = time.perf_counter(), time.process_time()
            engine.generate(prompts, how, use_tqdm=False)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"seconds": seconds, "cpu_seconds": cpu}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
