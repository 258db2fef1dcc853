"""One fine-tuning run in five stages: load_data -> plan_run -> check -> load_model -> fit.

Each stage returns what the next ones need. The loop itself is training/loop.py: it yields events, and `fit` hands
each event to its listeners (log, incidents, sample answers, checkpoints).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from transformers import PreTrainedModel

from handspun.config import TrainConfig, Weights
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import Dataset, ExampleCache, check_small_files, load_splits, resolve_max_length
from handspun.data.rendering import choose_template, with_defaults
from handspun.data.rows import check_data_exists
from handspun.display import captured_log, command_here, count_of, duration, logger
from handspun.errors import OutputError, StoppedError
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
    is_on_disk,
    load_config,
    load_generation_config,
    load_tokenizer,
    load_trainable,
    model_source,
    resolve_device,
    resolve_dtype,
)
from handspun.preflight.checks import EndOfTurn, Finding, check_rows, end_of_turn, template_lines
from handspun.preflight.print import (
    account_lines,
    corrected_line,
    doubts_about_memory,
    held_out_lines,
    length_lines,
    log_lines,
    plan_lines,
    show_examples,
    show_preflight,
    slow_lines,
)
from handspun.preflight.time_estimate import Forecast
from handspun.preflight.ways import Way, way_lines, ways_to_train
from handspun.runs.artifacts import Material, report_around, rows_for_report
from handspun.runs.checkpoints import CheckpointManager
from handspun.runs.live import LiveState
from handspun.runs.log import RunLog, plain_console
from handspun.runs.metrics import read_run
from handspun.runs.outcome import end_lines, next_commands
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
from handspun.runs.predict import dtype_of, epochs_of_plan, predict, seconds_of_run, shapes, with_lora
from handspun.runs.record import Resumed, RunRecord, new_record, peak_memory
from handspun.runs.replacing import check_inputs_outside, pending
from handspun.runs.resume import ResumePoint, check_same_run, execution_changes, make_way
from handspun.runs.sample_answers import Sampler, sample_prompts, sampler_of
from handspun.runs.signals import StopRequest, stop_requests
from handspun.runs.trackers import check_trackers_installed
from handspun.training.agreement import check_same_options, check_same_rows, check_same_weights
from handspun.training.checkpoint import TRAINING_STATE, read_optimizer, read_weights
from handspun.training.distributed import Distributed, processes_of_this_run
from handspun.training.dtype import use_threads
from handspun.training.guards import OutOfMemory, SkippedStep, Spike
from handspun.training.loop import Event, Loop, TrainingState, start
from handspun.training.loop import train as training_events
from handspun.training.memory import AvailableMemory, Plan, available_memory, check_fits_in_memory, make_plan
from handspun.training.runner import BatchRunner, select_runner

_MANY_ROWS = 100_000
"""The search for duplicates in so many rows takes a while, so it is announced."""

Listener = Callable[[Event, TrainingState], None]
"""What is done after an event of the loop."""


@dataclass(frozen=True)
class RunContext:
    """What every stage uses: the options, this process's rank, the log, and what the output folder held before."""

    config: TrainConfig
    processes: Distributed
    log: RunLog
    prepared: Prepared


@dataclass(frozen=True)
class LoadedData:
    """Where the model is, its chat template with the tokenizer, and the tokenized rows."""

    source: ModelSource
    template: ChatTemplate
    max_length: int
    training: Dataset
    held_out: Dataset | None
    findings: list[Finding]
    """Warnings about the rows; on the first rank only."""

    @property
    def datasets(self) -> list[Dataset]:
        """Return the training rows, and the held-out rows if there are any."""
        return [self.training] if self.held_out is None else [self.training, self.held_out]


@dataclass(frozen=True)
class RunPlan:
    """What is known before the weights are loaded.

    Attributes:
        plan: steps, tokens, memory, and disk.
        shape: the model to train, on the meta device.
        record: what will be in run.json, on the first rank of a real run; later stages add to it.
        point: the checkpoint to resume from.
        dtype: of the matmuls.
        ending: the end of turn that the rows teach.
        memory_doubts: why the run may not fit into memory.
        seconds: predicted for the steps; None if unknown.
        memory: available to this process; None if unknown.
        ways: the ways to train that are possible; in a dry run only.
    """

    plan: Plan
    shape: PreTrainedModel
    record: RunRecord | None
    point: ResumePoint | None
    dtype: torch.dtype
    ending: EndOfTurn
    memory_doubts: list[str]
    seconds: float | None
    memory: AvailableMemory | None
    ways: list[Way]


