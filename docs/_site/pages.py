"""The hook of mkdocs.yml: pages of this repository that are not in docs/, links between all pages, and the API from docstrings."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PLACES = {  # file of the repository, its place in the site; all other pages have the place that they have in docs/
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
}
FILES = {place: file for file, place in PLACES.items()}
LINK = re.compile(r"\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<url>[^)\s]+)\)")
COMMANDS = re.compile(
    r'<div class="highlight">(?=<pre><span></span><code>(?:[A-Z_]+=\S+ )*(?:deit-cli|torchrun|pip|python|hf|curl|docker) )'
)
CODE = re.compile(r"<code>.*?</code>", flags=re.DOTALL)
OPTION = re.compile(r"(?<=[\s>])--[a-z][a-z0-9-]*")
API = re.compile(r"<!-- docstrings of (\w+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/, and move those that have another place in the site."""
    for file, place in PLACES.items():
        there = files.get_file_from_path(file.removeprefix("docs/"))
        if file.startswith("docs/") and there is not None:
            files.remove(there)
        files.append(File.generated(config, place, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the text of a page with the links of the site, and directives of mkdocstrings where docstrings belong."""
    place = page.file.src_uri
    file = FILES.get(place, f"docs/{place}")
    linked = LINK.sub(lambda link: link_of_the_site(link, file, place), markdown)
    return API.sub(r"::: \1", linked)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the HTML of a page with classes for code blocks of commands and for options: site.css says where they may wrap."""
    options = CODE.sub(lambda code: OPTION.sub(r'<span class="option">\g<0></span>', code[0]), html)
    return COMMANDS.sub('<div class="highlight commands">', options)


def link_of_the_site(link: re.Match[str], file: str, place: str) -> str:
    """Return a link of a page in `file`, as it is at `place` in the site.

    Of a link to code only its text is left. A text that is the name of the page becomes its title, as in the navigation.
    """
    path, mark, anchor = link["url"].partition("#")
    if not path or "://" in path:
        return link[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
    if target not in PLACES and not target.startswith("docs/"):
        return link["text"] if (ROOT / target).exists() else link[0]
    to = PLACES.get(target, target.removeprefix("docs/"))
    text = title_of(ROOT / target) if link["text"].endswith(".md") and (ROOT / target).is_file() else link["text"]
    return f"[{text}]({posixpath.relpath(to, posixpath.dirname(place) or '.')}{mark}{anchor})"


def title_of(page: Path) -> str:
    """Return the first heading of a page."""
    return page.read_text().partition("\n")[0].removeprefix("# ")
