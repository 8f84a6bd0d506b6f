"""Renders the Markdown pages of a folder into plain, self-contained HTML pages, with one menu and no scripts.

`python docs/build_site.py docs docs/_site`. Links between pages keep working: `page.md#part` becomes `page.html#part`.
Exits 1 when a page links to a file that is not there.
"""

from __future__ import annotations

import html
import re
import shutil
import sys
from pathlib import Path

import markdown

_STYLE = """\
body { display: flex; gap: 3rem; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
       font: 16px/1.55 system-ui, sans-serif; color: #1c2430; background: #fff; }
nav { flex: 0 0 13rem; } nav ul { list-style: none; padding: 0; } nav ul ul { padding-left: 1rem; }
main { min-width: 0; } a { color: #0b5cad; }
pre { padding: .8rem 1rem; overflow-x: auto; } code, pre { background: #f3f5f8; font-size: .92em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #d7dde5; padding: .35rem .7rem; text-align: left; vertical-align: top; }
@media (max-width: 50rem) { body { display: block; } }
"""
#: The page that a visitor sees first, if the folder has it; else the first by name.
_FIRST = "getting-started.md"


def build(source: Path, target: Path) -> list[str]:
    """Writes one page per Markdown file and `index.html`; returns links that lead nowhere."""
    pages = sorted(page for page in source.rglob("*.md") if target not in page.parents)
    if not pages:
        return [f"{source}: no Markdown pages"]
    if target.exists():
        shutil.rmtree(target)
    broken: list[str] = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        broken += [f"{page}: {link}" for link in _links(text) if not (page.parent / link).exists()]
        written = target / page.relative_to(source).with_suffix(".html")
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(_render(page, text, source, pages), encoding="utf-8")
    for picture in source.rglob("*.svg"):
        if target not in picture.parents:
            shutil.copyfile(picture, target / picture.relative_to(source))
    first = source / _FIRST if (source / _FIRST) in pages else pages[0]
    shutil.copyfile(target / first.relative_to(source).with_suffix(".html"), target / "index.html")
    return broken


def _render(page: Path, text: str, source: Path, pages: list[Path]) -> str:
    body = markdown.markdown(text, extensions=["tables", "fenced_code", "toc", "sane_lists"])
    body = re.sub(r'href="(?![a-z]+:)([^"#]+)\.md(#[^"]*)?"', r'href="\1.html\2"', body)
    up = "../" * len(page.relative_to(source).parent.parts)
    entries = "".join(
        f'<li><a href="{up}{other.relative_to(source).with_suffix(".html")}">{html.escape(_title(other))}</a></li>'
        for other in pages
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(_title(page))}</title>'
        f"<style>{_STYLE}</style></head><body><nav><ul>{entries}</ul></nav><main>{body}</main></body></html>\n"
    )


def _title(page: Path) -> str:
    heading = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return heading.group(1).replace("`", "") if heading else page.stem


def _links(text: str) -> list[str]:
    """Files that a page links to, without code blocks, anchors and addresses."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose) if "://" not in link]


if __name__ == "__main__":
    nowhere = build(Path(sys.argv[1]), Path(sys.argv[2]))
    for entry in nowhere:
        print(f"link to nowhere: {entry}", file=sys.stderr)
    sys.exit(1 if nowhere else 0)
