"""One fine-tuning run, put together: data, model, loop, log, checkpoints."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import Dataset, ExampleCache, load_splits, resolve_max_length
from handspun.data.rendering import choose_template, with_defaults
from handspun.data.rows import check_data_exists
from handspun.errors import StoppedError
from handspun.files import cache_folder
from handspun.kernels.allocator import disable_malloc_trim, malloc_trim
from handspun.kernels.onednn import limit_primitive_cache
from handspun.models.embedding_rows import check_examples, embedding_rows, embedding_rows_of
from handspun.models.end_of_turn import end_of_turn_is_new, eos_token_ids_of, make_end_of_turn_eos
from handspun.models.fingerprints import model_fingerprints
from handspun.models.int8 import check_exact_matmuls, quantize_base, speed_notices
from handspun.models.load import (
    ChatModel,
    ModelSource,
    check_base_is_no_adapter,
    context_length,
    load_config,
    load_generation_config,
    load_tokenizer,
    model_source,
    read_model,
    recorded_base,
    resolve_device,
    resolve_dtype,
)
from handspun.models.lora import add_lora
from handspun.preflight.checks import Finding, check_rows, end_of_turn, template_lines
from handspun.preflight.time_estimate import Forecast, operations, predicted_seconds
from handspun.runs.artifacts import report_around
from handspun.runs.checkpoints import CheckpointManager
from handspun.runs.live import LiveState
from handspun.runs.log import RunLog, plain_console
from handspun.runs.output_dir import (
    Prepared,
    TrainedRun,
    check_disk_space,
    finished_earlier,
    in_place_of,
    lock_output_dir,
    prepare_output,
    record_incident,
    track_status,
)
from handspun.runs.record import run_facts
from handspun.runs.replacing import check_inputs_outside, pending
from handspun.runs.resume import ResumePoint, check_same_run, execution_changes, make_way
from handspun.runs.sample_answers import Sampler, sampler_of
from handspun.runs.signals import StopRequest, stop_requests
from handspun.runs.summary import (
    account_lines,
    corrected_line,
    doubts_about_memory,
    length_lines,
    plan_lines,
    show_examples,
    show_preflight,
)
from handspun.runs.trackers import check_trackers_installed
from handspun.training.agreement import check_same_options, check_same_rows, check_same_weights
from handspun.training.batching import pad_to_multiple
from handspun.training.checkpoint import TRAINING_STATE, read_optimizer, read_weights
from handspun.training.distributed import Distributed, processes_of_this_run
from handspun.training.dtype import choose_dtype, use_threads
from handspun.training.guards import OutOfMemory, SkippedStep, Spike
from handspun.training.loop import Loop, TrainingState, start
from handspun.training.loop import train as training_events
from handspun.training.memory import available_memory, check_fits_in_memory, make_plan
from handspun.training.runner import select_runner

_MANY_ROWS = 100_000
"""To look at these takes a while in which nothing else is said."""


def train(config: TrainConfig, *, console: Console | None = None) -> TrainedRun:
    """Fine-tunes a model as the config says: writes checkpoints, train.log, metrics.jsonl, run.json, report.html.

    An unfinished run of the same options in the output folder is gone on with, and ends with the very weights that
    it would have had undisturbed. Lines of the log also go to `console` (default: standard output). Under
    torchrun, every process calls it, and the first one logs and saves. Raises a HandspunError for anything that
    the user can mend: data, options, model, disk.
    """
    limit_primitive_cache()
    if not config.shard:  # FSDP2 frees each layer's weights after use: kept, they took a quarter more
        disable_malloc_trim()
    use_threads(config.threads)
    torch.manual_seed(config.seed)  # LoRA's initial values
    console = console or plain_console()
    with processes_of_this_run(resolve_device(config.device), sharded=config.shard) as processes:
        check_same_options(config, processes)
        check_trackers_installed(config.log_to)
        check_data_exists(config.data, config.eval_data)
        console.quiet = console.quiet or not processes.is_first
        folder = Path(config.output_dir) if processes.is_first and not config.dry_run else None
        said: list[str] = []
        with lock_output_dir(folder) if folder else nullcontext():
            prepared = prepare_output(folder, config, said.append) if folder else Prepared()
            if (finished := processes.broadcast_object(prepared.finished)) is not None:
                return _finished(config, finished, console)
            place = pending(folder) if folder and prepared.replaces else folder
            with RunLog(place, console, resumed_at=prepared.resumed_at) as log:
                for text in said:
                    log.line(text)
                return _train(config, processes, log, prepared)


@dataclass(frozen=True)
class RunContext:
    """What the loop of a run needs, and what it leaves to."""

    config: TrainConfig
    training: Dataset
    held_out: Dataset | None
    run: TrainedRun
    facts: dict[str, Any]
    point: ResumePoint | None
    processes: Distributed
    log: RunLog
    dtype: torch.dtype


def _train(
    config: TrainConfig,
    processes: Distributed,
    log: RunLog,
    prepared: Prepared,
) -> TrainedRun:
    """prepared: what is in the output folder, on the first rank."""
    earlier, point = prepared.earlier, prepared.point
    source = model_source(config.model, log.line)
    if config.lora:
        check_base_is_no_adapter(source)
    _check_inputs_outside(prepared.replaces, config, source)
    max_length = resolve_max_length(config.max_length, context_length(load_config(source)))
    tokenizer = load_tokenizer(source, log.line)
    choose_template(tokenizer, config.chat_template)
    template = ChatTemplate(tokenizer, config.template_values)
    training, held_out = load_splits(
        config,
        template,
        max_length=max_length,
        eval_data=config.eval_data,
        eval_ratio=config.eval_ratio,
        seed=config.seed,
        cache=ExampleCache(cache_folder() / "examples"),
        notice=log.line,
    )
    check_same_rows(training, held_out, template, max_length, processes)
    for some in (training, held_out) if held_out else (training,):
        check_examples(some.examples, embedding_rows_of(source), template.tokenizer, config.model)
    if processes.is_first:
        show_examples(log, training.examples, template.tokenizer)
    _log_data(log, training, held_out, max_length)
    odd = _odd_rows(config, training, held_out, template, log, max_length) if processes.is_first else []
    for some in (training, held_out) if held_out else (training,):
        some.release_rows()  # before memory is measured
    ending = end_of_turn(template, eos_token_ids_of(load_generation_config(source), load_config(source)), training)
    new_token_ids = [] if ending.is_eos else [template.end_of_turn_id]
    shapes_of, room = partial(shapes, source, new_token_ids=new_token_ids), available_memory(processes.device)
    doubts = list[str]()
    check_fits_in_memory(config, training.examples, shapes_of, room, processes=processes, notice=doubts.append)
    facts = {} if config.dry_run or not processes.is_first else run_facts(config, training, held_out, max_length)
    if facts:
        facts["fingerprints"] = model_fingerprints(source, template.tokenizer)
    if earlier is not None:
        has_saved = point is not None
        check_same_run(earlier, facts, config.output_dir, has_saved=has_saved, notice=log.line)
        if point is not None:
            make_way(Path(config.output_dir), point, log.line)
        facts |= {key: earlier[key] for key in ("started", "resumed") if key in earlier}
        facts["seconds"] = point.facts["run"]["seconds"] if point else 0.0
    shared = processes.broadcast_object(replace(point, folder=None) if point else None)
    point = point if processes.is_first else shared
    dtype = _compute_dtype(config, processes, facts, point, log)
    shape = shapes_of(config)
    plan = make_plan(shape, training.examples, config, multiple=pad_to_multiple(processes.device))
    if processes.is_first:
        for line in plan_lines(plan, config, max_length):
            log.line(line)
        seconds = predicted_seconds(
            operations(shape, plan, training.examples, config),
            config,
            dtype=dtype,
            device=processes.device,
            threads=torch.get_num_threads() * processes.count,
        )
        found = [*odd, *doubts_about_memory(doubts)]
        for line in template_lines(template):
            log.line(line)
        facts["preflight"] = show_preflight(log, config, found, ending, seconds)
    if config.dry_run:
        log.line("a dry run: nothing was trained or written")
        return TrainedRun(Path(config.output_dir), plan)
    chat = _model_to_train(config, processes, log)
    check_examples(training.examples, embedding_rows(chat.model), chat.tokenizer, config.model)
    run = TrainedRun(Path(config.output_dir), plan, chat)
    job = RunContext(config, training, held_out, run, facts, point, processes, log, dtype)
    if not processes.is_first:
        train_loop(job)
        return run
    check_disk_space(plan, config, prepared.replaces)
    facts["plan"] = asdict(plan)
    with in_place_of(prepared.replaces, run, facts, log), report_around(chat, config, training, held_out, log):
        with track_status(run, facts, log), log.tracked(config.log_to, facts):
            keeper = train_loop(job)
        keeper.finish()
    return run


def _finished(config: TrainConfig, facts: dict[str, Any], console: Console) -> TrainedRun:
    """Say that nothing is left to do."""
    run = finished_earlier(Path(config.output_dir), facts)
    best = f", the best one {run.best_checkpoint.name}" if run.best_checkpoint else ""
    count = len(run.checkpoints)
    text = f"the run in {run.output_dir} has finished ({count} checkpoints{best}): nothing is left to do"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return run


def _check_inputs_outside(replaces: Sequence[Path], config: TrainConfig, source: ModelSource) -> None:
    data = [config.data, config.eval_data] if config.eval_data is not None else [config.data]
    models = [config.model, source.location, source.adapter or config.model]
    check_inputs_outside(models, data, replaces, "Choose another --output-dir, or move it out of there first.")


def train_loop(job: RunContext) -> CheckpointManager:
    """The loop's events, turned into lines, records and checkpoints."""
    config, processes, run, point = job.config, job.processes, job.run, job.point
    assert run.model is not None
    model, pad_token_id = run.model.model, run.model.tokenizer.pad_token_id
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if point is not None and point.folder is not None:
        read_weights(model, point.folder / TRAINING_STATE)
    if processes.is_first:
        log_resume(job)
    keeper = CheckpointManager(run, config, processes, job.facts, job.log)
    sampler = sampler_of(run.model, config)
    with (
        stop_requests(say=not job.log.has_terminal) as request,
        job.log.watched(_live_state(job, sampler, request)),
        processes.losses_explained(),
    ):
        processes.broadcast_weights(model)
        with select_runner(
            model,
            config,
            job.training.examples,
            dtype=job.dtype,
            pad_token_id=pad_token_id if pad_token_id is not None else 0,  # masked: any id would do
            notice=job.log.line,
            run_on=processes.run_on,
        ) as runner:
            loop = Loop(
                config=config,
                examples=job.training.examples,
                held_out=job.held_out.examples if job.held_out else [],
                runner=runner,
                processes=processes,
            )
            state = start(model, config)
            if point is not None:
                keeper.restore(point)
                _go_on_from(point, state, run, config, processes)
            forecast = Forecast(run.plan, config.num_epochs)
            for event in training_events(loop, state):
                job.log.event(event)
                if (left := forecast.after(event)) is not None:
                    job.log.line(corrected_line(left, event.step))
                if isinstance(event, SkippedStep | Spike | OutOfMemory):
                    record_incident(run, event, config, job.training, processes, job.log)
                if sampler and processes.is_first and sampler.is_due(event, loop):
                    job.log.event(sampler.after(event))  # before a checkpoint of the step: it would not come again
                keeper.event(event, state)
                if loop.ends_step(event) and event.step < loop.total_steps:
                    number = int(processes.max(request.signal))  # the same step is the last one of all ranks
                    keeper.save_if_due(event, state, must=bool(number))
                    if number:
                        raise StoppedError(number, step=event.step, total_steps=loop.total_steps)
    if config.shard:
        run.model = None
        return keeper
    if config.activation_checkpointing:
        model.activation_checkpointing_disable()
    model.eval()
    return keeper


