"""The model card of a checkpoint, README.md in the hub's format, from the run's record."""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from handspun.models.embedded import EMBEDDED_NAME
from handspun.runs.record import RowSet, RunRecord
from handspun.training.loop import Evaluation

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PLACES = ("model", "output_dir", "data", "eval_data", "overwrite", "dry_run", "device", "threads", "strict",
           "cache_examples")  # fmt: skip
"""Options that say where things were, not what was done."""


def model_card(
    record: RunRecord,
    *,
    checkpoint: Mapping[str, Any],
    license: str | None = None,
    merged: bool = False,
) -> str:
    """Return the card: front matter, model and data, held-out losses, use, options, environment.

    Folders of the training machine are left out: others read the card.

    Args:
        record: the run's record, with the evaluations so far.
        checkpoint: step and epoch of this one.
        license: of the base model, if it is known.
        merged: whether adapters are merged into the weights.
    """
    config = record.config
    adapter = bool(config["lora"]) and not merged
    base = hub_id(config["model"])
    sections = [
        f"# {PurePath(config['model']).name}, fine-tuned",
        _introduction(config, base, merged),
        "## Model and data\n\n" + "\n".join(_table(_trained(record, checkpoint))),
        *_held_out(record.evaluations, checkpoint),
        "## Use\n\n" + _use(base, adapter),
        "## Options\n\n```yaml\n" + _options(config) + "```",
        "## Environment\n\n" + "\n".join(_table(_environment(record))),
    ]
    return f"---\n{_front_matter(config, base, adapter, license)}\n---\n\n" + "\n\n".join(sections) + "\n"


def license_of(model: str) -> str | None:
    """Return the license that the base model's card names, in its folder or the hub's cache; None if unknown."""
    if model == EMBEDDED_NAME:
        return "apache-2.0"
    card: Any = Path(os.path.expanduser(model)) / "README.md"
    if not card.is_file() and hub_id(model):
        card = try_to_load_from_cache(model, "README.md")
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's file
        return None
    return found if isinstance(found, str) else None


def hub_id(model: str) -> str | None:
    """Return the base model's hub id, as front matter needs it; None for a folder or a file."""
    if model == EMBEDDED_NAME:
        return _EMBEDDED_HUB_ID
    is_id = _HUB_ID.fullmatch(model) and not model.endswith(".gguf") and not Path(model).exists()
    return model if is_id else None


def _front_matter(config: Mapping[str, Any], base: str | None, adapter: bool, license: str | None) -> str:
    data = ModelCardData(
        base_model=base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        license=license,
        datasets=[name for name in _names(config["data"]) if hub_id(name) and not PurePath(name).suffix] or None,
        tags=["handspun", "lora" if config["lora"] else "full-fine-tuning", "sft"],
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
    )
    return data.to_yaml()


def _introduction(config: Mapping[str, Any], base: str | None, merged: bool) -> str:
    how = "LoRA adapters" if config["lora"] else "All weights"
    name = f"[{base}](https://huggingface.co/{base})" if base else f"`{PurePath(config['model']).name}`"
    end = " The adapters are merged into the weights." if merged and config["lora"] else ""
    return f"{how} of {name}, trained with Handspun on instruction data. This card was written by the run.{end}"


