"""Other forms of a checkpoint say what the checkpoint says."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.normalizers import NFC
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import handspun
from handspun.config import ExportConfig
from handspun.display import captured_log
from handspun.errors import ConfigError, ModelError, OutputError
from handspun.exports.export import export
from handspun.exports.gguf_file import write_gguf
from handspun.exports.gguf_tokenizer import _pre_tokenizer_name
from handspun.exports.hub import hub, push_folder
from handspun.models.load import ChatModel
from handspun.runs.train import train
from handspun.training.checkpoint import is_checkpoint
from small_runs import ROWS, quiet_console
from small_runs import brief_config as config
from tiny import tiny_model, tiny_tokenizer

TEXTS = [
    "Tell me a joke about computers.",
    "It's 1,234.5 — naïve café\n\n  user  12",
    "<|im_start|>user\nHi<|im_end|>",
]


def tiny_qwen3() -> Qwen3ForCausalLM:
    """With heads of 128, as all of Qwen3's are: transformers takes no other size from a GGUF file."""
    shape: dict[str, Any] = {"vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 512,
    }
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, initializer_range=0.1, tie_word_embeddings=True)).eval()


def tiny(family: str) -> ChatModel:
    if family == "qwen3":
        return ChatModel(tiny_qwen3(), tiny_tokenizer(), family)
    model = tiny_model(family, initializer_range=0.1, hidden_size=64)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return ChatModel(model, tiny_tokenizer(), family)


def read_back(file: Path) -> Any:
    dequantized = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=dequantized
    ).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 41).view(1, -1) * 7 % 320
    found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("q8_0", 5e-2), ("q5_0", 0.3), ("q4_0", 0.6)]
)
def test_a_gguf_read_back_gives_the_same_logits(tmp_path: Path, family: str, kind: Any, tolerance: float) -> None:
    chat = tiny(family)
    file = tmp_path / "model.gguf"
    write_gguf(chat, file, kind)
    expected = logits(chat.model)
    found = logits(read_back(file))
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.1.ffn_down.weight"] == kind.upper()
    assert types["blk.1.attn_norm.weight"] == "F32"


def test_llamas_q_is_in_the_order_of_llama_cpps_rotation(tmp_path: Path) -> None:
    """A head's row i of the first half goes to 2 i, row i of the second to 2 i + 1."""
    model = tiny_model("llama", hidden_size=64, attention_bias=True)
    attention = model.model.layers[0].self_attn
    torch.nn.init.normal_(attention.k_proj.bias, generator=torch.Generator().manual_seed(0))
    write_gguf(ChatModel(model, tiny_tokenizer(), "llama"), tmp_path / "model.gguf", "f32")
    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    query = attention.q_proj.weight.detach().numpy()  # 4 heads of 16 rows
    np.testing.assert_array_equal(written["blk.0.attn_q.weight"][:4], query[[0, 8, 1, 9]])
    np.testing.assert_array_equal(written["blk.0.attn_q.weight"][16:18], query[[16, 24]])
    key = attention.k_proj.bias.detach().numpy()  # 2 heads of 16
    np.testing.assert_array_equal(written["blk.0.attn_k.bias"][:4], key[[0, 8, 1, 9]])
    value = attention.v_proj.weight.detach().numpy()
    np.testing.assert_array_equal(written["blk.0.attn_v.weight"], value)


def test_the_tokenizer_comes_with_it(tmp_path: Path) -> None:
    chat = tiny("qwen2")
    write_gguf(chat, tmp_path / "model.gguf", "f32")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert found.chat_template == chat.tokenizer.chat_template
    for text in TEXTS:
        assert found(text)["input_ids"] == chat.tokenizer(text)["input_ids"]
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    end_of_turn = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end_of_turn
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[end_of_turn] == gguf.TokenType.CONTROL
    assert kinds[chat.tokenizer.convert_tokens_to_ids("<tool_call>")] == gguf.TokenType.USER_DEFINED
    assert kinds[0] == gguf.TokenType.NORMAL
    assert kinds[329] == gguf.TokenType.UNUSED  # a row of the embedding without a token


