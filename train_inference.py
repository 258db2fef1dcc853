# %% [markdown]
# # Fine-tune a small model on instructions, then decode in three ways
#
#     python train_inference.py --demo                 # the embedded model and data, no network
#     python -u train_inference.py > train.log 2>&1    # Qwen2.5-0.5B on the Alpaca rows of train.csv
#
# Training writes `output/checkpoint-epoch-N/` after each epoch: ordinary transformers folders.

# %%
import argparse
from pathlib import Path

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
# ## Decode
#
# From the last checkpoint, as anybody would load it.

# %%
checkpoint = Path(arguments.output_dir) / f"checkpoint-epoch-{arguments.num_epochs}"
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