def train(config: TrainConfig, *, console: Console | None = None) -> TrainedRun:
    """Fine-tune a model. Write checkpoints, train.log, metrics.jsonl, run.json, and report.html.

    If the output folder holds an unfinished run with the same options, training resumes from its last checkpoint
    and produces bit-identical weights. Under torchrun, every process calls this function; the first one logs and
    saves.

    Args:
        config: the options.
        console: also gets the lines of the log (default: standard output).

    Raises:
        HandspunError: for anything that the user can fix: data, options, model, disk.
    """
    limit_primitive_cache()
    if not config.shard:  # FSDP2 frees each layer's weights after use: kept, they took a quarter more
        disable_malloc_trim()
    use_threads(config.threads)
    torch.manual_seed(config.seed)  # LoRA's initial values
    console = console or plain_console()
    with (
        processes_of_this_run(resolve_device(config.device), sharded=config.shard) as processes,
        ExitStack() as stack,
    ):
        check_same_options(config, processes)
        check_trackers_installed(config.log_to)
        check_data_exists(*config.sources, *config.eval_sources)
        if not is_on_disk(config.model):
            check_small_files(config, [*config.sources, *config.eval_sources])
        console.quiet = console.quiet or not processes.is_first
        folder = Path(config.output_dir) if processes.is_first and not config.dry_run else None
        if folder:
            stack.enter_context(lock_output_dir(folder))
        with captured_log() as notes:  # train.log is opened once it is known where
            prepared = prepare_output(folder, config) if folder else Prepared()
        if (finished := processes.broadcast_object(prepared.finished)) is not None:
            return _finished(config, finished, console)
        # A new run that is refused leaves nothing behind.
        place = pending(folder) if folder and prepared.earlier is None else folder
        log = stack.enter_context(RunLog(place, console, resumed_at=prepared.resumed_at))
        for text in notes:
            logger.warning(text)
        run = RunContext(config, processes, log, prepared)
        data = load_data(run)
        planned = plan_run(run, data)
        check(run, data, planned)
        if config.dry_run:
            logger.info("a dry run: nothing was trained or written")
            return TrainedRun(Path(config.output_dir), planned.plan, ways=planned.ways)
        return fit(run, data, planned, load_model(run, data))


def load_data(run: RunContext) -> LoadedData:
    """Read, tokenize, and describe the rows. Raise DataError, ModelError, or TemplateError."""
    config, processes = run.config, run.processes
    source = model_source(config.model)
    if config.lora:
        check_base_is_no_adapter(source)
    inputs = [*config.sources, *config.eval_sources]
    models = [config.model, source.location, source.adapter or config.model]
    remedy = "Choose another --output-dir, or move it out of there first."
    check_inputs_outside(models, inputs, run.prepared.replaces, remedy)
    max_length = resolve_max_length(config.max_length, context_length(load_config(source)))
    tokenizer = load_tokenizer(source, warn=True)
    choose_template(tokenizer, config.chat_template)
    template = ChatTemplate(tokenizer, config.template_values)
    training, held_out = load_splits(
        config,
        template,
        max_length=max_length,
        eval_data=config.eval_sources,
        eval_ratio=config.eval_ratio,
        seed=config.seed,
        cache=ExampleCache(cache_folder() / "examples"),
    )
    check_same_rows(training, held_out, template, max_length, processes)
    data = LoadedData(source, template, max_length, training, held_out, [])
    for dataset in data.datasets:
        check_examples(dataset.examples, embedding_rows_of(source), tokenizer, config.model)
    if processes.is_first:
        show_examples(training.examples, tokenizer)
    _log_rows(data, is_brief=not config.dry_run)
    if processes.is_first:
        data.findings.extend(_odd_rows(config, data))
    for dataset in data.datasets:  # before memory is measured
        is_held_out = dataset is data.held_out
        keep = rows_for_report(dataset, config, is_held_out=is_held_out) if processes.is_first else ()
        dataset.release_rows(keep)
    return data


