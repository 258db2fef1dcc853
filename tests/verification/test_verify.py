"""`handspun verify`: right models pass, each check can fail, and a rounding tie is told from a bug."""

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

import handspun
from backends import AVAILABLE, backend, needs_kernels
from handspun.cli import main
from handspun.cli.views.verification import findings_json, findings_table
from handspun.data.chat_template import ChatTemplate, TokenizedExample
from handspun.decoding import beam, filters, next_tokens
from handspun.decoding.engines.fused import FusedEngine
from handspun.errors import ConfigError
from handspun.kernels import kernels_for
from handspun.kernels.reference import ReferenceKernels, exact_sums
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from handspun.training import packed
from handspun.verification import processors as sampling
from handspun.verification.answers import check_batches, check_beams, check_greedy, check_logits
from handspun.verification.int8 import check_int8, compared_kernels, compared_sums
from handspun.verification.processors import check_distributions, check_draws, check_processors, goodness_of_fit
from handspun.verification.reference import (
    Divergence,
    Finding,
    Reference,
    build_reference,
    compared,
    first_difference,
)
from handspun.verification.training import check_packed, check_prefix
from handspun.verification.verify import DEFAULT_PROMPTS, perplexities, verify
from tiny import tiny_model, tiny_tokenizer

PROMPTS = ("Say 3.", "Tell me a joke about computers.", "你好, list the colors.")


def chat_of(model: PreTrainedModel, engine_of: PreTrainedModel | None = None, *, int8: bool = False) -> ChatModel:
    """engine_of: whose weights the engine has, if not the model's."""
    fused = None if engine_of is None else fused_weights(engine_of, int8=int8)
    return ChatModel(model, tiny_tokenizer(), "tiny", fused)


def material_of(chat: ChatModel) -> Reference:
    return build_reference(chat, PROMPTS, is_chat=True, max_new_tokens=10)


@pytest.fixture(scope="module")
def material() -> Reference:
    return material_of(chat_of(tiny_model("qwen2")))


def statuses(findings: Sequence[Finding]) -> list[str]:
    return [finding.status for finding in findings]


def sliding_window() -> PreTrainedModel:
    shapes = tiny_model("llama").config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = MistralConfig(
        **{name: shapes[name] for name in names}, num_key_value_heads=2, initializer_range=0.5, sliding_window=8,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), sliding_window], ids=["fused", "transformers"])
def test_a_right_model_passes(make: Callable[[], PreTrainedModel]) -> None:
    findings = list(verify(chat_of(make()), PROMPTS, max_new_tokens=10))
    assert [finding for finding in findings if finding.status == "fail"] == []
    checks = {finding.check for finding in findings}
    assert checks == {
        "logits", "greedy", "beams", "processors", "sampling", "draws", "batches", "int8", "packed", "prompts",
    }  # fmt: skip


@pytest.mark.slow
def test_the_model_is_afterwards_as_it_was() -> None:
    chat = chat_of(tiny_model("llama"))
    chat.model.generation_config.repetition_penalty = 1.5
    frozen = chat.model.get_input_embeddings().weight
    frozen.requires_grad_(False)  # as a merged adapter leaves it
    before, state = {name: p.clone() for name, p in chat.model.named_parameters()}, torch.random.get_rng_state()
    findings = list(verify(chat, PROMPTS, max_new_tokens=4))
    assert "fail" not in statuses(findings)  # nothing of the generation_config came in
    assert torch.equal(torch.random.get_rng_state(), state)
    assert chat.model.generation_config.repetition_penalty == 1.5
    assert [p.requires_grad for p in chat.model.parameters()].count(False) == 1
    for name, parameter in chat.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_an_engine_with_other_weights_fails() -> None:
    other = tiny_model("qwen2")
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight *= 2
    material = material_of(chat_of(tiny_model("qwen2"), other))
    assert check_logits(material).status == "fail"
    plain, _ = check_greedy(material)
    assert plain.status == "fail"
    assert all(divergence.margin > divergence.rounding for divergence in plain.divergences)
    assert "fail" in statuses(list(check_beams(material)))
    assert "fail" in statuses(list(check_distributions(material)))


