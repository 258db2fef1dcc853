"""One fine-tuning run, put together: data, model, loop, log, checkpoints."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.prepare import ExampleSet, prepare_examples, resolve_max_length
from handspun.errors import OutputError
from handspun.models.end_of_turn import end_of_turn_is_new, make_end_of_turn_eos
from handspun.models.load import (
    ChatModel,
    ModelSource,
    context_length,
    load,
    load_config,
    load_tokenizer,
    model_source,
    resolve_device,
    resolve_dtype,
)
from handspun.models.lora import add_lora
from handspun.report.account import account_lines, length_lines
from handspun.report.environment import peak_memory
from handspun.report.log import RunLog, duration
from handspun.report.plan import plan_lines
from handspun.report.record import run_facts, write_run
from handspun.training.allocator import keep_freed_memory
from handspun.training.checkpoint import errors_for_people, link_checkpoint, save_checkpoint
from handspun.training.execution import execution_of
from handspun.training.loop import EpochEnd, Evaluation, Loop, start
from handspun.training.loop import train as training_events
from handspun.training.preflight import Plan, make_plan

_OUR_FILES = ["checkpoint-*", ".checkpoint-*", "train.log", "metrics.jsonl", "run.json"]


@dataclass
class TrainedRun:
    """What a run left: its folder, its checkpoints in order, the best one, held-out losses, and the model
    (None after a dry run)."""

    output_dir: Path
    plan: Plan
    model: ChatModel | None = None
    checkpoints: list[Path] = field(default_factory=list)
    best_checkpoint: Path | None = None
    evaluations: list[Evaluation] = field(default_factory=list)


def train(config: TrainConfig, *, console: Console | None = None) -> TrainedRun:
    """Fine-tunes a model as the config says, and writes checkpoints, train.log, metrics.jsonl and run.json.

    Lines of the log also go to `console` (default: standard output). Raises a HandspunError for anything that
    the user can mend: data, options, model, disk.
    """
    keep_freed_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)  # LoRA's initial values, and dropout
    console = console or Console(highlight=False)
    output_dir = Path(config.output_dir)
    folder = None if config.dry_run else _prepare_output(output_dir, overwrite=config.overwrite)
    with RunLog(folder, console) as log:
        source = model_source(config.model, log.line)
        max_length = resolve_max_length(config.max_length, context_length(load_config(source)))
        template = ChatTemplate(load_tokenizer(source))
        training, held_out = prepare_examples(
            config,
            template,
            max_length=max_length,
            eval_data=config.eval_data,
            eval_ratio=config.eval_ratio,
            seed=config.seed,
        )
        _log_data(log, training, held_out, max_length)
        if config.dry_run:
            return _dry_run(config, source, training, log)
        chat = _model_to_train(config, log)
        plan = make_plan(chat.model, training.examples, config)
        for line in plan_lines(plan, config, max_length):
            log.line(line)
        _refuse_without_room(plan, config, output_dir)
        run = TrainedRun(output_dir, plan, chat)
        facts = run_facts(config, training, held_out, plan, max_length)
        with _recorded(run, facts, log):
            _run_loop(run, config, training, held_out, facts, log)
    return run


def _dry_run(config: TrainConfig, source: ModelSource, training: ExampleSet, log: RunLog) -> TrainedRun:
    """The plan from the model's shapes alone: its weights are not read."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(source))
        if config.lora:
            model = _with_lora(model, config)
    plan = make_plan(model, training.examples, config)
    for line in plan_lines(plan, config, max(len(example) for example in training.examples)):
        log.line(line)
    log.line("a dry run: nothing was trained or written")
    return TrainedRun(Path(config.output_dir), plan)


def _model_to_train(config: TrainConfig, log: RunLog) -> ChatModel:
    """The model in float32, with an end of turn that it can learn, and with adapters where they are asked for."""
    device = resolve_device(config.device)
    chat = load(config.model, dtype="float32", device=str(device), notice=log.line)
    is_new = end_of_turn_is_new(chat)
    make_end_of_turn_eos(chat)
    new_token_ids = []
    if is_new:
        log.line(
            f"the end of turn {chat.template.end_of_turn} was no eos of the base model; it is one of the tuned "
            "model, in generation_config, config and tokenizer"
        )
        new_token_ids = [chat.template.end_of_turn_id]
    if config.lora:
        chat.model = _with_lora(chat.model, config, new_token_ids)
        if is_new:
            log.line("its embedding row is trained beside the adapters: they alone could not teach it")
    return chat


def _with_lora(
    model: PreTrainedModel, config: TrainConfig, new_token_ids: list[int] | None = None
) -> PreTrainedModel:
    return add_lora(
        model,
        config.model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        new_token_ids=new_token_ids or [],
    )