def plan_run(run: RunContext, data: LoadedData) -> RunPlan:
    """Predict what the run takes, and find out where it resumes.

    Raises TrainingError if it cannot fit into memory, ConfigError if the unfinished run had other options.
    """
    config, processes, examples = run.config, run.processes, data.training.examples
    eos = eos_token_ids_of(load_generation_config(data.source), load_config(data.source))
    ending = end_of_turn(data.template, eos, data.training)
    new_token_ids = [] if ending.is_eos else [data.template.end_of_turn_id]
    shapes_of = partial(shapes, data.source, new_token_ids=new_token_ids)
    memory = available_memory(processes.device)
    doubts = check_fits_in_memory(config, examples, shapes_of, memory, processes=processes)
    record = None
    if processes.is_first and not config.dry_run:
        record = new_record(config, data.training, data.held_out, data.max_length)
        record.fingerprints = model_fingerprints(data.source, data.template.tokenizer)
    point = _resume_point(run, record)
    dtype = _compute_dtype(run, record, point)
    shape = shapes_of(config)
    plan = make_plan(shape, examples, config)
    seconds = seconds_of_run(shape, plan, examples, config, dtype=dtype, processes=processes)
    ways = []
    if config.dry_run and processes.is_first:
        ways = ways_to_train(config, partial(predict, examples, shapes_of, processes=processes), memory)
    return RunPlan(plan, shape, record, point, dtype, ending, doubts, seconds, memory, ways)


def check(run: RunContext, data: LoadedData, planned: RunPlan) -> None:
    """Log the plan and all warnings. Raise ConfigError for warnings under --strict."""
    config, processes = run.config, run.processes
    if not processes.is_first:
        return
    log_lines(
        plan_lines(planned.plan, config, data.max_length),
        held_out_lines(data.training, data.held_out, config),
        template_lines(data.template),
    )
    findings = [*data.findings, *doubts_about_memory(planned.memory_doubts)]
    if planned.ways:
        log_lines(way_lines(planned.ways, planned.memory))
    found = show_preflight(config, findings, planned.ending, planned.seconds)
    if planned.record is not None:
        planned.record.preflight = found


def load_model(run: RunContext, data: LoadedData) -> ChatModel:
    """Load the weights in float32, with adapters if asked for, and with an end of turn that the model can learn.

    A model that will be sharded stays on the CPU until its shares move to the ranks' devices.
    """
    config, processes = run.config, run.processes
    device = torch.device("cpu") if processes.sharded else processes.device
    logger.info(f"loading {config.model} ...")
    chat = load_trainable(data.source, data.template, device)
    check_same_weights(chat.model, processes)
    # What is saved renders as it was trained, in every program.
    chat.tokenizer.chat_template = with_defaults(chat.tokenizer.chat_template, chat.template_args)
    is_new = end_of_turn_is_new(chat)
    make_end_of_turn_eos(chat)
    if is_new:
        logger.info(
            f"the end of turn {chat.template.end_of_turn} was not an eos of the base model; it is one of the "
            "tuned model, in generation_config, config and tokenizer"
        )
    if config.lora:
        new_ids = [chat.template.end_of_turn_id] if is_new else []
        chat.model = with_lora(chat.model, config, data.source.name, new_ids)
        if is_new:
            logger.info("its embedding row is trained along with the adapters: they alone could not teach it")
    if config.base_weights == "int8":
        check_exact_matmuls(chat.device)
        quantize_base(chat.model)
        malloc_trim()
        logger.info("the frozen layers under the adapters are int8; embedding and head stay float32")
    check_examples(data.training.examples, embedding_rows(chat.model), chat.tokenizer, config.model)
    return chat


def fit(run: RunContext, data: LoadedData, planned: RunPlan, chat: ChatModel) -> TrainedRun:
    """Run the training loop, and hand each of its events to the listeners. Raise TrainingError or StoppedError."""
    config, processes, log, model = run.config, run.processes, run.log, chat.model
    trained = TrainedRun(Path(config.output_dir), planned.plan, chat)
    prompts = sample_prompts(chat, config, data.training, data.held_out) if planned.record is not None else []
    sampler = sampler_of(chat, config, prompts)
    with ExitStack() as around:
        if (record := planned.record) is not None:
            check_disk_space(planned.plan, config, run.prepared.replaces)
            record.plan = planned.plan
            around.enter_context(in_place_of(run.prepared.replaces, trained, record, log))
            material = Material(chat, config, data.training, data.held_out, prompts, log, planned.seconds)
            around.enter_context(report_around(material))
        with ExitStack() as inside:
            if record is not None:
                inside.enter_context(track_status(trained, record))
                inside.enter_context(log.tracked(config.log_to, record))
            if config.activation_checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            if planned.point is not None and planned.point.folder is not None:
                read_weights(model, planned.point.folder / TRAINING_STATE)
            if record is not None and planned.point is not None:
                log_resume(planned.point, record, planned.plan)
            checkpoints = CheckpointManager(trained, config, processes, record)
            request = inside.enter_context(stop_requests(say=not log.has_terminal))
            inside.enter_context(log.watched(_live_state(run, data, planned, sampler, request)))
            inside.enter_context(processes.losses_explained())
            processes.broadcast_weights(model)
            loop = Loop(
                config=config,
                examples=data.training.examples,
                held_out=data.held_out.examples if data.held_out else [],
                runner=inside.enter_context(_runner(run, data, planned, chat)),
                processes=processes,
            )
            state = start(model, config)
            if planned.point is not None:
                checkpoints.restore(planned.point)
                _restore_state(planned.point, state, trained, run)
            if loop.held_out and state.step == 0:
                logger.info(f"computing the loss of {count_of(len(loop.held_out), 'held-out row')} ...")
            listeners = _listeners(run, data, planned, loop, trained, checkpoints, sampler, request)
            for event in training_events(loop, state):
                for listener in listeners:
                    listener(event, state)
            if config.shard:
                trained.model_in_memory = None
        if not config.shard:
            if config.activation_checkpointing:
                model.activation_checkpointing_disable()
            model.eval()
        checkpoints.cleanup()
    if record is not None:
        earlier = planned.point.state.run.seconds if planned.point is not None else None
        _log_end(trained, (earlier or 0.0) + run.log.seconds)
    return trained