def _live_state(job: RunContext, sampler: Sampler | None, request: StopRequest) -> LiveState:
    return LiveState(
        total_steps=job.run.plan.steps,
        num_epochs=job.config.num_epochs,
        held_out=job.held_out is not None,
        prompts=sampler.prompts if sampler else (),
        stopping=lambda: bool(request.signal),
    )


def _go_on_from(
    point: ResumePoint, state: TrainingState, run: TrainedRun, config: TrainConfig, processes: Distributed
) -> None:
    folder = point.folder / TRAINING_STATE if point.folder else None
    read_optimizer(state.model, state.optimizer, folder, processes.device)
    state.step = point.step
    state.best_loss = min((evaluation.loss for evaluation in run.evaluations), default=state.best_loss)
    state.skipped, state.losses = point.facts["skipped"], point.facts["losses"]
    if config.max_tokens == point.facts["run"]["config"]["max_tokens"]:  # else it is what the user wants now
        state.max_tokens = point.facts["max_tokens"]


def log_resume(job: RunContext) -> None:
    """A run that is gone on with says from where, and what is not as it was."""
    if job.point is None:
        return
    earlier = job.point.facts["run"]
    changes = execution_changes(earlier, job.facts)
    job.log.line(f"goes on after step {job.point.step} of {job.run.plan.steps}, from {job.point.folder}")
    for what, (before, now) in changes.items():
        job.log.line(f"  {what} was {before} and is {now}: the weights will differ in their rounding")
    resumed = {"step": job.point.step, "at": datetime.now(UTC).isoformat(timespec="seconds"), "changes": changes}
    job.facts["resumed"] = [*job.facts.get("resumed", []), resumed]


