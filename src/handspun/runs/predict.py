"""What a run will take, predicted from its options, its rows, and the shapes of its model."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.models.int8 import check_exact_matmuls, quantize_base
from handspun.models.load import ModelSource, load_config, recorded_base, resolve_device, resolve_dtype
from handspun.preflight.time_estimate import operations, predicted_seconds
from handspun.training.batching import steps_of_epoch
from handspun.training.distributed import Distributed
from handspun.training.dtype import choose_dtype
from handspun.training.memory import Plan, Shapes, make_plan


def predict(
    examples: Sequence[Example], shapes_of: Shapes, config: TrainConfig, *, processes: Distributed
) -> tuple[float | None, int]:
    """Return the predicted seconds of the steps, None if unknown, and the predicted peak bytes.

    Args:
        examples: the training examples.
        shapes_of: returns the model of a config on the meta device.
        config: the run's options.
        processes: the ranks.
    """
    shape, (dtype, _) = shapes_of(config), dtype_of(config, processes.device)
    plan = make_plan(shape, examples, config)
    return seconds_of_run(shape, plan, examples, config, dtype=dtype, processes=processes), plan.peak_memory


def seconds_of_run(
    shape: PreTrainedModel,
    plan: Plan,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    dtype: torch.dtype,
    processes: Distributed,
) -> float | None:
    """Return the predicted seconds of all steps, or None if unknown.

    Args:
        shape: the model, which may be on the meta device.
        plan: the run's plan.
        examples: the training examples.
        config: the run's options.
        dtype: type of the matmuls.
        processes: the ranks.
    """
    return predicted_seconds(
        epochs_of_plan(plan, config) * operations(shape, plan, examples, config),
        config,
        dtype=dtype,
        device=processes.device,
        threads=torch.get_num_threads() * processes.count,
    )


def epochs_of_plan(plan: Plan, config: TrainConfig) -> float:
    """Return the epochs of the run; `max_steps` may cut the last one."""
    return plan.steps / steps_of_epoch(plan.examples, config)


def dtype_of(config: TrainConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """Return (the type of the matmuls of a new run, the reason)."""
    if config.dtype != "auto":
        return resolve_dtype(config.dtype, device), "asked for"
    if config.base_weights == "int8":
        return torch.float32, "beside the int8 layers"
    return choose_dtype(device)


def shapes(source: ModelSource, config: TrainConfig, *, new_token_ids: Sequence[int] = ()) -> PreTrainedModel:
    """Return the model to train, on the meta device. new_token_ids: as in LoRA."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(source), dtype=torch.float32)
        if config.lora:
            model = with_lora(model, config, source.name, new_token_ids)
    if config.base_weights == "int8":
        check_exact_matmuls(resolve_device(config.device))
        quantize_base(model)
    return model


def with_lora(
    model: PreTrainedModel, config: TrainConfig, base: str, new_token_ids: Sequence[int]
) -> PreTrainedModel:
    """Return the model with the run's adapters. base: the model's name. new_token_ids: rows to train along."""
    from handspun.models.lora import add_lora  # imports peft

    return add_lora(
        model,
        recorded_base(base),
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        new_token_ids=new_token_ids,
    )
