"""The command report."""

from pathlib import Path

from handspun.cli.app import app
from handspun.display import HarmlessConsole, write_text


@app.command
def report(*runs: Path, output_file: Path | None = None) -> None:
    """Rebuild a run's report.html from its folder. With several runs, write one page that compares them.

    Parameters
    ----------
    runs
        Output folders of `handspun train` (its --output-dir). If none is given, `output`.
    output_file
        File to write. If not given, report.html in the run's folder; for several runs, comparison.html in the
        current folder.
    """
    from handspun.report.page import comparison_page, report_page, write_page
    from handspun.runs.metrics import REPORT, read_run

    found = [read_run(run) for run in runs or (Path("output"),)]
    if len(found) == 1:
        page, file = report_page(found[0]), found[0].folder / REPORT
    else:
        page, file = comparison_page(found), Path("comparison.html")
    write_text(HarmlessConsole(), str(write_page(page, output_file or file)))