def test_an_engine_without_a_number_fails() -> None:
    other = tiny_model("qwen2")
    with torch.no_grad():
        other.model.norm.weight[0] = torch.nan
    assert check_logits(material_of(chat_of(tiny_model("qwen2"), other))).status == "fail"


def test_a_tie_is_told_from_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with the same row in the head: the reference takes one, by how this CPU rounds, and an engine
    that computes the other's logit larger by a rounding error takes that one. To take the second best of the same
    logits is a bug."""
    model = tiny_model("qwen2")
    first = material_of(chat_of(model)).answers[0].token_ids[0]
    model, nudged = tiny_model("qwen2"), tiny_model("qwen2")
    with torch.no_grad():
        for one in (model, nudged):
            one.lm_head.weight[329] = one.lm_head.weight[first]
    taken = material_of(chat_of(model)).answers[0].token_ids[0]
    with torch.no_grad():
        nudged.lm_head.weight[first if taken == 329 else 329] *= 1 + 1e-6
    material = material_of(chat_of(model, nudged))
    assert check_logits(material).status == "pass"
    plain, _ = check_greedy(material)
    assert plain.status == "tie"
    assert (plain.divergences[0].prompt, plain.divergences[0].token) == (1, 1)
    assert plain.divergences[0].margin < 1e-5
    assert set(statuses(list(check_beams(material)))) <= {"pass", "tie"}

    material = material_of(chat_of(tiny_model("qwen2")))
    monkeypatch.setattr(next_tokens, "select_tokens", lambda logits, **_: logits.topk(2).indices[:, 1])
    assert statuses(list(check_greedy(material))) == ["fail", "fail"]


def test_a_beam_search_of_other_rules_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eleventh token ends an answer, so that there are hypotheses of all lengths."""
    chat = chat_of(tiny_model("qwen2"))
    chat.model.generation_config.eos_token_id = list(range(0, 330, 11))
    material = material_of(chat)
    assert set(statuses(list(check_beams(material)))) == {"pass"}
    monkeypatch.setattr(beam.BeamState, "keep", lambda search, ended: search.hypotheses.extend(ended))
    findings = list(check_beams(material))
    assert "fail" in statuses(findings)
    assert any(divergence.margin > divergence.rounding for one in findings for divergence in one.divergences)


def test_beams_with_other_scores_fail(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    grow = beam.BeamTrace.grow

    def higher(tree: Any, parents: Any, tokens: Any, scores: list[float], **more: Any) -> None:
        grow(tree, parents, tokens, [score + 0.1 for score in scores], **more)

    monkeypatch.setattr(beam.BeamTrace, "grow", higher)
    assert statuses(list(check_beams(material))) == ["fail"] * 3


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        ("temperature", {"temperature"}),
        ("top_k", {"top_k"}),
        ("top_p", {"top_p"}),
        ("min_p", {"min_p"}),
        ("typical_p", {"typical_p"}),
        ("repetition_penalty", {"repetition_penalty"}),
        ("no_repeat_ngram", {"no_repeat_ngram_size"}),
        ("sequence_bias", {"logit_bias", "sequence_bias", "bad_words"}),
        ("mask_tokens", {"min_new_tokens", "suppress_tokens", "begin_suppress_tokens"}),
    ],
)
def test_a_processor_that_does_nothing_fails(
    material: Reference, monkeypatch: pytest.MonkeyPatch, name: str, cases: set[str]
) -> None:
    assert {finding.case for finding in check_processors(material) if finding.status == "pass"} >= cases
    monkeypatch.setattr(filters, name, lambda logits, *_: logits)
    assert {finding.case for finding in check_processors(material) if finding.status == "fail"} == cases


