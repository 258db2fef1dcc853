"""The commands generate and chat."""

from pathlib import Path
from typing import Annotated

from handspun.cli.app import (
    FLAT,
    ModelOptions,
    PromptOptions,
    TemplateOptions,
    app,
    check_no_model_among,
    load_model,
    quick_imports,
    read_prompts,
    with_name,
)
from handspun.config import GenerationOptions
from handspun.config.names import options as option_class
from handspun.display import HarmlessConsole


@option_class
class AnswerDetails:
    """What is printed with the answers."""

    json: bool = False
    """Print one JSON object per line: text, token ids, finish reason."""

    logprobs: bool = False
    """Add each token's log-probability in the model's own distribution (with --json)."""

    explain: bool = False
    """Show how each token was chosen: its rank and probability, each processor's effect, the tokens left, the draw
    and the runner-up. Prints a table, or adds it to --json. Not available with beams."""

    show_tree: bool = False
    """Show the tree that a beam search explored: all its beams with their scores. Prints a tree, or adds it to
    --json."""


@app.command
def generate(
    *prompts: str,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    options: Annotated[GenerationOptions, FLAT] = GenerationOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    prompts_file: Path | None = None,
    asking: Annotated[PromptOptions, FLAT] = PromptOptions(),  # noqa: B008
    prefill: str | None = None,
    details: Annotated[AnswerDetails, FLAT] = AnswerDetails(),  # noqa: B008
) -> None:
    """Answer prompts: greedy, sampling (--do-sample) or beam search (--num-beams).

    Parameters
    ----------
    prompts
        Prompts to answer. A pipe or a file on standard input is added to a single prompt. Without any prompt and
        without --prompts-file, standard input is the prompt.
    prompts_file
        A text file with one prompt per line.
    prefill
        Beginning of every answer. The model continues it, and only the continuation is shown.
    """
    with quick_imports():
        from handspun.cli.views.answers import show_answers

    check_no_model_among(prompts, source)
    show_answers(
        load_model(source, template, decodes_only=True),
        read_prompts(prompts, prompts_file),
        options,
        HarmlessConsole(),
        prefill=prefill,
        as_json=details.json,
        system_prompt=asking.system_prompt,
        chat=asking.chat,
        batch_size=asking.batch_size,
        logprobs=details.logprobs,
        explain=details.explain,
        show_tree=details.show_tree,
    )


@app.command
def chat(
    name: str | None = None,
    /,
    *,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    options: Annotated[GenerationOptions, FLAT] = GenerationOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    system_prompt: str | None = None,
) -> None:
    """Talk to a model. /help shows the commands, Ctrl-C stops an answer, /quit (or Ctrl-D) exits.

    Parameters
    ----------
    name
        The model, the same as --model.
    system_prompt
        System message. If not given, the chat template's default applies.
    """
    with quick_imports():
        from handspun.cli.views.chat import Chat

    model = load_model(with_name(source, name), template, decodes_only=True)
    Chat(model, options, HarmlessConsole(), system_prompt).loop()
