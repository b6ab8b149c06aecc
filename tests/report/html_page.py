"""A page taken apart by the standard library: tags, ids, texts and whatever a browser would fetch."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "use", "image", "rect", "circle", "line"}
# Attributes whose address a browser fetches by itself, unlike that of a link that one follows.
FETCHED = {"src", "srcset", "data", "poster", "background", "action", "formaction", "xlink:href"}


class Page(HTMLParser):
    """Hold what was found: tags with their attributes, texts by tag, and tags that were closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.misplaced: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    @classmethod
    def read(cls, file: Path) -> "Page":
        return cls(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.misplaced.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]

    def text(self) -> str:
        """Return what a person reads, spaces squeezed."""
        return " ".join(" ".join(text for tag, text in self.texts if tag not in ("style", "title")).split())

    def fetched(self) -> list[str]:
        """Return every address that a browser would fetch to show the page."""
        found = [value for _, attributes in self.tags for name, value in attributes.items() if name in FETCHED]
        return found + [attributes.get("href", "") for tag, attributes in self.tags if tag == "link"]