def _run_loop(
    run: TrainedRun,
    config: TrainConfig,
    training: ExampleSet,
    held_out: ExampleSet | None,
    facts: dict[str, Any],
    log: RunLog,
) -> None:
    """The loop's events, turned into lines, records and checkpoints."""
    assert run.model is not None
    model, pad_token_id = run.model.model, run.model.tokenizer.pad_token_id
    with execution_of(
        model,
        config,
        training.examples,
        dtype=resolve_dtype(config.dtype, run.model.device),
        pad_token_id=pad_token_id if pad_token_id is not None else 0,  # masked: any id would do
        notice=log.line,
    ) as execution:
        held_out_examples = held_out.examples if held_out else []
        loop = Loop(config=config, examples=training.examples, held_out=held_out_examples, execution=execution)
        for event in training_events(loop, start(model, config)):
            log.event(event)
            if isinstance(event, Evaluation | EpochEnd):
                _keep(run, event, config, log)
                write_run(run.output_dir, {**facts, **_results(run), "status": "running"})


def _keep(run: TrainedRun, event: Evaluation | EpochEnd, config: TrainConfig, log: RunLog) -> None:
    """checkpoint-best after an evaluation that is the best so far, checkpoint-epoch-N after each epoch."""
    best = run.output_dir / "checkpoint-best"
    if isinstance(event, Evaluation):
        run.evaluations.append(event)
        if event.best and event.step:
            _save(run, best, config, asdict(event))
            run.best_checkpoint = best
        return
    folder = run.output_dir / f"checkpoint-epoch-{event.epoch}"
    latest = run.evaluations[-1] if run.evaluations else None
    if latest is not None and latest.best:  # the evaluation at the end of this epoch
        link_checkpoint(best, folder)
    else:
        _save(run, folder, config, {**asdict(event), "loss": latest.loss if latest else None})
    run.checkpoints.append(folder)
    log.line(f"saved {folder}")


def _save(run: TrainedRun, folder: Path, config: TrainConfig, facts: dict[str, object]) -> None:
    assert run.model is not None
    dtype = torch.bfloat16 if config.save_dtype == "bfloat16" else torch.float32
    save_checkpoint(run.model.model, run.model.tokenizer, folder, dtype=dtype, facts=facts)


@contextmanager
def _recorded(run: TrainedRun, facts: dict[str, Any], log: RunLog) -> Iterator[None]:
    """run.json says how the run ended, whatever ended it."""
    began = time.perf_counter()
    status = "failed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        seconds = time.perf_counter() - began
        results = {"seconds": seconds, "peak_memory_bytes": peak_memory(), **_results(run)}
        write_run(run.output_dir, {**facts, **results, "status": status})
        if status == "finished":
            _log_results(log, run, seconds)
    assert run.model is not None
    run.model.model.eval()


def _results(run: TrainedRun) -> dict[str, Any]:
    return {
        "evaluations": [asdict(evaluation) for evaluation in run.evaluations],
        "checkpoints": [path.name for path in run.checkpoints],
        "best_checkpoint": run.best_checkpoint.name if run.best_checkpoint else None,
    }


def _log_data(log: RunLog, training: ExampleSet, held_out: ExampleSet | None, max_length: int) -> None:
    for lines in (account_lines(training.account, max_length=max_length), length_lines(training.examples)):
        for line in lines:
            log.line(line)
    if held_out is not None:
        log.line("held out:")
        for line in account_lines(held_out.account, max_length=max_length):
            log.line("  " + line)


def _log_results(log: RunLog, run: TrainedRun, seconds: float) -> None:
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        best = min(run.evaluations, key=lambda evaluation: evaluation.loss)
        log.line(
            f"held-out loss {first.loss:.4f} before, {last.loss:.4f} after; "
            f"best {best.loss:.4f} at step {best.step}"
        )
    memory = peak_memory()
    used = f", peak memory {memory / 1e9:.1f} GB (predicted {run.plan.peak_memory / 1e9:.1f})" if memory else ""
    log.line(f"finished in {duration(seconds)}{used}")


def _prepare_output(folder: Path, *, overwrite: bool) -> Path:
    """The output folder, without an earlier run. Raises OutputError if there is one and it may not go."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: choose another --output-dir.")
    earlier = [path for pattern in _OUR_FILES for path in folder.glob(pattern)]
    if earlier and not overwrite:
        raise OutputError(
            f"{folder} holds an earlier run ({', '.join(sorted(path.name for path in earlier)[:3])}): choose "
            "another --output-dir, or replace it with --overwrite."
        )
    with errors_for_people(folder):
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_without_room(plan: Plan, config: TrainConfig, folder: Path) -> None:
    """Before the first step rather than after the first epoch."""
    needed = plan.checkpoint_size * (config.num_epochs + 1)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder} has {free / 1e9:.1f} GB free, and {config.num_epochs} checkpoints with the best one take "
            f"{needed / 1e9:.1f} GB. Free some, choose another --output-dir, give fewer --num-epochs, or halve "
            "the files with --save-dtype bfloat16."
        )
