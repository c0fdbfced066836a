"""One epoch of training: batches, losses, steps.

Images stay uint8 in memory (on the device, if they fit) and are augmented batch by batch. Every
random number of an epoch derives from (seed, epoch), so that an epoch can be repeated at will: to
resume, and by a recipe's `cycle` to learn again from images that the teachers have answered.
Processes and gradient exchange are accelerate's: under `accelerate launch` each process takes its
share of every batch. Autocast is entered here and not by accelerate, which would rewrap the
model's forward: a prepared `fx.GraphModule` must stay what it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from mpq.calls import arguments, leaves
from mpq.cpu import this_cpu
from mpq.errors import DataError, TrainError, UsageError
from mpq.graph.norms import freeze_norms
from mpq.graph.redundant import drop_redundant_relus
from mpq.nonfinite import first_nonfinite
from mpq.processes import leave_at_exit
from mpq.rundir import Run
from mpq.train.answers import Answers, answer_folders
from mpq.train.augment import Targets, epoch_rng
from mpq.train.bf16 import autocast
from mpq.train.compiled import compiled
from mpq.train.evaluate import class_logits, normalize_unit
from mpq.train.feed import Share, feed_of
from mpq.train.metrics import Record, Totals
from mpq.train.objective import Objective, Parts
from mpq.train.optim import Ema, build_optimizer, learning_rate
from mpq.train.oscillation import dampening, strength
from mpq.train.plan import OnStep, TrainingData, TrainingPlan
from mpq.train.progressive import Lowering
from mpq.train.resume import State, structure
from mpq.train.whiten import whiten_first_layer

logger = logging.getLogger(__name__)

WHITENED = 2000
"""Training images whose patches whiten the first layer: two million patches of 32x32 images."""
SPREAD = 64
"""Training images from which the spread of a teacher's answers is taken."""
CHECK_EVERY = 16
"""Steps between looks at the loss on an accelerator, where each look would stall the queue."""
SLOW_BF16 = (
    "this CPU has no instructions for bf16 and takes many times as long as in float32: "
    "--set precision=float32"
)