def _compute_dtype(
    config: TrainConfig, processes: Distributed, facts: dict[str, Any], point: ResumePoint | None, log: RunLog
) -> torch.dtype:
    """The type of the matrix matmuls, asked for, measured, or that of the run so far; the same on all ranks."""
    device = processes.device
    if config.dtype == "auto" and point is not None:
        dtype, reason = resolve_dtype(point.facts["run"]["dtype"], device), "as before"
    elif config.dtype == "auto" and config.base_weights == "int8":
        dtype, reason = torch.float32, "beside the int8 layers"
    elif config.dtype == "auto":
        dtype, reason = choose_dtype(device)
        dtype = torch.bfloat16 if processes.broadcast_scalar(dtype == torch.bfloat16) else torch.float32
    else:
        dtype, reason = resolve_dtype(config.dtype, device), "asked for"
    name = str(dtype).removeprefix("torch.")
    facts["dtype"], facts["processes"], facts["threads"] = name, processes.count, torch.get_num_threads()
    threads = torch.get_num_threads()
    where = f"{threads} {'thread' if threads == 1 else 'threads'}" if device.type == "cpu" else str(device)
    each = "a share of the model" if processes.sharded else "the whole model"
    several = f"{processes.count} processes with {each} each, of " if processes.count > 1 else ""
    log.line(f"{several}{where}, matmuls in {name} ({reason})")
    if config.base_weights == "int8":
        for notice in speed_notices(device):
            log.line(notice)
    return dtype


