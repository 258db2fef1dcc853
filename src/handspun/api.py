"""What Python programs call: `handspun.train`, `load`, `generate`, and the others of `handspun.__all__`.

They take what a program has in hand (a model's name or a loaded model, a file's name or rows in memory), and their
errors speak of arguments, not of the command line's options. The work is done elsewhere.
"""

import os
from collections.abc import Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, cast

from rich.console import Console

from handspun.config import DataConfig, ExportConfig, GenerationOptions, TemplateArgs, TrainConfig, Weights
from handspun.config.docs import with_options
from handspun.config.spelling import python_words
from handspun.config.typed import short
from handspun.decoding import generate as decoding
from handspun.decoding.arguments import CallOptions, GenerateArguments
from handspun.decoding.prompts import Prompt
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.display import logger
from handspun.errors import ConfigError
from handspun.models import load as loading
from handspun.models.load import ChatModel

# Imported where they are called: a program that only decodes needs neither peft nor the report.
if TYPE_CHECKING:
    from handspun.evaluation.compare import Comparison
    from handspun.evaluation.score import Scores
    from handspun.preflight.preview_data import Preview
    from handspun.runs.output_dir import TrainedRun

Model: TypeAlias = "ChatModel | TrainedRun | str | os.PathLike[str]"
"""A loaded model, the result of a run, or a name for `load`."""
Data: TypeAlias = "str | os.PathLike[str] | Sized"
"""A file, a folder, a hub dataset, or rows in memory: a list of dicts, a DataFrame, a Dataset."""


@with_options(TrainConfig)
@python_words()
def train(
    data: "TrainConfig | Data | None" = None,
    *,
    console: Console | None = None,
    **options: Any,
) -> "TrainedRun":
    """Fine-tune a model. Write checkpoints, train.log, metrics.jsonl, run.json, and report.html.

        run = handspun.train("tickets.csv", model="smollm2-135m", lora=True)
        handspun.generate(run.model, "My invoice is wrong.")

    If the output folder holds an unfinished run with the same options, training resumes from its last checkpoint
    and produces bit-identical weights. Under torchrun, every process calls this function; the first one logs and
    saves.

    Args:
        data: Training rows: a file, a folder, a hub dataset, rows in memory (a list of dicts, a DataFrame, a
            Dataset), or a whole `TrainConfig`.
        console: Also gets the lines of the log. Default: standard output.
        **options: Fields of `TrainConfig`.

    Raises:
        HandspunError: for anything that you can fix: data, options, model, disk.
    """
    from handspun.runs.train import train as run_training

    if isinstance(data, TrainConfig):
        config = replace(data, **options) if options else data
    else:
        config = TrainConfig(**options) if data is None else TrainConfig(data=cast(Any, data), **options)
    return run_training(config, console=console)


@python_words()
def load(
    name: "str | os.PathLike[str]",
    *,
    weights: Weights = "auto",
    device: str = "auto",
    chat_template: str | None = None,
    template_args: TemplateArgs | None = None,
) -> ChatModel:
    """Load a chat model by name.

    Args:
        name: Hub id, folder, a run's output folder (its best checkpoint), folder of a LoRA adapter (merged into
            its base), .gguf file, or "smollm2-135m".
        weights: Type of the weights. "auto" is float32 on a CPU, and bfloat16 on a GPU that supports it. "int8"
            is for decoding, with one scale per channel and one per row of activations.
        device: "auto" (a GPU if there is one), or a torch device such as "cpu".
        chat_template: Name of one of the tokenizer's templates, or a Jinja file; by default the tokenizer's own.
        template_args: Values for the template's variables, such as {"enable_thinking": False}.

    Raises:
        ModelError: if the model does not exist, is incomplete, or does not support int8.
        ConfigError: for an unknown template or template variable.
    """
    return loading.load(
        os.fspath(name),
        weights=weights,
        device=device,
        chat_template=chat_template,
        template_args=template_args,
    )


@with_options(CallOptions, GenerationOptions)
@python_words()
def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    **arguments: Unpack[GenerateArguments],
) -> list[GenerationResult]:
    """Return the answers to the prompts: a flat list, prompt by prompt, num_return_sequences per prompt.

        model = handspun.load("smollm2-135m")
        print(handspun.generate(model, "Tell me a joke.", temperature=0.7)[0].text)

    The log tells which settings come from the model, and every ten seconds how far a long prompt is.

    Args:
        model: The model, from `handspun.load` or `TrainedRun.model`. A name is loaded anew by every call.
        prompts: One or several. A string is a user message (plain text with chat=False); a list of messages is a
            conversation.
        options: Many options at once. Those given by name override it.
        **arguments: Fields of `GenerationOptions`, and those of the call itself.

    Raises:
        ConfigError: for options that are wrong, or that the model does not support.
        DataError: for messages that cannot be read.
        TemplateError: for a chat template that cannot render them.
    """
    return decoding.generate(loaded(model), prompts, options=options, **arguments)


@with_options(CallOptions, GenerationOptions)
@python_words()
def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    **arguments: Unpack[GenerateArguments],
) -> Iterator[GenerationChunk]:
    """Yield every answer's text as it grows. The last chunk of each answer holds its result.

        for chunk in handspun.stream(model, "Tell me a joke."):
            print(chunk.text, end="", flush=True)

    A beam search streams the prefix that all of its possible answers share, as soon as it is certain: one chunk
    for each of a prompt's num_return_sequences answers, and the rest of each at the end. If tokens are excluded
    (by a constraint, say), a search may find fewer answers; then only the best is streamed before the end.

    Args:
        model: As in `generate`.
        prompts: As in `generate`.
        options: As in `generate`.
        **arguments: As in `generate`.

    Raises:
        HandspunError: those of `generate`, by the call itself rather than at the first chunk.
    """
    return decoding.stream(loaded(model), prompts, options=options, **arguments)


