"""`Recipe`: every choice of a training run, from a YAML file that ships with mpq or is the user's.

`plain` is the baseline of papers, `strong` the long recipe for good teachers and students, `fast`
one of minutes for teachers, `qat` a short fine-tuning of a prepared model. A recipe is checked as a
whole: an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpq.errors import UsageError, nearest
from mpq.limits import read_named
from mpq.yamltext import mapping

WeightingName = Literal["mean", "vote", "entropy", "confidence", "gradient", "dynamic"]


class Recipe(BaseModel):
    """Hyper-parameters of one training run; each field's description says what it does."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int = Field(default=200, ge=1, description="passes over the training images")
    batch: int = Field(
        default=128, ge=1, description="images per step; an incomplete last batch is left out"
    )
    epoch_steps: int = Field(
        default=0,
        ge=0,
        description="steps of an epoch at most, of data too many for one; 0: all batches",
    )
    accumulate: int = Field(
        default=1, ge=1, description="parts that a batch is computed in, to save memory"
    )
    cycle: int = Field(
        default=0,
        ge=0,
        description="epochs after which order and augmentation repeat, so that the answers of "
        "teachers that are kept serve again; 0: never",
    )
    checkpoint_every: int = Field(default=1, ge=1, description="epochs between checkpoints")
    precision: Literal["float32", "bf16"] = Field(
        default="float32", description="bf16: autocast of student and teachers, float32 losses"
    )
    channels_last: bool = Field(default=False, description="memory layout of images and weights")
    compile: bool = Field(
        default=False, description="the step's network goes through torch's compiler first"
    )

    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd is with Nesterov")
    lr: float = Field(default=0.1, gt=0, description="highest learning rate")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD, or beta1 of AdamW")
    weight_decay: float = Field(
        default=5e-4, ge=0, description="not for biases, normalisation and quantizer steps"
    )
    step_lr: float = Field(
        default=1.0, ge=0, description="factor on lr for quantizer steps (parameters `.scale`)"
    )
    norm: Literal["live", "folded"] = Field(
        default="live",
        description="quantized layers train with batch norm after them, or with its fold",
    )
    norm_frozen: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="last part of the run in which live norms keep their statistics",
    )
    dampen: float = Field(
        default=0.0,
        ge=0,
        description="pull of weights of 4 bits and less to their grid, reached at the end; 0: none",
    )
    progressive_epochs: float = Field(
        default=0.0,
        ge=0,
        description="quantizers begin at 8 bits and reach their policy's widths after this many "
        "epochs, in stages; 0: at once",
    )
    clip_norm: float = Field(default=0.0, ge=0, description="largest gradient norm; 0: any")
    warmup_epochs: float = Field(default=0.0, ge=0, description="linear rise of the rate")
    final_lr: float = Field(
        default=0.0, ge=0, le=1, description="where the half cosine ends, as a fraction of lr"
    )
    ema: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, which is then kept; 0: none",
    )
    whiten: bool = Field(
        default=False,
        description="the first convolution begins by whitening patches of the training images",
    )

    crop: float = Field(
        default=0.125, ge=0, lt=1, description="random shift by up to this fraction of a side"
    )
    flip: bool = Field(default=True, description="mirror half of the images")
    alternate: bool = Field(
        default=False, description="with flip: mirror each image in every second epoch"
    )
    trivial: bool = Field(default=False, description="TrivialAugmentWide")
    rand_operations: int = Field(
        default=0, ge=0, le=14, description="RandAugment: operations per image; 0: off"
    )
    rand_magnitude: int = Field(
        default=9, ge=0, le=30, description="RandAugment: strength of each, 30 is most"
    )
    erase: float = Field(default=0.0, ge=0, le=1, description="probability of random erasing")
    mixup: float = Field(default=0.0, ge=0, description="Beta parameter of MixUp; 0: off")
    cutmix: float = Field(default=0.0, ge=0, description="Beta parameter of CutMix; 0: off")
    mix_probability: float = Field(
        default=1.0, ge=0, le=1, description="share of images mixed, half by each if both are on"
    )

    smoothing: float = Field(default=0.0, ge=0, lt=1, description="label smoothing")
    distill: Literal["kd", "standardized", "dkd", "dist"] = Field(
        default="kd", description="distillation loss, used with a teacher"
    )
    temperature: float = Field(default=2.0, ge=0.1, le=100, description="of the distillation loss")
    label_weight: float = Field(
        default=0.1, ge=0, description="factor on the cross-entropy, if there is a teacher"
    )
    distill_weight: float = Field(default=0.9, ge=0, description="factor on the distillation loss")
    distill_warmup_epochs: float = Field(
        default=0.0, ge=0, description="linear rise of distill_weight"
    )
    dkd_beta: float = Field(default=2.0, ge=0, description="weight of NCKD within dkd")
    weighting: WeightingName = Field(
        default="mean", description="how the members of an ensemble are weighed"
    )
    weighting_beta: float = Field(
        default=1.0,
        ge=0,
        description="dynamic: weight of the distance to the student at first",
    )
    weighting_tau: float = Field(
        default=0.25, gt=0, description="dynamic: small picks one teacher, large is the mean"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch must be a multiple of accumulate ({self.accumulate}). "
                f"Got {self.batch} instead"
            )
        if self.progressive_epochs and self.progressive_epochs > self.epochs - 1:
            raise ValueError(
                f"progressive_epochs must be at most {self.epochs - 1}, so that the last of "
                f"{self.epochs} epochs has the policy's widths. Got {self.progressive_epochs:g} "
                "instead"
            )
        if self.alternate and not self.flip:
            raise ValueError("alternate needs flip: set both or neither")
        if self.trivial and self.rand_operations:
            raise ValueError("trivial and rand_operations cannot both be on: choose one")
        if self.label_weight == self.distill_weight == 0:
            raise ValueError("one of label_weight and distill_weight must be above 0")
        return self

    @classmethod
    def names(cls) -> list[str]:
        """The recipes that ship with mpq."""
        files = resources.files("mpq.train").joinpath("recipes").iterdir()
        return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """Read a shipped recipe by name, or a YAML file.

        Raises:
            UsageError: no such recipe or file, not YAML, an unknown key, a value out of range.
        """
        text = str(name_or_path)
        if text in cls.names():
            source = resources.files("mpq.train").joinpath("recipes", f"{text}.yaml")
            return cls.parse(source.read_text(encoding="utf-8"), where=f"recipe {text}")
        remedy = (
            f"It must be one of {', '.join(cls.names())} or a YAML file{nearest(text, cls.names())}"
        )
        read = read_named(text, UsageError, f"recipe {text!r} does not exist.", remedy)
        return cls.parse(read, where=f"recipe {text}")

    @classmethod
    def parse(cls, text: str, *, where: str = "recipe") -> Recipe:
        """Read YAML text; `where` names it in messages. Raises as `load`."""
        return _validate(mapping(text, where, UsageError, "such as `lr: 0.1`"), where)

    def to_yaml(self) -> str:
        """All keys with their values, as a recipe file."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with other values; text is read as YAML would read it (`"0.01"`, `"true"`).

        Raises:
            UsageError: an unknown key or a value out of range.
        """
        return _validate({**self.model_dump(), **values}, "recipe")


def _validate(values: Mapping[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise UsageError(f"{where}: " + " ".join(_explain(e) for e in error.errors())) from None


def _explain(item: Any) -> str:
    key = ".".join(str(p) for p in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{key} is not a known key{nearest(key, Recipe.model_fields)}"
    if not key:
        return f"{item['msg'].removeprefix('Value error, ')}."
    return f"{key}: {item['msg']}. Got {item['input']!r} instead."
