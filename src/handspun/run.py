"""One fine-tuning run, put together: data, model, loop, log, checkpoints."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.cache import ExampleCache
from handspun.data.chat_template import ChatTemplate
from handspun.data.prepare import ExampleSet, prepare_examples, resolve_max_length
from handspun.errors import StoppedError
from handspun.models.allocator import give_back_freed_memory, keep_freed_memory
from handspun.models.embedded import cache_folder
from handspun.models.end_of_turn import end_of_turn_is_new, make_end_of_turn_eos
from handspun.models.int8 import quantize_base, refuse_inexact_products
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
from handspun.output import TrainedRun, keep, prepare_output, record, recorded, refuse_without_room
from handspun.report.account import account_lines, length_lines
from handspun.report.log import RunLog, plain_console
from handspun.report.plan import plan_lines
from handspun.report.record import run_facts
from handspun.training.dtype import choose_dtype
from handspun.training.execution import execution_of
from handspun.training.loop import EpochEnd, Evaluation, Event, Loop, start
from handspun.training.loop import train as training_events
from handspun.training.preflight import make_plan
from handspun.training.processes import Processes, processes_of_this_run
from handspun.training.signals import StopRequest, stop_requests
from handspun.training.threads import use_threads


def train(config: TrainConfig, *, console: Console | None = None) -> TrainedRun:
    """Fine-tunes a model as the config says, and writes checkpoints, train.log, metrics.jsonl and run.json.

    Lines of the log also go to `console` (default: standard output). Under torchrun, every process calls it, and
    the first one logs and saves. Raises a HandspunError for anything that the user can mend: data, options, model,
    disk.
    """
    if not config.shard:  # FSDP2 frees each layer's weights after use: kept, they took a quarter more
        keep_freed_memory()
    use_threads(config.threads)
    torch.manual_seed(config.seed)  # LoRA's initial values, and dropout
    console = console or plain_console()
    with processes_of_this_run(resolve_device(config.device), sharded=config.shard) as processes:
        console.quiet = console.quiet or not processes.is_first
        writes = processes.is_first and not config.dry_run
        folder = prepare_output(Path(config.output_dir), overwrite=config.overwrite) if writes else None
        with RunLog(folder, console) as log:
            return _train(config, processes, log)


def _train(config: TrainConfig, processes: Processes, log: RunLog) -> TrainedRun:
    source = model_source(config.model, log.line)
    max_length = resolve_max_length(config.max_length, context_length(load_config(source)))
    training, held_out = prepare_examples(
        config,
        ChatTemplate(load_tokenizer(source)),
        max_length=max_length,
        eval_data=config.eval_data,
        eval_ratio=config.eval_ratio,
        seed=config.seed,
        cache=ExampleCache(cache_folder() / "examples"),
        notice=log.line,
    )
    _log_data(log, training, held_out, max_length)
    if config.dry_run:
        return _dry_run(config, source, training, max_length, log)
    chat = _model_to_train(config, processes, log)
    plan = make_plan(chat.model, training.examples, config)
    for line in plan_lines(plan, config, max_length):
        log.line(line)
    run = TrainedRun(Path(config.output_dir), plan, chat)
    if not processes.is_first:
        _run_loop(run, config, training, held_out, {}, processes, log)
        return run
    refuse_without_room(plan, config)
    facts = run_facts(config, training, held_out, plan, max_length)
    with recorded(run, facts, log):
        _run_loop(run, config, training, held_out, facts, processes, log)
    return run


def _run_loop(
    run: TrainedRun,
    config: TrainConfig,
    training: ExampleSet,
    held_out: ExampleSet | None,
    facts: dict[str, Any],
    processes: Processes,
    log: RunLog,
) -> None:
    """The loop's events, turned into lines, records and checkpoints."""
    assert run.model is not None
    model, pad_token_id = run.model.model, run.model.tokenizer.pad_token_id
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    with stop_requests() as request, processes.losses_explained():
        processes.share_weights(model)
        with execution_of(
            model,
            config,
            training.examples,
            dtype=_product_dtype(config, processes, facts, log),
            pad_token_id=pad_token_id if pad_token_id is not None else 0,  # masked: any id would do
            notice=log.line,
            run_on=processes.run_on,
        ) as execution:
            loop = Loop(
                config=config,
                examples=training.examples,
                held_out=held_out.examples if held_out else [],
                execution=execution,
                processes=processes,
            )
            for event in training_events(loop, start(model, config)):
                log.event(event)
                if isinstance(event, Evaluation | EpochEnd):
                    keep(run, event, config, processes, log)
                    if processes.is_first:
                        record(run, facts, "running")
                _stop_if_asked(request, event, loop)
    if config.shard:
        run.model = None
        return
    if config.activation_checkpointing:
        model.activation_checkpointing_disable()
    model.eval()


