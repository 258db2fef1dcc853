"""Pages of `handspun report` in a real browser: screenshots on a phone and a desk, light and dark, a PDF, and axe.

    npm install --prefix /tmp/axe axe-core
    python benchmarks/report_in_a_browser.py output/report.html --axe /tmp/axe/node_modules/axe-core/axe.min.js

    python benchmarks/report_in_a_browser.py output/demo/report.html --picture docs/images/report.png

Chromium's headless shell does it (Debian: chromium-headless-shell). It ends with 1 if axe finds a violation.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desk": 1280}
SCHEMES = {"dark": 0, "light": 1}  # Blink's numbers for prefers-color-scheme


def browser() -> str | None:
    """The headless browser of this machine."""
    names = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


def run(page: Path, *options: str, width: int = 1280, height: int = 900, scheme: str = "light") -> str:
    """What the browser prints when it has shown the page."""
    command = browser()
    assert command is not None, "no Chromium is installed"
    with tempfile.TemporaryDirectory() as profile:
        given = [
            command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            *options, page.absolute().as_uri(),
        ]  # fmt: skip
        return subprocess.run(given, check=True, capture_output=True, text=True, timeout=120).stdout


def with_script(page: Path, script: str, folder: Path) -> Path:
    """A copy of the page that runs a script, which its own policy forbids."""
    html = page.read_text(encoding="utf-8")
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    copy = folder / "with_script.html"
    copy.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


def answer_of(page: Path, script: str, *, width: int, scheme: str = "light") -> str:
    """What a script says, in the page as this width and scheme show it; it calls `say(text)` once."""
    say = (
        "function say(text) { const found = document.createElement('pre'); found.id = 'said';"
        " found.textContent = text; document.body.append(found); }\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = with_script(page, say + script, Path(folder))
        dom = run(copy, "--dump-dom", "--virtual-time-budget=60000", width=width, scheme=scheme)
    found = re.search(r'<pre id="said">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, "the script said nothing"
    return unescape(found[1])


def violations(page: Path, axe: Path, *, width: int, scheme: str) -> Any:
    """What axe finds, with every rule that it has for WCAG 2 A, AA and good practice."""
    script = axe.read_text(encoding="utf-8").replace("</script", "<\\/script")
    script += "\naxe.run(document).then(found => say(JSON.stringify(found.violations)), error => say(`${error}`));"
    return json.loads(answer_of(page, script, width=width, scheme=scheme))


def overflow(page: Path, *, width: int) -> int:
    """Pixels by which the page is wider than the window."""
    return int(answer_of(page, "say(document.documentElement.scrollWidth - innerWidth)", width=width))


def screenshot(page: Path, file: Path, *, width: int, scheme: str, height: int | None = None) -> None:
    """The whole page, or its first `height` pixels."""
    whole = height or int(answer_of(page, "say(document.documentElement.scrollHeight)", width=width))
    run(page, f"--screenshot={file.absolute()}", width=width, height=whole, scheme=scheme)


def picture(page: Path, file: Path, *, height: int = 1900) -> None:
    """The top of the page on a desk in light, and on a phone in dark, side by side at two thirds of their size."""
    from PIL import Image

    both = Image.new("RGB", (sum(WIDTHS.values()) + 24, height), "#8a8a8a")
    with tempfile.TemporaryDirectory() as folder:
        for device, scheme, left in (("desk", "light", 0), ("phone", "dark", WIDTHS["desk"] + 24)):
            shot = Path(folder) / f"{device}.png"
            screenshot(page, shot, width=WIDTHS[device], scheme=scheme, height=height)
            both.paste(Image.open(shot), (left, 0))
    small = both.resize((both.width * 2 // 3, both.height * 2 // 3), Image.Resampling.LANCZOS)
    small.quantize(256).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A report in a real browser.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--axe", type=Path, help="axe.min.js of the npm package axe-core")
    parser.add_argument("--output-dir", type=Path, help="folder for screenshots and PDFs")
    parser.add_argument("--picture", type=Path, help="file for a desk and a phone side by side, of the first page")
    arguments = parser.parse_args()
    if arguments.picture:
        picture(arguments.pages[0], arguments.picture)
        return
    found = 0
    for page in arguments.pages:
        for device, width in WIDTHS.items():
            print(f"{page}: {device}, {overflow(page, width=width)} px too wide")
            for scheme in SCHEMES:
                if arguments.axe:
                    some = violations(page, arguments.axe, width=width, scheme=scheme)
                    found += len(some)
                    print(f"{page}: {device}, {scheme}: {len(some)} violations")
                    for rule in some:
                        places = "; ".join(" ".join(node["target"]) for node in rule["nodes"][:3])
                        print(f"  {rule['id']}: {rule['help']} ({places})")
                if arguments.output_dir:
                    arguments.output_dir.mkdir(parents=True, exist_ok=True)
                    file = arguments.output_dir / f"{page.stem}-{device}-{scheme}.png"
                    screenshot(page, file, width=width, scheme=scheme)
        if arguments.output_dir:
            pdf = arguments.output_dir / f"{page.stem}.pdf"
            run(page, f"--print-to-pdf={pdf.absolute()}", "--no-pdf-header-footer")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
