"""The options of a run."""

from typing import Any, Literal

from handspun.config.names import options
from handspun.config.ranges import MOST, Ranges, wrong_values
from handspun.config.role_map import parse_role_map
from handspun.config.template_args import read_template_args
from handspun.errors import ConfigError

DataFormat = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@options
class DataConfig:
    """Which rows are read, and how they become examples."""

    data: str = "train.csv"
    """Training rows: a csv, tsv, json, jsonl or parquet file, a folder of them, or a hub dataset id."""

    data_format: DataFormat = "auto"
    """How a row is written; "auto" recognizes it from the columns and says so."""

    system_prompt: str | None = None
    """System message for conversations without one; if not given, the template's own default holds."""

    role_map: tuple[str, ...] | dict[str, str] | None = None
    """Names of the data's speakers that are not known, and the role that each stands for, as in agent=assistant;
    may be given more than once, and a file's mapping works too. Roles: system, user, assistant, tool."""

    chat_template: str | None = None
    """Name of one of the tokenizer's chat templates, or a Jinja file; if not given, the tokenizer's own (and its
    "tool_use" for rows with tools)."""

    template_args: tuple[str, ...] | dict[str, Any] | None = None
    """Values for the chat template's variables, as in enable_thinking=false; may be given more than once. What is
    saved has them as its template's defaults."""

    max_length: int | None = None
    """Longest example in tokens, prompt included; if not given, 2048 or the model's limit."""

    strict: bool = False
    """Make an error of dropped or truncated rows, and of every warning before a run."""

    cache_examples: bool = True
    """Keep tokenized rows in ~/.cache/handspun/examples, and read them from there where nothing has changed."""

    @property
    def template_values(self) -> dict[str, Any]:
        """The values for the chat template's variables, by name."""
        return read_template_args(self.template_args)[0]

    def __post_init__(self) -> None:
        if problems := wrong_values(self, _DATA_RANGES) or _role_map_problems(self) + _read_template_args(self):
            raise ConfigError(problems)

    @property
    def roles(self) -> dict[str, str]:
        """The role map: name, as names are compared -> role."""
        return parse_role_map(self.role_map or ())


