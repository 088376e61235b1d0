"""Spectra of a model's layers, block by block: the sweep backward, or forward without gradients.

Going backward, a block is run again from its stored input, and the stored gradient of its output is
fed back: as the gradient of the sum of output times that gradient, so that the code that collects
moments in memory collects them here.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank.channels.expert_order import of_feed_forwards
from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.compression.analysis import Analysis, analyze
from hf_lowrank.compression.cache import write_stored
from hf_lowrank.compression.options import Run, Texts
from hf_lowrank.compression.prices import DRAWS, enough, measure_prices
from hf_lowrank.compression.streaming.block_stream import BlockStream
from hf_lowrank.compression.streaming.states import States, needed
from hf_lowrank.config import LowRankConfig
from hf_lowrank.decomposition.metrics import METRICS
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import TargetError
from hf_lowrank.format.dense_linear import linear_shape
from hf_lowrank.format.feed_forward import find_feed_forwards
from hf_lowrank.measuring.batches import num_tokens
from hf_lowrank.measuring.collection import frozen, prepared, run_batch
from hf_lowrank.measuring.hooks import GRADIENT_FIELDS
from hf_lowrank.measuring.items import Batch, ItemLosses
from hf_lowrank.measuring.losses import item_losses
from hf_lowrank.measuring.progress import Progress
from hf_lowrank.modeling.qualification import reasons_against
from hf_lowrank.modeling.targets import fixed_ranks

_NUMBER = "number_of_batch"


class BlockLoss:
    """A loss of a block's output whose gradient is the one that the model's loss has there.

    Args:
        stream: Where the block is from.
        block: The block, in memory.
        index: Its number.
        states: Of the calibration batches.
        gradients: Folder of the gradients at the levels.
        reads_input: Whether the gradient at the block's input is wanted.
    """

    def __init__(
        self,
        stream: BlockStream,
        block: nn.Module,
        index: int,
        states: States,
        gradients: Path,
        reads_input: bool,
    ) -> None:
        self.stream, self.block, self.index = stream, block, index
        self.states, self.gradients, self.reads_input = states, gradients, reads_input

    def __call__(self, model: nn.Module, batch: Batch) -> ItemLosses:
        """Runs the block; without gradients its output becomes the next block's input."""
        number, index = int(batch[_NUMBER][0]), self.index
        hidden = self.states.read(index, number, self.stream.tensors.device)
        call = self.states.call(number, index)
        if not torch.is_grad_enabled():
            output = call(self.block, hidden)
            if not self.states.has(index + 1, number):
                self.states.write(index + 1, number, output)
            return ItemLosses(torch.zeros(1), torch.ones(1, dtype=torch.long))
        kept: Any = needed(gradient_file(self.gradients, index + 1, number))
        if self.reads_input:
            hidden.requires_grad_().register_hook(partial(self._keep, number, kept["losses"]))
        output = call(self.block, hidden)
        exact = torch.promote_types(output.dtype, torch.float32)
        total = (output.to(exact) * kept["gradient"].to(output.device, exact)).sum()
        return ItemLosses(total[None], torch.tensor([kept["losses"]]))

    def _keep(self, number: int, losses: int, gradient: torch.Tensor) -> None:
        write_gradient(self.gradients, self.index, number, gradient, losses)


def gradient_file(folder: Path, level: int, number: int) -> Path:
    """Where a batch's gradient at a level lies."""
    return folder / f"{level:04}" / f"{number}.pt"


def write_gradient(
    folder: Path, level: int, number: int, gradient: torch.Tensor, losses: int
) -> None:
    """Keeps the gradient of a batch's summed loss at a level, and how many losses that sums."""
    value = {"gradient": gradient.detach().cpu().clone(), "losses": losses}
    write_stored(gradient_file(folder, level, number), value)


