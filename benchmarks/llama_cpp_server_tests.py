"""llama.cpp's own tests of its server, run against `handspun serve`.

    python benchmarks/llama_cpp_server_tests.py LLAMA.CPP/tools/server/tests [options of pytest]

In place of its program, they start a server with a small random model, behind benchmarks/llama_cpp_shim.py. Tests
of what only llama.cpp has are left out, each with its reason. The text that a test expects of its model is not
compared, unless a constraint decides it. It ends with 1 if any of the others fails.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from llama_cpp_shim import ServerInThreads

FILES = (
    *("basic", "security", "chat_completion", "completion", "tokenize", "template", "tool_call", "ctx_shift"),
    "compat_oai_responses",
)
OWN_OPTION = "an option or endpoint of its own"
OWN_FORM = "a form of request or answer of its own"
ITS_TOKENS = "counts the tokens of its model"
ORIGINS = "web pages of other origins are answered 403 or nothing, on purpose"
FIRST_DELTA = "wants null as the content of the first chunk, where OpenAI sends an empty text"
LEFT_OUT = {
    "test_server_multiple_addresses": "one address per server",
    "test_server_props": OWN_OPTION,
    "test_server_slots": OWN_OPTION,
    "test_load_split_model": OWN_OPTION,
    "test_server_model_aliases_and_tags": OWN_OPTION,
    "test_access_static_assets_without_api_key": "names the files of its page",
    "test_cors_": ORIGINS,
    "test_cors_proxy": OWN_OPTION,
    "test_local_media_file": "images",
    "test_completion[": ITS_TOKENS,
    "test_completion_stream[": ITS_TOKENS,
    "test_completion_with_openai_library": "wants a fingerprint that begins with b",
    "test_completion_stream_with_openai_library_stops": "a model from the hub",
    "test_json_prompt": OWN_FORM,
    "test_completion_with_tokens_input": OWN_FORM,
    "test_completion_response_fields": OWN_FORM,
    "test_completion_prompt_cache": ITS_TOKENS,
    "test_n_probs": OWN_FORM,
    "test_logit_bias[False": "logit_bias by text, which OpenAI does not have",
    "test_chat_completion[": ITS_TOKENS,
    "test_chat_completion_cached_tokens": ITS_TOKENS,
    "test_chat_completion_stream": FIRST_DELTA,
    "test_chat_completion_with_openai_library": "wants a fingerprint that begins with b",
    "test_chat_template": OWN_FORM,
    "test_apply_chat_template": "a template by its name",
    "test_completion_with_response_format[response_format0": OWN_FORM,
    "test_completion_with_response_format[response_format1": OWN_FORM,
    "test_completion_with_json_schema": OWN_FORM,
    "test_completion_with_grammar": "grammars in GBNF",
    "test_chat_completion_with_timings_per_token": OWN_FORM,
    "test_logprobs_stream": FIRST_DELTA,
    "test_context_size_exceeded": "wants an error type that OpenAI does not have",
    "test_return_progress": "counts its batches",
    "test_chat_completions_token_count": OWN_OPTION,
    "test_verbose_debug": OWN_FORM,
    "test_tokenize_with_bos": ITS_TOKENS,
    "test_reasoning": OWN_OPTION,
    "test_date_inside_prompt": "a variable that transformers does not give a template either",
    "test_add_generation_prompt": "a prompt that nothing answers, which is refused",
    "test_completion_without_tool_call_fast[meta-llama-Llama-3.3-70B-Instruct": FIRST_DELTA,
    "test_responses_stream_with_llama_telemetry": OWN_FORM,
    "test_ctx_shift_enabled": OWN_OPTION,
    "test_ctx_shift_disabled_short_prompt": OWN_FORM,
    "test_ctx_shift_disabled_long_prompt": "compares the words of an error",
}
"""By the beginning of a test's name, the longest that fits."""
ALWAYS = {"test_completion_without_tool_call_fast": "NORMAL"}
DECIDED = ("response_format2", "response_format3")
"""Cases whose text a constraint decides."""


class Plugin:
    """Leaves tests out, and lists what became of the others."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.reasons: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left_out = []
        for item in list(items):
            if "slow" in item.keywords:
                reason: str | None = "a model from the hub"
            else:
                reason = reason_against(item.name)
            if reason is not None:
                self.reasons[reason] += 1
                left_out.append(item)
                items.remove(item)
                continue
            # "Fails on linux": the same answer with and without the cache. Here it must be.
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skip"]
        config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        utils, module = sys.modules["utils"], item.module  # type: ignore[attr-defined]
        is_decided = any(name in item.name for name in DECIDED)
        module.match_regex = utils.match_regex if is_decided else lambda *_: True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.split("/")[-1]] = report.outcome


def reason_against(name: str) -> str | None:
    """Why a test is left out."""
    if any(name.startswith(test) and case in name for test, case in ALWAYS.items()):
        return None
    fitting = [beginning for beginning in LEFT_OUT if name.startswith(beginning)]
    return LEFT_OUT[max(fitting, key=len)] if fitting else None


def main() -> None:
    folder, *options = sys.argv[1:] or sys.exit(__doc__)
    tests = Path(folder).resolve()
    os.chdir(tests)
    sys.modules["wget"] = ModuleType("wget")  # which downloads models
    sys.path.insert(0, str(tests))
    import utils  # type: ignore[import-not-found]  # llama.cpp's

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.subprocess = SimpleNamespace(Popen=ServerInThreads, TimeoutExpired=TimeoutError)
    plugin = Plugin()
    names = [f"unit/test_{name}.py" for name in FILES]
    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(tests), *options, *names], [plugin])
    print(report(plugin))
    sys.exit(int(code))


def report(plugin: Plugin) -> str:
    counts = Counter(plugin.outcomes.values())
    lines = [f"{count} {outcome}" for outcome, count in counts.items()]
    lines += [f"not passed: {name}" for name, outcome in plugin.outcomes.items() if outcome != "passed"]
    lines += [f"left out, {reason}: {count}" for reason, count in plugin.reasons.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
