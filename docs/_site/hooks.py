"""What the site takes from outside `docs`: pages made of files of the repository, links to them, help of commands.

Links in `docs` are those that hold in the repository. A link to ``../CONTRIBUTING.md`` or ``../examples/plain_loop.py``
leads, on the site, to the page that is made of this file.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]

SITE_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/fuzz/README.md": "fuzzing.md",
    **{
        f"examples/{script.name}": f"examples/{script.stem}.md"
        for script in sorted((REPOSITORY / "examples").glob("*.py"))
    },
}
"""File of the repository -> page of the site."""

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_HELP = re.compile(r"^<!-- help: (?P<command>[a-z -]+) -->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of files outside `docs`."""
    for source, page in SITE_PAGES.items():
        if source == "README.md":
            continue
        text = (REPOSITORY / source).read_text(encoding="utf-8")
        content = _script_page(source, text) if source.endswith(".py") else _with_site_links(text, source, page)
        generated = File.generated(config, page, content=content)
        if source != "CONTRIBUTING.md" and source != "CHANGELOG.md":
            generated.inclusion = generated.inclusion.__class__.NOT_IN_NAV
        files.append(generated)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave `docs` into links between pages, and fills in the help of commands."""
    if page.file.generated_by is None:
        markdown = _with_site_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return _HELP.sub(lambda found: _help(found["command"]), markdown)


def _with_site_links(markdown: str, source: str, page: str) -> str:
    """The links of a file of the repository as they are on the page that it becomes."""

    def on_site(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        if target in SITE_PAGES:
            target = f"docs/{SITE_PAGES[target]}"
        if not target.startswith("docs/"):
            raise PluginError(f"{source} links to {found[2]}, which is no page of the site: see SITE_PAGES")
        there = os.path.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")
        return f"{found[1]}{there}{found[3]}"

    return _LINK.sub(on_site, markdown)


def _script_page(source: str, code: str) -> str:
    """A page of an example script: what it is, then the script."""
    title = (ast.get_docstring(ast.parse(code)) or source).partition("\n\n")[0]
    return f"# {Path(source).name}\n\n{title}\n\n```python\n{code}```\n"


def _help(command: str) -> str:
    """What ``dmagent COMMAND --help`` prints."""
    from dmagent_loader.cli import build_parser

    parser = build_parser()
    for name in command.split():
        actions = [action for action in parser._actions if isinstance(action.choices, dict)]
        parser = actions[0].choices[name]
    os.environ["COLUMNS"] = "90"
    return f"```text\n{parser.format_help().rstrip()}\n```"
