"""Commands that look at what a model does: eval, compare."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from handspun.cli.app import FLAT, Count, ModelOptions, TemplateOptions, app, load_model, read_prompts
from handspun.config import DataConfig, GenerationOptions, Weights
from handspun.display import HarmlessConsole, json_line, say

if TYPE_CHECKING:
    from handspun.models.load import ChatModel


@dataclass(frozen=True, kw_only=True)
class HeldOutData(DataConfig):
    """The rows that a model is evaluated on."""

    data: str = "held_out.csv"
    """Held-out rows: a csv, tsv, json, jsonl or parquet file, a folder of them, or a hub dataset id."""


@app.command(name="eval")
def evaluate(
    *,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    config: Annotated[HeldOutData, FLAT] = HeldOutData(),
    batch_size: Count = 8,
    per_row: Path | None = None,
    generate: bool = False,
    max_new_tokens: Count = 512,
    json: bool = False,
) -> None:
    """Score a model on held-out rows: loss, perplexity; with --generate exact matches.

    The loss is a mean over learned tokens, the same whatever the batch size.

    Parameters
    ----------
    batch_size
        Rows computed together; it changes no score.
    per_row
        A file to write a JSON object a row to: file, row, loss, tokens, the beginnings of prompt and output.
    generate
        Also answer every prompt greedily, and compare with the row's output, white space aside.
    max_new_tokens
        Most tokens of an answer.
    json
        One JSON object in place of the table.
    """
    from handspun.cli.views.scores import row_lines, scores_record, scores_table
    from handspun.data.rows import check_data_exists
    from handspun.evaluation.score import score
    from handspun.files import whole_file
    from handspun.runs.summary import account_lines

    check_data_exists(config.data)
    with ExitStack() as stack:
        partial = stack.enter_context(whole_file(per_row, option="--per-row")) if per_row else None
        scores = score(
            load_model(source, config),
            config,
            batch_size=batch_size,
            ask=generate,
            max_new_tokens=max_new_tokens,
            notice=say,
        )
        if partial is not None:
            partial.write_text("".join(f"{line}\n" for line in row_lines(scores.rows)), encoding="utf-8")
    if json:
        print(json_line(scores_record(scores)))
        return
    console = HarmlessConsole()
    if scores.account is not None:
        for line in account_lines(scores.account, max_length=scores.max_length):
            console.print(line, markup=False, soft_wrap=True)
    console.print(scores_table(scores))


@app.command
def compare(
    model_a: str,
    model_b: str,
    *,
    prompts_file: Annotated[Path | None, Parameter(alias="--prompts")] = None,
    options: Annotated[GenerationOptions, FLAT] = GenerationOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    system_prompt: str | None = None,
    chat: bool = True,
    batch_size: Count = 8,
    html: Path | None = None,
    device: str = "auto",
    weights: Weights = "auto",
    threads: Count | None = None,
) -> None:
    """Ask two models the same, and show their answers side by side. One is loaded after the other.

    Parameters
    ----------
    model_a
        Hub id, folder, adapter folder, .gguf file, or "smollm2-135m".
    model_b
        The same.
    prompts_file
        A text file with one prompt a line; if not given, one prompt is read from standard input.
    system_prompt
        System message; if not given, each template's own default holds.
    chat
        Put prompts into each model's chat template; --no-chat takes them as they are.
    batch_size
        Rows decoded together.
    html
        A file to write the same to, as one page that needs nothing else.
    device
        "auto" (cuda where there is one, else cpu), "cpu", "cuda", "cuda:1", "mps".
    weights
        Type of both models' weights, as for generate.
    threads
        CPU threads; if not given, PyTorch's default (one per physical core).
    """
    from handspun.evaluation.compare import compare as compare_models
    from handspun.files import whole_file
    from handspun.report.compare import comparison_html, print_comparison

    def load(name: str) -> "ChatModel":
        return load_model(ModelOptions(model=name, device=device, weights=weights, threads=threads), template)

    prompts = read_prompts((), prompts_file)
    with ExitStack() as stack:
        partial = stack.enter_context(whole_file(html, option="--html")) if html else None
        found = compare_models(
            [model_a, model_b],
            prompts,
            load=load,
            options=options,
            chat=chat,
            system_prompt=system_prompt,
            batch_size=batch_size,
            notice=say,
        )
        if partial is not None:
            partial.write_text(comparison_html(found, options), encoding="utf-8")
    print_comparison(found, HarmlessConsole())
    if html is not None:
        say(f"written: {html}")
