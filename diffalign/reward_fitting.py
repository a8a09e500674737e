"""The settings of a reward's training: the flags of `diffalign reward train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import docstring_parser
from jsonargparse import ArgumentParser

from diffalign.errors import InputError
from diffalign.reward_model import Tower


@dataclass(frozen=True)
class Fitting:
    """Training a reward."""

    data: str
    """Judged pictures: a folder, a file of one, or hf:user/dataset. Pairs, or labels.jsonl with ratings; see docs/data.md."""
    model: str = "openai/clip-vit-large-patch14"
    """Base model: shapes-clip (embedded), a Hub id, or the folder of a CLIP or SigLIP model in transformers' layout."""
    revision: str = "main"
    """Revision of a Hub model."""
    loss: Literal["bradley-terry", "ratings"] = "bradley-terry"
    """bradley-terry: -log sigmoid of the difference of a pair; ratings: squared error of each aspect."""
    aspects: list[str] | None = None
    """With ratings: the aspects, each with its weight in the reward as colour=2; by default all that are rated, with weight 1."""
    hidden: int = 0
    """Units of the head's hidden layer; 0 for a linear head."""
    train_tower: Tower = "none"
    """Of the base model's picture tower: nothing, a LoRA, or full, all of its weights."""
    train_text: bool = False
    """Train the text tower in the same way."""
    lora_rank: int = 8
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """Scale of the LoRA is alpha / rank; by default alpha = rank."""
    steps: int = 500
    """Optimiser steps."""
    batch_size: int = 64
    """Pairs, or rated pictures, of a step."""
    learning_rate: float | None = None
    """Of AdamW; by default 1e-3 for a head alone, 3e-4 with a LoRA, 1e-5 with full."""
    weight_decay: float = 0.01
    """Of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """Schedule of the learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    label_smoothing: float = 0.0
    """With bradley-terry: how often the preference is taken to be wrong, below 0.5."""
    held_out: float = 0.1
    """Share of the prompts that is held out, with their pictures."""
    evaluate_every: int | None = None
    """Steps between evaluations on what is held out; by default a tenth of them. The weights of the best are kept."""
    patience: int | None = None
    """Stop after so many evaluations that are no better; by default all steps are taken."""
    data_limit: int | None = None
    """Use so many judgements, the first ones."""
    bad_pictures: Literal["refuse", "skip"] = "refuse"
    """What to do with pictures that are missing or damaged."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the base model; what trains is fp32."""
    device: str | None = None
    """By default cuda, mps or cpu, the first there is."""
    seed: int = 0
    """Of what is held out, of the order, and of what is drawn at the start."""

    def __post_init__(self) -> None:
        whole_numbers = dict(hidden=0, lora_rank=1, steps=1, batch_size=1, evaluate_every=1, patience=1, data_limit=1)
        for name, least in whole_numbers.items():
            if vars(self)[name] is not None and not vars(self)[name] >= least:
                raise InputError(f"{name} is {vars(self)[name]}: give {least} or more.")
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            if vars(self)[name] is not None and not 0 < vars(self)[name] < float("inf"):
                raise InputError(f"{name} is {vars(self)[name]}: give a number above 0.")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(f"weight_decay is {self.weight_decay}: give 0 or more.")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}: give a share between 0 and 1, such as 0.1.")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(f"label_smoothing is {self.label_smoothing}: give 0 to below 0.5.")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to 2147483647.")
        if self.train_text and self.train_tower == "none":
            raise InputError("train_text trains the text tower as train_tower says, which is none: --train-tower lora, or full.")
        if self.train_tower == "full" and self.precision == "bf16":
            raise InputError("train_tower full trains the tower in fp32: drop --precision bf16, or take a LoRA.")
        if self.loss == "bradley-terry" and self.aspects is not None:
            raise InputError("aspects are of ratings: --loss ratings, or drop --aspects.")
        if self.loss == "ratings" and self.label_smoothing:
            raise InputError("label_smoothing is of bradley-terry: drop it.")

    @property
    def weights(self) -> dict[str, float] | None:
        """The aspects with their weights; None for all that are rated. Raises InputError for a weight that is none."""
        found: dict[str, float] = {}
        for word in self.aspects or ():
            name, _, number = word.rpartition("=") if "=" in word else (word, "", "1")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not name or not math.isfinite(weight) or weight == 0:
                raise InputError(f"aspects: '{word}' has no weight: give NAME, or NAME=NUMBER with a number other than 0.")
            found[name] = weight
        return found or None


def build_parser() -> ArgumentParser:
    """The parser of `diffalign reward train`: the fields of `Fitting`, and --output."""
    usage = "diffalign reward train --data FOLDER --output DIR [options]"
    parser = ArgumentParser(prog="diffalign reward train", exit_on_error=False, allow_abbrev=False, usage=usage)
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the reward, a new one.")
    parser.add_class_arguments(Fitting, None)
    about = {p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(Fitting).params}
    for action in parser._actions:
        action.help = about.get(action.dest, action.help)
    return parser
