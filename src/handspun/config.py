"""All options, each with its one default. The command line, YAML files and help texts are read from here.

`None` means "not given": the text says what is then done. Names are transformers' where it has one.
"""

from dataclasses import dataclass
from typing import Any, Literal

from handspun.errors import ConfigError

DataFormat = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt"]
Weights = Literal["auto", "float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows are read, and how they become examples."""

    data: str = "train.csv"
    """Training rows: a csv, tsv, json, jsonl or parquet file, a folder of them, or a hub dataset id."""

    data_format: DataFormat = "auto"
    """How a row is written; "auto" recognises it from the columns and says so."""

    system_prompt: str | None = None
    """System message for conversations without one; if not given, the template's own default holds."""

    max_length: int | None = None
    """Longest example in tokens, prompt included; if not given, 2048 or the model's limit."""

    strict: bool = False
    """Make dropped or truncated rows an error instead of a line in the account."""

    cache_examples: bool = True
    """Keep tokenised rows in ~/.cache/handspun/examples, and read them from there where nothing has changed."""

    def __post_init__(self) -> None:
        if problems := _numbers_out_of_range(self, _DATA_RANGES):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig):
    """One fine-tuning run, from rows to checkpoints."""

    model: str = "Qwen/Qwen2.5-0.5B"
    """Hub id, folder, .gguf file, or "smollm2-135m" (embedded: needs no network)."""

    output_dir: str = "output"
    """Folder for checkpoints, train.log, metrics.jsonl and run.json."""

    eval_data: str | None = None
    """Held-out rows, in any of the forms of --data."""

    eval_ratio: float = 0.0
    """Share of the training rows to hold out (0 to 1), drawn with the seed; not with --eval-data."""

    eval_steps: int | None = None
    """Evaluate every so many optimiser steps, besides the start and the end of every epoch."""

    num_epochs: int = 3
    """Passes over the training rows."""

    batch_size: int = 8
    """Rows in an optimiser step. How they are cut to fit memory does not change the result."""

    max_tokens: int = 2048
    """Tokens in a micro-batch, padding included; a single longer row makes one of its own."""

    batching: Literal["packed", "padded"] = "packed"
    """How a micro-batch is computed: rows end to end behind the prefix that they share, or padded. The
    results are the same."""

    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third
    more work."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW; if not given, 5e-5, and 5e-4 with LoRA."""

    lr_schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls from its peak to zero after warm-up."""

    warmup_ratio: float = 0.03
    """Share of the optimiser steps (0 to 1) over which the learning rate rises from zero."""

    weight_decay: float = 0.0
    """AdamW's weight decay, of matrices only (not of biases and norms)."""

    optimizer_states: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Type of AdamW's two states of each trained weight: 8 bytes a weight, 4, or 2. The short ones are rounded so
    that the mean is kept, and make a step slower."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""

    lora: bool = False
    """Train LoRA adapters (through peft) in place of all weights."""

    lora_rank: int = 16
    """Rank of the LoRA matrices."""

    lora_alpha: int = 32
    """LoRA's scale: updates are multiplied by alpha / rank."""

    lora_dropout: float = 0.0
    """Dropout on the LoRA branch's input (0 to 1)."""

    base_weights: Literal["float32", "int8"] = "float32"
    """Type of the frozen weights under LoRA adapters; int8 layers take a quarter of the memory, are faster, and
    round. Embedding and head stay float32."""

    seed: int = 0
    """Seed of the row order, the held-out draw, LoRA's initial values and dropout."""

    device: str = "auto"
    """"auto" (cuda where there is one, else cpu), "cpu", "cuda", "cuda:1", "mps"."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matrix products; weights, optimiser and held-out losses stay float32. "auto" is bfloat16 where a
    probe of a few products says that it is clearly faster."""

    threads: int | None = None
    """CPU threads; if not given, one per physical core. Under torchrun, those of each process; if not given, its
    share of the machine's physical cores."""

    shard: bool = False
    """Under torchrun, give every process a share of the weights, gradients and optimiser states (FSDP2) in place
    of a copy: for a model that is too large for one."""

    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the saved weights; bfloat16 halves the files and rounds, at random, so that in the mean nothing is
    lost."""

    overwrite: bool = False
    """Replace an earlier run in the output folder."""

    dry_run: bool = False
    """Show the plan (steps, tokens, predicted peak memory) and stop."""

    def __post_init__(self) -> None:
        problems = _numbers_out_of_range(self, {**_DATA_RANGES, **_TRAIN_RANGES})
        if self.eval_data is not None and self.eval_ratio > 0:
            problems.append(
                "--eval-data and --eval-ratio exclude each other: rows are held out either from a file of "
                "their own or from the training rows. Give one of them."
            )
        if self.base_weights == "int8" and not self.lora:
            problems.append(
                "--base-weights int8 needs --lora: int8 weights are frozen, so without adapters there would be "
                "nothing to train. Add --lora, or leave --base-weights out."
            )
        if self.base_weights == "int8" and self.shard:
            problems.append(
                "--shard cannot cut int8 weights. Leave --base-weights int8 out, or leave --shard out: an int8 "
                "base takes a quarter of the memory on every process."
            )
        if self.optimizer_states != "float32" and self.shard:
            problems.append(
                f"--shard cuts float32 optimiser states, and --optimizer-states {self.optimizer_states} shortens "
                "whole ones: leave one of the two out."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-4 if self.lora else 5e-5


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to decode. What is not given comes from the model's generation_config (and is said), then
    from the defaults named here."""

    max_new_tokens: int | None = None
    """Most tokens to generate (default 512)."""

    min_new_tokens: int | None = None
    """Fewest tokens before an end of sequence is allowed (default 0)."""

    do_sample: bool | None = None
    """Draw from the distribution instead of taking the most probable token (default no)."""

    temperature: float | None = None
    """Logits are divided by it before sampling (default 1.0); above 0."""

    top_k: int | None = None
    """Sample from the k most probable tokens, ties kept (default 0, off)."""

    top_p: float | None = None
    """Sample from the smallest set whose probability reaches this (default 1.0, off)."""

    min_p: float | None = None
    """Sample from tokens at least this share as probable as the best (default 0, off)."""

    typical_p: float | None = None
    """Sample from the tokens whose surprise is nearest the expected one, until their probability reaches this
    (default 1.0, off)."""

    repetition_penalty: float | None = None
    """Divides (or multiplies, if negative) logits of tokens in prompt and output (default 1.0, off)."""

    repetition_penalty_exempt: Literal["none", "template"] | None = None
    """"template" spares what the chat template wrote, and every added token, so that structure is not penalised
    (default "none", as in transformers)."""

    presence_penalty: float | None = None
    """Taken off the logits of tokens that the output has already (-2 to 2, default 0, off)."""

    frequency_penalty: float | None = None
    """Taken off a token's logit once for every time the output has it already (-2 to 2, default 0, off)."""

    no_repeat_ngram_size: int | None = None
    """No run of so many tokens occurs twice in prompt and output (default 0, off)."""

    logit_bias: dict[str, float] | None = None
    """Added to the logits of token ids, as in --logit-bias.42=-100 or --logit-bias '{"42": -100}'."""

    sequence_bias: dict[str, float] | None = None
    """The same for the last of several ids ("42 7") where the others come before it."""

    bad_words: tuple[str, ...] | None = None
    """Texts that are not to be generated, at the start of a word or behind a space."""

    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    """The same as token ids; several ids are one run."""

    suppress_tokens: tuple[int, ...] | None = None
    """Token ids that are never generated."""

    begin_suppress_tokens: tuple[int, ...] | None = None
    """Token ids that no answer begins with."""

    json_schema: str | dict[str, Any] | None = None
    """Answers are JSON of this schema, given as JSON or as a file's name."""

    regex: str | None = None
    """Answers match this regular expression as a whole (Rust's syntax, without look-around)."""

    choice: tuple[str, ...] | None = None
    """Answers are one of these texts."""

    num_beams: int | None = None
    """Beams of a beam search (default 1, off)."""

    length_penalty: float | None = None
    """Beam scores are divided by (generated length) ** this (default 1.0)."""

    early_stopping: bool | Literal["never"] | None = None
    """When a beam search ends: yes, once num_beams hypotheses are complete; no, when a better one is
    unlikely; "never", when none is possible (default no)."""

    num_return_sequences: int | None = None
    """Answers to each prompt (default 1)."""

    stop_strings: tuple[str, ...] | None = None
    """Strings that end an answer and are cut from it (default for chats: the template's end of turn
    and "\\nUser:"; otherwise none)."""

    seed: int | tuple[int, ...] | None = None
    """Seed of the draws: one, or one for each prompt (default 0)."""

    def __post_init__(self) -> None:
        problems = _numbers_out_of_range(self, _GENERATION_RANGES) + _exclusions(self)
        if problems:
            raise ConfigError(problems)


SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Options that only change what is sampled."""

CONSTRAINTS = ("json_schema", "regex", "choice")
"""Options that say what a whole answer is; one of them at a time."""

# name: (lowest, highest, is the lowest itself allowed, is the highest itself allowed)
_DATA_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "max_length": (2, float("inf"), True, False),
}
_TRAIN_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "eval_ratio": (0, 1, True, False),
    "eval_steps": (1, float("inf"), True, False),
    "num_epochs": (1, float("inf"), True, False),
    "batch_size": (1, float("inf"), True, False),
    "max_tokens": (1, float("inf"), True, False),
    "learning_rate": (0, float("inf"), False, False),
    "warmup_ratio": (0, 1, True, True),
    "weight_decay": (0, float("inf"), True, False),
    "max_grad_norm": (0, float("inf"), True, False),
    "lora_rank": (1, float("inf"), True, False),
    "lora_alpha": (1, float("inf"), True, False),
    "lora_dropout": (0, 1, True, False),
    "seed": (0, 2**63, True, False),
    "threads": (1, float("inf"), True, False),
}
_GENERATION_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "max_new_tokens": (1, float("inf"), True, False),
    "min_new_tokens": (0, float("inf"), True, False),
    "temperature": (0, float("inf"), False, False),
    "top_k": (0, float("inf"), True, False),
    "top_p": (0, 1, False, True),
    "min_p": (0, 1, True, True),
    "typical_p": (0, 1, False, True),
    "presence_penalty": (-2, 2, True, True),
    "frequency_penalty": (-2, 2, True, True),
    "repetition_penalty": (0, float("inf"), False, False),
    "no_repeat_ngram_size": (0, float("inf"), True, False),
    "num_beams": (1, float("inf"), True, False),
    "num_return_sequences": (1, float("inf"), True, False),
}


def option_name(name: str) -> str:
    """`batch_size` as it is typed: `--batch-size`."""
    return "--" + name.replace("_", "-")


def _numbers_out_of_range(config: Any, ranges: dict[str, tuple[float, float, bool, bool]]) -> list[str]:
    problems = []
    for name, (low, high, low_allowed, high_allowed) in ranges.items():
        value = getattr(config, name)
        if value is None:
            continue
        above = value >= low if low_allowed else value > low
        below = value <= high if high_allowed else value < high
        if not (above and below):
            wanted = f"{'at least' if low_allowed else 'more than'} {low:g}"
            if high != float("inf"):
                wanted += f" and {'at most' if high_allowed else 'less than'} {high:g}"
            problems.append(f"{option_name(name)} is {value}: expected {wanted}.")
    return problems


def _exclusions(options: GenerationOptions) -> list[str]:
    """Options that the user gave and that cannot be had together, each with the remedy."""
    problems = []
    beams, sample = options.num_beams or 1, options.do_sample
    sampling = [option_name(name) for name in SAMPLING_OPTIONS if getattr(options, name) is not None]
    if beams > 1 and sample:
        problems.append(
            f"--num-beams {beams} and --do-sample exclude each other: a beam search takes the most probable "
            "beams and draws nothing. Leave one of them out."
        )
    elif sampling and (beams > 1 or sample is False):
        other = f"--num-beams {beams}" if beams > 1 else "--no-do-sample"
        verb = "changes" if len(sampling) == 1 else "change"
        problems.append(
            f"{', '.join(sampling)} only {verb} what is sampled, and {other} does not sample. "
            f"Leave {'it' if len(sampling) == 1 else 'them'} out, or use --do-sample without beams."
        )
    constraints = [option_name(name) for name in CONSTRAINTS if getattr(options, name) is not None]
    if len(constraints) > 1:
        problems.append(f"{' and '.join(constraints)} exclude each other: each says what a whole answer is.")
    for name in ("length_penalty", "early_stopping"):
        if getattr(options, name) is not None and beams == 1:
            problems.append(f"{option_name(name)} belongs to beam search: give --num-beams 2 or more with it.")
    returned = options.num_return_sequences or 1
    if beams > 1 and returned > beams:
        problems.append(
            f"--num-return-sequences {returned} is more than --num-beams {beams}: a beam search has at most "
            "as many answers as beams."
        )
    if returned > 1 and beams == 1 and sample is False:
        problems.append(
            f"--num-return-sequences {returned} with greedy decoding would give the same answer {returned} "
            "times: use --do-sample or --num-beams."
        )
    if (options.min_new_tokens or 0) > (options.max_new_tokens or float("inf")):
        problems.append(
            f"--min-new-tokens {options.min_new_tokens} is more than --max-new-tokens {options.max_new_tokens}."
        )
    return problems


__all__ = [
    "CONSTRAINTS",
    "SAMPLING_OPTIONS",
    "DataConfig",
    "DataFormat",
    "GenerationOptions",
    "TrainConfig",
    "Weights",
    "option_name",
]
