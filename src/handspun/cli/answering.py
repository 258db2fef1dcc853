"""Commands that decode: generate, chat."""

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
        What to ask; with none, and no --prompts-file, one prompt is read from standard input.
    prompts_file
        A text file with one prompt a line.
    system_prompt
        System message; if not given, the template's own default holds.
    prefill
        How every answer begins; the model goes on from there, and what is shown comes after it.
    chat
        Put prompts into the model's chat template; --no-chat takes them as they are.
    batch_size
        Rows decoded together.
    json
        One JSON object a line: text, token ids, finish reason.
    logprobs
        Log-probability of each token, in the model's own distribution (with --json).
    explain
        How each token came to be: its rank and probability, what every processor did, what was left, the draw, the
        runner-up; a table, or part of the --json. Not with beams.
    show_tree
        What a beam search looked at: all its beams, with their scores; a tree, or part of the --json.
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
    """Talk to a model. Ctrl-C stops an answer, /reset begins anew, /quit (or Ctrl-D) leaves.

    Parameters
    ----------
    system_prompt
        System message; if not given, the template's own default holds.
    """
    from handspun.cli.views.answers import chat_loop

    chat_loop(load_model(source, template), options, HarmlessConsole(), system_prompt=system_prompt)
