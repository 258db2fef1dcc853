"""The commands generate and chat."""

from pathlib import Path
from typing import Annotated

from handspun.cli.app import FLAT, Count, ModelOptions, TemplateOptions, app, load_model, read_prompts
from handspun.config import GenerationOptions
from handspun.display import HarmlessConsole


@app.command
def generate(
    *prompts: str,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    options: Annotated[GenerationOptions, FLAT] = GenerationOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    prompts_file: Path | None = None,
    system_prompt: str | None = None,
    prefill: str | None = None,
    chat: bool = True,
    batch_size: Count = 8,
    json: bool = False,
    logprobs: bool = False,
    explain: bool = False,
    show_tree: bool = False,
) -> None:
    """Answer prompts: greedy, sampling (--do-sample) or beam search (--num-beams).

    Parameters
    ----------
    prompts
        Prompts to answer. Without any and without --prompts-file, one prompt is read from standard input.
    prompts_file
        A text file with one prompt per line.
    system_prompt
        System message. If not given, the chat template's default applies.
    prefill
        Beginning of every answer. The model continues it, and only the continuation is shown.
    chat
        Put prompts into the model's chat template; --no-chat passes them as plain text.
    batch_size
        Number of answers decoded together.
    json
        Print one JSON object per line: text, token ids, finish reason.
    logprobs
        Add each token's log-probability in the model's own distribution (with --json).
    explain
        Show how each token was chosen: its rank and probability, each processor's effect, the tokens left, the
        draw and the runner-up. Prints a table, or adds it to --json. Not available with beams.
    show_tree
        Show the tree that a beam search explored: all its beams with their scores. Prints a tree, or adds it to
        --json.
    """
    from handspun.cli.views.answers import show_answers

    show_answers(
        load_model(source, template),
        read_prompts(prompts, prompts_file),
        options,
        HarmlessConsole(),
        chat=chat,
        system_prompt=system_prompt,
        prefill=prefill,
        batch_size=batch_size,
        as_json=json,
        logprobs=logprobs,
        explain=explain,
        show_tree=show_tree,
    )


@app.command
def chat(
    *,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    options: Annotated[GenerationOptions, FLAT] = GenerationOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    system_prompt: str | None = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, /reset starts over, /quit (or Ctrl-D) exits.

    Parameters
    ----------
    system_prompt
        System message. If not given, the chat template's default applies.
    """
    from handspun.cli.views.answers import chat_loop

    chat_loop(load_model(source, template), options, HarmlessConsole(), system_prompt=system_prompt)