def shapes(source: ModelSource, config: TrainConfig, *, new_token_ids: Sequence[int] = ()) -> PreTrainedModel:
    """The model that is trained, on the meta device. new_token_ids: as those of LoRA."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(source), dtype=torch.float32)
        if config.lora:
            model = _with_lora(model, config, new_token_ids)
    if config.base_weights == "int8":
        check_exact_matmuls(resolve_device(config.device))
        quantize_base(model)
    return model


def _model_to_train(config: TrainConfig, processes: Distributed, log: RunLog) -> ChatModel:
    """The model in float32, with an end of turn that it can learn, and with adapters where they are asked for. One
    that will be cut over the ranks is moved to their devices in shares."""
    device = "cpu" if processes.sharded else str(processes.device)
    chat = read_model(
        config.model,
        weights="float32",
        device=device,
        chat_template=config.chat_template,
        template_args=config.template_args,
        notice=log.line,
    )
    check_same_weights(chat.model, processes)
    # What is saved renders as it was trained, in every program.
    chat.tokenizer.chat_template = with_defaults(chat.tokenizer.chat_template, chat.template_args)
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
        check_exact_matmuls(chat.device)
        quantize_base(chat.model)
        malloc_trim()
        log.line("the frozen layers under the adapters are int8; embedding and head stay float32")
    return chat


def _with_lora(model: PreTrainedModel, config: TrainConfig, new_token_ids: Sequence[int]) -> PreTrainedModel:
    return add_lora(
        model,
        recorded_base(config.model),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        new_token_ids=new_token_ids,
    )


def _odd_rows(
    config: TrainConfig,
    training: Dataset,
    held_out: Dataset | None,
    template: ChatTemplate,
    log: RunLog,
    max_length: int,
) -> list[Finding]:
    rows = training.account.rows + (held_out.account.rows if held_out else 0)
    if rows >= _MANY_ROWS:
        log.line(f"looking for duplicates and placeholders in {rows} rows")
    return check_rows(config, training, held_out, max_length=max_length, markers=template.plain_markers)


def _log_data(log: RunLog, training: Dataset, held_out: Dataset | None, max_length: int) -> None:
    for lines in (account_lines(training.account, max_length=max_length), length_lines(training.examples)):
        for line in lines:
            log.line(line)
    if held_out is not None:
        log.line("held out:")
        for line in account_lines(held_out.account, max_length=max_length):
            log.line("  " + line)
