"""The figures of decode.py as tables: who is measured, in which columns, and what they are compared with."""

import statistics
from collections.abc import Callable, Sequence
from itertools import takewhile

from decode_prompts import Column
from measurements import Contender, Results, Run, table, with_range

DECODING, OPENVINO = ".venv-peers-decoding", ".venv-peers-openvino"
CONTENDERS = {
    "transformers": Contender("transformers_decode.py", environment=DECODING),
    "Handspun": Contender("handspun_decode.py", {"options": {"weights": "float32"}}),
    "CTranslate2": Contender("ctranslate2_decode.py", environment=DECODING),
    "llama.cpp": Contender("llama_cpp_decode.py", environment=DECODING),
    "OpenVINO GenAI": Contender("openvino_decode.py", environment=OPENVINO),
    "Handspun, int8, plain": Contender("handspun_decode.py", {"options": {"weights": "int8"}, "native": False}),
    "Handspun, int8": Contender("handspun_decode.py", {"options": {"weights": "int8"}}),
}
PEERS = {
    "Handspun": ["transformers"],
    "Handspun, int8": ["CTranslate2", "llama.cpp", "OpenVINO GenAI"],
}
"""Whose weights are as long, or shorter."""
PLAIN = {"Handspun, int8": ["Handspun, int8, plain"]}
"""Without native kernels."""
FAMILIES = [[*peers, *PLAIN.get(name, []), name] for name, peers in PEERS.items()]

PREFILLED = 41
LENGTHS = (128, 512, 1024, 2048, 4096)
PREFILL, STREAMED = "prefill", "first token"
MAIN = {
    "1 row": Column(1),
    "8 rows": Column(8),
    "32 rows": Column(32),
    "4 beams, 1 prompt": Column(beams=4),
    "4 beams, 4 prompts": Column(4, beams=4),
    PREFILL: Column(tokens=PREFILLED, is_prefill=True),
}
ROWS = {f"{n} row{'s' if n > 1 else ''}": Column(n) for n in (1, 2, 4, 8, 16, 32)}
BEAMS = {f"{n} beams, 1 prompt": Column(beams=n) for n in (2, 4, 8)}
PROMPTS = {f"{n}-token prompt": Column(tokens=n, streamed=True) for n in LENGTHS}
COLUMNS = {**MAIN, STREAMED: Column(streamed=True), **PROMPTS, **ROWS, **BEAMS}
BANDWIDTH = "read bandwidth"


def key(name: str, title: str) -> str:
    """The name of a contender's runs of a column."""
    return f"{name}: {title}"


def rates(results: Results, name: str, title: str) -> list[float]:
    """New tokens a second of all repetitions of all runs; of a streamed answer, those after its first token."""
    runs = results.of(key(name, title))
    if COLUMNS[title].streamed:
        return [rate for run in runs for rate in run["rates"]]
    return [
        tokens / seconds for run in runs for tokens, seconds in zip(run["tokens"], run["seconds"], strict=True)
    ]


def waits(results: Results, name: str, title: str) -> list[float]:
    """Seconds to the first token, or of the prefill."""
    what = "first" if COLUMNS[title].streamed else "seconds"
    return [value for run in results.of(key(name, title)) for value in run[what]]


def rate_cell(results: Results, name: str, title: str) -> str:
    """The median, with the lowest and highest; * where an answer ended early."""
    found = rates(results, name, title)
    return with_range(found, 1) + "*" * ended_early(results, name, title) if found else ""


def wait_cell(results: Results, name: str, title: str) -> str:
    """The median of the seconds, with the lowest and highest."""
    found = waits(results, name, title)
    return with_range(found, 3) if found else ""


def main_cell(results: Results, name: str, title: str) -> str:
    """Tokens a second, or seconds of the prefill."""
    return (wait_cell if COLUMNS[title].is_prefill else rate_cell)(results, name, title)


def shown(results: Results, name: str, title: str) -> str:
    """What has been measured, in a line."""
    if COLUMNS[title].streamed:
        return f"{wait_cell(results, name, title)} s, then {rate_cell(results, name, title)} tokens/s"
    return main_cell(results, name, title)


def ended_early(results: Results, name: str, title: str) -> bool:
    """Whether fewer tokens were made than were asked for."""
    column, asked = COLUMNS[title], results.header["settings"]["new_tokens"]
    if column.streamed or column.is_prefill:
        return False
    return any(tokens < column.prompts * asked for run in results.of(key(name, title)) for tokens in run["tokens"])


