"""Help pages: options in groups, in the order in which people need them."""

from collections.abc import Collection, Sequence
from typing import Any

from attrs import evolve
from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel
from rich.text import Text

GROUPS = {
    "Arguments": "files models name prompts runs",
    "Prompts": "prompts-file system-prompt prefill chat",
    "Model": "model-a model-b model weights device threads chat-template template-args",
    "Rows": "data limit data-format columns role-map max-length strict cache-examples",
    "Training": "num-epochs max-steps learning-rate lr-schedule warmup-ratio weight-decay max-grad-norm",
    "LoRA": "lora lora-rank lora-alpha lora-target-modules lora-dropout base-weights",
    "Evaluation": "eval-data eval-ratio eval-steps generate per-row",
    "Answers during training": "sample-answers sample-prompts sample-every",
    "Length and end": "max-new-tokens min-new-tokens stop-strings",
    "Sampling": "do-sample temperature top-k top-p min-p typical-p num-return-sequences",
    "Beam search": "num-beams length-penalty early-stopping",
    "Penalties": "repetition-penalty repetition-penalty-exempt presence-penalty frequency-penalty",
    "Words and tokens": "no-repeat-ngram-size logit-bias sequence-bias bad-words bad-words-ids suppress-tokens"
    " begin-suppress-tokens",
    "Constraints": "json-schema regex choice",
    "Server": "host port api-key-file without-key allowed-host allowed-origin page collect log-requests",
    "Load": "max-rows max-queue kv-tokens cache-mb target-step-ms queue-seconds request-seconds drain-seconds",
    "Limits of a request": "max-choices max-prompts max-messages max-tools max-stop-strings max-logit-bias"
    " max-top-logprobs max-schema-kb max-regex-kb grammar-seconds max-body-mb max-json-depth",
    "Connections": "max-connections read-seconds send-seconds keep-alive-seconds ping-seconds",
    "Memory and speed": "batching activation-checkpointing optimizer-states dtype shard"
    " prompt-lookup-num-tokens max-matching-ngram-size",
    "Faults": "on-nonfinite max-skipped-steps",
    "Files": "output-dir output-file save-dtype save-steps save-minutes keep-last resume overwrite dry-run"
    " log-to report-rows merge gguf html",
    "Hub": "push private token",
    "Check": "steps kills",
    "Output": "json logprobs explain show-tree examples plain",
}
"""The names of each group's options, in order, without hyphens."""
COMMANDS = ["demo", "preview", "preflight", "train", "chat", "generate", "serve", "eval", "compare", "report"]
COMMANDS += ["export", "verify", "verify-resume"]
"""The commands in the order of work."""

EXAMPLES = {
    "preview": ["preview train.csv", "preview tickets.csv --columns prompt=Frage,completion=Antwort"],
    "preflight": ["preflight train.csv --lora"],
    "train": [
        "train train.csv --model smollm2-135m --lora",
        "train train.csv more.jsonl --epochs 2 --lr 1e-4 --output-dir output",
        "train --config run.yaml",
    ],
    "chat": ["chat", "chat output-lora --temperature 0.7"],
    "generate": [
        'generate "Tell me a joke."',
        'generate -m output --temperature 0.7 "Tell me a joke."',
        'generate "Summarize this mail." < mail.txt',
        'generate -m output --choice yes --choice no "Is 7 a prime number?"',
    ],
    "serve": ["serve output", "serve --model tuned=output --model base=smollm2-135m --weights int8"],
    "eval": ["eval held_out.csv --generate", "eval held_out.csv -m smollm2-135m --per-row rows.jsonl"],
    "compare": ["compare smollm2-135m output --prompts prompts.txt --html compare.html"],
    "report": ["report", "report output output-lora"],
    "export": ["export output --gguf q8_0 --output-dir exported"],
}
"""Examples of commands, at the end of their help."""
_ALSO = "Also: --config FILE (options from a YAML file), --traceback (where an error comes from)."


def epilogue(command: str) -> str:
    """Return what stands at the end of a command's help."""
    examples = [f"  handspun {example}" for example in EXAMPLES.get(command, [])]
    return "\n".join([*(["Examples:", *examples, ""] if examples else []), _ALSO])


class GroupedHelp(DefaultFormatter):
    """Prints a panel per group of options, and lets texts wrap where the window ends."""

    def __call__(self, console: Any, options: Any, panel: HelpPanel) -> None:
        """Print the commands, or the groups of options."""
        for entry in panel.entries:
            if isinstance(text := getattr(entry.description, "primary_renderable", None), Text):
                entry.description.primary_renderable = _rewrapped(text)
        if panel.format == "command":
            entries = sorted(panel.entries, key=lambda entry: _rank(COMMANDS, entry.names[0]))
            super().__call__(console, options, panel.copy(entries=entries))
            return
        by_name = {option_of(entry): _repeatable(entry) for entry in panel.entries}
        for title, names in groups_of(by_name).items():
            super().__call__(console, options, panel.copy(title=title, entries=[by_name[name] for name in names]))

    def render_description(self, console: Any, options: Any, description: Any) -> None:
        """Print what a command does."""
        if isinstance(text := getattr(description, "primary_renderable", None), Text):
            description.primary_renderable = _rewrapped(text)
        super().render_description(console, options, description)


def option_of(entry: HelpEntry) -> str:
    """Return an option's or argument's own name without hyphens."""
    return str(entry.names[0] if entry.names else entry.positional_label).removeprefix("--").lower().rstrip(".")


def _repeatable(entry: HelpEntry) -> HelpEntry:
    """Return the entry without the dots of `STR...`, which would invite several values after one option."""
    if not (entry.names and entry.metavar and "..." in entry.metavar):
        return entry
    text = getattr(entry.description, "primary_renderable", None)
    if isinstance(text, Text) and "epeatable" not in text.plain:
        text.append(" Repeatable.")
    kinds = dict.fromkeys(kind.rstrip(".") for kind in entry.metavar.split("|"))
    return evolve(entry, metavar="|".join(kinds))


def groups_of(names: Collection[str]) -> dict[str, list[str]]:
    """Return the names of a command's options by group. Raises ValueError for a name that has no group."""
    wanted = {title: [name for name in listed.split() if name in names] for title, listed in GROUPS.items()}
    # A run's seed decides more than its samples, and its batch size more than its speed. --max-tokens is a
    # micro-batch's, or the limit of an answer.
    wanted["Training" if "num-epochs" in names else "Sampling"] += [name for name in ("seed",) if name in names]
    where = "Training" if "num-epochs" in names else "Memory and speed"
    wanted[where] = [name for name in ("batch-size",) if name in names] + wanted[where]
    group = "Limits of a request" if "max-choices" in names else "Memory and speed"
    wanted[group] = [name for name in ("max-tokens",) if name in names] + wanted[group]
    if missing := set(names) - {name for listed in wanted.values() for name in listed}:
        raise ValueError(f"no group of the help has {', '.join(sorted(missing))}.")
    return {title: listed for title, listed in wanted.items() if listed}


def _rank(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _rewrapped(text: Text) -> Text:
    """Return the text with a docstring's own line ends taken out, except those between paragraphs."""
    paragraphs = text.plain.split("\n\n")
    return Text("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
