"""The documentation as a site: it builds without a warning, shows what GitHub shows, needs no other host, and finds its own words."""

import json
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from support.builders import with_checkout

pytest.importorskip("mkdocs", reason="the site needs deit-cli[docs]")
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
OUTSIDE = {  # pages of the site that are not those of docs/ under their own name; docs/_site/pages.py brings them
    "index.html": "README.md",
    "contents.html": "docs/README.md",
    "changelog.html": "CHANGELOG.md",
    "contributing.html": "CONTRIBUTING.md",
    "benchmarks.html": "benchmarks/README.md",
}
LOADS = {
    "src",
    "srcset",
    "data",
    "poster",
    "action",
    "formaction",
    "background",
    "manifest",
}  # attributes that make a browser fetch something
GITHUB = MarkdownIt("gfm-like", {"linkify": False})
SOURCES = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"), *(ROOT / file for file in OUTSIDE.values())]


class Built(HTMLParser):
    """A page of the site: what its text is made of, and what a browser fetches for it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.counts = dict.fromkeys(("pre", "li", "tr", "img", "h2", "h3"), 0)
        self.lines: list[str] = []
        self._article = self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.fetched += [value for name, value in known.items() if name in LOADS]
        if tag == "link":
            self.fetched.append(known["href"])
        elif "href" in known:
            self.links.append(known["href"])
        self.fetched += re.findall(r"url\(([^)]+)\)", known.get("style", ""))
        self._article |= tag == "article"
        self._script = tag in ("script", "style")
        if self._article and tag in self.counts:
            self.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self._article &= tag != "article"
        self._script &= tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._script:
            self.fetched += re.findall(r"""(?:import|fetch|url)\(["']?(https?:[^"')]+)""", data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site; its build printed no warning."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=with_checkout(NO_MKDOCS_2_WARNING="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("INFO")] == []
    return folder


def pages_of(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def source_of(page: str) -> Path | None:
    """Return the Markdown file of a page, None for 404 and for the pages of the examples."""
    path = (
        ROOT / OUTSIDE[page]
        if page in OUTSIDE
        else ROOT / "docs" / page.replace("index.html", "README.md").replace(".html", ".md")
    )
    return path if path.exists() else None


@pytest.mark.slow
def test_every_page_of_the_repository_is_in_the_site(site):
    shown = {source_of(path.relative_to(site).as_posix()) for path in pages_of(site)}
    assert {path for path in SOURCES if path not in shown} == set()


@pytest.mark.slow
def test_a_page_shows_the_blocks_that_github_shows(site):
    """Python's Markdown takes some lists, tables and code blocks for text."""
    for path in pages_of(site):
        source = source_of(path.relative_to(site).as_posix())
        if source is None or "docstrings of" in source.read_text():
            continue
        tokens = GITHUB.parse(source.read_text())
        kinds = [token.type for token in tokens]
        inline = [child.type for token in tokens for child in token.children or ()]
        wanted = {
            "pre": kinds.count("fence") + kinds.count("code_block"),
            "li": kinds.count("list_item_open"),
            "tr": kinds.count("tr_open"),
            "img": inline.count("image"),
            "h2": sum(token.type == "heading_open" and token.tag == "h2" for token in tokens),
            "h3": sum(token.type == "heading_open" and token.tag == "h3" for token in tokens),
        }
        assert Built(path.read_text()).counts == wanted, source


@pytest.mark.slow
def test_a_browser_asks_no_other_host_for_anything(site):
    for path in pages_of(site):
        page = Built(path.read_text())
        assert page.fetched or source_of(path.relative_to(site).as_posix()) is None
        assert [address for address in page.fetched if urlsplit(address).netloc] == [], path
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text()), sheet


@pytest.mark.slow
def test_links_between_pages_lead_to_files_of_the_site(site):
    for path in pages_of(site):
        for link in Built(path.read_text()).links:
            parts = urlsplit(link)
            if not parts.scheme and parts.path and path.name != "404.html":
                assert (path.parent / parts.path).exists(), (path, link)


@pytest.mark.slow
def test_addresses_of_other_hosts_are_https(site):
    outside = {link for path in pages_of(site) for link in Built(path.read_text()).links if urlsplit(link).scheme}
    assert len(outside) > 5
    for link in outside:
        parts = urlsplit(link)
        assert parts.scheme == "https", link
        assert re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc), link
        assert not re.search(r"[\s<>\"{}|^`]", link), link


@pytest.mark.slow
def test_the_public_names_have_docstrings_and_places_on_the_api_page(site):
    page = (site / "api.html").read_text()
    named = 0
    for package in ("pipeline", "trainer"):
        for name in getattr(import_module(package), "__all__", ()):
            place = re.search(rf'id="{package}\.{name}"', page)
            assert place, f"docs/api.md has no docstring of {package}.{name}"
            assert 'class="doc doc-contents' in page[place.start() :][:20_000]
            named += 1
    assert named >= 4


@pytest.mark.slow
def test_the_search_index_has_the_words_of_every_page(site):
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {
        path.relative_to(site).as_posix() for path in pages_of(site) if source_of(path.relative_to(site).as_posix())
    } <= {place or "index.html" for place in found}
    assert any("tail_mass" in entry["text"] for entry in index["docs"])


@cache
def settings() -> dict:
    class Loader(yaml.SafeLoader):
        """Reads the one Python object of the file as its arguments."""

    Loader.add_multi_constructor(
        "tag:yaml.org,2002:python/object/apply:", lambda loader, _, node: loader.construct_mapping(node)
    )
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def test_a_page_is_in_the_navigation_once():
    def pages_in(part) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for each in (part.values() if isinstance(part, dict) else part) for page in pages_in(each)]

    pages = pages_in(settings()["nav"])
    files = {path.relative_to(ROOT / "docs").as_posix() for path in SOURCES if path.is_relative_to(ROOT / "docs")}
    places = {OUTSIDE[page.replace(".md", ".html")] for page in pages if page.replace(".md", ".html") in OUTSIDE}
    assert len(pages) == len(set(pages))
    assert files - {*pages} == {"README.md"}
    assert places == {*OUTSIDE.values()}


def test_what_is_not_checked_is_a_warning_and_a_warning_is_an_error():
    assert settings()["strict"] is True
    assert set(settings()["validation"].values()) == {"warn"}
    assert settings()["theme"]["font"] is False