@with_options(DataConfig)
@python_words()
def evaluate(
    model: Model,
    data: Data,
    *,
    generate: bool = False,
    batch_size: int = 8,
    max_new_tokens: int = 512,
    **options: Any,
) -> "Scores":
    """Score a model on rows: loss, perplexity, and with generate=True exact matches.

        scores = handspun.evaluate("output", "held_out.csv", generate=True)
        print(scores.loss, scores.exact_match)

    Args:
        model: The model, or a name for `load`.
        data: Rows: a file, a folder, a hub dataset, or rows in memory (a list of dicts, a DataFrame, a Dataset).
        generate: Also answer every prompt greedily, and compare with the row's output.
        batch_size: Rows computed together. It does not change the scores.
        max_new_tokens: Maximum number of tokens per answer.
        **options: Fields of `DataConfig`.

    Raises:
        DataError: for rows that cannot be used.
        ConfigError: for wrong options.
    """
    from handspun.evaluation.score import score

    config = DataConfig(data=cast(Any, data), **options)
    return score(loaded(model), config, batch_size=batch_size, ask=generate, max_new_tokens=max_new_tokens)


@with_options(GenerationOptions)
@python_words()
def compare(
    models: Sequence[Model],
    prompts: str | Sequence[str],
    *,
    options: GenerationOptions | None = None,
    chat: bool = True,
    system_prompt: str | None = None,
    batch_size: int = 8,
    **arguments: Any,
) -> "Comparison":
    """Return several models' answers to the same prompts. Models given by name are in memory one at a time.

        found = handspun.compare(["smollm2-135m", "output"], ["Who are you?"], max_new_tokens=60)
        for name, answers in zip(found.models, found.answers):
            print(name, answers[0][0].text)

    Args:
        models: The models, or names for `load`.
        prompts: User messages, or plain texts with chat=False.
        options: Many options at once, the same for all models. Those given by name override it.
        chat: Put the prompts into each model's chat template.
        system_prompt: System message of every prompt. None leaves the template's default.
        batch_size: Number of answers decoded together.
        **arguments: Fields of `GenerationOptions`.
    """
    from handspun.evaluation.compare import compare as compare_models

    if isinstance(models, str | os.PathLike):
        raise ConfigError(f"models is {short(models)}: expected a list of models or names.")
    by_name = {f"{_name(model)}": model for model in models}
    chosen = replace(options, **arguments) if options else GenerationOptions(**arguments)
    return compare_models(
        list(by_name), [prompts] if isinstance(prompts, str) else prompts,
        load=lambda name: loaded(by_name[name]), options=chosen,
        chat=chat, system_prompt=system_prompt, batch_size=batch_size,
    )  # fmt: skip


@with_options(ExportConfig)
@python_words()
def export(model: "TrainedRun | str | os.PathLike[str]", output_dir: Any = None, **options: Any) -> Path:
    """Export a checkpoint: a merged folder, a GGUF file for llama.cpp, or a repository on the Hugging Face hub.

        handspun.export("output", "exported", gguf="q8_0")

    Args:
        model: A run, or the name of a checkpoint or of any other model.
        output_dir: Folder for the exported files. Not needed if they are only pushed.
        **options: Fields of `ExportConfig`.

    Returns:
        The folder of the exported files, or of the model that was pushed.
    """
    from handspun.exports.export import export as export_checkpoint

    wanted = ExportConfig(model=_checkpoint_name(model), output_dir=output_dir, **options)
    export_checkpoint(wanted)
    return wanted.folder


@with_options(DataConfig)
@python_words()
def preview(
    data: Data,
    model: "str | os.PathLike[str]" = TrainConfig.model,
    *,
    examples: int = 3,
    **options: Any,
) -> "Preview":
    """Return what would be trained on: rendered examples, lengths, and what happens to every row.

        print(handspun.preview("tickets.csv", "smollm2-135m"))

    Tokens trained on stand between ⟦ and ⟧. A notebook shows the result without `print`.

    Args:
        data: Rows: a file, a folder, a hub dataset, or rows in memory (a list of dicts, a DataFrame, a Dataset).
        model: The model whose tokenizer and chat template are used. Its weights are not read.
        examples: Number of rendered examples.
        **options: Fields of `DataConfig`.
    """
    from handspun.preflight.preview_data import preview_data

    return preview_data(DataConfig(data=cast(Any, data), **options), os.fspath(model), examples=examples)


def _name(model: Any) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return str(getattr(model, "name", None) or getattr(model, "output_dir", None) or short(model))


def _checkpoint_name(model: Any) -> str:
    """Return the folder or name to export. Raises ConfigError for a model that is only in memory."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if isinstance(folder := getattr(model, "output_dir", None), Path):
        return str(folder)
    raise ConfigError(
        f"model is {short(model)}: export reads a checkpoint (expected a run from handspun.train, a folder, or a "
        "name). Give the folder that holds it."
    )


def loaded(model: Any) -> ChatModel:
    """Return the model of a caller: loaded already, a run's, or to be loaded by its name. Raises ConfigError."""
    if isinstance(model, ChatModel):
        return model
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        logger.info(f"{name}: loading")
        return loading.load(name)
    if isinstance(found := getattr(model, "model", None), ChatModel):
        return found
    raise ConfigError(
        f"model is {short(model)}: expected a model from handspun.load, a run from handspun.train, or a name such "
        'as "smollm2-135m".'
    )