@options
class TrainConfig(DataConfig):
    """One fine-tuning run, from rows to checkpoints."""

    model: str = "Qwen/Qwen2.5-0.5B"
    """Hub id, folder, .gguf file, or "smollm2-135m" (embedded: needs no network)."""

    output_dir: str = "output"
    """Folder for checkpoints, train.log, metrics.jsonl, run.json and report.html."""

    eval_data: str | None = None
    """Held-out rows, in any of the forms of --data."""

    eval_ratio: float = 0.0
    """Share of the training rows to hold out (0 to 1), drawn with the seed; not with --eval-data."""

    eval_steps: int | None = None
    """Evaluate every so many optimizer steps, besides the start and the end of every epoch."""

    num_epochs: int = 3
    """Passes over the training rows."""

    batch_size: int = 8
    """Rows in an optimizer step. How they are cut to fit memory does not change the result."""

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
    """Share of the optimizer steps (0 to 1) over which the learning rate rises from zero."""

    weight_decay: float = 0.0
    """AdamW's weight decay, of matrices only (not of biases and norms)."""

    optimizer_states: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Type of AdamW's two states of each trained weight: 8 bytes a weight, 4, or 2. The short ones are rounded so
    that the mean is kept, and make a step slower."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What is done at a step whose loss or gradient is not finite: stop before it, or leave its update out and go
    on, as the schedule would have. Its rows are written to the output folder either way."""

    max_skipped_steps: int = 10
    """How many steps `--on-nonfinite skip` leaves out before it stops all the same."""

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
    """Type of the matrix matmuls; weights, optimizer and held-out losses stay float32. "auto" is bfloat16 where a
    probe of a few matmuls says that it is clearly faster."""

    threads: int | None = None
    """CPU threads; if not given, one per physical core. Under torchrun, those of each process; if not given, its
    share of the machine's physical cores."""

    shard: bool = False
    """Under torchrun, give every process a share of the weights, gradients and optimizer states (FSDP2) in place
    of a copy: for a model that is too large for one."""

    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the saved weights; bfloat16 halves the files and rounds, at random, so that in the mean nothing is
    lost."""

    save_steps: int | None = None
    """Save a checkpoint to resume from every so many optimizer steps, besides the end of every epoch; the last
    ones stay as models when the run is finished."""

    save_minutes: float = 30
    """Save a checkpoint to resume from when so many minutes have passed since the last one; 0 turns it off."""

    keep_last: int = 2
    """Checkpoints to resume from that are kept: a newer one takes the place of the oldest. Those of epochs stay
    as models."""

    resume: bool | None = None
    """Go on with the unfinished run in the output folder from its last checkpoint: if not given, where there is
    one; --resume, or say that there is none; --no-resume, never."""

    sample_answers: bool = True
    """Answer a few prompts before the first step and after the last, for report.html: a minute each at most."""

    sample_prompts: tuple[str, ...] | None = None
    """The prompts of the sample answers; if not given, the three of the demonstration."""

    sample_every: int | None = None
    """Answer the sample prompts greedily every so many optimizer steps too, and show how the answers change."""

    log_to: tuple[Tracker, ...] = ()
    """Send the figures of every step to TensorBoard, Weights & Biases (offline) or trackio too; may be given more
    than once, and each needs its package."""

    report_rows: int = 256
    """Rows of each set, at even distances, whose losses by the final weights are in report.html, the worst and the
    best with their text; 0 leaves them out."""

    overwrite: bool = False
    """Replace an earlier run in the output folder."""

    dry_run: bool = False
    """Do all that comes before the first step, and stop: the same as `handspun preflight`."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {**_DATA_RANGES, **_TRAIN_RANGES}):
            raise ConfigError(problems)
        problems += _role_map_problems(self) + _read_template_args(self)
        if self.eval_data is not None and self.eval_ratio > 0:
            problems.append(
                "--eval-data and --eval-ratio exclude each other: rows are held out either from a file of "
                "their own or from the training rows. Give one of them."
            )
        if self.resume and self.overwrite:
            problems.append(
                "--resume and --overwrite exclude each other: go on with the earlier run, or replace it."
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
                f"--shard cuts float32 optimizer states, and --optimizer-states {self.optimizer_states} shortens "
                "whole ones: leave one of the two out."
            )
        if self.sample_every is not None and self.shard:
            problems.append(
                "--sample-every answers with the whole model, and with --shard no process has it. Leave one of "
                "the two out: without --shard, the first process answers."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-4 if self.lora else 5e-5


def _role_map_problems(config: DataConfig) -> list[str]:
    """Return what is wrong with the role map. One that is right is kept as a mapping, however it was given: that
    is what run.json holds and a resumed run compares."""
    try:
        object.__setattr__(config, "role_map", config.roles or None)
    except ValueError as error:
        return [f"--role-map: {error}"]
    return []


def _read_template_args(config: DataConfig) -> list[str]:
    """Make a dict of what was given for the template's variables; return what is wrong with it."""
    if config.template_args is None:
        return []
    found, problems = read_template_args(config.template_args)
    object.__setattr__(config, "template_args", found)
    return problems


_DATA_RANGES: Ranges = {
    "max_length": (2, MOST, True, True),
}
_TRAIN_RANGES: Ranges = {
    "eval_ratio": (0, 1, True, False),
    "eval_steps": (1, MOST, True, True),
    "save_steps": (1, MOST, True, True),
    "save_minutes": (0, float("inf"), True, False),
    "keep_last": (1, MOST, True, True),
    "report_rows": (0, MOST, True, True),
    "sample_every": (1, MOST, True, True),
    "num_epochs": (1, MOST, True, True),
    "batch_size": (1, MOST, True, True),
    "max_tokens": (1, MOST, True, True),
    "learning_rate": (0, float("inf"), False, False),
    "warmup_ratio": (0, 1, True, True),
    "weight_decay": (0, float("inf"), True, False),
    "max_grad_norm": (0, float("inf"), True, False),
    "max_skipped_steps": (1, MOST, True, True),
    "lora_rank": (1, MOST, True, True),
    "lora_alpha": (1, MOST, True, True),
    "lora_dropout": (0, 1, True, False),
    "seed": (0, 2**63, True, False),
    "threads": (1, MOST, True, True),
}