def test_a_processor_that_is_a_little_off_fails(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    right = filters.temperature
    monkeypatch.setattr(filters, "temperature", lambda logits, value: right(logits, 1.0001 * value))
    assert {finding.case for finding in check_processors(material) if finding.status == "fail"} == {"temperature"}
    assert "fail" in statuses(list(check_distributions(material)))


def test_draws_of_another_distribution_fail(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sampling.select_tokens
    assert statuses(list(check_draws(material))) == ["pass"] * 4
    monkeypatch.setattr(sampling, "select_tokens", lambda logits, draws: right(1.3 * logits, draws=draws))
    assert statuses(list(check_draws(material))) == ["fail"] * 4


def test_draws_that_forget_the_step_fail(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sampling.select_tokens
    monkeypatch.setattr(
        sampling, "select_tokens", lambda logits, draws: right(logits, draws=[(stream, 0) for stream, _ in draws])
    )
    assert statuses(list(check_draws(material))) == ["pass", "pass", "pass", "fail"]


def test_goodness_of_fit_by_hand() -> None:
    """30 and 70 draws where 50 each are expected: chi-squared is 16, and p = erfc(sqrt(8)). Of 100 draws, 4, 3 and
    3 expected ones share a bin."""
    halves = torch.tensor([0.5, 0.5, 0.0])
    p, bins = goodness_of_fit(torch.tensor([0] * 30 + [1] * 70), halves)
    assert (p, bins) == (pytest.approx(6.334e-5, rel=1e-3), 2)
    p, bins = goodness_of_fit(torch.tensor([0] * 90 + [1] * 10), torch.tensor([0.9, 0.04, 0.03, 0.03]))
    assert (p, bins) == (pytest.approx(1.0), 2)
    assert goodness_of_fit(torch.tensor([0] * 50 + [1] * 49 + [2]), halves)[0] == 0.0  # an impossible one


def in_other_batches(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An engine whose logits are changed where several rows are fed."""
    right = FusedEngine.forward

    def forward(engine: FusedEngine, feeds: Any) -> Tensor:
        logits = right(engine, feeds)
        return change(logits) if len(feeds) > 1 else logits

    return forward


def test_answers_that_depend_on_the_batch_fail(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(list(check_batches(material, material.chat, "", exact=False))) == ["pass"] * 3
    monkeypatch.setattr(FusedEngine, "forward", in_other_batches(lambda logits: logits.roll(1, 0)))
    assert statuses(list(check_batches(material, material.chat, "", exact=False))) == ["fail"] * 3


def test_int8_is_held_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    material = material_of(chat_of(tiny_model("qwen2")))
    rounded = chat_of(tiny_model("qwen2"), tiny_model("qwen2"), int8=True)
    assert statuses(list(check_batches(material, rounded, "int8", exact=True))) == ["pass"] * 3
    monkeypatch.setattr(FusedEngine, "forward", in_other_batches(lambda logits: logits * (1 + 1e-7)))
    assert statuses(list(check_batches(material, rounded, "int8", exact=True)))[0] == "fail"
    assert statuses(list(check_batches(material, material.chat, "float32", exact=False))) == ["pass"] * 3


def test_packed_gradients_that_are_a_little_off_fail(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed.linear_cross_entropy_backward
    assert statuses(list(check_packed(material))) == ["pass", "pass"]

    def off(*arguments: Any) -> tuple[float, Tensor]:
        loss, gradient = right(*arguments)
        return loss, gradient * 1.0002

    monkeypatch.setattr(packed, "linear_cross_entropy_backward", off)
    assert statuses(list(check_packed(material))) == ["pass", "fail"]


def test_a_model_that_is_not_packed_says_why() -> None:
    [finding] = check_packed(material_of(chat_of(sliding_window())))
    assert (finding.status, "padded" in finding.found, "sliding" in finding.found) == ("info", True, True)


def test_prompts_that_are_not_what_is_trained_fail(material: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_prefix(material).status == "pass"
    right = ChatTemplate.encode

    def shifted(template: ChatTemplate, messages: Any) -> list[TokenizedExample]:
        return [
            TokenizedExample([5, *made.input_ids], [False, *made.loss_mask]) for made in right(template, messages)
        ]

    monkeypatch.setattr(ChatTemplate, "encode", shifted)
    assert check_prefix(material).status == "fail"


def test_first_difference_by_hand() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("Say 3.\nTell me a joke.\n", encoding="utf-8")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_the_command_prints_a_table_or_json_and_ends_with_zero(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, prompts_file: Path, weights: str
) -> None:
    command = ["verify", "--model", str(tiny_folder), "--prompts-file", str(prompts_file), "--weights", weights]
    command += ["--max-new-tokens", "6"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "Handspun computes the same as transformers" in printed
    assert ("int8, greedy" in " ".join(printed.split())) == (weights == "int8")
    assert main([*command, "--json", "--no-chat"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["passed"] is True
    assert {finding["check"] for finding in record["findings"]} >= {"logits", "beams", "packed"}


def test_margins_without_limit_are_json() -> None:
    apart = Divergence(prompt=1, token=2, ours="a", theirs="", margin=math.inf, rounding=1e-4)
    finding = compared("greedy", "plain", "", [apart])
    record = json.loads(findings_json([finding], "tiny"))
    assert (record["passed"], record["findings"][0]["divergences"][0]["margin"]) == (False, None)
    shown = io.StringIO()
    Console(file=shown, width=80).print(findings_table([finding]))
    assert "margin inf" in " ".join(shown.getvalue().split())


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="there are 33 prompts"):
        list(verify(chat_of(tiny_model("qwen2")), ["Hi"] * 33))


@pytest.mark.slow
def test_a_failure_is_exit_code_one(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, prompts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "top_k", lambda logits, _: logits)
    command = ["verify", "--model", str(tiny_folder), "--prompts-file", str(prompts_file), "--max-new-tokens", "4"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "FAIL" in printed.out
    assert "checks failed (processors" in printed.err
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert main([*command, "--max-new-tokens", "0"]) == 2


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model_passes(smollm2: ChatModel) -> None:
    rounded = handspun.load("smollm2-135m", weights="int8")
    prompts = [DEFAULT_PROMPTS[number] for number in (0, 3)]  # a few words, and Chinese
    findings = list(verify(smollm2, prompts, rounded=rounded, rounded_name="int8", max_new_tokens=6))
    assert [finding for finding in findings if finding.status == "fail"] == []
    passed = {(finding.check, finding.case) for finding in findings if finding.status == "pass"}
    assert {("batches", "int8, logits"), ("batches", "int8, greedy"), ("batches", "int8, sampled")} <= passed


@pytest.mark.cpu
def test_int8_sums_are_compared_one_by_one() -> None:
    findings = list(check_int8(torch.device("cpu")))
    cases = ["decoding", "training, forward", "training, backward"]
    name = kernels_for(torch.device("cpu")).name
    assert [finding.case for finding in findings] == [*cases, f"{name} kernels, compared with the plain form"]
    assert statuses(findings) == ["pass"] * 3 + ["info" if name == "reference" else "pass"]


@needs_kernels
def test_kernels_that_differ_in_one_bit_fail() -> None:
    class Wrong(ReferenceKernels):
        name = "wrong"

        def attend(self, queries: Tensor, pool: Tensor, spans: Any) -> Tensor:
            found = super().attend(queries, pool, spans)
            found[7, 7] = found[7, 7].nextafter(torch.tensor(torch.inf))
            return found

    finding = compared_kernels(Wrong(attends=True))
    assert finding.status == "fail"
    assert finding.found.startswith("1 of ")
    assert compared_kernels(backend(AVAILABLE[0])).status == "pass"
    assert compared_kernels(ReferenceKernels()).status == "info"


def test_perplexities_by_hand() -> None:
    """A model whose head is zeros takes any of 330 tokens to be as likely."""
    exact, zeros = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        zeros.lm_head.weight.zero_()
    material = material_of(chat_of(exact))
    finding = perplexities(material, chat_of(exact), chat_of(zeros), "zeros")
    assert finding.status == "info"
    assert finding.found.startswith(f"{zeros.config.vocab_size}.000, float32 ")


def test_one_wrong_int8_sum_fails() -> None:
    """Of a hundred thousand, by one."""

    def wrong(rows: Tensor, weight: Tensor) -> Tensor:
        sums = exact_sums(rows, weight)
        sums[-1, -1] += len(rows) == 130
        return sums

    finding = compared_sums("decoding", wrong, torch.device("cpu"))
    assert (finding.status, finding.found) == ("fail", "1 of 19506 sums are not exact")
