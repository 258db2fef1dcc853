"""The plan of a run in lines for people."""

from handspun.config import TrainConfig
from handspun.training.preflight import Plan


def plan_lines(plan: Plan, config: TrainConfig, max_length: int) -> list[str]:
    """Steps, tokens, memory and disk."""
    what = f"LoRA rank {config.lora_rank}, " if config.lora else ""
    return [
        f"model {config.model}: {plan.parameters / 1e6:.1f}M parameters, {what}"
        f"{plan.trainable / 1e6:.1f}M trained",
        f"plan: {plan.examples} examples x {config.num_epochs} epochs in batches of {config.batch_size}: "
        f"{plan.steps} steps",
        f"tokens in an epoch: {plan.tokens}, {plan.learned_tokens} of them learned, {plan.computed_tokens} "
        f"computed ({plan.batching}); {plan.micro_batches} micro-batches of at most {config.max_tokens}; "
        f"rows of at most {max_length}",
        f"learning rate {config.peak_learning_rate:g}, {config.lr_schedule} after "
        f"{config.warmup_ratio:.0%} warm-up; seed {config.seed}",
        f"predicted peak memory {plan.peak_memory / 1e9:.1f} GB{' without --shard' if config.shard else ''}; "
        f"each checkpoint {plan.checkpoint_size / 1e9:.2f} GB, and the last {config.keep_last} "
        f"have {plan.training_state_size / 1e9:.2f} GB beside it to resume from",
    ]
