"""The plan of a run in lines for people."""

from handspun.config import TrainConfig
from handspun.training.plan import Plan, disk_at_most


def plan_lines(plan: Plan, config: TrainConfig, max_length: int) -> list[str]:
    """Steps, tokens, memory and disk."""
    what = f"LoRA rank {config.lora_rank}, " if config.lora else ""
    return [
        f"model {config.model}: {plan.parameters / 1e6:.1f}M parameters, {what}"
        f"{plan.trainable / 1e6:.1f}M trained",
        f"plan: {plan.examples} examples x {config.num_epochs} epochs in batches of {config.batch_size}: "
        f"{plan.steps} steps",
        f"tokens in an epoch: {plan.tokens}, {plan.learned_tokens} of them learned,",
        f"  {plan.computed_tokens} computed ({plan.batching}); rows of at most {max_length}",
        f"  in {plan.micro_batches} micro-batches of at most {config.max_tokens}",
        f"learning rate {config.peak_learning_rate:g}, {config.lr_schedule} after "
        f"{config.warmup_ratio:.0%} warm-up; seed {config.seed}",
        f"predicted peak memory {plan.peak_memory / 1e9:.1f} GB{' without --shard' if config.shard else ''}",
        f"disk: each checkpoint {plan.checkpoint_size / 1e9:.2f} GB, the last {config.keep_last} with "
        f"{plan.training_state_size / 1e9:.2f} GB to resume from;",
        f"  at most {disk_at_most(plan, config) / 1e9:.2f} GB in all",
    ]
