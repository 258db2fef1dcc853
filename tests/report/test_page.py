"""report.html: the facts are in it, nothing is fetched, hostile texts stay texts."""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import handspun
from handspun.cli import main
from handspun.errors import OutputError, StoppedError
from handspun.report.page import comparison_page, report_page, write_report
from handspun.runs import outcome
from handspun.runs.metrics import RunFiles, read_metrics, read_run
from handspun.runs.train import train
from html_page import Page, points_of
from report_in_a_browser import SCHEMES, WIDTHS, browser, overflow, violations
from small_runs import ROWS, config, quiet_console

HOSTILE = "<script>alert(1)</script> \"'><img src=http://evil.example/x onerror=alert(2)> {{ 7 * 7 }} &amp; </pre>"
EMPTY_ROW = 21


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with a row that was dropped and one that is hostile."""
    data = tmp_path_factory.mktemp("report") / "train.csv"
    hostile = HOSTILE.replace('"', '""')
    data.write_text(f'{ROWS}Say it.,,\n"{hostile}",,"{hostile}"\n', encoding="utf-8")
    train(config(tiny_folder, data, sample_prompts=("Say 3.", HOSTILE)), console=quiet_console())
    return data.with_name("output")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies of the run under names of their own, to be changed."""

    def make(name: str = "run", **facts: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("run.json", "metrics.jsonl", "report_data.json"):
            shutil.copy(finished / file, folder)
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        (folder / "run.json").write_text(json.dumps({**record, **facts}), encoding="utf-8")
        return folder

    return make


def keep_events(folder: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves only some of a run's events."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if wanted(json.loads(line))]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def without(folder: Path, *keys: str) -> None:
    """Takes away what was kept for the report at the end of the run."""
    kept = json.loads((folder / "report_data.json").read_text(encoding="utf-8"))
    left = {key: value for key, value in kept.items() if key not in keys}
    (folder / "report_data.json").write_text(json.dumps(left), encoding="utf-8")


def test_the_facts_are_in_the_page(finished: Path, tiny_folder: Path) -> None:
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    metrics = read_metrics(finished / "metrics.jsonl")
    text = Page((finished / "report.html").read_text(encoding="utf-8")).text
    first, *_, last = [event["loss"] for event in metrics.evaluations]
    assert f"{first:.4f} → {last:.4f}" in text
    assert "The run finished." in text
    for name in ("train", "held_out"):
        assert record["data"][name]["sha256"] in text
    weights = hashlib.sha256((tiny_folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"sha256 of model.safetensors: {weights}" in text
    assert "dropped, empty output: 1" in text
    assert record["environment"]["machine"] in text
    assert f"torch=={record['environment']['versions']['torch']}" in text
    assert "--learning-rate 0.001 not given" in text
    for title in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Memory"):
        assert title in text


def test_what_was_known_before_the_first_step_is_in_the_page(copy: Callable[..., Path]) -> None:
    rows = [{"file": "train.csv", "row": 3, "text": "as row 1"}, {"file": "train.csv", "row": 17, "text": ""}]
    warning = {"what": "rows <twice>", "remedy": "Leave them out.", "count": 3, "of": 100, "rows": rows}
    about_memory = {"what": "memory is short", "remedy": "Give --lora.", "count": 0, "of": 0, "rows": []}
    ending = {"token": "<|im_end|>", "learned": 96, "examples": 97, "is_eos": True, "saved": ["<|im_end|>"]}
    known = {"warnings": [warning, about_memory], "end_of_turn": ending, "predicted_seconds": 61.0}
    text = Page(report_page(read_run(copy(preflight=known)))).text
    assert "Warnings before training" in text
    assert "rows <twice>: 3 of 100 (3%). Leave them out. rows 3 (as row 1), 17 and 1 more" in text
    assert "memory is short. Give --lora." in text
    assert "<|im_end|>, an eos of the base model; the last target token of 96 of 97 examples" in text


def test_a_run_without_preflight_has_a_page(copy: Callable[..., Path]) -> None:
    assert "Warnings" not in Page(report_page(read_run(copy(preflight={})))).text


def test_answers_before_and_after_stand_under_their_prompts(finished: Path) -> None:
    kept = json.loads((finished / "report_data.json").read_text(encoding="utf-8"))
    assert [prompt["text"] for prompt in kept["prompts"]] == ["Say 3.", HOSTILE]
    for when in ("before", "after"):
        assert [answer["prompt"] for answer in kept[when]["answers"]] == ["Say 3.", HOSTILE]
    greedy = kept["after"]["answers"][0]
    [again] = handspun.generate(
        handspun.load(str(finished / "checkpoint-epoch-2")), "Say 3.", do_sample=False, max_new_tokens=64
    )
    assert greedy["text"] == again.text


def test_the_page_begins_with_the_outcome(copy: Callable[..., Path]) -> None:
    """Then come curves, answers, warnings, and rows; how it was made is last."""
    folder = copy()
    run = read_run(folder)
    found = outcome.verdict(run)
    assert found is not None
    html = report_page(run)
    sections = re.findall(r'<h2 id="(\w+)"', html)
    assert sections == ["curves", "answers", "data", "rows", "what", "again", "appendix"]
    head = Page(html[: html.index("<nav")]).text
    for shown in (found.text, "Held-out loss", f"Model to use {folder}/checkpoint-best Talk to it handspun chat"):
        assert shown in head
    last = run.metrics.evaluations[-1]["loss"]
    assert re.search(
        rf"Epoch Training loss Held-out loss before \d\.\d+ 1 .* {last:.4f} The x axes", Page(html).text
    )


def test_wrong_answers_and_matches_are_shown(copy: Callable[..., Path]) -> None:
    folder = copy()
    kept = json.loads((folder / "report_data.json").read_text(encoding="utf-8"))
    row = {"file": "train.csv", "prompt": "Is it <b>?", "expected": "yes", "text": "no", "is_right": False}
    right = {**row, "row": 8, "text": "yes", "is_right": True}
    kept["row_answers"] = {"before": [{**row, "row": 7}, right], "after": [{**row, "row": 7}, right]}
    (folder / "report_data.json").write_text(json.dumps(kept), encoding="utf-8")
    text = Page(report_page(read_run(folder))).text
    assert "Exact matches 1 → 1 of 2 held-out rows (of 4), before and after" in text
    assert "row 7 Is it <b>? expected yes answer no" in text
    assert "row 8 Is it" not in text


def test_an_expected_answer_stands_beside_those_before_and_after(copy: Callable[..., Path]) -> None:
    folder = copy()
    kept = json.loads((folder / "report_data.json").read_text(encoding="utf-8"))
    answer = {"prompt": "Say 3.", "decoding": "greedy", "finish_reason": "eos", "expected": "It is 3."}
    kept["before"] = {"answers": [{**answer, "text": "Hm."}], "notes": []}
    kept["after"] = {"answers": [{**answer, "text": "It is  3."}], "notes": []}
    (folder / "report_data.json").write_text(json.dumps(kept), encoding="utf-8")
    text = Page(report_page(read_run(folder))).text
    assert "Say 3. expected It is 3. before Hm. after It is 3. ✓ as expected" in text


def test_the_hardest_rows_are_shown_with_their_prompts_and_without_markers(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    summaries = re.findall(r'<details class="row">\s*<summary>(.*?)</summary>', html, re.DOTALL)
    assert len(summaries) == 10 + 4
    assert all("Say" in summary or "script" in summary for summary in summaries)
    assert not any("im_end" in summary for summary in summaries)
    assert f"rows trained on are in {finished / 'hardest_rows.csv'}" in Page(html).text


def test_nothing_is_fetched_and_every_link_leads_somewhere(finished: Path, copy: Callable[..., Path]) -> None:
    pages = [
        (finished / "report.html").read_text(encoding="utf-8"),
        comparison_page([read_run(copy("a")), read_run(copy("b"))]),
    ]
    for html in pages:
        page = Page(html)
        assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
        assert not page.values("src")
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        links = page.values("href") + page.values("xlink:href")
        ids = page.values("id")
        assert all(link.startswith("#") for link in links)
        assert {link.removeprefix("#") for link in links} <= set(ids)
        assert len(set(ids)) == len(ids)
        assert set(re.findall(r"url\(#?([^)]*)\)", html)) <= set(ids)
        assert "@import" not in html
        assert any("default-src 'none'" in value for value in page.values("content"))


def test_hostile_texts_are_texts(finished: Path) -> None:
    """In a prompt, in a row among the worst or best, and and next to the marks around target tokens."""
    html = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "<script" not in html
    assert "{{ 7 * 7 }}" in page.text
    assert "evil.example" in page.text


def test_what_no_file_can_hold_is_replaced(copy: Callable[..., Path]) -> None:
    folder = copy()
    kept = json.loads((folder / "report_data.json").read_text(encoding="utf-8"))
    kept["accounted"]["train"][0]["values"]["input"] = "half a pair: \ud83d, a bell: \x07, nothing: \x00"
    (folder / "report_data.json").write_text(json.dumps(kept), encoding="utf-8")
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "half a pair: [U+D83D], a bell: ␇, nothing: ␀" in text


def test_a_dropped_row_is_linked_to_its_text(finished: Path) -> None:
    html = (finished / "report.html").read_text(encoding="utf-8")
    links = [link for link in Page(html).values("href") if link.endswith(f"-{EMPTY_ROW}")]
    assert len(links) == 1
    article = html[html.index(f'<article id="{links[0].removeprefix("#")}"') :]
    article = article[: article.index("</article>")]
    assert f"row {EMPTY_ROW}" in article
    assert "Say it." in article
    assert "dropped, empty output" in article


def test_losses_of_rows_add_up_to_the_held_out_loss(finished: Path) -> None:
    found = json.loads((finished / "report_data.json").read_text(encoding="utf-8"))["row_losses"]
    last = read_metrics(finished / "metrics.jsonl").evaluations[-1]
    assert found["held_out"]["mean"] == pytest.approx(last["loss"], rel=1e-5)
    assert len(found["train"]["losses"]) == found["train"]["of"] == 17
    for some in found.values():
        assert some["losses"] == sorted(some["losses"], reverse=True)
        assert [row["loss"] for row in some["worst"]] == some["losses"][:10]
    worst = found["train"]["worst"][0]
    assert [learned for _, learned in worst["runs"]] == [False, True]
    assert worst["runs"][1][0] == worst["answer"] + "<|im_end|>"
    assert worst["prompt"] in worst["runs"][0][0]


def test_a_large_set_is_looked_at_at_even_distances(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.csv"
    data.write_text(ROWS, encoding="utf-8")
    train(config(tiny_folder, data, report_rows=4, eval_ratio=0.0, sample_answers=False), console=quiet_console())
    output = data.with_name("output")
    found = json.loads((output / "report_data.json").read_text(encoding="utf-8"))["row_losses"]["train"]
    assert sorted(row["row"] for row in found["worst"]) == [1, 6, 11, 16]
    text = Page((output / "report.html").read_text(encoding="utf-8")).text
    assert "4 rows, evenly spaced among 20" in text
    assert "There are no answers before training: they were not asked for (--no-sample-answers)." in text


def test_a_run_that_ends_early_has_a_report_that_says_so(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "train.csv"
    data.write_text(ROWS, encoding="utf-8")

    def stopped(*_: object, **__: object) -> None:
        raise StoppedError(15, step=2, total_steps=4)

    monkeypatch.setattr("handspun.runs.checkpoints.CheckpointManager.on_event", stopped)
    with pytest.raises(StoppedError):
        train(config(tiny_folder, data, sample_prompts=("Say 3.",)), console=quiet_console())
    text = Page(data.with_name("output").joinpath("report.html").read_text(encoding="utf-8")).text
    assert "The run was stopped before it finished." in text
    assert "There are no answers after training: the run did not finish." in text
    assert "Losses of rows are not available: the run did not finish." in text


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_the_answers_from_before_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the same run, whatever is asked for in its report."""
    data = tmp_path / "train.csv"
    data.write_text(ROWS, encoding="utf-8")
    made = config(tiny_folder, data, sample_prompts=("Say 3.",), report_rows=4)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("handspun.runs.train.CheckpointManager.save_if_due", killed)
        with pytest.raises(KeyboardInterrupt):
            train(made, console=quiet_console())
    kept = data.with_name("output") / "report_data.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["before"]
    train(replace(made, sample_prompts=("Say 4.", "Say 5."), report_rows=3), console=quiet_console())
    found = json.loads(kept.read_text(encoding="utf-8"))
    assert found["before"] == before
    assert {answer["prompt"] for answer in found["after"]["answers"]} == {"Say 3."}


def test_a_disk_that_takes_no_report_does_not_hide_why_a_run_failed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "train.csv"
    data.write_text(ROWS, encoding="utf-8")

    def full(what: str) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OutputError(f"no room for the {what}")

        return fail

    monkeypatch.setattr("handspun.runs.checkpoints.save_checkpoint", full("checkpoint"))
    monkeypatch.setattr("handspun.runs.artifacts.write_report", full("report"))
    with pytest.raises(OutputError, match="no room for the checkpoint"):
        train(config(tiny_folder, data, sample_answers=False), console=quiet_console())


def test_a_model_in_shares_gives_no_answers_and_says_why(copy: Callable[..., Path]) -> None:
    folder = copy()
    kept = json.loads((folder / "report_data.json").read_text(encoding="utf-8"))
    missing = {"missing": "the model is in shares on several processes"}
    kept |= {"before": missing, "after": missing, "row_losses": missing}
    (folder / "report_data.json").write_text(json.dumps(kept), encoding="utf-8")
    text = Page(report_page(read_run(folder))).text
    for beginning in ("There are no answers before training", "There are no answers after training"):
        assert f"{beginning}: the model is in shares on several processes." in text
    assert "Losses of rows are not available: the model is in shares on several processes." in text


def test_without_held_out_rows_the_training_loss_is_told(copy: Callable[..., Path]) -> None:
    folder = copy()
    keep_events(folder, lambda event: event["event"] != "evaluation")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["data"]["held_out"] = None
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    without(folder, "lengths", "accounted", "row_losses")
    run = read_run(folder)
    text = Page(report_page(run)).text
    first, *_, last = [step["loss"] for step in run.metrics.steps]
    assert f"Training loss {first:.4f} → {last:.4f} first and last step; no rows held out" in text


def test_a_run_stopped_before_its_second_evaluation_shows_one_loss(copy: Callable[..., Path]) -> None:
    folder = copy(status="stopped")
    keep_events(folder, lambda event: event["event"] != "evaluation" or event["step"] == 0)
    run = read_run(folder)
    [first] = run.metrics.evaluations
    text = Page(report_page(run)).text
    assert f"Held-out loss {first['loss']:.4f} at step 0; perplexity" in text
    assert f"{first['loss']:.4f} →" not in text


def test_without_memory_there_is_no_plot_of_it(copy: Callable[..., Path]) -> None:
    folder = copy(peak_memory_bytes=None)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [{**json.loads(line), "memory_bytes": None} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    page = report_page(read_run(folder))
    assert "Peak memory unknown" in Page(page).text
    assert 'aria-label="Memory' not in page
    assert 'aria-label="Loss' in page


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_hardly_any_step_has_a_report(copy: Callable[..., Path], steps: int) -> None:
    folder = copy(status="failed")
    keep_events(folder, lambda event: event["event"] == "step" and event["step"] <= steps)
    without(folder, "before", "after", "row_losses")
    page = report_page(read_run(folder))
    assert "The run failed." in Page(page).text
    assert ('aria-label="Loss' in page) == (steps == 1)


def test_a_run_without_report_data_still_has_its_curves(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "report_data.json").unlink()
    assert 'aria-label="Loss' in report_page(read_run(folder))


def test_two_runs_stand_side_by_side(
    copy: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    first = copy("first")
    record = json.loads((first / "run.json").read_text(encoding="utf-8"))
    record["data"]["held_out"]["sha256"] = "0" * 64
    changed = {"given": {**record["given"], "batch_size": 4}, "config": {**record["config"], "batch_size": 4}}
    second = copy("second", **changed, data=record["data"])
    file = tmp_path / "both.html"
    assert main(["report", str(first), str(second), "--output-file", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    html = file.read_text(encoding="utf-8")
    text = Page(html).text
    assert "first and second" in text
    assert "--batch-size 8 4" in text
    assert "their held-out losses cannot be compared" in text
    [training] = [
        svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if 'aria-label="Training loss' in svg
    ]
    assert len(points_of(training, "first")) == len(points_of(training, "second")) == 6
    assert "cannot be compared" not in comparison_page([read_run(first), read_run(first)])


def test_a_report_is_written_again_from_the_folder(copy: Callable[..., Path], finished: Path) -> None:
    folder = copy()
    assert main(["report", str(folder)]) == 0
    again, first = ((place / "report.html").read_text(encoding="utf-8") for place in (folder, finished))
    assert again.replace(str(folder), str(finished)) == first


def test_a_folder_without_a_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run.json: expected the --output-dir"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OutputError, match="lacks started"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(OutputError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


@pytest.mark.skipif(browser() is None or "AXE" not in os.environ, reason="needs Chromium, and $AXE: axe.min.js")
def test_axe_finds_nothing_in_any_page(finished: Path, copy: Callable[..., Path], tmp_path: Path) -> None:
    """On a phone and a desk, light and dark; and it does find what is planted."""
    both = tmp_path / "both.html"
    both.write_text(comparison_page([read_run(copy("a")), read_run(copy("b"))]), encoding="utf-8")
    axe = Path(os.environ["AXE"])
    for page in (finished / "report.html", both):
        assert overflow(page, width=WIDTHS["phone"]) == 0
        for width, scheme in itertools.product(WIDTHS.values(), SCHEMES):
            assert violations(page, axe, width=width, scheme=scheme) == []
    planted = tmp_path / "planted.html"
    planted.write_text(
        both.read_text(encoding="utf-8").replace("<main>", '<main><img src="data:,">'), encoding="utf-8"
    )
    assert [rule["id"] for rule in violations(planted, axe, width=390, scheme="light")] == ["image-alt"]


def test_a_run_folder_is_plain_data(finished: Path) -> None:
    """What a notebook would use: facts in, a page out."""
    run = read_run(finished)
    assert isinstance(run, RunFiles)
    assert report_page(run).startswith("<!DOCTYPE html>")
