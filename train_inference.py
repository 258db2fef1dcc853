# %% [markdown]
# # The whole job in one file
#
# Fine-tune a small chat model on instructions, then decode in three ways. Plain PyTorch, to be read from top to
# bottom: transformers supplies the tokenizer and the network, and everything else is here.
#
#     python train_inference.py --demo                 # the embedded model and rows, no network
#     python -u train_inference.py > train.log 2>&1    # Qwen2.5-0.5B on the Alpaca rows of train.csv
#
# The package gives the same losses, greedy and beam tokens (`tests/test_train_inference.py`). It also reads other
# formats and templates, keeps a user's text apart from the template's markup, accounts for every row, fits a batch
# into memory, resumes a killed run, and writes a report. It trains the demo 2.1 times as fast in float32 and 2.9
# times in bfloat16; its short answers take as long in float32, and come 2.1 to 3.6 times as fast with int8 weights
# (`python benchmarks/whole_job.py`, one thread of an Intel Sapphire Rapids server).

# %%
import argparse
import csv
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

BATCH_SIZE, MAX_LENGTH, SEED = 8, 2048, 0
WARMUP_RATIO, MAX_GRAD_NORM = 0.03, 1.0
LORA_RANK, LORA_ALPHA = 16, 32
END_OF_TURN = "<|im_end|>"  # of ChatML, the template of Qwen2.5 and SmolLM2
STOP_STRINGS = (END_OF_TURN, "\nUser:")
IGNORED = -100  # label of a position without a target; cross_entropy skips it

Example = dict[str, Tensor]  # input_ids and labels of a row, each (length,)
Ending = Callable[[list[int]], str | None]  # why an answer has ended; None if it has not
Scored = tuple[float | None, list[int]]  # an answer's score, None without beams, and its tokens

# %% [markdown]
# ## From a row to token ids and labels
#
# The chat template turns a conversation into text, such as
#
#     <|im_start|>user
#     Name a color.<|im_end|>
#     <|im_start|>assistant
#     Blue.<|im_end|>
#
# Only the answer and its end of turn are targets: the model learns to answer and to stop, not to ask. All other
# labels are -100. Rows differ in length, so a batch pads the shorter ones on the right. The attention mask hides
# the padding from attention, and -100 hides it from the loss.


# %%
def encode_prompt(tokenizer: Any, user: str) -> tuple[str, list[int]]:
    """Return text and token ids of a user's turn, up to where the assistant's answer begins."""
    turns = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text, tokenizer(text, add_special_tokens=False).input_ids


def encode_row(tokenizer: Any, row: dict[str, str]) -> Example:
    """Return a row's token ids, and as labels the ids of answer and end of turn, -100 elsewhere."""
    user = row["instruction"] + ("\n" + row["input"] if row["input"].strip() else "")
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    prompt, prompt_ids = encode_prompt(tokenizer, user)
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.startswith(prompt), "this template writes a finished turn in another way than a prompt"
    answer = text[len(prompt) : text.rindex(END_OF_TURN)] + END_OF_TURN  # without the line break after it
    answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
    input_ids, labels = prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids
    return {"input_ids": torch.tensor(input_ids[:MAX_LENGTH]), "labels": torch.tensor(labels[:MAX_LENGTH])}


def read_examples(file: str, tokenizer: Any) -> list[Example]:
    """Read a csv file with the columns instruction, input and output."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restval="")
        rows = list(reader)
    if missing := {"instruction", "input", "output"} - {*(reader.fieldnames or ())}:
        sys.exit(f"{file}: there is no column {', '.join(sorted(missing))}. `handspun train` reads other formats.")
    examples = [encode_row(tokenizer, row) for row in rows if row["instruction"].strip() and row["output"].strip()]
    examples = [example for example in examples if (example["labels"] != IGNORED).any()]
    print(f"{file}: {len(rows)} rows, {len(examples)} with an answer to train on")
    return examples


def collate_fn(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels of a batch, each (batch, length)."""
    ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


# %% [markdown]
# ## Training
#
# The logits at position i predict token i + 1. So the loss compares the logits of all positions but the last with
# the labels of all positions but the first. A step is forward, backward, clip, update. The learning rate rises
# over the first 3% of the steps, and then falls to zero.


