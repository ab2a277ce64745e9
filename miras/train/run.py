"""A training run from a configuration to a folder with a model in it, by transformers' Trainer."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from miras.data import TokenWindows, load_corpus, load_tokenizer, pack
from miras.engines import plan
from miras.errors import UsageError
from miras.hf import MirasConfig, MirasForCausalLM
from miras.mixer import Mixer
from miras.rule import Rule
from miras.train import folder, processes
from miras.train.card import card
from miras.train.checkpoints import finish, saving
from miras.train.config import TrainConfig
from miras.train.files import keep_metrics, write_text
from miras.train.memory import PeakMemory
from miras.train.optimizer import make_optimizer
from miras.train.progress import Reporter, no_bars, say
from miras.train.provenance import versions
from miras.train.summary import Summary

LINES = 500
"""At most about so many lines of metrics."""


def train(config: TrainConfig, resume: bool = False) -> Summary:
    """Train a model.

    Writes into `config.out`: config.yaml, run.json, metrics.jsonl, checkpoints/, and at the end model/ (model,
    tokenizer and model card, for `AutoModelForCausalLM` after `import miras.hf`) and summary.json.

    Under torchrun each process takes its part of every batch; the first one writes.

    Args:
        config: the run.
        resume: go on after the newest complete checkpoint. On a CPU the result is bit by bit that of a run that never
            stopped. A finished run is not done again.

    Returns:
        What summary.json says.

    Raises:
        UsageError: the configuration, the data or the run folder cannot be used.
        MirasError: the disk is full, or the loss is no longer finite.
    """
    out = Path(config.out)
    if processes.is_main():
        folder.check(config, resume)
    if resume and (out / "summary.json").exists():
        say(f"The run in {out} is finished.")
        return Summary.read(out / "summary.json")
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the package tensorboard: write pip install tensorboard, or leave it out.")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    no_bars()
    with _arguments(config).main_process_first(local=False):
        data = _load_data(config)
    if resume:
        folder.check_data(out, data.about)
    checkpoint = folder.resume_point(out) if resume else None
    with PeakMemory() as peak:
        set_seed(config.seed)
        model = MirasForCausalLM(model_config(config, **_vocabulary(data.tokenizer)))
        _headline(model, config, data)
        if not resume and processes.is_main():
            with saving("The configuration", out):
                folder.begin(config, data.about)
        return _Run(config, data, model, peak).go(checkpoint)


def model_config(config: TrainConfig, **vocabulary: Any) -> MirasConfig:
    """The model of a run; over bytes, if no fields of `MirasConfig` say what tokens there are."""
    return MirasConfig(
        **vocabulary,
        hidden_size=config.dim,
        intermediate_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        mixer=list(config.mixers),
        gates=config.gates,
        conv_size=config.conv,
        rope=config.rope,
        context_length=config.context,
    )


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@dataclass(frozen=True)
class _Data:
    tokenizer: PreTrainedTokenizerFast
    train: TokenWindows
    validation: TokenWindows
    about: dict[str, Any]


def _load_data(config: TrainConfig) -> _Data:
    corpus = load_corpus(config.data)
    tokenizer = load_tokenizer(config.tokenizer, corpus)
    # What is streamed from a hub has no end that one could wait for.
    most = config.steps * config.batch if corpus.hash is None else None
    with saving("The tokenised text", Path(config.cache)):
        train_windows, validation = pack(corpus, tokenizer, config.context, Path(config.cache), most)
    about = {
        "name": corpus.name,
        "hash": corpus.hash,
        "train_tokens": train_windows.tokens,
        "validation_tokens": validation.tokens,
        "bytes_per_token": validation.bytes_per_token,
        "tokenizer": config.tokenizer,
    }
    return _Data(tokenizer, train_windows, validation, about)


class _Trainer(Trainer):
    """The Trainer, with checkpoints that count only when complete."""

    run: TrainConfig

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Compiled layers would be compiled once more for this.
        with torch.compiler.set_stance("force_eager"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, out = self.state.global_step, Path(self.run.out)
        with saving(f"The checkpoint of step {step}", out):
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                finish(out / "checkpoints" / f"checkpoint-{step}", self.run.keep)


class _Run:
    """What `train` does once there are data and a model."""

    def __init__(self, config: TrainConfig, data: _Data, model: MirasForCausalLM, peak: PeakMemory) -> None:
        self.config, self.data, self.model, self.peak, self.out = config, data, model, peak, Path(config.out)

    def go(self, checkpoint: Path | None) -> Summary:
        step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        before = keep_metrics(self.out / "metrics.jsonl", step) if processes.is_main() else []
        seconds = max((line.get("seconds", 0.0) for line in before), default=0.0)
        data = self.data
        lengths = (data.train.bytes_per_token, data.validation.bytes_per_token)
        with Reporter(self.out, self.config.steps, self.config.batch, lengths, seconds) as reporter:
            trainer = self._trainer(reporter)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.evaluate(_spread(data.validation, self.config.eval_windows))
        summary = self._summary(reporter)
        if processes.is_main():
            with saving("The model", self.out):
                self.model.save_pretrained(self.out / "model")
                data.tokenizer.save_pretrained(self.out / "model")
                write_text(self.out / "model" / "README.md", card(summary, self.config.context))
                summary.write(self.out / "summary.json")
        say(f"validation {summary.val_bits_per_byte:.3f} bits/byte, {summary.tokens_per_second:,.0f} tokens/s")
        say(f"model      {self.out / 'model'}\nnumbers    {self.out / 'summary.json'}, {self.out / 'metrics.jsonl'}")
        say(f"try it     miras generate {self.out} --prompt 'def '")
        return summary

    def _trainer(self, reporter: Reporter) -> Trainer:
        config, arguments = self.config, _arguments(self.config)
        model = self.model.to(arguments.device)  # type: ignore[arg-type]
        if config.compile:
            model.model.backbone.compile_layers()
        trainer = _Trainer(
            model,
            arguments,
            train_dataset=self.data.train,
            eval_dataset=_spread(self.data.validation, -(-config.eval_windows // 4)),
            processing_class=self.data.tokenizer,  # is saved with each checkpoint
            # The windows are full: one that pads would add a mask, and with it slower ways through the model.
            data_collator=default_data_collator,
            callbacks=[reporter],
            optimizers=make_optimizer(model, config.learning_rate, config.weight_decay, config.warmup, config.steps),
        )
        trainer.run = config
        # All windows are equally long, so a plain mean is right, and the same in all versions of transformers.
        trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        # The output layer is the embedding, so it is not in a checkpoint: no cause for a warning on resuming.
        model._keys_to_ignore_on_save = list(model._tied_weights_keys)
        return trainer

    def _summary(self, reporter: Reporter) -> Summary:
        config = self.config
        return Summary(
            name=config.model,
            mixer=" | ".join(_label(mixer) for mixer in dict.fromkeys(config.mixers)),
            parameters=self.model.num_parameters(),
            steps=config.steps,
            tokens=config.steps * config.batch,
            val_loss=reporter.last_validation["val_loss"],
            val_bits_per_byte=reporter.last_validation["val_bits_per_byte"],
            tokens_per_second=config.batch * reporter.clock.steps_per_second(),
            train_seconds=reporter.clock.seconds,
            peak_memory_bytes=self.peak.so_far(),
            threads=torch.get_num_threads(),
            data=self.data.about,
            versions=versions(),
            seed=config.seed,
            command=folder.command(config),
        )


def _arguments(config: TrainConfig) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(Path(config.out) / "checkpoints"),
        max_steps=config.steps,
        per_device_train_batch_size=config.sequences,
        per_device_eval_batch_size=config.sequences,
        gradient_accumulation_steps=config.accumulation,
        max_grad_norm=config.clip,
        seed=config.seed,
        data_seed=config.seed,
        bf16=config.bf16,
        ddp_find_unused_parameters=False,  # a layer has parameters for its gates only
        use_cpu=not torch.accelerator.is_available(),  # else several processes on a CPU would not find each other
        logging_strategy="steps",
        logging_steps=math.ceil(config.steps / LINES),
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show the mean of the past instead
        eval_strategy="steps",
        eval_steps=config.eval_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=None,  # older ones are deleted when a new one counts, not before
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # there are none
        disable_tqdm=True,
        report_to=["tensorboard"] if config.tensorboard else [],
    )
    # Several GPUs in one process would each get a whole batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _spread(windows: TokenWindows, most: int) -> Subset[dict[str, torch.Tensor]]:
    """At most `most` windows, evenly spaced, always the same."""
    count = min(most, len(windows))
    return Subset(windows, [i * len(windows) // count for i in range(count)])


def _label(mixer: Mixer) -> str:
    said = mixer.describe()
    label = " x ".join(said[axis] for axis in ("memory", "bias", "retention", "algorithm"))
    return f"{label}, chunk {mixer.chunk}" if isinstance(mixer, Rule) else label


def _engine(rule: Rule, config: TrainConfig) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # as the Trainer chooses
    head = torch.empty(1, 1, 1, config.dim // config.heads, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=config.bf16):
        engine = plan(rule, tokens=(head, head))
    return f"{engine.name}, {engine.about}"


def _headline(model: MirasForCausalLM, config: TrainConfig, data: _Data) -> None:
    about = data.about
    shape = f"{config.layers} layers of {config.dim} with {config.heads} heads"
    say(f"{config.model}: {model.num_parameters():,} parameters, {shape}")
    for mixer in dict.fromkeys(config.mixers):
        said = _engine(mixer, config) if isinstance(mixer, Rule) else "PyTorch's attention"
        say(f"mixer      {_label(mixer)}\nengine     {said}")
    say(
        f"data       {about['name']}: {about['train_tokens']:,} tokens to train on, {about['validation_tokens']:,} "
        f"held out, {about['bytes_per_token']:.2f} bytes per token ({about['tokenizer']})"
    )
    say(
        f"plan       {config.steps:,} steps of {config.batch:,} tokens in sequences of {config.context:,}, "
        f"{torch.get_num_threads()} threads, into {config.out}"
    )