def _runner(
    run: RunContext, data: LoadedData, planned: RunPlan, chat: ChatModel
) -> AbstractContextManager[BatchRunner]:
    pad_token_id = chat.tokenizer.pad_token_id
    return select_runner(
        chat.model,
        run.config,
        data.training.examples,
        dtype=planned.dtype,
        pad_token_id=pad_token_id if pad_token_id is not None else 0,  # masked: any id would do
        run_on=run.processes.run_on,
    )


def _listeners(
    run: RunContext,
    data: LoadedData,
    planned: RunPlan,
    loop: Loop,
    trained: TrainedRun,
    checkpoints: CheckpointManager,
    sampler: Sampler | None,
    request: StopRequest,
) -> list[Listener]:
    """Return the listeners in the order in which they get each event."""
    config, processes, log = run.config, run.processes, run.log
    forecast = Forecast(trained.plan, epochs_of_plan(trained.plan, config), planned.seconds)

    def log_event(event: Event, _state: TrainingState) -> None:
        log.event(event)
        if (left := forecast.after(event)) is not None:
            logger.info(corrected_line(left, event.step))
            log_lines(slow_lines(forecast.times_predicted or 0.0, config, planned.dtype))

    def keep_incidents(event: Event, _state: TrainingState) -> None:
        if isinstance(event, SkippedStep | Spike | OutOfMemory):
            record_incident(trained, event, config, data.training, processes)

    def sample_answers(event: Event, _state: TrainingState) -> None:
        if sampler and processes.is_first and sampler.is_due(event, loop):
            log.event(sampler.after(event))  # before a checkpoint of the step: it would not come again

    def save_or_stop(event: Event, state: TrainingState) -> None:
        if not loop.ends_step(event) or event.step >= loop.total_steps:
            return
        number = int(processes.max(request.signal))  # all ranks stop after the same step
        checkpoints.save_if_due(event, state, must=bool(number))
        if number:
            raise StoppedError(number, step=event.step, total_steps=loop.total_steps)

    return [log_event, keep_incidents, sample_answers, checkpoints.on_event, save_or_stop]


def _log_end(trained: TrainedRun, seconds: float) -> None:
    """Log what the run came to. The last line says how long it took."""
    try:
        run = read_run(trained.output_dir)
        log_lines(end_lines(run))
        for what, command in next_commands(run, command_here()):
            logger.info(f"{what}:")
            logger.info(f"  {command}", extra={"unwrapped": True})  # to be copied
    except OutputError as error:  # the weights are saved
        logger.info(str(error))
    memory = peak_memory()
    used = (
        f", peak memory {memory / 1e9:.1f} GB (predicted {trained.plan.peak_memory / 1e9:.1f})" if memory else ""
    )
    logger.info(f"finished in {duration(seconds)}{used}")


def _finished(config: TrainConfig, record: RunRecord, console: Console) -> TrainedRun:
    """Say that nothing is left to do."""
    trained = finished_earlier(Path(config.output_dir), record)
    best = f", the best one {trained.best_checkpoint.name}" if trained.best_checkpoint else ""
    count = len(trained.checkpoints)
    text = f"the run in {trained.output_dir} has finished ({count} checkpoints{best}): nothing is left to do"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return trained


