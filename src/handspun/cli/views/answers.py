"""Print answers, conversations and previews on a terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Unpack

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from handspun.cli.views.explain import explanation_table, search_tree
from handspun.config import DataConfig, GenerationOptions
from handspun.data.messages import Message
from handspun.data.preview import bracketed, colored
from handspun.decoding.arguments import GenerateArguments
from handspun.decoding.generate import stream
from handspun.decoding.options import resolve
from handspun.decoding.results import GenerationResult
from handspun.display import json_line, print_line, write_text
from handspun.models.load import ChatModel


def show_preview(config: DataConfig, model: str, console: Console, *, examples: int, plain: bool) -> None:
    """Print rendered examples, the length distribution, and the data report."""
    from handspun.preflight.preview_data import preview_data

    found = preview_data(config, model, examples=examples)
    how = "between ⟦ and ⟧" if plain else "in green"
    console.print(f"tokens trained on are {how}\n", markup=False)
    for example in found.shown:
        title = found.title(example)
        console.print(f"--- {title}" if plain else Rule(title, align="left"), markup=False)
        text = Text(bracketed(example, found.tokenizer)) if plain else colored(example, found.tokenizer)
        console.print(text, soft_wrap=True)
    console.print("---\n" if plain else Rule(), markup=False)
    for line in found.summary():
        print_line(console, line)


def show_answers(
    model: ChatModel,
    prompts: Sequence[str],
    options: GenerationOptions,
    console: Console,
    *,
    prefill: str | None = None,
    as_json: bool = False,
    **arguments: Unpack[GenerateArguments],
) -> None:
    """Print the answers in the order of their prompts: each as soon as it and all before it are complete.

    A single answer is printed alone, token by token; others stand under their prompts.

    Args:
        model: The model that answers.
        prompts: User messages, or plain texts.
        options: Generation options.
        console: Where to print.
        prefill: Beginning of every answer.
        as_json: Print one JSON object per line.
        **arguments: As for `generate`.
    """
    asked = list(prompts) if prefill is None else [_with_prefill(prompt, prefill) for prompt in prompts]
    arguments["continue_final_message"] = prefill is not None
    count = resolve(options, model, chat=arguments.get("chat", True))[0].num_return_sequences
    is_alone = len(prompts) * count == 1 and not as_json
    waiting: dict[int, list[GenerationResult]] = {index: [] for index in range(len(prompts))}
    for chunk in stream(model, asked, options=options, **arguments):
        if is_alone:
            write_text(console, chunk.text, end="" if chunk.result is None else "\n")
        if chunk.result is not None:
            waiting[chunk.prompt_index].append(chunk.result)
        while waiting and len(results := waiting[min(waiting)]) == count:
            _print_answers(prompts[min(waiting)], results, console, as_json=as_json, is_alone=is_alone)
            del waiting[min(waiting)]
    for index, results in waiting.items():  # a beam search found fewer than requested
        _print_answers(prompts[index], results, console, as_json=as_json, is_alone=False)


def _print_answers(
    prompt: str, results: list[GenerationResult], console: Console, *, as_json: bool, is_alone: bool
) -> None:
    """Print a prompt's answers. is_alone: the text has been printed already."""
    for result in sorted(results, key=lambda result: result.return_index):
        if as_json:
            print(json_line({"prompt": prompt, **asdict(result)}))
            continue
        if not is_alone:
            _print_with_prompt(console, prompt, result)
        if result.explanation is not None:
            console.print(explanation_table(result.explanation))
        if result.tree is not None:
            console.print(search_tree(result.tree))


def _with_prefill(prompt: str, prefill: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": prefill}]


def _print_with_prompt(console: Console, prompt: str, result: GenerationResult) -> None:
    if result.return_index == 0:
        console.print(f"> {prompt}", style="bold", markup=False, soft_wrap=True)
    write_text(console, result.text)
    console.print()
