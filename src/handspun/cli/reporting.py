"""Commands that tell what came of a run: report."""

from pathlib import Path

from handspun.cli.app import app
from handspun.display import HarmlessConsole, write_text


@app.command
def report(*runs: Path, output_file: Path | None = None) -> None:
    """Write a run's report.html again, from what its folder holds; of several runs, one page side by side.

    Parameters
    ----------
    runs
        Folders that `handspun train` wrote (its --output-dir); if none is named, `output`.
    output_file
        Where the page goes; if not given, report.html in the run's folder, and comparison.html here for several.
    """
    from handspun.report.page import comparison_page, report_page, write_page
    from handspun.runs.metrics import REPORT, read_run

    found = [read_run(run) for run in runs or (Path("output"),)]
    if len(found) == 1:
        page, file = report_page(found[0]), found[0].folder / REPORT
    else:
        page, file = comparison_page(found), Path("comparison.html")
    write_text(HarmlessConsole(), str(write_page(page, output_file or file)))
