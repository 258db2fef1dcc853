"""Options of a fine-tuning run. The text under each field is its help text."""

from typing import Any, Literal

from handspun.config.columns import parse_columns
from handspun.config.names import options
from handspun.config.ranges import MOST, Ranges, option_name, wrong_values
from handspun.config.role_map import parse_role_map
from handspun.config.template_args import read_template_args
from handspun.errors import ConfigError

DataFormat = Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@options
class DataConfig:
    """Which rows to read, and how to turn them into examples."""

    data: tuple[str, ...] | str = "train.csv"
    """Training rows: a csv, tsv, json, jsonl or parquet file, a folder of them, or a hub dataset id. Repeatable;
    each file may have its own format."""

    limit: int | None = None
    """Use only the first N rows of --data. Default: all."""

    data_format: DataFormat = "auto"
    """Format of the rows. "auto" recognizes it from the columns and logs it."""

    columns: tuple[str, ...] | dict[str, str] | None = None
    """Columns of other names, for example instruction=Frage,output=Antwort. Repeatable, or a mapping in a --config
    file. Common pairs such as question and answer are recognized without it."""

    system_prompt: str | None = None
    """System message for conversations without one. Default: the template's own default."""

    role_map: tuple[str, ...] | dict[str, str] | None = None
    """Roles for unknown speaker names in the data, for example agent=assistant. Repeatable, or a mapping in a
    --config file. Roles: system, user, assistant, tool."""

    chat_template: str | None = None
    """Name of one of the tokenizer's chat templates, or a Jinja file. Default: the tokenizer's own (its "tool_use"
    template for rows with tools)."""

    template_args: tuple[str, ...] | dict[str, Any] | None = None
    """Values for the chat template's variables, for example enable_thinking=false. Repeatable. Saved models use
    them as their template's defaults."""

    max_length: int | None = None
    """Longest example in tokens, including the prompt. Default: 2048, or the model's limit if lower."""

    strict: bool = False
    """Treat dropped rows, truncated rows and all warnings before a run as errors."""

    cache_examples: bool = True
    """Cache tokenized rows in ~/.cache/handspun/examples, and reuse them if nothing has changed."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The files, folders or hub datasets of `data`."""
        return (self.data,) if isinstance(self.data, str) else self.data

    @property
    def template_values(self) -> dict[str, Any]:
        """Values for the chat template's variables, by name."""
        return read_template_args(self.template_args)[0]

    def __post_init__(self) -> None:
        if problems := wrong_values(self, _DATA_RANGES) or _map_problems(self) + _read_template_args(self):
            raise ConfigError(problems)

    @property
    def roles(self) -> dict[str, str]:
        """The role map: normalized name -> role."""
        return parse_role_map(self.role_map or ())

    @property
    def column_names(self) -> dict[str, str]:
        """The map of columns: column -> its name in the file."""
        return parse_columns(self.columns or ())


