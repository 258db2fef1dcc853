"""The command verify."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from handspun.cli.app import FLAT, Count, ModelOptions, TemplateOptions, app, load_model, read_prompts
from handspun.display import HarmlessConsole
from handspun.errors import VerificationError


@app.command
def verify(
    *,
    source: Annotated[ModelOptions, FLAT] = ModelOptions(),  # noqa: B008
    template: Annotated[TemplateOptions, FLAT] = TemplateOptions(),  # noqa: B008
    prompts_file: Path | None = None,
    chat: bool = True,
    max_new_tokens: Count = 16,
    json: bool = False,
) -> None:
    """Compare Handspun's results with those of transformers on your own model.

    It checks logits, tokens, beams, processors, draws, losses, gradients, and answers in different batches.

    Both sides compute in float32; other --weights are reported, but cannot fail. Exits with 1 if a check fails.

    Parameters
    ----------
    prompts_file
        A text file with one prompt per line. If not given, six prompts that come with Handspun.
    chat
        Put prompts into the model's chat template; --no-chat passes them as plain text.
    max_new_tokens
        Tokens per answer. More take longer, but find more differences.
    json
        Print one JSON object instead of the table.
    """
    from handspun.cli.views.verification import failed, findings_json, findings_table, verdict
    from handspun.verification.verify import DEFAULT_PROMPTS
    from handspun.verification.verify import verify as run_checks

    prompts = DEFAULT_PROMPTS if prompts_file is None else read_prompts((), prompts_file)
    exact = load_model(replace(source, weights="float32"), template)
    rounded = None if _are_float32(source) else load_model(source, template)
    with HarmlessConsole(stderr=True).status("comparing with transformers"):
        findings = list(
            run_checks(
                exact,
                prompts,
                rounded=rounded,
                rounded_name=source.weights,
                is_chat=chat,
                max_new_tokens=max_new_tokens,
            )
        )
    console = HarmlessConsole()
    try:
        if json:
            print(findings_json(findings, exact.name))
        else:
            console.print(findings_table(findings))
    finally:  # also if the table could not be printed
        if failed(findings):
            raise VerificationError(verdict(findings))
    if not json:
        console.print(f"\n{verdict(findings)}", markup=False)


def _are_float32(source: ModelOptions) -> bool:
    import torch

    from handspun.models.load import resolve_device, resolve_dtype

    if source.weights == "int8":
        return False
    return resolve_dtype(source.weights, resolve_device(source.device)) == torch.float32