class Engine:
    """A model, its data and its optimizer on one device.

    Attributes:
        state: what a checkpoint holds.
        lowering: the widths of its quantizers, by epoch.

    The arguments are those of `fit`. Raises `UsageError` for a device that is not there, or
    where there is no compiler and the recipe wants one.
    """

    def __init__(self, model: nn.Module, data: TrainingData, plan: TrainingPlan, run: Run) -> None:
        recipe, teacher = plan.recipe, plan.teacher
        self.recipe, self.teacher, self.seed = recipe, teacher, run.seed
        self.normalize = data.normalize
        self.accelerator, self.device = _accelerator(run.device)
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        if recipe.precision == "bf16" and self.device.type == "cpu" and this_cpu().lacks_bf16:
            logger.warning(SLOW_BF16)
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model
        guide = plan.task.teacher if plan.task else teacher
        for network in [model] if guide is None else [model, guide]:
            network.to(device=self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.objective = Objective(recipe, plan.weighting)
        self.task, self.streams = plan.task, data.batches is not None
        if self.streams and plan.task is None:
            raise UsageError("batches of the user's own need a task: a loss, or a teacher.")
        share = Share(run.seed, self.device, self.rank, self.ranks)
        self.feed = feed_of(data, plan, share)
        self._take_network()
        identity = self._identity(data, plan)
        self._answers: Answers | None = None
        self._folders: list[Path] = []
        if plan.answers is not None and teacher is not None:
            images = {k: identity[k] for k in ("seed", "data", "processes")}
            images |= {"rank": self.rank, "device": self.device.type}
            self._folders = answer_folders(plan.answers, teacher, recipe, images)
        ema = Ema(model, recipe.ema) if recipe.ema else None
        self.state = State(model, build_optimizer(model, recipe), ema, identity)
        self.lowering = Lowering(self.state, recipe.progressive_epochs)

    def whiten(self) -> None:
        """Let the first layer begin as the recipe says; a checkpoint resumed replaces it.

        And let the task look at the first images, of which the spread of its answers is taken.
        """
        if self.recipe.whiten:
            whiten_first_layer(self.model, self._first(WHITENED))
        if self.task is not None:
            self.task.look(self._shown(self.feed.first(SPREAD)))

    def _first(self, size: int) -> Any:
        found = self.feed.first(size)
        return found if self.streams else self._input(found)

    def _take_network(self) -> None:
        """What a step runs: the model without needless passes, for several processes, compiled."""
        model = self.model
        step = drop_redundant_relus(model) if isinstance(model, fx.GraphModule) else model
        if self.task is not None and self.task.step is not None:
            step = self.task.step.to(self.device)
        if self.ranks > 1:
            step = self.accelerator.prepare_model(step, device_placement=False)
        self.network = step
        self.forward = compiled(step, self.device.type) if self.recipe.compile else step

    def _identity(self, data: TrainingData, plan: TrainingPlan) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        weighting = plan.weighting
        return {
            "recipe": plan.recipe.model_dump(),
            "seed": self.seed,
            "data": self.feed.identity(),
            "model": structure(self.model),
            "normalize": str(data.normalize),
            "teacher": self._teachers(plan),
            "weighting": getattr(weighting, "__qualname__", type(weighting).__name__),
            "processes": self.ranks,
        }

    def _teachers(self, plan: TrainingPlan) -> list[str]:
        if plan.task is None:
            return [] if plan.teacher is None else plan.teacher.names
        return [plan.task.name, getattr(plan.task.loss, "__name__", "")]

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)

    @contextmanager
    def environment(self) -> Iterator[None]:
        """Leave the caller's random state and cuDNN settings as they were."""
        cuda = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = True
            try:
                yield
            finally:
                torch.backends.cudnn.benchmark = before

    def train_epoch(self, epoch: int, on_step: OnStep | None) -> Record:
        """Train for one epoch; the record lacks only validation and time."""
        self.model.train()
        freeze_norms(self.model, epoch >= self.recipe.epochs * (1 - self.recipe.norm_frozen))
        view = epoch % self.recipe.cycle if self.recipe.cycle else epoch
        rng = epoch_rng(self.seed, view, 1 + self.rank)
        torch.manual_seed(int(rng.integers(2**62)))  # for dropout and the like
        look = self.feed.begin(view)
        self.lowering.begin(epoch, lambda: look() if self.streams else self._input(look()))
        totals = Totals()
        if self._folders:
            self._answers = Answers([f / f"epoch-{view:04}.pth" for f in self._folders])
        for step, parts in enumerate(self.feed.parts()):
            loss = self._step(epoch, step, parts, rng, totals)
            if on_step and self._look(step):
                on_step(epoch, step, self.feed.steps, float(loss))
        if self._answers is not None:
            self._answers.close()
        lr = learning_rate(self.recipe, (epoch + 1) * self.feed.steps - 1, self.feed.steps)
        return {"epoch": epoch, "lr": lr, **totals.record(self.accelerator), "val_top1": None}

    def _look(self, step: int) -> bool:
        """Whether the loss of this step is read back from the device."""
        return self.device.type == "cpu" or step % CHECK_EVERY == 0 or step == self.feed.steps - 1

    def _step(
        self, epoch: int, step: int, parts: list[Any], rng: np.random.Generator, totals: Totals
    ) -> Tensor:
        """One optimizer step over `parts`: indices of images, or a batch of the user's own."""
        optimizer, recipe = self.state.optimizer, self.recipe
        rate = learning_rate(recipe, epoch * self.feed.steps + step, self.feed.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        progress = (epoch * self.feed.steps + step) / max(1, recipe.epochs * self.feed.steps - 1)
        optimizer.zero_grad(set_to_none=True)
        sizes = [self.feed.size(part) for part in parts]
        loss = torch.zeros((), device=self.device)
        for number, part in enumerate(parts):
            images, targets = self.feed.load(part, rng)
            share = sizes[number] / sum(sizes)
            if number < len(parts) - 1:
                with self.accelerator.no_sync(self.network):
                    loss += self._backward(images, targets, progress, share, totals)
            else:
                loss += self._backward(images, targets, progress, share, totals)
            if self._look(step) and not bool(torch.isfinite(loss)):
                raise TrainError(self._explain(epoch, step, images))
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        optimizer.step()
        if self.state.ema:
            self.state.ema.update(self.model)
        return loss

    def _backward(
        self, images: Any, targets: Any, progress: float, share: float, totals: Totals
    ) -> Tensor:
        """Forward and backward of one part; returns its contribution to the step's loss."""
        learn = self._classify if self.task is None else self._follow
        parts, student, labels = learn(images, targets, progress)
        loss = parts.loss
        if self.recipe.dampen:
            loss = loss + self.recipe.dampen * strength(progress) * dampening(self.model)
        self.accelerator.backward(loss * share)
        totals.add(parts, student, labels)
        return parts.loss.detach() * share

    def _classify(
        self, images: Tensor, targets: Targets, progress: float
    ) -> tuple[Parts, Tensor, Tensor | None]:
        """The loss of a classifier, its logits and labels."""
        with self._autocast():
            student = class_logits(self.forward(self._input(images)))
            teachers = self._teach(images)
        self._check_logits(student, teachers)
        labels = targets.for_classes(student.shape[1], partial=self.feed.partial)
        parts = self.objective(student, teachers, labels, progress=progress)
        return parts, student.detach(), labels

    def _follow(
        self, images: Any, targets: Any, progress: float
    ) -> tuple[Parts, Tensor, Tensor | None]:
        """The loss of any network, by its task."""
        assert self.task is not None
        task, recipe = self.task, self.recipe
        inputs = images if self.streams else self._input(images)
        if not self.streams:
            targets = (inputs, targets.first) if not self.feed.partial else (inputs,)
        first = next(iter(leaves(inputs).values()))
        if task.step is not None:
            with self._autocast():
                loss: Tensor = self.forward(targets)
            return Parts(loss, loss.detach()), first, None
        with self._autocast():
            answer = self.forward(*self._arguments(inputs))
            taught = None if task.teacher is None else task.teach(self._shown(images))
        weights = (recipe.label_weight, recipe.distill_weight)
        parts = task.parts(answer, targets, taught, recipe.temperature, weights)
        return parts, first, None

    def _shown(self, images: Any) -> Any:
        """Images in 0..1 as the teacher of a task takes them; the user's inputs as they are."""
        assert self.task is not None
        if self.streams:
            return images
        norm = self.task.normalize
        return self._input(images) if norm is None else normalize_unit(images, norm)

    def _arguments(self, inputs: Any) -> list[Any]:
        if isinstance(self.model, fx.GraphModule):
            return arguments(self.model, inputs)
        return list(inputs) if isinstance(inputs, tuple) else [inputs]

    def _check_logits(self, student: Tensor, teachers: Tensor | None) -> None:
        if student.ndim != 2 or student.shape[1] < self.feed.classes:
            raise DataError(
                f"the model must give logits [B, C] with C >= {self.feed.classes}, the number of "
                f"classes in the labels. Got {list(student.shape)}."
            )
        if teachers is not None and teachers.shape[1:] != student.shape:
            raise DataError(
                f"teachers must give logits [B, C] like the model, {list(student.shape)}. "
                f"Got {list(teachers.shape[1:])}: they know other classes."
            )

    def _input(self, images: Tensor) -> Tensor:
        return normalize_unit(images, self.normalize).contiguous(memory_format=self.layout)

    def _teach(self, images: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        teacher = self.teacher
        with torch.no_grad():
            if self._answers is None:
                logits: Tensor = teacher(images)
                return logits
            known = self._answers.take(len(images), lambda k: teacher.answer(k, images))
            return known.to(self.device, non_blocking=True)

    def _autocast(self) -> ExitStack:
        return autocast(self.device.type, enabled=self.recipe.precision == "bf16")

    def _explain(self, epoch: int, step: int, images: Tensor) -> str:
        """Who made the loss of this batch infinite or NaN."""
        with self._autocast():
            modules = dict(self.model.named_modules())
            inputs = self._arguments(images if self.streams else self._input(images))
            found = first_nonfinite(modules, lambda: self.model(*inputs))
            teacher, culprit = self.teacher, str(found or "")
            if found is None and teacher is not None:
                found = first_nonfinite(dict(teacher.named_modules()), lambda: teacher(images))
                culprit = f"teacher {found}" if found else ""
        if found is None and self.task is not None and self.task.loss is not None:
            return (
                f"the loss {self.task.loss.__name__} gave NaN or infinity in epoch {epoch}, step "
                f"{step}, of answers that are finite. Look at its logarithms and divisions, and at "
                "images without any target; the checkpoint of the last finished epoch is intact."
            )
        return (
            f"the loss became non-finite in epoch {epoch}, step {step}. First non-finite output: "
            f"{culprit or 'none: the loss itself overflowed on finite logits'}. "
            f"Try a lower lr (now {self.recipe.lr:g}), clip_norm (now {self.recipe.clip_norm:g})"
            f"{', precision float32' if self.recipe.precision == 'bf16' else ''}; the checkpoint "
            "of the last finished epoch is intact."
        )


def _accelerator(device: str) -> tuple[Any, torch.device]:
    """The processes as accelerate sees them, and the device of this one."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        has = "cpu or cuda" if torch.cuda.is_available() else "cpu (this torch sees no CUDA device)"
        raise UsageError(f"device must be {has}. Got {device!r} instead.")
    from accelerate import Accelerator  # which nothing but training needs

    try:
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
    except ValueError:  # the process has one already, with other settings: ours are our own
        accelerator = Accelerator()
    if accelerator.num_processes > 1:
        leave_at_exit()
        return accelerator, accelerator.device
    return accelerator, torch.device(device)