# %%
def batch_loss(model: Any, examples: Sequence[Example]) -> tuple[Tensor, int]:
    """Return the summed loss of a batch's target tokens, and their number."""
    batch = {name: tensor.to(model.device) for name, tensor in collate_fn(examples).items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    predictions = logits[:, :-1].flatten(0, 1)  # (batch * (length - 1), vocab)
    targets = batch["labels"][:, 1:].flatten()  # (batch * (length - 1),)
    loss_sum = F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")
    return loss_sum, int((targets != IGNORED).sum())


@torch.no_grad()
def evaluate(model: Any, examples: Sequence[Example]) -> float:
    """Return the mean loss per target token."""
    batches = [examples[i : i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE)]
    sums, counts = zip(*(batch_loss(model.eval(), batch) for batch in batches), strict=True)
    return float(sum(sums)) / float(sum(counts))


def load(name: str, *, lora: bool = False) -> tuple[Any, Any]:
    """Return model and tokenizer, in float32, with the end of turn as an eos token."""
    if name == "smollm2-135m":
        from handspun.models.embedded import embedded_folder

        name = str(embedded_folder())
    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if END_OF_TURN not in tokenizer.get_vocab() or not tokenizer.chat_template:
        sys.exit(f"{name}: its chat template is not ChatML. `handspun train` knows other templates.")
    end_of_turn, eos = tokenizer.convert_tokens_to_ids(END_OF_TURN), model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    others = [token for token in eos if token not in (None, end_of_turn)]
    model.config.eos_token_id = model.generation_config.eos_token_id = [end_of_turn, *others]
    tokenizer.eos_token = END_OF_TURN
    if lora:
        import peft

        torch.manual_seed(SEED)  # of the adapters' initial values
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=LORA_ALPHA)
        config.target_modules = "all-linear"
        # Qwen2.5's base model was not trained on the end of turn, and adapters alone cannot teach a token.
        config.trainable_token_indices = None if end_of_turn in eos else [end_of_turn]
        model = peft.get_peft_model(model, config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Return the learning rate of a step, counted from 0."""
    warmup_steps = math.ceil(total_steps * WARMUP_RATIO)
    rising, falling = (step + 1) / warmup_steps, (total_steps - step) / max(1, total_steps - warmup_steps)
    return peak * min(rising, falling)


def train_step(model: Any, optimizer: torch.optim.Optimizer, examples: Sequence[Example]) -> tuple[float, float]:
    """Take one optimizer step on a batch. Return its loss per target token, and the norm of its gradient."""
    loss_sum, target_tokens = batch_loss(model.train(), examples)
    loss = loss_sum / target_tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


def train(
    model: Any, tokenizer: Any, examples: list[Example], held_out: list[Example], options: argparse.Namespace
) -> list[float]:
    """Train the model, and save a checkpoint after each epoch. Return the loss of each step."""
    peak = options.learning_rate or (5e-4 if options.lora else 5e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
    total_steps = math.ceil(len(examples) / BATCH_SIZE) * options.num_epochs
    losses: list[float] = []
    for folder in Path(options.output_dir).glob("checkpoint-epoch-*"):
        shutil.rmtree(folder)  # of an earlier run
    if held_out:
        print(f"held-out loss before training: {evaluate(model, held_out):.4f}")
    for epoch in range(1, options.num_epochs + 1):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + epoch)
        for rows in torch.randperm(len(examples), generator=generator).split(BATCH_SIZE):
            optimizer.param_groups[0]["lr"] = rate = learning_rate_at(len(losses), total_steps, peak)
            loss, norm = train_step(model, optimizer, [examples[row] for row in rows])
            losses.append(loss)
            figures = f"loss {loss:.4f}, learning rate {rate:.2e}, gradient norm {norm:.2f}"
            print(f"epoch {epoch}, step {len(losses)} of {total_steps}: {figures}", flush=True)
        if held_out:
            print(f"held-out loss after epoch {epoch}: {evaluate(model, held_out):.4f}")
        # Adapters alone would not say what ends an answer, hence the generation config.
        for part in (model, model.generation_config, tokenizer):
            part.save_pretrained(Path(options.output_dir) / f"checkpoint-epoch-{epoch}")
    return losses


# %% [markdown]
# ## Decoding
#
# All answers grow by one token per step, as one batch. Prompts differ in length, so shorter ones are padded on the
# left: the last column then holds the newest token of each row. The cache keeps keys and values of earlier tokens,
# so a step computes the newest ones only.


# %%
@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to decode: greedily, unless do_sample or num_beams says otherwise."""

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0


class Answer(NamedTuple):
    """An answer. score: of beams, the log-probability divided by length ** length_penalty."""

    text: str
    token_ids: list[int]
    finish_reason: str
    score: float | None


def pad_left(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return input_ids and attention_mask, each (prompts, length)."""
    ids = [torch.tensor(prompt, device=device) for prompt in prompts]
    ones = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, padding_side="left"), pad_sequence(ones, True, padding_side="left")


def next_logits(model: Any, new_ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Run the model on the newest columns, which the cache does not hold. Return (rows, vocab)."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new_ids.shape[1] :]  # padding is not counted
    logits = model(input_ids=new_ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    return logits[:, -1]  # type: ignore[no-any-return]


def apply_filters(logits: Tensor, histories: Sequence[Sequence[int]], how: Decoding) -> Tensor:
    """Return the logits, (rows, vocab), to choose tokens by. histories: ids of each row's prompt and answer."""
    logits, penalty = logits.clone(), how.repetition_penalty
    for row, history in zip(logits, histories, strict=True):
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    if not how.do_sample:
        return logits
    logits = logits / how.temperature
    if how.top_k > 0:  # exclude all but the k most probable tokens
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[:, -1:], -torch.inf)
    if how.top_p < 1:  # exclude the least probable tokens, as many as have a total probability of at most 1 - p
        ascending, order = logits.sort(-1)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - how.top_p
        removed[:, -1] = False
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    return logits


def decode(model: Any, prompts: Sequence[list[int]], how: Decoding, ending: Ending) -> list[Scored]:
    """Return one answer per prompt: the most probable token of each step, or one that is drawn."""
    answers: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator(model.device).manual_seed(how.seed)
    tokens, mask = pad_left(prompts, model.device)
    cache = DynamicCache()
    while not all(map(ending, answers)):
        histories = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        logits = apply_filters(next_logits(model, tokens, mask, cache), histories, how)
        tokens = logits.argmax(-1, keepdim=True)  # (rows, 1)
        if how.do_sample:
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        for answer, token in zip(answers, tokens[:, 0].tolist(), strict=True):
            if not ending(answer):  # one that has ended stays in the batch, and its further tokens are dropped
                answer.append(token)
        mask = F.pad(mask, (0, 1), value=1)
    return [(None, answer) for answer in answers]


# %% [markdown]
# Beam search keeps the `num_beams` most probable unfinished answers of each prompt; all beams of all prompts are
# the rows of one batch. Each step ranks every continuation of every beam. Of the best `num_beams`, those that end
# are finished answers; the best that do not end are the next beams.
#
# Each token lowers an answer's log-probability, so short answers would win. Hence a finished answer's score is
# divided by its length, to the power of `length_penalty`. The search ends when the best beam scores no better than
# the worst of `num_beams` finished answers.


# %%
def beam_search(model: Any, prompts: Sequence[list[int]], how: Decoding, ending: Ending) -> list[Scored]:
    """Return the best answer to each prompt."""
    n, count = how.num_beams, len(prompts)
    width = n * (1 + len(model.generation_config.eos_token_id))  # n do not end, even if all beams may
    beams: list[list[list[int]]] = [[[]] * n for _ in prompts]
    # A prompt's beams are the same at first, so all but one begin with a score that cannot win.
    beam_scores = torch.tensor([[0.0] + [-1e9] * (n - 1)] * count, device=model.device)  # (prompts, beams)
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]
    done = [False] * count
    tokens, mask = pad_left([prompt for prompt in prompts for _ in range(n)], model.device)
    cache = DynamicCache()
    for length in range(1, how.max_new_tokens + 1):
        histories = [prompts[p] + beam for p in range(count) for beam in beams[p]]
        logprobs = next_logits(model, tokens, mask, cache).log_softmax(-1)  # (prompts * beams, vocab)
        totals = beam_scores.view(-1, 1) + apply_filters(logprobs, histories, how)
        best = totals.view(count, -1).topk(width)  # values and indices: (prompts, width), the best first
        kept: list[tuple[int, int]] = []  # (row of the cache, next token) of each next beam
        for p, scores in enumerate(best.values.tolist()):
            pairs = [divmod(index, logprobs.shape[-1]) for index in best.indices[p].tolist()]  # (beam, token)
            answers = [[*beams[p][beam], token] for beam, token in pairs]
            ended = [ending(answer) is not None for answer in answers]
            if not done[p]:
                finished[p] += [(scores[i] / length**how.length_penalty, answers[i]) for i in range(n) if ended[i]]
                finished[p] = sorted(finished[p], key=lambda answer: -answer[0])[:n]
            chosen = sorted(range(width), key=lambda i: ended[i])[:n]
            beams[p], beam_scores[p] = [answers[i] for i in chosen], best.values[p, chosen]
            kept += [(p * n + pairs[i][0], pairs[i][1]) for i in chosen]
            best_score = scores[chosen[0]] / length**how.length_penalty
            done[p] |= all(ended) or (len(finished[p]) == n and best_score <= finished[p][-1][0])
        if all(done):
            break
        rows, tokens = torch.tensor(kept, device=model.device).split(1, dim=1)  # (prompts * beams, 1) each
        cache.reorder_cache(rows[:, 0])
        mask = F.pad(mask, (0, 1), value=1)  # the beams of a prompt are padded alike
    return [answers[0] for answers in finished]


