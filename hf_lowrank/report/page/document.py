"""One HTML file that needs nothing else: its style is inside, its figures are data URIs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# Nothing is fetched, and the browser is told so.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: #fdfdfb;
  color: #1d2329; font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid #d9dcd6; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .4rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere; }
.lead, figcaption, .note { color: #565e66; }
figcaption, .note { font-size: .88rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #e4e6e1;
  white-space: nowrap; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.bar { min-width: 9rem; }
.bar span { display: block; height: .7rem; background: #2f5d82; }
.bar div { border: 1px solid #2f5d82; }
.heat { font-size: .78rem; }
.heat th, .heat td { padding: .12rem .35rem; text-align: center; border: 1px solid #fdfdfb;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.heat th.up { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left;
  padding: .35rem .12rem; }
.heat th:first-child { padding-right: .5rem; text-align: right; }
.facts td:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.pair .scroll { min-width: 0; max-width: 100%; }
.figures { display: grid; gap: 1rem 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.wide { max-width: 36rem; }
figure { margin: 0 0 .8rem; }
img { display: block; width: 100%; max-width: 100%; height: auto; }
.samples { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.samples div { border: 1px solid #d9dcd6; background: #fff; padding: .6rem .8rem; }
.samples h4 { margin: 0 0 .3rem; font-size: .85rem; color: #565e66; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding: .3rem .35rem; }
  .bar { display: none; }
  .heat { font-size: .64rem; }
  .heat th, .heat td { padding: .12rem .18rem; }
}
.samples p { margin: 0; white-space: pre-wrap; font-size: .92rem; }
""".strip()


def document(title: str, sections: Sequence[str]) -> str:
    """The whole file around finished sections."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading with its parts below it, or nothing if there are none."""
    shown = [part for part in parts if part]
    if not shown:
        return ""
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *shown, "</section>"])


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def cell(text: str, tag: str = "td", attributes: str = "") -> str:
    """A cell of a table with plain text in it."""
    return f"<{tag}{attributes}>{escape(text)}</{tag}>"


def bar_cell(share: float) -> str:
    """A cell with a bar that fills a share between 0 and 1."""
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<td class="bar"><div><span style="width:{width:.1f}%"></span></div></td>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself where the page is narrow; cells are finished HTML."""
    attribute = f' class="{kind}"' if kind else ""
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table{attribute}>\n<thead><tr>{"".join(header)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def plain_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of plain texts, the first row its header."""
    header, *body = rows
    return table(
        [cell(text, "th") for text in header], [[cell(text) for text in row] for row in body], kind
    )


def figure(uri: str, description: str, caption: str = "", kind: str = "") -> str:
    """A drawing with its description for those who can't see it, and a caption."""
    attribute = f' class="{kind}"' if kind else ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure{attribute}><img src="{escape(uri)}" alt="{escape(description)}">{below}</figure>'
    )
