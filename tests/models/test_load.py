"""Models by name, what is refused and how, LoRA, and the end of a turn."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import handspun
from handspun.display import captured_log
from handspun.errors import ModelError, TemplateError
from handspun.models import embedded
from handspun.models import load as load_module
from handspun.models.end_of_turn import end_of_turn_is_new, eos_token_ids, make_end_of_turn_eos
from handspun.models.load import ChatModel, checkpoint_of_run, load, resolve_device
from handspun.models.lora import add_lora
from handspun.models.save import save_model
from tiny import tiny_model, tiny_tokenizer


def copy_of(folder: Path, tmp_path: Path, *, without: str) -> str:
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    for path in copied.glob(without):
        path.unlink()
    return str(copied)


def test_a_folder_loads_in_eval_mode_in_float32(tiny_folder: Path) -> None:
    chat = handspun.load(str(tiny_folder))
    assert not chat.model.training
    assert chat.model.dtype == torch.float32
    assert chat.template.end_of_turn == "<|im_end|>"


def test_a_misspelt_folder_is_told_its_neighbor(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean .*tiny-qwen2"):
        handspun.load(str(tiny_folder.with_name("tiny-qwen")))


def test_a_folder_without_weights(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without weights \(expected \*\.safetensors, found"):
        handspun.load(copy_of(tiny_folder, tmp_path, without="*.safetensors"))


def test_a_folder_without_a_config(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config\.json"):
        handspun.load(copy_of(tiny_folder, tmp_path, without="config.json"))


def test_pickled_weights_are_refused_with_the_remedy(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path, without="*.safetensors")
    (Path(folder) / "pytorch_model.bin").write_bytes(b"no matter what")
    with pytest.raises(ModelError, match="only as pickles .*save_pretrained"):
        handspun.load(folder)


def test_missing_weights_are_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path, without="nothing")
    config = json.loads((Path(folder) / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (Path(folder) / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lacks .* of its weights"):
        handspun.load(folder)


def test_an_unknown_hub_model_names_the_embedded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing cannot be downloaded from the hub") as caught:
        handspun.load("nobody/nothing")
    assert "model smollm2-135m" in str(caught.value)


def test_a_tokenizer_without_a_chat_template(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder, tmp_path, without="chat_template.jinja")
    with pytest.raises(TemplateError, match="no chat template"):
        _ = handspun.load(folder).template


def test_the_embedded_package_is_checked_by_its_sha256(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(embedded, "_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="expected sha256 0000.*found b179c952"):
        handspun.load("smollm2-135m")


def test_the_end_of_turn_becomes_an_eos_beside_the_old_one(tiny_chat: ChatModel) -> None:
    end_of_turn, end_of_text = map(tiny_chat.tokenizer.convert_tokens_to_ids, ["<|im_end|>", "<|endoftext|>"])
    assert eos_token_ids(tiny_chat.model) == [end_of_text]
    assert end_of_turn_is_new(tiny_chat)
    make_end_of_turn_eos(tiny_chat)
    assert eos_token_ids(tiny_chat.model) == [end_of_turn, end_of_text]
    assert not end_of_turn_is_new(tiny_chat)


def lora_of(chat: ChatModel, new_token_ids: list[int]) -> ChatModel:
    model = add_lora(chat.model, "tiny", rank=4, alpha=8, dropout=0.0, new_token_ids=new_token_ids)
    return ChatModel(model, chat.tokenizer, chat.name)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_trains_the_row_of_a_new_end_of_turn_in_embedding_and_head(tied: bool, tmp_path: Path) -> None:
    base: Any = tiny_model("qwen2", tie_word_embeddings=tied)
    before_in = base.get_input_embeddings().weight.detach().clone()
    before_out = base.get_output_embeddings().weight.detach().clone()
    base_folder = tmp_path / "base"
    base.save_pretrained(base_folder)
    tiny_tokenizer().save_pretrained(base_folder)
    row = 42
    chat = lora_of(ChatModel(base, tiny_tokenizer(), "tiny"), [row])
    chat.model.peft_config["default"].base_model_name_or_path = str(base_folder)
    optimizer = torch.optim.SGD([p for p in chat.model.parameters() if p.requires_grad], lr=1.0)
    ids = torch.tensor([[1, row, 3, row]])
    chat.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    save_model(chat.model, chat.tokenizer, tmp_path / "adapter", dtype=torch.float32)
    merged = handspun.load(str(tmp_path / "adapter")).model
    for before, after in [
        (before_in, merged.get_input_embeddings().weight),
        (before_out, merged.get_output_embeddings().weight),
    ]:
        changed = (after != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == [row]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_saved_once_and_read_back_tied(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    save_model(model, tiny_tokenizer(), tmp_path, dtype=dtype)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert "model.embed_tokens.weight" in names
    assert ("lm_head.weight" in names) is not tied
    assert dtypes == {"F32" if dtype == torch.float32 else "BF16"}
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) is tied
    assert again.dtype == dtype
    for name, parameter in model.named_parameters():
        near = 0.0 if dtype == torch.float32 else 2**-7  # rounded up or down to 8 bits
        torch.testing.assert_close(again.get_parameter(name).float(), parameter, rtol=near, atol=0.0)


def test_adapters_are_scaled_by_alpha_over_rank_and_the_file_says_what_was_given(tmp_path: Path) -> None:
    model = add_lora(tiny_model("qwen2"), "the-base", rank=3, alpha=12, dropout=0.25)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 2 * 7
    assert {layer.scaling["default"] for layer in layers} == {4.0}
    assert {layer.r["default"] for layer in layers} == {3}
    assert {layer.lora_dropout["default"].p for layer in layers} == {0.25}
    save_model(model, tiny_tokenizer(), tmp_path, dtype=torch.float32)
    saved = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    given = {"r": 3, "lora_alpha": 12, "lora_dropout": 0.25, "base_model_name_or_path": "the-base"}
    assert {name: saved[name] for name in given} == given
    assert not saved["use_rslora"]
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in saved["target_modules"]} == projections


@pytest.mark.parametrize("new_token_ids", [[], [42]])
def test_an_adapters_file_holds_adapters_alone(new_token_ids: list[int], tmp_path: Path) -> None:
    """Of the embedding only the rows that are trained, where there are some."""
    base = tiny_model("qwen2", tie_word_embeddings=True)
    model = add_lora(base, "b", rank=2, alpha=4, dropout=0.0, new_token_ids=new_token_ids)
    save_model(model, tiny_tokenizer(), tmp_path, dtype=torch.float32)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    others = {name: shape for name, shape in shapes.items() if ".lora_A." not in name and ".lora_B." not in name}
    assert len(shapes) - len(others) == 2 * 2 * 7
    assert list(others.values()) == [[1, 32]] * len(new_token_ids)


def test_an_adapter_is_a_standard_folder_that_peft_loads(tiny_folder: Path, tmp_path: Path) -> None:
    chat = lora_of(handspun.load(str(tiny_folder)), [])
    chat.model.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    with torch.no_grad():
        for name, parameter in chat.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_model(chat.model, chat.tokenizer, tmp_path / "adapter", dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    ours = handspun.load(str(tmp_path / "adapter")).model(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_checkpoint_of_run_is_the_best_or_the_last(tmp_path: Path) -> None:
    """A file or folder of another name is none, and neither is a checkpoint without a model."""
    assert checkpoint_of_run(tmp_path) is None
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    (tmp_path / "checkpoint-plan.md").touch()
    (tmp_path / "checkpoint-epoch-12").mkdir()
    assert checkpoint_of_run(tmp_path) is None
    for name, expected in [
        ("checkpoint-step-400", "checkpoint-step-400"),
        ("checkpoint-epoch-9", "checkpoint-epoch-9"),
        ("checkpoint-epoch-10", "checkpoint-epoch-10"),
        ("checkpoint-best", "checkpoint-best"),
        ("checkpoint-beta-11", "checkpoint-best"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}", encoding="utf-8")
        found = checkpoint_of_run(tmp_path)
        assert found is not None
        assert found.name == expected
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # a model itself
    assert checkpoint_of_run(tmp_path) is None


def test_load_a_runs_folder_loads_its_checkpoint_and_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "output" / "checkpoint-epoch-2"
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "output" / "run.json").write_text("{}", encoding="utf-8")
    with captured_log() as lines:
        chat = load(str(tmp_path / "output"))
    assert torch.equal(chat.model.lm_head.weight, model.lm_head.weight)
    assert f"{tmp_path / 'output'}: checkpoint-epoch-2 of this run" in lines


def test_resolve_device_auto_on_a_mac_says_once_that_it_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    load_module._log_untried_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with captured_log() as log:
        assert {resolve_device("auto").type, resolve_device("auto").type} == {"cpu"}
    assert log == ["running on the CPU: this Mac's GPU has not been tried (--device mps takes it)"]


@pytest.mark.parametrize(
    ("device", "hint"),
    [("gpu", "cuda"), ("GPU:0", "cuda"), ("metal", "mps"), ("cudaa", "cuda"), ("toaster", None)],
)
def test_resolve_device_of_a_wrong_name_says_which_one_was_meant(device: str, hint: str | None) -> None:
    with pytest.raises(ModelError) as raised:
        resolve_device(device)
    said = f" Did you mean {hint}?" if hint else ""
    assert str(raised.value).endswith(
        f"--device {device}: no such device (expected auto, cpu, cuda, cuda:1, or mps).{said}"
    )


@pytest.mark.parametrize("tied", [True, False])
def test_load_int8_keeps_norms_alone_in_float(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    chat = load(str(tmp_path), weights="int8")
    left = dict(chat.model.named_parameters())
    in_float = {name: weight for name, weight in left.items() if not weight.is_meta}
    layers = model.config.num_hidden_layers
    assert len(in_float) == 2 * layers + 1
    assert all("norm" in name for name in in_float)
    # A view of the file would keep all of it in memory.
    if (maps := Path("/proc/self/maps")).is_file():
        assert str(tmp_path / "model.safetensors") not in maps.read_text()
