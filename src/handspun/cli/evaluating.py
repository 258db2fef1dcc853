"""The commands eval and compare."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from handspun.cli.app import (
    FLAT,
    ComputeOptions,
    Count,
    ModelOptions,
    PromptOptions,
    TemplateOptions,
    app,
    load_model,
    read_prompts,
    with_files,
)
from handspun.config import DataConfig, GenerationOptions
from handspun.display import HarmlessConsole, json_line, logger, print_line

if TYPE_CHECKING:
    from handspun.models.load import ChatModel


@dataclass(frozen=True, kw_only=True)
class HeldOutData(DataConfig):
    """Rows to evaluate a model on."""

    data: tuple[str, ...] | str = "held_out.csv"
    """Held-out rows: a csv, tsv, json, jsonl or parquet file, a folder of them, or a hub dataset id.
    Repeatable."""


@app.command(name="eval")
def evaluate(
    *files: str,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    config: Annotated[HeldOutData, FLAT] = HeldOutData(),
    batch_size: Count = 8,
    per_row: Path | None = None,
    generate: bool = False,
    max_new_tokens: Count = 512,
    json: bool = False,
) -> None:
    """Score a model on held-out rows: loss, perplexity, and with --generate exact matches.

    The loss is the mean over target tokens (those in the loss mask), whatever the batch size.

    Parameters
    ----------
    files
        Held-out rows, the same as --data.
    batch_size
        Rows computed together. It does not change the scores.
    per_row
        File to write one JSON object per row to: file, row, loss, tokens, beginnings of prompt and output.
    generate
        Also answer every prompt greedily, and compare with the row's output, ignoring white space around it.
    max_new_tokens
        Maximum number of tokens per answer.
    json
        Print one JSON object instead of the table.
    """
    from handspun.cli.views.scores import row_lines, scores_record, scores_table
    from handspun.data.rows import check_data_exists
    from handspun.evaluation.score import score
    from handspun.files import whole_file
    from handspun.preflight.print import account_lines

    config = with_files(config, files, "eval")
    check_data_exists(*config.sources)
    with ExitStack() as stack:
        partial = stack.enter_context(whole_file(per_row, option="--per-row")) if per_row else None
        scores = score(
            load_model(source, config),
            config,
            batch_size=batch_size,
            ask=generate,
            max_new_tokens=max_new_tokens,
        )
        if partial is not None:
            partial.write_text("".join(f"{line}\n" for line in row_lines(scores.rows)), encoding="utf-8")
    if json:
        print(json_line(scores_record(scores)))
        return
    console = HarmlessConsole()
    if scores.account is not None:
        for line in account_lines(scores.account, max_length=scores.max_length):
            print_line(console, line)
    console.print(scores_table(scores))


@app.command
def compare(
    model_a: str,
    model_b: str,
    *,
    prompts_file: Annotated[Path | None, Parameter(alias="--prompts")] = None,
    options: Annotated[GenerationOptions, FLAT] = GenerationOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    asking: Annotated[PromptOptions, FLAT] = PromptOptions(),  # noqa: B008
    html: Path | None = None,
    compute: Annotated[ComputeOptions, FLAT] = ComputeOptions(),  # noqa: B008
) -> None:
    """Show two models' answers to the same prompts side by side. Only one model is loaded at a time.

    Parameters
    ----------
    model_a
        Hub id, folder, adapter folder, .gguf file, or "smollm2-135m".
    model_b
        The second model, given in the same way.
    prompts_file
        A text file with one prompt per line. If not given, one prompt is read from standard input.
    html
        File to write the comparison to, as one self-contained HTML page.
    """
    from handspun.cli.views.comparison import print_comparison
    from handspun.evaluation.compare import compare as compare_models
    from handspun.files import whole_file
    from handspun.report.compare import comparison_html

    def load(name: str) -> "ChatModel":
        return load_model(ModelOptions(model=name, **asdict(compute)), template)

    prompts = read_prompts((), prompts_file)
    with ExitStack() as stack:
        partial = stack.enter_context(whole_file(html, option="--html")) if html else None
        found = compare_models(
            [model_a, model_b],
            prompts,
            load=load,
            options=options,
            chat=asking.chat,
            system_prompt=asking.system_prompt,
            batch_size=asking.batch_size,
        )
        if partial is not None:
            partial.write_text(comparison_html(found, options), encoding="utf-8")
    print_comparison(found, HarmlessConsole())
    if html is not None:
        logger.info(f"written: {html}")
