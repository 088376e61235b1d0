"""A model whose blocks are in memory one at a time: loaded, run on all batches, and let go."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hf_lowrank.channels.order import ChannelOrder
from hf_lowrank.compression.cache import add_batches
from hf_lowrank.compression.streaming.calls import AllCaught, CallRecorder
from hf_lowrank.compression.streaming.freed_memory import give_back_freed
from hf_lowrank.compression.streaming.states import DENSE, States
from hf_lowrank.compression.streaming.tensors import CheckpointTensors
from hf_lowrank.decomposition.spectrum import Factors
from hf_lowrank.errors import TargetError
from hf_lowrank.format.torchao_weights import assemble_
from hf_lowrank.measuring.distributed import ALONE, Processes
from hf_lowrank.measuring.items import Batch, eval_mode, is_encoder_decoder
from hf_lowrank.measuring.losses import forward_body
from hf_lowrank.measuring.passes import Compute, Stream, feed
from hf_lowrank.measuring.progress import Progress
from hf_lowrank.modeling.surgery import factorize_, replace_layer_
from hf_lowrank.ranks.plan import RankPlan

Result = TypeVar("Result")
Moment = Callable[[ChannelOrder], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class PlanInForce:
    """A plan, and what it is cut from."""

    factors: Mapping[str, Factors]
    plan: RankPlan
    orders: Mapping[str, ChannelOrder]

    def within(self, prefix: str) -> PlanInForce | None:
        """The part for the layers below a block; None where it leaves them as they are."""
        ranks = {n: rank for n, rank in self.plan.ranks.items() if n.startswith(prefix)}
        narrowed = {n: s for n, s in self.plan.narrowed.items() if n.startswith(prefix)}
        if not narrowed and not any(ranks.values()):
            return None
        shapes = {name: self.plan.shapes[name] for name in ranks}
        plan = RankPlan(ranks, shapes, narrowed, self.plan.form)
        orders = {n: self.orders[n] for n in self.orders if n in narrowed}
        return PlanInForce(self.factors, plan, orders)


class BlockStream(Stream):
    """Feeds a model on the meta device its blocks from a checkpoint.

    Args:
        model: The model, in eval mode.
        targets: Names of its targeted layers; they say which of its lists holds the blocks.
        tensors: The checkpoint.
        folder: Where hidden states go; all processes' own.
        processes: Those that share the batches out among them. All make the same calls.

    Attributes:
        once: Digests of batches that only the dense and the final model read, so that no more than
            their last states are kept.

    Raises:
        TargetError: The blocks are not one list.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Iterable[str],
        tensors: CheckpointTensors,
        folder: Path,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.tensors, self.folder = model, tensors, folder
        self.processes = processes
        self.name = block_list(model, targets)
        found = model.get_submodule(self.name)
        assert isinstance(found, nn.ModuleList)
        self.list = found
        self.once: set[str] = set()
        self.key = DENSE
        self._cut: PlanInForce | None = None
        self.moment_of: Moment = lambda order: order.moment
        self._kinds: dict[type, int | None] = {}
        self._take_templates()
        feed(model, self)

    def _take_templates(self) -> None:
        self.templates: list[nn.Module] = [copy.deepcopy(block) for block in self.list]

    def __len__(self) -> int:
        return len(self.templates)

    def prefix(self, index: int) -> str:
        """What the names of a block's layers begin with."""
        return f"{self.name}.{index}."

    def read_from(self, tensors: CheckpointTensors, key: str) -> None:
        """From now on blocks are what the model's own are now, read from another checkpoint."""
        self.tensors, self.key = tensors, key
        self._take_templates()

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block in memory and in its place in the model, with the plan in force."""
        give_back_freed()
        before, block = self.list[index], copy.deepcopy(self.templates[index])
        place = f"{self.name}.{index}"
        replace_layer_(self.model, place, block)
        try:
            self.tensors.read(lambda name: name.startswith(self.prefix(index)))
            assemble_(block)
            part = None if self._cut is None else self._cut.within(self.prefix(index))
            if part is not None:
                orders = {
                    name: dataclasses.replace(order, moment=self.moment_of(order))
                    for name, order in part.orders.items()
                }
                factorize_(self.model, part.factors, part.plan, orders)
            yield block
        finally:
            replace_layer_(self.model, place, before)

    @contextmanager
    def ends(self) -> Iterator[None]:
        """All that is not in a block in memory: embeddings, norm, head."""
        inside = {id(module) for module in self.list.modules()}
        outside = [module for module in self.model.modules() if id(module) not in inside]
        held = [(m, dict(m._parameters), dict(m._buffers)) for m in outside]
        try:
            self.tensors.read(lambda name: not name.startswith(f"{self.name}."))
            self.model.tie_weights()  # type: ignore[operator]
            yield
        finally:
            for module, parameters, buffers in held:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    @contextmanager
    def short(self) -> Iterator[None]:
        """The model with the first block of each kind alone, in memory; others pass states on.

        What has to be found out about a model once can be found out here: how its head makes
        logits, which loss is its own, whether it sees the token that it predicts.
        """
        firsts: dict[type, int] = {}
        for index, template in enumerate(self.templates):
            firsts.setdefault(type(template), index)
        with ExitStack() as stack:
            stack.enter_context(self.ends())
            for index in firsts.values():
                block = stack.enter_context(self.block(index))
                block.register_forward_hook(self._note_kind)
            stack.enter_context(self._replaced(self._pass_on, firsts.values()))
            yield

    def _note_kind(self, block: nn.Module, args: object, output: object) -> None:
        self._kinds[type(block)] = len(output) if isinstance(output, tuple) else None

    def _hand_on(self, index: int, hidden: torch.Tensor) -> Any:  # noqa: ANN401
        """Hidden states as a block returns them."""
        length = self._kinds[type(self.templates[index])]
        return hidden if length is None else (hidden, *[None] * (length - 1))

    def _pass_on(self, index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._hand_on(index, args[0] if args else kwargs["hidden_states"])

    @contextmanager
    def _replaced(self, forward: Callable[..., Any], but: Iterable[int] = ()) -> Iterator[None]:
        """Another forward pass in place of the blocks', which gets the block's index first."""
        blocks = [(i, block) for i, block in enumerate(self.list) if i not in set(but)]
        try:
            for index, block in blocks:
                block.forward = partial(forward, index)
            yield
        finally:
            for _, block in blocks:
                vars(block).pop("forward", None)

    @contextmanager
    def replayed(self, last: torch.Tensor) -> Iterator[None]:
        """The model as if its blocks made these hidden states; others than the last show as NaN."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if index == len(self) - 1:
                return self._hand_on(index, last)
            hidden = args[0] if args else kwargs["hidden_states"]
            return self._hand_on(index, hidden if index else torch.full_like(hidden, torch.nan))

        with self._replaced(forward):
            yield

    def on_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch where blocks are run."""
        return {name: value.to(self.tensors.device) for name, value in batch.items()}

    @torch.no_grad()
    def states(self, batches: Sequence[Batch]) -> States:
        """The states of some batches under the plan in force, with the calls of their blocks."""
        folder = self.folder / digest_of(batches)
        states = States(folder, DENSE, len(batches))
        todo = [number for number in range(len(batches)) if not states.has_calls(number)]
        if todo := self.processes.decide(todo):
            with self.ends(), eval_mode(self.model), torch.random.fork_rng():
                for number in self.processes.share(todo):
                    recorder = CallRecorder(self.model, len(self), self._hand_on)
                    try:
                        with self._replaced(recorder):
                            forward_body(self.model, self.on_device(batches[number]))
                    except AllCaught:
                        pass
                    recorder.check()
                    assert recorder.hidden is not None  # there is a block
                    states.write(0, number, recorder.hidden)
                    states.keep_calls(number, recorder.calls)
            self.processes.wait()
        if self._cut is None and self.key == DENSE:
            return states
        key = self.key if self._cut is None else plan_key(self._cut.plan)
        first = 0 if self._cut is None else self._first_changed(self._cut)
        while first and not states.is_complete(first):
            first -= 1
        return States(folder, key, len(batches), self.processes.decide(first))

    def _first_changed(self, cut: PlanInForce) -> int:
        changed = (i for i in range(len(self)) if cut.within(self.prefix(i)) is not None)
        return next(changed, len(self))

    @torch.no_grad()
    def forward(self, states: States, progress: str | None, keep: bool = True) -> None:
        """Makes the states of all levels, from the last that is there.

        Args:
            states: Of the batches, under the plan in force.
            progress: Name of the phase, or None.
            keep: Whether all levels stay, or the last alone.
        """
        levels = range(states.first, len(self) + 1)
        start = max((level for level in levels if states.is_complete(level)), default=0)
        left = range(self.processes.decide(start), len(self))
        with eval_mode(self.model), Progress(progress, len(left) * states.count) as shown:
            for index in left:
                self._advance(index, states, shown)
                self.processes.wait()
                if not keep and self.processes.is_main:
                    states.drop(index)

    def _advance(self, index: int, states: States, shown: Progress) -> None:
        """All batches through one block; no name of it is left when the next one is read."""
        with self.block(index) as block:
            for number in self.processes.share(range(states.count)):
                if not states.has(index + 1, number):
                    hidden = states.read(index, number, self.tensors.device)
                    states.write(index + 1, number, states.call(number, index)(block, hidden))
                shown.update(self.processes.count, note=f"block {index + 1} of {len(self)}")

    def passes(
        self, batches: Sequence[Batch], compute: Compute[Result], progress: str | None
    ) -> Iterator[Result]:
        """All batches through each block in turn; then the function on the model's own end."""
        states = self.states(batches)
        is_kept = self._cut is None and self.key == DENSE and digest_of(batches) not in self.once
        self.forward(states, progress, is_kept)
        with self.ends(), eval_mode(self.model):
            for number, batch in enumerate(batches):
                last = states.read(len(self), number, self.tensors.device)
                with self.replayed(last), torch.no_grad():
                    result = compute(self.model, self.on_device(batch))
                yield result

    @contextmanager
    def cut(
        self, factors: Mapping[str, Factors], plan: RankPlan, orders: Mapping[str, ChannelOrder]
    ) -> Iterator[None]:
        """Has a plan in force in all passes within the block."""
        before, self._cut = self._cut, PlanInForce(factors, plan, orders)
        try:
            yield
        finally:
            self._cut = before


def digest_of(batches: Sequence[Batch]) -> str:
    """Tells sets of batches apart by their numbers."""
    digest = hashlib.blake2b(digest_size=8)
    add_batches(digest, batches)
    return digest.hexdigest()


def plan_key(plan: RankPlan) -> str:
    """Tells plans for a model's layers apart."""
    text = json.dumps([dict(plan.ranks), dict(plan.narrowed), plan.form], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def block_list(model: nn.Module, targets: Iterable[str]) -> str:
    """Name of the one list that holds a model's blocks.

    Raises:
        TargetError: Targeted layers lie outside of it, or in more than one.
    """
    lists = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    found = {
        name: next((each for each in outermost if name.startswith(f"{each}.")), "")
        for name in targets
    }
    places = sorted(set(found.values()))
    if len(places) != 1 or not places[0] or is_encoder_decoder(model):
        outside = next((name for name, place in found.items() if not place), None)
        where = f"{outside} is in no list of blocks" if outside else " and ".join(places)
        raise TargetError(
            f"{type(model).__name__}: only a model whose targeted layers are in one list of blocks "
            f"can be compressed block by block ({where}); compress it in memory, or name layers "
            "of one list with target_modules."
        )
    return places[0]