def summary(results: Results) -> str:
    """All tables in which there is a figure."""
    everyone = [name for family in FAMILIES for name in family]
    tables = [rates_of_a_family(results, family) for family in FAMILIES]
    tables += [
        one_row(results, everyone),
        figures("seconds to the first token", results, everyone, [STREAMED, *PROMPTS], wait_cell),
        figures("tokens/s after it", results, everyone, [STREAMED, *PROMPTS], rate_cell),
        figures("new tokens/s", results, everyone, list(ROWS), rate_cell),
        figures("new tokens/s", results, everyone, ["1 row", *BEAMS], rate_cell),
        figures("peak memory, GB", results, everyone, [*MAIN, *PROMPTS], memory_cell),
        figures("leading tokens as transformers'", results, everyone, list(MAIN), agreeing),
    ]
    return "\n\n".join(filter(None, tables))


def rates_of_a_family(results: Results, family: Sequence[str]) -> str:
    """New tokens a second and seconds of prefill, and Handspun's ratio to the best peer."""
    names, titles = measured(results, family, list(MAIN)), list(MAIN)
    lines = [[*label(results, name), *(main_cell(results, name, title) for title in titles)] for name in names]
    ratios = [ratio(results, family[-1], title) for title in titles]
    if any(ratios):
        lines.append(["times the best peer's", "", *ratios])
    heads = [f"{PREFILLED}-token prefill, s" if title == PREFILL else title for title in titles]
    return table(["new tokens/s (lowest-highest)", "weights", *heads], lines) if names else ""


def ratio(results: Results, name: str, title: str) -> str:
    """Handspun's median speed in terms of the fastest peer's."""
    is_prefill = COLUMNS[title].is_prefill
    of = waits if is_prefill else rates
    peers = [statistics.median(found) for peer in PEERS[name] if (found := of(results, peer, title))]
    mine = of(results, name, title)
    if not mine or not peers:
        return ""
    speed = statistics.median(mine)
    return f"{min(peers) / speed:.2f}" if is_prefill else f"{speed / max(peers):.2f}"


def one_row(results: Results, everyone: Sequence[str]) -> str:
    """What a streamed answer's tokens after the first come to, of what reading all weights for each allows."""
    bandwidths = [value for run in results.of(BANDWIDTH) for value in run["gb_a_second"]]
    names = measured(results, everyone, [STREAMED])
    if not bandwidths or not names:
        return ""
    bandwidth = statistics.median(bandwidths)
    lines = []
    for name in names:
        read = results.of(key(name, STREAMED))[0]["bytes_a_token"] / 1e9
        reached = statistics.median(rates(results, name, STREAMED))
        share = f"{reached * read / bandwidth:.0%}"
        lines.append([*label(results, name), f"{read:.3f}", f"{bandwidth / read:.1f}", f"{reached:.1f}", share])
    threads = results.header["settings"]["threads"]
    head = f"one row, at {with_range(bandwidths, 1)} GB/s (the sum of a 1 GiB tensor by {threads} threads)"
    return table([head, "weights", "GB read a token", "limit, tokens/s", "reached", "share"], lines)


def figures(
    head: str,
    results: Results,
    names: Sequence[str],
    titles: Sequence[str],
    cell: Callable[[Results, str, str], str],
) -> str:
    """A table of the contenders that have any of the columns; empty without any."""
    lines = [
        [*label(results, name), *(cell(results, name, title) for title in titles)]
        for name in measured(results, names, titles)
    ]
    return table([head, "weights", *titles], lines) if lines else ""


def measured(results: Results, names: Sequence[str], titles: Sequence[str]) -> list[str]:
    """Those that have been, in any of the columns."""
    return [name for name in names if any(results.of(key(name, title)) for title in titles)]


def label(results: Results, name: str) -> tuple[str, str]:
    """The engine with its version, and how it holds the weights, as it names them itself."""
    run = next(run for title in COLUMNS for run in results.of(key(name, title)))
    return run["engine"], run["weights"]


def memory_cell(results: Results, name: str, title: str) -> str:
    """The median of the processes' peaks, loading included."""
    peaks = [run["peak_gb"] for run in results.of(key(name, title))]
    return f"{statistics.median(peaks):.1f}" if peaks else ""


def agreeing(results: Results, name: str, title: str) -> str:
    """In how many leading tokens a contender's first answer is that of transformers: of the first row, in the last
    repetition of the first run."""
    theirs, ours = (first_answer(results.of(key(each, title))) for each in ("transformers", name))
    if not theirs or not ours:
        return ""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs, ours, strict=False)))
    return f"{same} of {len(theirs)}"


def first_answer(runs: Sequence[Run]) -> list[int]:
    """Empty without runs."""
    return list(runs[0]["ids"]) if runs else []
