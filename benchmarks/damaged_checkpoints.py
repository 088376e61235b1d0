"""Damaged checkpoints: each must load right or be refused with a LowRankError, and nothing else."""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers.utils import logging

import hf_lowrank
from benchmarks.mutations import MUTATIONS, Mutation, mutate_index
from hf_lowrank import LowRankConfig, LowRankError
from hf_lowrank.config import option
from hf_lowrank.format.layout import Layout
from hf_lowrank.format.rebuild import replace_with_lowrank_
from hf_lowrank.modeling.marks import attach_config_
from hf_lowrank.report.provenance import write_result
from hf_lowrank.value_checks import check_count
from tests.tiny_models import tiny_bert_classifier, tiny_gpt2, tiny_llama, token_batches

LAYER = "model.layers.0.self_attn.q_proj"
GOOD = ("loaded right", "refused")
SECONDS = 20.0  # a good one takes less than 0.1
MEGABYTES = 200  # a checkpoint has 0.1


@dataclass
class DamagedArguments:
    """Arguments of the trial by damaged checkpoints."""

    count: int = option(10_000, "Damaged checkpoints.")
    seed: int = option(0, "Seed of the damage.")
    output: str = option("outputs/damaged_checkpoints.json", "JSON file of the result.")

    def check(self) -> None:
        """Refuses what leaves nothing to try.

        Raises:
            ConfigError: The count is below 1.
        """
        check_count("count", self.count)


class Case(NamedTuple):
    """One damaged checkpoint.

    Attributes:
        number: Its place in the run; with the run's seed it makes the case again.
        checkpoint: Name of the checkpoint that is damaged.
        mutate: How.
    """

    number: int
    checkpoint: str
    mutate: Mutation


class Outcome(NamedTuple):
    """What became of a case.

    Attributes:
        kind: One of `GOOD`, or "loaded wrong", "other error", "too slow", "too large", "died".
        detail: The error, if there is one.
        seconds: Of the processor; of the clock for one that hung.
    """

    kind: str
    detail: str = ""
    seconds: float = 0.0


def try_damaged_checkpoints(args: DamagedArguments) -> None:
    """Writes how many damaged checkpoints loaded, were refused, or did anything else."""
    args.check()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # the workers are forks
    counts: dict[str, Counter[str]] = {}
    failures, slowest = [], 0.0
    with tempfile.TemporaryDirectory() as place:
        good = make_checkpoints(Path(place))
        cases = [_case(number, args.seed, sorted(good)) for number in range(args.count)]
        for case, found in zip(cases, outcomes(cases, args.seed, good), strict=True):
            for name in (case.checkpoint, case.mutate.__name__):
                counts.setdefault(name, Counter())[found.kind] += 1
            slowest = max(slowest, found.seconds)
            if found.kind not in GOOD:
                failures.append(
                    {"number": case.number, "checkpoint": case.checkpoint}
                    | {"mutation": case.mutate.__name__, **found._asdict()}
                )
                print(failures[-1], flush=True)
    total = sum((counts[name] for name in good if name in counts), Counter[str]())
    print(", ".join(f"{number} {kind}" for kind, number in sorted(total.items())))
    result = {"arguments": vars(args), "outcomes": total, "by_kind": counts}
    limits = {"slowest_seconds": slowest, "limits": {"seconds": SECONDS, "megabytes": MEGABYTES}}
    write_result(Path(args.output), {**result, **limits, "failures": failures})