def _stop_if_asked(request: StopRequest, event: Event, loop: Loop) -> None:
    """Raises StoppedError on all ranks after the same step, if a signal came to one of them. What ends an epoch is
    waited for: its checkpoint is worth more than the time."""
    if event.step == loop.total_steps or not (event.step % loop.steps_per_epoch or isinstance(event, EpochEnd)):
        return
    if number := int(loop.processes.max(request.signal)):
        raise StoppedError(number, step=event.step, total_steps=loop.total_steps)


def _product_dtype(config: TrainConfig, processes: Processes, facts: dict[str, Any], log: RunLog) -> torch.dtype:
    """The type of the matrix products, asked for or measured, the same on all ranks."""
    device = processes.device
    if config.dtype == "auto" and config.base_weights == "int8":
        dtype, reason = torch.float32, "beside the int8 layers"
    elif config.dtype == "auto":
        dtype, reason = choose_dtype(device)
        dtype = torch.bfloat16 if processes.of_first(dtype == torch.bfloat16) else torch.float32
    else:
        dtype, reason = resolve_dtype(config.dtype, device), "asked for"
    name = str(dtype).removeprefix("torch.")
    facts["dtype"], facts["processes"], facts["threads"] = name, processes.count, torch.get_num_threads()
    threads = torch.get_num_threads()
    where = f"{threads} {'thread' if threads == 1 else 'threads'}" if device.type == "cpu" else str(device)
    each = "a share of the model" if processes.sharded else "the whole model"
    several = f"{processes.count} processes with {each} each, of " if processes.count > 1 else ""
    log.line(f"{several}{where}, products in {name} ({reason})")
    return dtype


def _dry_run(
    config: TrainConfig, source: ModelSource, training: ExampleSet, max_length: int, log: RunLog
) -> TrainedRun:
    """The plan from the model's shapes alone: its weights are not read."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(source), dtype=torch.float32)
        if config.lora:
            model = _with_lora(model, config)
    if config.base_weights == "int8":
        refuse_inexact_products(resolve_device(config.device))
        quantize_base(model)
    plan = make_plan(model, training.examples, config)
    for line in plan_lines(plan, config, max_length):
        log.line(line)
    log.line("a dry run: nothing was trained or written")
    return TrainedRun(Path(config.output_dir), plan)


def _model_to_train(config: TrainConfig, processes: Processes, log: RunLog) -> ChatModel:
    """The model in float32, with an end of turn that it can learn, and with adapters where they are asked for. One
    that will be cut over the ranks is moved to their devices in shares."""
    device = "cpu" if processes.sharded else str(processes.device)
    chat = load(config.model, weights="float32", device=device, notice=log.line)
    is_new = end_of_turn_is_new(chat)
    make_end_of_turn_eos(chat)
    if is_new:
        log.line(
            f"the end of turn {chat.template.end_of_turn} was no eos of the base model; it is one of the tuned "
            "model, in generation_config, config and tokenizer"
        )
    if config.lora:
        chat.model = _with_lora(chat.model, config, [chat.template.end_of_turn_id] if is_new else [])
        if is_new:
            log.line("its embedding row is trained beside the adapters: they alone could not teach it")
    if config.base_weights == "int8":
        refuse_inexact_products(chat.device)
        quantize_base(chat.model)
        give_back_freed_memory()
        log.line("the frozen layers under the adapters are int8; embedding and head stay float32")
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


def _log_data(log: RunLog, training: ExampleSet, held_out: ExampleSet | None, max_length: int) -> None:
    for lines in (account_lines(training.account, max_length=max_length), length_lines(training.examples)):
        for line in lines:
            log.line(line)
    if held_out is not None:
        log.line("held out:")
        for line in account_lines(held_out.account, max_length=max_length):
            log.line("  " + line)