@options
class TrainConfig(DataConfig):
    """One fine-tuning run, from rows to checkpoints."""

    model: str = "Qwen/Qwen2.5-0.5B"
    """Hub id, folder, .gguf file, or "smollm2-135m" (embedded: needs no hub)."""

    output_dir: str = "output"
    """Folder for checkpoints, train.log, metrics.jsonl, run.json and report.html."""

    eval_data: tuple[str, ...] | str | None = None
    """Held-out rows, in any form that --data accepts. Repeatable. --limit does not apply to them."""

    eval_ratio: float | None = None
    """Share of the training rows to hold out (0 to 1), chosen with the seed. Default: 5 % but at most 200 rows, if
    there are at least 100 rows and no --eval-data. 0: train on all."""

    eval_steps: int | None = None
    """Evaluate every N optimizer steps, in addition to the start of the run and the end of each epoch."""

    num_epochs: int = 3
    """Passes over the training rows."""

    max_steps: int | None = None
    """Stop after at most N optimizer steps, even in the middle of an epoch. The learning rate falls to zero there.
    Default: all steps of --num-epochs."""

    batch_size: int = 8
    """Rows per optimizer step. Splitting them into micro-batches to fit memory does not change the result."""

    max_tokens: int = 2048
    """Most tokens per micro-batch, including padding. A longer row gets a micro-batch to itself."""

    batching: Literal["packed", "padded"] = "packed"
    """How to compute a micro-batch: packed (rows end to end after their shared prefix, no padding) or padded. The
    results are the same."""

    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass, and recompute the rest. Saves memory, costs a third more
    work."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW. Default: 5e-5, or 5e-4 with LoRA."""

    lr_schedule: Literal["cosine", "linear", "constant"] = "linear"
    """How the learning rate falls from its peak to zero after warm-up."""

    warmup_ratio: float = 0.03
    """Share of the optimizer steps (0 to 1) over which the learning rate rises from zero."""

    weight_decay: float = 0.0
    """AdamW's weight decay. Applies to matrices only, not to biases and norms."""

    optimizer_states: Literal["float32", "bfloat16", "8bit"] = "float32"
    """Type of AdamW's two states: 8, 4 or 2 bytes per trained weight. bfloat16 and 8bit round without bias and
    make steps slower."""

    max_grad_norm: float = 1.0
    """Clip gradients to this norm. 0 turns clipping off."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or gradient is not finite: stop the run, or skip the update and continue. The rows
    of the step are written to the output folder either way."""

    max_skipped_steps: int = 10
    """Most steps that `--on-nonfinite skip` may skip before the run stops."""

    lora: bool = False
    """Train LoRA adapters (through peft) instead of all weights."""

    lora_rank: int = 16
    """Rank of the LoRA matrices."""

    lora_alpha: int = 32
    """LoRA scale: updates are multiplied by alpha / rank."""

    lora_target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that get LoRA adapters, such as q_proj. Repeatable. Default: all but the head."""

    lora_dropout: float = 0.0
    """Dropout on the LoRA branch's input (0 to 1)."""

    base_weights: Literal["float32", "int8"] = "float32"
    """Type of the frozen weights under LoRA adapters. int8 layers take a quarter of the memory and are faster, but
    round. Embedding and head stay float32."""

    seed: int = 0
    """Seed of the row order, the held-out rows, LoRA's initial values and dropout."""

    device: str = "auto"
    """"auto" (cuda if available, else cpu), "cpu", "cuda", "cuda:1", "mps"."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matmuls. Weights, optimizer and held-out losses stay float32. "auto" picks bfloat16 if a short
    probe shows that it is clearly faster."""

    threads: int | None = None
    """CPU threads (per process under torchrun). Default: all physical cores, shared by the processes."""

    shard: bool = False
    """Under torchrun, shard weights, gradients and optimizer states across the processes (FSDP2). Use it for a
    model that is too large for one process."""

    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the saved weights. bfloat16 halves the files, with stochastic rounding to preserve the mean."""

    save_steps: int | None = None
    """Save a resumable checkpoint every N optimizer steps, in addition to the end of each epoch. The last
    ones remain as models after the run."""

    save_minutes: float = 30
    """Save a resumable checkpoint when N minutes have passed since the last one. 0 turns it off."""

    keep_last: int = 2
    """Number of resumable checkpoints to keep. A newer one replaces the oldest. Epoch checkpoints
    remain as models."""

    resume: bool | None = None
    """Resume the unfinished run in the output folder from its last checkpoint. Default: if there is one. --resume:
    fail if there is none. --no-resume: never."""

    sample_answers: bool = True
    """Answer a few prompts before the first step and after the last. Answers and row losses take at most a tenth
    of the steps' time (30 seconds are always allowed)."""

    sample_prompts: tuple[str, ...] | None = None
    """Prompts for the sample answers. Default: those of three held-out rows, or else training rows."""

    sample_every: int | None = None
    """Also answer the sample prompts greedily every N optimizer steps, and show how the answers change."""

    log_to: tuple[Tracker, ...] = ()
    """Also send each step's metrics to TensorBoard, Weights & Biases (offline) or trackio. Repeatable. Each needs
    its package."""

    report_rows: int = 256
    """Most evenly spaced rows per data set whose final losses are computed. The hardest are in report.html, and in
    hardest_rows.csv. 0 leaves them out."""

    overwrite: bool = False
    """Replace an earlier run in the output folder."""

    dry_run: bool = False
    """Do everything up to the first step, then stop. The same as `handspun preflight`."""

    def __post_init__(self) -> None:
        if problems := wrong_values(self, {**_DATA_RANGES, **_TRAIN_RANGES}):
            raise ConfigError(problems)
        problems += _map_problems(self) + _read_template_args(self)
        if self.eval_data is not None and self.eval_ratio:
            problems.append(
                "--eval-data and --eval-ratio exclude each other: held-out rows come either from their own file "
                "or from the training rows. Use one of them."
            )
        if self.resume and self.overwrite:
            problems.append(
                "--resume and --overwrite exclude each other. Either resume the earlier run or replace it."
            )
        if self.base_weights == "int8" and not self.lora:
            problems.append(
                "--base-weights int8 needs --lora: int8 weights are frozen, so without adapters there would be "
                "nothing to train. Add --lora, or remove --base-weights."
            )
        if self.lora_target_modules is not None and not (self.lora and self.lora_target_modules):
            problems.append(
                "--lora-target-modules names layers for LoRA adapters. Add --lora and at least one name, or "
                "remove it."
            )
        if self.base_weights == "int8" and self.shard:
            problems.append(
                "--shard cannot split int8 weights. Remove --base-weights int8, or remove --shard: an int8 base "
                "takes a quarter of the memory in every process."
            )
        if self.optimizer_states != "float32" and self.shard:
            problems.append(
                f"--shard splits float32 optimizer states only, and not those of --optimizer-states "
                f"{self.optimizer_states}. Remove one of the two."
            )
        if self.sample_every is not None and self.shard:
            problems.append(
                "--sample-every needs the whole model in one process, and --shard splits it. Remove one of the "
                "two."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def eval_sources(self) -> tuple[str, ...]:
        """The files, folders or hub datasets of `eval_data`."""
        return (self.eval_data,) if isinstance(self.eval_data, str) else self.eval_data or ()

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 5e-4 if self.lora else 5e-5


def _map_problems(config: DataConfig) -> list[str]:
    """Return what is wrong with the maps of roles and columns. Store valid ones as mappings."""
    # run.json holds the mappings, and a resumed run compares them, whatever form they were given in.
    problems = []
    for name, parsed in (("role_map", "roles"), ("columns", "column_names")):
        try:
            object.__setattr__(config, name, getattr(config, parsed) or None)
        except ValueError as error:
            problems.append(f"{option_name(name)}: {error}")
    return problems


def _read_template_args(config: DataConfig) -> list[str]:
    """Store the values of the template's variables as a dict, and return what is wrong with them."""
    if config.template_args is None:
        return []
    found, problems = read_template_args(config.template_args)
    object.__setattr__(config, "template_args", found)
    return problems


_DATA_RANGES: Ranges = {
    "max_length": (2, MOST, True, True),
    "limit": (1, MOST, True, True),
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
    "max_steps": (1, MOST, True, True),
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