def make_checkpoints(place: Path) -> dict[str, Path]:
    """Small sound checkpoints of several architectures and stored forms, by name."""
    plain = LowRankConfig(param_ratio=0.6, metric="plain")
    narrow = LowRankConfig(param_ratio=0.6, channels=True, rank_pattern={LAYER: 6})
    models: dict[str, Any] = {
        "llama narrowed": tiny_llama(num_hidden_layers=1),
        "llama usv": tiny_llama(num_hidden_layers=1),
        "llama compact sharded": tiny_llama(),
        "llama compact int8": tiny_llama(num_hidden_layers=1),
        "llama factors int4": tiny_llama(num_hidden_layers=1),
        "gpt2 factors": tiny_gpt2(),
        "bert compact": tiny_bert_classifier(),
    }
    for name, model in models.items():
        if name.endswith("narrowed"):
            hf_lowrank.compress(model, narrow, token_batches(2), progress=False)
        elif name.endswith("usv"):
            replace_with_lowrank_(model, Layout({LAYER: 6}, form="usv"))
            attach_config_(model, LowRankConfig(ranks={LAYER: 6}, form="usv"))
        else:
            words = name.split()
            form = "factors" if "factors" in words else "compact"
            weights = words[-1] if words[-1].startswith("int") else None
            hf_lowrank.compress(model, plain.replace(form=form, weights=weights), progress=False)
        size = "20KB" if name.endswith("sharded") else "5GB"
        model.save_pretrained(place / name, max_shard_size=size)
    return {name: place / name for name in models}


def _case(number: int, seed: int, checkpoints: list[str]) -> Case:
    chance = random.Random(f"{seed} {number}")
    mutate = chance.choice(MUTATIONS)
    with_index = [name for name in checkpoints if name.endswith("sharded")]
    return Case(
        number, chance.choice(with_index if mutate is mutate_index else checkpoints), mutate
    )


def outcomes(
    cases: list[Case],
    seed: int,
    good: dict[str, Path],
    load: Callable[[Path], Any] = hf_lowrank.load,
) -> Iterator[Outcome]:
    """Tries the cases in a fork of this process, a new one after each that hangs or dies."""
    done = 0
    while done < len(cases):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(cases[done:], seed, good, load, sender), daemon=True
        )
        worker.start()
        sender.close()
        try:
            while done < len(cases) and _answers(receiver):
                yield receiver.recv()
                done += 1
            if done < len(cases):
                yield Outcome("too slow", "killed", 2 * SECONDS)
                done += 1
        except EOFError:
            worker.join()
            yield Outcome("died", f"exit code {worker.exitcode}")
            done += 1
        finally:
            worker.kill()
            worker.join()
            receiver.close()


def _answers(receiver: Connection) -> bool:
    """Whether a worker answers in time; a pause of this whole process, too, costs it one step."""
    return any(receiver.poll(0.1) for _ in range(round(20 * SECONDS)))


def _work(
    cases: list[Case],
    seed: int,
    good: dict[str, Path],
    load: Callable[[Path], Any],
    sender: Connection,
) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        for folder in good.values():  # what is allocated once
            load(folder)
        for case in cases:
            folder = Path(place) / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(good[case.checkpoint], folder)
            case.mutate(folder, random.Random(f"{seed} {case.number} damage"))
            sender.send(try_to_load(folder, load))


def try_to_load(folder: Path, load: Callable[[Path], Any] = hf_lowrank.load) -> Outcome:
    """What `hf_lowrank.load`, or what stands in for it, makes of a checkpoint."""
    start, memory = time.process_time(), _peak()
    try:
        right, detail = holds_its_tensors(load(folder), folder), ""
        kind = "loaded right" if right else "loaded wrong"
    except LowRankError as error:
        kind, detail = "refused", str(error)
    except Exception as error:
        kind, detail = "other error", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    if _peak() - memory > MEGABYTES:
        return Outcome("too large", f"{_peak() - memory:.0f} MB; {detail}", seconds)
    return Outcome("too slow" if seconds > SECONDS else kind, detail[:500], seconds)


def holds_its_tensors(model: Any, folder: Path) -> bool:  # noqa: ANN401
    """Whether a model holds the tensors of its files, in the type that it is loaded in."""
    state = model.state_dict()
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("model-*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return set(stored) <= set(state) and all(
        state[name].shape == tensor.shape and torch.equal(state[name], tensor.to(state[name].dtype))
        for name, tensor in stored.items()
    )


def _peak() -> float:
    """Most memory that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