@torch.inference_mode()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], how: Decoding) -> list[Answer]:
    """Answer the prompts as one batch. Texts are cut at the end of turn, and where a user's turn would follow."""

    def ending(token_ids: list[int]) -> str | None:
        if token_ids and token_ids[-1] in model.generation_config.eos_token_id:
            return "eos"
        if any(stop in tokenizer.decode(token_ids) for stop in STOP_STRINGS):
            return "stop"
        return "length" if len(token_ids) == how.max_new_tokens else None

    ids = [encode_prompt(tokenizer, prompt)[1] for prompt in prompts]
    answers = []
    for score, token_ids in (beam_search if how.num_beams > 1 else decode)(model, ids, how, ending):
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        for stop in STOP_STRINGS:
            text = text.split(stop)[0]
        answers.append(Answer(text, token_ids, ending(token_ids) or "", score))
    return answers


# %% [markdown]
# ## Run it
#
# A notebook has no command line; there it is the demo.


# %%
def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fine-tune, then decode: greedy, sampling, beam search.")
    add = parser.add_argument
    add("--model", default="Qwen/Qwen2.5-0.5B", help="hub id, folder or smollm2-135m (default: %(default)s)")
    add("--data", default="train.csv", help="csv file of instruction, input, output (default: %(default)s)")
    add("--eval-data", help="held-out rows, in the same form")
    add("--output-dir", default="output", help="folder for checkpoints (default: %(default)s)")
    add("--num-epochs", type=int, default=3, help="passes over the rows (default: %(default)s)")
    add("--learning-rate", type=float, help="peak of the schedule (default: 5e-5, and 5e-4 with --lora)")
    add("--lora", action="store_true", help="train LoRA adapters instead of all weights")
    add("--overwrite", action="store_true", help="replace the checkpoints of an earlier run")
    add("--demo", action="store_true", help="the embedded model and rows instead of --model and --data")
    options = parser.parse_args(arguments)
    if options.demo:
        import handspun

        rows = Path(handspun.__file__).parent / "demo"
        options.model, options.data = "smollm2-135m", str(rows / "demo.csv")
        options.eval_data = str(rows / "held_out.csv")
    for file in filter(None, (options.data, options.eval_data)):
        if not Path(file).is_file():
            parser.error(f"{file}: there is no such file. Name a csv file with --data, or try --demo.")
    if [*Path(options.output_dir).glob("checkpoint-epoch-*")] and not options.overwrite:
        parser.error(f"{options.output_dir}: holds an earlier run. Choose another folder, or add --overwrite.")
    return options


