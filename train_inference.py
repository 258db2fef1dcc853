# %% [markdown]
# # Fine-tune a small model on instructions, then decode in three ways
#
#     python train_inference.py --demo                 # the embedded model and data, no network
#     python -u train_inference.py > train.log 2>&1    # Qwen2.5-0.5B on the Alpaca rows of train.csv
#
# Training writes `output/checkpoint-epoch-N/` after each epoch: ordinary transformers folders.

# %%
import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

import handspun
from handspun.demo.run import demo_config

parser = argparse.ArgumentParser(description="Train, then decode: greedy, sampling, beam search.")
parser.add_argument(
    "--model", default="Qwen/Qwen2.5-0.5B", help="hub id, folder or .gguf file (default: %(default)s)"
)
parser.add_argument("--data", default="train.csv", help="instruction rows (default: %(default)s)")
parser.add_argument("--eval-data", help="held-out rows")
parser.add_argument("--output-dir", default="output", help="folder for the run (default: %(default)s)")
parser.add_argument("--num-epochs", type=int, default=3, help="passes over the rows (default: %(default)s)")
parser.add_argument(
    "--learning-rate", type=float, help="peak of the schedule (default: 5e-5, and 5e-4 with --lora)"
)
parser.add_argument("--lora", action="store_true", help="train LoRA adapters in place of all weights")
parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the output folder")
parser.add_argument(
    "--demo", action="store_true", help="the embedded model and data in place of --model and --data"
)
arguments = parser.parse_args()
if arguments.demo:
    demo = demo_config(arguments.output_dir)
    arguments.model, arguments.data, arguments.eval_data = demo.model, demo.data, demo.eval_data
    arguments.learning_rate = arguments.learning_rate or demo.learning_rate

# %% [markdown]
# ## Train
#
# Every row is accounted for; what is learned of each are the answer and the end of turn.

# %%
config = handspun.TrainConfig(
    model=arguments.model,
    data=arguments.data,
    eval_data=arguments.eval_data,
    output_dir=arguments.output_dir,
    num_epochs=arguments.num_epochs,
    batch_size=8,
    learning_rate=arguments.learning_rate,
    lora=arguments.lora,
    overwrite=arguments.overwrite,
)
run = handspun.train(config)

# %% [markdown]
# What came of it, out of `output/metrics.jsonl`, a line for each step and evaluation. The same and much more is in
# `output/report.html`, for a browser.

# %%
output = Path(arguments.output_dir)
events = [json.loads(line) for line in (output / "metrics.jsonl").open(encoding="utf-8")]
steps = [event for event in events if event["event"] == "step"]
evaluations = [event for event in events if event["event"] == "evaluation"]
at = [event["step"] for event in steps]

figure, (losses, rates) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
losses.plot(at, [event["loss"] for event in steps], lw=0.8, alpha=0.6, label="each batch")
if evaluations:
    held_out = [event["loss"] for event in evaluations]
    losses.plot([event["step"] for event in evaluations], held_out, "o-", label="held-out rows")
losses.set(xlabel="step", ylabel="loss per learned token", ylim=(0, None))
losses.legend(frameon=False)
rates.plot(at, [event["learning_rate"] for event in steps], "C0")
rates.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
rates.yaxis.label.set_color("C0")
norms = rates.twinx()
norms.plot(at, [event["grad_norm"] for event in steps], "C1", lw=0.8, alpha=0.6)
norms.set_ylabel("gradient norm", color="C1")
norms.set_ylim(0, None)
figure.savefig(output / "training.png", dpi=110)

# %% [markdown]
# ## Decode
#
# From the last checkpoint, as anybody would load it.

# %%
checkpoint = output / f"checkpoint-epoch-{arguments.num_epochs}"
model = handspun.load(str(checkpoint))


def show(title: str, prompt: str, answers: list[handspun.GenerationResult]) -> None:
    """The prompt and its answers, with what ended each."""
    print(f"\n{title}\n> {prompt}")
    for answer in answers:
        print(f"{answer.text}\n[{len(answer.token_ids)} tokens, ended by {answer.finish_reason}]")


# %% [markdown]
# Greedy: the most probable token, every time.

# %%
prompt = "Give me a brief introduction to Shanghai Jiao Tong University."
show("Greedy", prompt, handspun.generate(model, prompt, do_sample=False))

# %% [markdown]
# Sampling, three times: each answer draws from a stream of its own.

# %%
prompt = "Tell me a joke about computers."
answers = handspun.generate(model, prompt, do_sample=True, temperature=0.7, num_return_sequences=3, seed=0)
show("Sampling", prompt, answers)

# %% [markdown]
# Beam search: the most probable answer that four beams find.

# %%
prompt = "What is the sum of the first 100 natural numbers? Please think step by step."
show("Beam search", prompt, handspun.generate(model, prompt, num_beams=4))