def test_pre_tokenizers_go_by_their_rules() -> None:
    qwen = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": qwen}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert _pre_tokenizer_name({"type": "Sequence", "pretokenizers": [split, level]}, "m") == "qwen2"
    assert _pre_tokenizer_name({"type": "Sequence", "pretokenizers": [digits, words]}, "m") == "smollm"
    assert _pre_tokenizer_name(words, "m") == "gpt-2"
    with pytest.raises(ModelError, match="splits text by rules that --gguf does not support"):
        _pre_tokenizer_name({"type": "Whitespace"}, "m")


def test_rows_that_are_no_blocks_are_f16_and_said(tmp_path: Path) -> None:
    chat = ChatModel(tiny_model("qwen2", intermediate_size=48), tiny_tokenizer(), "tiny")
    with captured_log() as log:
        write_gguf(chat, tmp_path / "model.gguf", "q8_0")
    assert "blk.0.ffn_down.weight" in log[0]
    assert logits(read_back(tmp_path / "model.gguf")).isfinite().all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding windows"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "scaled"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    chat = ChatModel(tiny_model("qwen2", **options), tiny_tokenizer(), "tiny")
    with pytest.raises(ModelError, match=reason):
        write_gguf(chat, tmp_path / "model.gguf", "f32")


def test_values_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    chat = tiny("qwen2")
    with torch.no_grad():
        chat.model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ModelError, match="f32"):
        write_gguf(chat, tmp_path / "model.gguf", "f16")


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run with LoRA, whose embedding rows are trained too."""
    data = tmp_path_factory.mktemp("run") / "train.csv"
    data.write_text(ROWS, encoding="utf-8")
    run = train(config(tiny_folder, data, lora=True, num_epochs=1, learning_rate=1e-2), console=quiet_console())
    return run.checkpoints[-1]


def test_a_merged_adapter_is_an_ordinary_folder_with_the_same_logits(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    export(ExportConfig(model=str(adapter), output_dir=str(folder), merge=True))
    assert is_checkpoint(folder)
    assert not (folder / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)).eval())
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-6)
    untouched = logits(AutoModelForCausalLM.from_pretrained(tiny_folder))
    assert (untouched - expected).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card
    assert "merged" in card


def test_a_merged_gguf_is_the_adapter_too(adapter: Path, tmp_path: Path) -> None:
    export(ExportConfig(model=str(adapter), output_dir=str(tmp_path), gguf="f32"))
    file = next(tmp_path.glob("*.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{file.stem}.Modelfile", file.name]
    torch.testing.assert_close(
        logits(read_back(file)), logits(handspun.load(str(adapter)).model), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(OutputError, match="--overwrite"):
        export(ExportConfig(model=str(adapter), output_dir=str(tmp_path), gguf="f32"))


def test_a_failed_export_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("handspun.exports.gguf_file.GGUFWriter.write_tensor_data", broken)
    with pytest.raises(OutputError, match="no space left on the disk"):
        export(ExportConfig(model=str(adapter), output_dir=str(tmp_path), gguf="f16"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_replaced_unasked(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="--overwrite"):
        export(ExportConfig(model=str(adapter), output_dir=str(tmp_path), merge=True))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_merge_does_not_replace_the_folder_that_it_reads(adapter: Path) -> None:
    for folder in (adapter, adapter.parent):
        wanted = ExportConfig(model=str(adapter), output_dir=str(folder), merge=True, overwrite=True)
        with pytest.raises(OutputError, match="would be replaced"):
            export(wanted)
    assert is_checkpoint(adapter)


def test_an_export_of_nothing_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="merge=True, gguf or push"):
        ExportConfig(model="m")
    with pytest.raises(ConfigError, match="output_dir is missing"):
        ExportConfig(model="m", merge=True)
    with pytest.raises(ConfigError, match="Add merge=True or gguf"):
        ExportConfig(model="Qwen/Qwen2.5-0.5B", push="me/model")


class Hub:
    """Stands in for HfApi: remembers what it was sent."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if self.error:
            raise self.error
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