def _trained(record: RunRecord, checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    config, plan = record.config, record.plan
    assert plan is not None
    yield "base model", base_name(config["model"])
    if config["lora"]:
        names = config.get("lora_target_modules")  # runs of earlier versions have no such option
        layers = ", ".join(names) if names else "every linear layer"
        yield "method", f"LoRA, rank {config['lora_rank']}, alpha {config['lora_alpha']}, on {layers}"
    else:
        yield "method", "full fine-tuning"
    yield "parameters", f"{plan.parameters / 1e6:.1f}M, {plan.trainable / 1e6:.1f}M trained"
    train, held_out = record.data.train, record.data.held_out
    yield "training rows", f"{_sources(config['data'])}: {_rows(train)}"
    if held_out:
        share = held_out.rows.rows / (held_out.rows.rows + train.rows.rows)
        source = _sources(config["eval_data"]) if config["eval_data"] else f"{share:.0%} of the rows read"
        yield "held-out rows", f"{source}: {_rows(held_out)}"
    yield "this checkpoint", f"step {checkpoint['step']} of {plan.steps}, epoch {checkpoint['epoch']}"


def base_name(model: str) -> str:
    """Return a model as a card names it: a whole id, or the last part of a folder."""
    return hub_id(model) or PurePath(model).name


def _names(sources: str | Sequence[str]) -> Sequence[str]:
    return [sources] if isinstance(sources, str) else sources


def _sources(sources: str | Sequence[str]) -> str:
    return ", ".join(name if hub_id(name) else PurePath(name).name for name in _names(sources))


def _rows(some: RowSet) -> str:
    rows = some.rows
    dropped = f", {len(rows.dropped)} dropped" if rows.dropped else ""
    truncated = f", {len(rows.truncated)} truncated" if rows.truncated else ""
    return (
        f"{rows.kept} of {rows.rows} rows{dropped}{truncated}; {some.tokens} tokens, "
        f"{some.learned_tokens} of them target tokens; sha256 `{some.sha256}`"
    )


def _held_out(evaluations: Sequence[Evaluation], checkpoint: Mapping[str, Any]) -> Iterator[str]:
    if not evaluations:
        return
    lines = ["| step | epoch | loss | perplexity |", "| --- | --- | --- | --- |"]
    for evaluation in evaluations:
        loss = evaluation.loss
        perplexity = f"{math.exp(loss):.2f}" if loss < 700 else "infinite"
        mark = " (this checkpoint)" if evaluation.step == checkpoint["step"] else ""
        lines.append(f"| {evaluation.step}{mark} | {evaluation.epoch} | {loss:.4f} | {perplexity} |")
    tokens = evaluations[0].learned_tokens
    what = f"A mean over the {tokens} target tokens of the held-out rows, computed in float32."
    yield "## Held-out loss\n\n" + what + "\n\n" + "\n".join(lines)


def _use(base: str | None, adapter: bool) -> str:
    handspun = 'handspun generate --model FOLDER "Tell me a joke about computers."'
    load = (
        "from peft import AutoPeftModelForCausalLM as AutoModel\nfrom transformers import AutoTokenizer"
        if adapter
        else "from transformers import AutoModelForCausalLM as AutoModel\nfrom transformers import AutoTokenizer"
    )
    code = (
        f"{load}\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        'model = AutoModel.from_pretrained("FOLDER")\n'
        'messages = [{"role": "user", "content": "Tell me a joke about computers."}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        "output = model.generate(**inputs, max_new_tokens=256)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )
    needs_base = " and the base model it was trained from, by the path in adapter_config.json" if not base else ""
    what = f"FOLDER is the one that holds this file{needs_base if adapter else ''}, or its id on the hub."
    return f"{what}\n\n```sh\n{handspun}\n```\n\n```python\n{code}\n```"


def _options(config: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in config.items() if name not in _PLACES and value is not None}
    text: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    return text


def _environment(record: RunRecord) -> Iterator[tuple[str, str]]:
    environment = record.environment
    yield "started", record.started
    yield "machine", f"{environment.machine}, {environment.cores} cores"
    yield "system", f"{environment.system}, Python {environment.python}"
    if record.dtype is not None:
        yield "matmuls", f"{record.dtype}, {record.processes} process(es), {record.threads} thread(s)"
    yield "versions", ", ".join(f"{name} {version}" for name, version in environment.versions.items())


def _table(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    yield "| | |"
    yield "| --- | --- |"
    for name, value in rows:
        yield f"| {name} | {value.replace('|', chr(92) + '|')} |"