def _resume_point(run: RunContext, record: RunRecord | None) -> ResumePoint | None:
    """Return where the run resumes, the same on all ranks; on the first with the checkpoint's folder.

    Adds what an unfinished run recorded to its new record, and removes checkpoints that are newer.
    """
    config, processes = run.config, run.processes
    earlier, point = run.prepared.earlier, run.prepared.point
    if earlier is not None and record is not None:
        check_same_run(earlier, record, config.output_dir, has_saved=point is not None)
        if point is not None:
            make_way(Path(config.output_dir), point)
        record.started, record.resumed = earlier.started, earlier.resumed
        record.seconds = point.state.run.seconds if point else 0.0
    shared = processes.broadcast_object(replace(point, folder=None) if point else None)
    return point if processes.is_first else shared


def _restore_state(point: ResumePoint, state: TrainingState, trained: TrainedRun, run: RunContext) -> None:
    folder = point.folder / TRAINING_STATE if point.folder else None
    read_optimizer(state.model, state.optimizer, folder, run.processes.device)
    state.step = point.step
    state.best_loss = min((evaluation.loss for evaluation in trained.evaluations), default=state.best_loss)
    state.skipped, state.losses = point.state.skipped, point.state.losses
    if run.config.max_tokens == point.state.run.config["max_tokens"]:  # else it is what the user wants now
        state.max_tokens = point.state.max_tokens


def log_resume(point: ResumePoint, record: RunRecord, plan: Plan) -> None:
    """Log the step that the run resumes after, and what has changed since; record both."""
    changes = execution_changes(point.state.run, record)
    logger.info(f"resuming after step {point.step} of {plan.steps}, from {point.folder}")
    for what, (before, now) in changes.items():
        logger.info(f"  {what} was {before} and is {now}: the weights will differ in their rounding")
    resumed = Resumed(point.step, datetime.now(UTC).isoformat(timespec="seconds"), changes)
    record.resumed = [*(record.resumed or []), resumed]


def _live_state(
    run: RunContext, data: LoadedData, planned: RunPlan, sampler: Sampler | None, request: StopRequest
) -> LiveState:
    return LiveState(
        total_steps=planned.plan.steps,
        num_epochs=math.ceil(epochs_of_plan(planned.plan, run.config)),
        held_out=data.held_out is not None,
        prompts=tuple(prompt.text for prompt in sampler.prompts) if sampler else (),
        stopping=lambda: bool(request.signal),
    )


def _compute_dtype(run: RunContext, record: RunRecord | None, point: ResumePoint | None) -> torch.dtype:
    """Return the type of the matmuls, the same on all ranks: given, measured, or that of the run so far."""
    config, processes, device = run.config, run.processes, run.processes.device
    if config.dtype == "auto" and point is not None:
        dtype, reason = resolve_dtype(cast(Weights, point.state.run.dtype), device), "as before"
    else:
        dtype, reason = dtype_of(config, device)
        dtype = torch.bfloat16 if processes.broadcast_scalar(dtype == torch.bfloat16) else torch.float32
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    if record is not None:
        record.dtype, record.processes, record.threads = name, processes.count, threads
    where = f"{threads} {'thread' if threads == 1 else 'threads'}" if device.type == "cpu" else str(device)
    each = "a share of the model" if processes.sharded else "the whole model"
    several = f"{processes.count} processes with {each} each, of " if processes.count > 1 else ""
    logger.info(f"{several}{where}, matmuls in {name} ({reason})")
    log_lines(speed_notices(device, is_int8=config.base_weights == "int8"))
    return dtype


def _odd_rows(config: TrainConfig, data: LoadedData) -> list[Finding]:
    rows = sum(dataset.account.rows for dataset in data.datasets)
    if rows >= _MANY_ROWS:
        logger.info(f"looking for duplicates and placeholders in {rows} rows")
    markers = data.template.plain_markers
    return check_rows(config, data.training, data.held_out, max_length=data.max_length, markers=markers)


def _log_rows(data: LoadedData, *, is_brief: bool) -> None:
    log_lines(
        account_lines(data.training.account, max_length=data.max_length),
        length_lines(data.training.examples, is_brief=is_brief),
    )
    if data.held_out is not None:
        account = data.held_out.account
        is_in_order = account.kept == account.rows and not (account.truncated or account.notes)
        if not is_brief or not is_in_order:  # the plan has their number
            lines = account_lines(account, max_length=data.max_length)
            log_lines(["held out:"], (f"  {line}" for line in lines))
