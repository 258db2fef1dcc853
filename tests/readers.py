"""What Handspun saves, opened by other readers: transformers 4, peft on it, and CTranslate2's converter.

    python tests/readers.py make FOLDER       with Handspun's environment: saves models, and what they answer
    python tests/readers.py check FOLDER      with an environment of the readers: the same ids and logits?

`make test-readers` runs both.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

TEXTS = ["Tell me a joke about computers.", "It's 1,234.5\n\n  user 12", "<|im_start|>user\nHi<|im_end|>"]
IDS = torch.arange(1, 61).view(1, -1) * 7 % 320


def make(folder: Path) -> None:
    """Save a Llama and a Qwen2 with rotations of their own, and an adapter on one of them."""
    from handspun.models.load import ChatModel, load
    from handspun.models.lora import add_lora
    from handspun.models.save import save_model
    from tiny import tiny_model, tiny_tokenizer

    for name, theta in (("llama", 1e5), ("qwen2", 1e6)):
        rope = {"rope_type": "default", "rope_theta": theta}
        model = tiny_model(name, rope_parameters=rope, hidden_size=64)  # type: ignore[arg-type]
        model.generation_config.temperature = 0.7  # without do_sample, as some published models have it
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = tokenizer.unk_token = "<|endoftext|>"  # which CTranslate2 wants to be there
        save_model(model, tokenizer, folder / name, dtype=torch.float32)
        _record(ChatModel(model, tokenizer, name), folder / name)
    base = load(str(folder / "llama"))
    base.model = add_lora(base.model, str(folder / "llama"), rank=4, alpha=8, dropout=0.0)
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    save_model(base.model, base.tokenizer, folder / "adapter", dtype=torch.float32)
    _record(base, folder / "adapter")


def check(folder: Path) -> None:
    """Open each with this environment's libraries; exits with the differences."""
    import ctranslate2
    import transformers
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"transformers {transformers.__version__}, CTranslate2 {ctranslate2.__version__}")
    problems = []
    for saved in sorted(folder.iterdir()):
        expected = json.loads((saved / "expected.json").read_text(encoding="utf-8"))
        auto = AutoPeftModelForCausalLM if (saved / "adapter_config.json").exists() else AutoModelForCausalLM
        model: Any = auto.from_pretrained(saved, torch_dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(saved)
        with torch.no_grad():
            off = (model(input_ids=IDS).logits - torch.tensor(expected["logits"])).abs().max().item()
        same_ids = [tokenizer(text)["input_ids"] for text in TEXTS] == expected["ids"]
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        print(f"{saved.name}: logits off by {off:.1e}, ids {'the same' if same_ids else 'DIFFERENT'}")
        if off > 1e-4 or not same_ids or chat != expected["chat"]:
            problems.append(saved.name)
        if auto is AutoModelForCausalLM:
            ctranslate2.converters.TransformersConverter(str(saved)).convert(str(saved / "ct2"), force=True)
            problems += _check_ctranslate2(ctranslate2, saved, tokenizer)
    sys.exit(f"different: {', '.join(problems)}" if problems else 0)


def _check_ctranslate2(ctranslate2: Any, saved: Path, tokenizer: Any) -> list[str]:
    """Compare its log-probabilities of the same ids."""
    expected = json.loads((saved / "expected.json").read_text(encoding="utf-8"))
    tokens = tokenizer.convert_ids_to_tokens(IDS[0].tolist())
    scores = ctranslate2.Generator(str(saved / "ct2")).score_batch([tokens])[0].log_probs
    logits = torch.tensor(expected["logits"])[0]
    wanted = logits.log_softmax(-1)[:-1].gather(1, IDS[0, 1:, None])[:, 0]
    off = (torch.tensor(scores[-len(wanted) :]) - wanted).abs().max().item()
    print(f"{saved.name} in CTranslate2: log-probabilities off by {off:.1e}")
    return [f"{saved.name} in CTranslate2"] if off > 1e-3 else []


def _record(chat: Any, folder: Path) -> None:
    with torch.no_grad():
        logits = chat.model(input_ids=IDS).logits
    hi = chat.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    expected = {"logits": logits.tolist(), "ids": [chat.tokenizer(t)["input_ids"] for t in TEXTS], "chat": hi}
    (folder / "expected.json").write_text(json.dumps(expected), encoding="utf-8")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
