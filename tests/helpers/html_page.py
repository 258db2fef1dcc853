"""An HTML page as tests look at it."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """A page taken apart: its text, and all attributes by name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def values(self, name: str) -> list[str]:
        return [value or "" for _, found, value in self.attributes if found == name]


def points_of(svg: str, name: str) -> list[tuple[float, float]]:
    """The points of a line, in the units of the picture: its path is `M x y L x y ...`."""
    found = re.search(rf'id="[\w-]*line-{re.escape(name)}">\s*<path d="([^"]*)"', svg)
    assert found is not None
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", found[1])]
    return list(zip(numbers[::2], numbers[1::2], strict=True))