if __name__ == "__main__":
    in_notebook = "ipykernel" in sys.modules
    options = parse_options(["--demo", "--output-dir=output-notebook", "--overwrite"] if in_notebook else None)
    model, tokenizer = load(options.model, lora=options.lora)
    examples = read_examples(options.data, tokenizer)
    held_out = read_examples(options.eval_data, tokenizer) if options.eval_data else []
    train(model, tokenizer, examples, held_out, options)
    model.eval()

# %% [markdown]
# ## Three demonstrations
#
# Greedy decoding gives the same answer every time. It takes the most probable token even where none is probable,
# as in a number that the model does not know.


# %%
def show(title: str, prompts: Sequence[str], how: Decoding) -> None:
    """Print the prompt and its answers, with what ended each."""
    print(f"\n{title}\n> {prompts[0]}")
    for text, token_ids, reason, score in generate(model, tokenizer, prompts, how):
        ended = f"ended by {reason}" + ("" if score is None else f", beam score {score:.4f}")
        print(f"{text}\n[{len(token_ids)} tokens, {ended}]", flush=True)


if __name__ == "__main__":
    show("Greedy", ["Give me a brief introduction to Shanghai Jiao Tong University."], Decoding())

# %% [markdown]
# Sampling, three times: each answer is another draw. A temperature below 1 makes probable tokens more probable.

# %%
if __name__ == "__main__":
    sampling = Decoding(do_sample=True, temperature=0.7)
    show("Sampling, temperature 0.7", ["Tell me a joke about computers."] * 3, sampling)

# %% [markdown]
# Beam search finds an answer that is more probable as a whole, though its first tokens may be less probable.

# %%
if __name__ == "__main__":
    prompt = "What is the sum of the first 100 natural numbers? Please think step by step."
    show("Beam search, 4 beams", [prompt], Decoding(num_beams=4))