def test_a_push_makes_the_repository_and_sends_the_folder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in, tokens = Hub(), []
    monkeypatch.setattr("handspun.exports.hub.HfApi", lambda token: tokens.append(token) or stand_in)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    folder = tmp_path / "merged"
    wanted = ExportConfig(model=str(adapter), output_dir=str(folder), merge=True, push="me/model")
    with captured_log() as log:
        export(wanted)
    assert tokens == ["hf_of_the_environment"]
    (first, created), (second, sent) = stand_in.calls
    assert (first, created) == ("create_repo", {"repo_id": "me/model", "private": True, "exist_ok": True})
    assert (second, sent["repo_id"], sent["folder_path"]) == ("upload_folder", "me/model", folder)
    assert "training_state/**" in sent["ignore_patterns"]
    assert "https://huggingface.co/me/model" in log[-1]
    assert not any("hf_of_the_environment" in text for text in log)


def test_push_of_an_adapter_on_a_local_base_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = Hub()
    monkeypatch.setattr("handspun.exports.hub.HfApi", lambda token: stand_in)  # noqa: ARG005
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    with pytest.raises(OutputError, match=r"adapter_config\.json refers to its base model by a local path, /"):
        export(ExportConfig(model=str(adapter), push="me/model"))
    assert stand_in.calls == []


def test_write_gguf_says_what_the_file_leaves_out(tmp_path: Path) -> None:
    chat = tiny("qwen2")
    chat.tokenizer.backend_tokenizer.normalizer = NFC()
    ends = chat.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    chat.model.generation_config = GenerationConfig(eos_token_id=ends, do_sample=True, temperature=0.7)
    with captured_log() as log:
        write_gguf(chat, tmp_path / "model.gguf", "f32")
    assert [text.removeprefix("not in the file: ")[:40] for text in log] == [
        "its tokenizer normalizes text first (NFC",
        "a GGUF file names one end and one end of",
        "generation_config's defaults: do_sample ",
    ]
    assert "here <|endoftext|> ends generation too" in log[1]
    assert "temperature 0.7. Set them" in log[2]


def test_write_gguf_keeps_all_named_templates(tmp_path: Path) -> None:
    chat = tiny("qwen2")
    default = str(chat.tokenizer.chat_template)
    chat.tokenizer.chat_template = {"default": default, "tool_use": "{{ tools }}" + default}
    write_gguf(chat, tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == default
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}" + default


def test_a_merged_adapter_on_a_tied_embedding_keeps_the_head(tiny_folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        adapted: Any = get_peft_model(base, lora)
    torch.nn.init.normal_(
        adapted.base_model.model.model.embed_tokens.lora_embedding_B["default"],
        generator=torch.Generator().manual_seed(0),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    folder = tmp_path / "merged"
    export(ExportConfig(model=str(tmp_path / "adapter"), output_dir=str(folder), merge=True))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged), logits(adapted.eval()), rtol=1e-5, atol=1e-6)


def test_a_push_without_a_token_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        export(ExportConfig(model="no/model", output_dir="x", merge=True, push="me/model"))
    assert hub("hf_given").token == "hf_given"


def test_a_push_without_a_network_says_that_the_folder_is_whole(tmp_path: Path) -> None:
    unreachable: Any = Hub(ConnectionError("Name or service not known"))
    with pytest.raises(OutputError, match="could not be pushed to me/model: Name or service not known"):
        push_folder(tmp_path, "me/model", unreachable, private=True)


def test_the_manifest_of_a_merged_folder_names_its_source(adapter: Path, tmp_path: Path) -> None:
    export(
        ExportConfig(model=str(adapter), output_dir=str(tmp_path / "m"), merge=True, save_dtype="bfloat16"),
    )
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["merged_from"] == adapter.name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").dtype == torch.bfloat16