class StoredFactors(Mapping[str, Factors]):
    """Factors by layer name, read from disk where they are used.

    Args:
        files: The file of each layer that has some.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def __getitem__(self, name: str) -> Factors:
        found: Any = needed(self.files[name], mapped=True)
        return found["factors"][name]  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class BlockAnalyst:
    """Analyzes a model's blocks, each finished one kept on disk.

    Args:
        stream: The model.
        targets: Its layers that are asked for, by name.
        config: What to do.
        run: Texts, and how to work.
        folder: Where results go.
    """

    def __init__(
        self,
        stream: BlockStream,
        targets: Mapping[str, nn.Module],
        config: LowRankConfig,
        run: Run,
        folder: Path,
    ) -> None:
        self.stream, self.targets, self.config, self.run = stream, targets, config, run
        self.folder, self.gradients = folder / "blocks", folder / "gradients"
        metric = METRICS[config.metric]
        self.needs_data = bool(metric.needs)
        self.needs_gradient = bool(metric.needs & GRADIENT_FIELDS)
        texts = (run.texts.calibration, run.texts.held_out, run.texts.evaluation)
        some = next((list(batches) for batches in texts if batches), [])
        self.batches = some if self.needs_data else some[:1]
        # Each draw of labels is a batch of its own: it has a gradient of its own.
        priced = enough(run.texts.held_out or []) if config.measured_prices else []
        self.priced = list(priced) * DRAWS
        self.aimed = [
            index
            for index in range(len(stream))
            if any(name.startswith(stream.prefix(index)) for name in targets)
        ]

    def __call__(self) -> tuple[Analysis, dict[str, str]]:
        """The spectra of all layers, and the reason by name of those that can't be factorized."""
        order = range(self.aimed[-1] + 1)
        if self.needs_gradient:
            order = range(len(self.stream) - 1, self.aimed[0] - 1, -1)
        processes = self.run.processes
        todo = [index for index in order if not self._results(index).exists()]
        if todo := processes.decide(todo):
            states = self.stream.states([*self.batches, *self.priced])
            with self.run.stopwatch.phase("statistics"):
                has_gradients = processes.decide(self._has_gradients(todo[0] + 1))
                if self.needs_gradient and not has_gradients:
                    self.stream.forward(states, "forward" if self.run.progress else None)
                    self._output_gradients(states)
                    processes.wait()
            phase = "analyze" if self.run.progress else None
            with Progress(phase, len(todo), "blocks") as shown:
                for index in todo:
                    self._analyze(index, states)
                    processes.wait()
                    if processes.is_main:
                        self._drop(index, states)
                    shown.update(note=f"block {index + 1} of {len(self.stream)}")
        self.stream.moment_of = self._moment
        return self._joined()

    def _results(self, index: int) -> Path:
        return self.folder / f"{index:04}-prices.pt"

    def _factors(self, index: int) -> Path:
        return self.folder / f"{index:04}-factors.pt"

    def _has_gradients(self, level: int) -> bool:
        numbers = range(len(self.batches) + len(self.priced))
        return all(gradient_file(self.gradients, level, each).exists() for each in numbers)

    def _output_gradients(self, states: States) -> None:
        """The gradient of the loss at the last block's output, by the model's own end."""
        stream, level, model = self.stream, len(self.stream), self.stream.model
        sources = [self.config.label_source] * len(self.batches) + ["model"] * len(self.priced)
        # The same draws as in memory: see `collect_moments` and `measure_effects`.
        seeds = [*range(len(self.batches)), *range(1, 1 + len(self.priced))]
        with stream.ends(), frozen(model), torch.random.fork_rng():
            numbered = [*enumerate([*self.batches, *self.priced])]
            for number, batch in self.run.processes.share(numbered):
                torch.manual_seed(self.config.seed + seeds[number])
                loss = partial(item_losses, label_source=sources[number])
                last = states.read(level, number, stream.tensors.device).requires_grad_()
                with stream.replayed(last):
                    losses = run_batch(model, prepared(model, batch), loss, True)
                gradient = torch.zeros_like(last) if last.grad is None else last.grad
                write_gradient(self.gradients, level, number, gradient, losses)

    def _analyze(self, index: int, states: States) -> None:
        """Keeps what is made of one block: prices last, so that a block that has them is whole."""
        stream, model, prefix = self.stream, self.stream.model, self.stream.prefix(index)
        numbered = [
            {**batch, _NUMBER: torch.full((len(next(iter(batch.values()))),), number)}
            for number, batch in enumerate([*self.batches, *self.priced])
        ]
        names = [name for name in self.targets if name.startswith(prefix)]
        with stream.block(index) as block:
            reads_input = index > self.aimed[0]
            loss = BlockLoss(stream, block, index, states, self.gradients, reads_input)
            layers = {name: model.get_submodule(name) for name in names}
            with self.run.stopwatch.phase("statistics"):
                reasons = reasons_against(
                    model,
                    layers,
                    numbered[0] if numbered else None,
                    needs_gradient=self.needs_gradient,
                    loss=loss,
                )
            fit = {name: layer for name, layer in layers.items() if name not in reasons}
            if fit:
                found = self._analysis(fit, loss, numbered)
            else:
                found = Analysis(self.config, {})
                with frozen(model):
                    for batch in self.run.processes.share(numbered):
                        run_batch(model, stream.on_device(batch), loss, self.needs_gradient)
        if not self.run.processes.is_main:
            return
        moments = {name: order.moment for name, order in found.orders.items()}
        write_stored(self._factors(index), {"factors": found.factors, "moments": moments})
        kept = (
            found.spectra,
            found.failures,
            _light(of_feed_forwards(found.orders)),
            reasons,
            found.held_out,
        )
        write_stored(self._results(index), kept)

    def _analysis(
        self, layers: Mapping[str, nn.Module], loss: BlockLoss, numbered: Sequence[Batch]
    ) -> Analysis:
        """What `analyze` makes of one block's layers."""
        config, model = self.config, self.stream.model
        if config.channels:
            try:
                find_feed_forwards(model, layers)
            except TargetError:  # others have some
                config = config.replace(channels=False, channels_only=None)
        options = dataclasses.replace(
            self.run.options, loss_function=loss, cache_dir=None, progress=False
        )
        count = len(self.batches)
        texts = Texts(calibration=numbered[:count] if self.needs_data else None)
        plain = config.replace(measured_prices=False)
        run = Run(texts, options, self.run.stopwatch, self.run.processes)
        found = analyze(model, layers, plain, run)
        if self.priced:
            with self.run.stopwatch.phase("prices"):
                found.held_out = measure_prices(
                    model,
                    found.factors,
                    found.orders,
                    numbered[count:],
                    draws=1,
                    loss_function=loss,
                    progress=False,
                    processes=self.run.processes,
                )
        return found

    def _drop(self, index: int, states: States) -> None:
        """Removes what no block needs any more."""
        if self.needs_gradient:
            shutil.rmtree(self.gradients / f"{index + 1:04}", ignore_errors=True)
            states.drop(index + 1)
        states.drop(index)

    def _moment(self, order: ChannelOrder) -> torch.Tensor:
        index = int(order.block.output.removeprefix(f"{self.stream.name}.").split(".")[0])
        found: Any = needed(self._factors(index), mapped=True)
        return found["moments"][order.block.output]  # type: ignore[no-any-return]

    def _joined(self) -> tuple[Analysis, dict[str, str]]:
        found = Analysis(self.config, {})
        left_dense: dict[str, str] = {}
        files: dict[str, Path] = {}
        for index in self.aimed:
            kept: Any = needed(self._results(index))
            spectra, failures, orders, reasons, held_out = kept
            found.spectra |= spectra
            found.failures |= failures
            found.orders |= orders
            left_dense |= reasons
            if held_out is not None:
                found.held_out = held_out.joined(found.held_out)
            files |= dict.fromkeys(spectra, self._factors(index))
        fit = {name: layer for name, layer in self.targets.items() if name not in left_dense}
        found.shapes = {name: linear_shape(layer) for name, layer in fit.items()}
        if found.held_out is not None:
            found.held_out = dataclasses.replace(found.held_out, draws=DRAWS)
        found.factors = StoredFactors(files)
        found.fixed = fixed_ranks(fit, self.config) | dict.fromkeys(found.failures)
        found.tokens = sum(num_tokens(batch) for batch in self.run.texts.calibration or [])
        return found, left_dense


def _light(orders: Mapping[str, ChannelOrder]) -> dict[str, ChannelOrder]:
    """The orders without what only surgery needs."""
    return {n: dataclasses.replace(each, moment=torch.empty(0)) for n, each in orders.items()}
