"""The pieces of a self-contained HTML page: everything it shows is in the file, and it runs no
scripts.

Text that a model or a user made passes through `escape`; what is called `markup` here is ours and
goes in as it is. The page follows the reader's light or dark mode, and columns become rows on a
phone.

Left out: templates (an f-string is one already) and anything that is fetched when the page is
opened.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f23; --soft: #5c6370; --paper: #ffffff;
  --tint: #f3f4f6; --rule: #d9dce1; --good: #0063a0; --bad: #b34700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --soft: #a2a8b4; --paper: #16181c;
  --tint: #22252b; --rule: #3a3f48; --good: #6db8ec; --bad: #f39a5b; } }
* { box-sizing: border-box; }
/* A character that turns the direction of writing has an effect inside its own text alone. */
span, b, code, td { unicode-bidi: isolate; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem;
  background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: .5rem 0 .75rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 .6rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 48rem; } .soft { color: var(--soft); } small, .small { font-size: .85rem; }
code, pre, .mono {
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .88em; }
pre { background: var(--tint); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
.cards, .plots, .pair { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); margin: 1.2rem 0; }
.card { background: var(--tint); border-radius: 8px; padding: 1rem 1.2rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.3; font-weight: 650; }
.plots, .pair { grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); }
figure { margin: 1rem 0; max-width: 38rem; } figure.full { max-width: none; }
.plots figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; background: #fff; border-radius: 6px; }
figcaption { font-size: .85rem; color: var(--soft); margin-top: .35rem; }
.wide { overflow-x: auto; margin: 1rem 0; } td + td { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .8rem; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { font-size: .9rem; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 9rem; }
.sample { border-left: 4px solid var(--rule); padding: .4rem .7rem; margin: .6rem 0;
  overflow-wrap: anywhere; border-radius: 0 6px 6px 0; }
.tokens span { display: inline-block; white-space: pre; border: 1px solid rgba(128, 128, 128, .5);
  border-radius: 3px; padding: 0 .22em; margin: 1px; line-height: 1.5; }
.tokens .end { color: var(--soft); font-style: italic; }
.response { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--tint);
  border-radius: 6px; padding: .6rem .8rem; }
.good { color: var(--good); font-weight: 650; } .bad { color: var(--bad); font-weight: 650; }
details { margin: .8rem 0; } summary { cursor: pointer; }
"""
GOOD_RGB, BAD_RGB = "0, 114, 178", "213, 94, 0"  # as in the plots


def escape(text: object) -> str:
    """Any value as text for the page. Half characters, which no file can hold, become "?"."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def section(title: str, *markup: str) -> str:
    """A heading and what is below it; empty parts are left out."""
    body = "\n".join(part for part in markup if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def paragraph(*sentences: str) -> str:
    """Sentences of markup in one paragraph; empty ones are left out."""
    return f"<p>{' '.join(sentence for sentence in sentences if sentence)}</p>"


def limit(text: str) -> str:
    """What the section does not show."""
    return f'<p class="soft"><b>A limit.</b> {text}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text, and are escaped; a line break in a cell is kept."""

    def line(kind: str, cells: Sequence[str]) -> str:
        shown = (escape(cell).replace("\n", "<br>") for cell in cells)
        return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in shown) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>\n{line("th", head)}\n{body}\n</table></div>'


def picture(path: Path | None, alternative: str, caption: str = "", full: bool = False) -> str:
    """A PNG file inside the page; nothing for None.

    alternative: what it shows, in words. full: as wide as the page.
    """
    if path is None:
        return ""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'
    return f"<figure{' class=full' if full else ''}>{image}{below}</figure>"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """(what it is, its value, what to know about it) of each, side by side."""
    each = []
    for name, value, note in items:
        note_markup = f'<span class="small soft">{escape(note)}</span>'
        each.append(f'<div class="card">{escape(name)}<b>{escape(value)}</b>{note_markup}</div>')
    return f'<div class="cards">{"".join(each)}</div>'


def colour_of(strength: float) -> str:
    """Blue for a strength up to 1, orange down to -1, as CSS."""
    alpha = min(abs(strength), 1.0)
    if not alpha:
        return ""
    rgb = GOOD_RGB if strength > 0 else BAD_RGB
    return f"border-color: rgb({rgb}); background: rgba({rgb}, {0.06 + 0.3 * alpha:.3f})"


def tokens(
    texts: Iterable[str], head: str, note: str, strength: float, each: Sequence[float] = ()
) -> str:
    """One answer, each token in a box, coloured by `colour_of` the strength.

    each: the strength of each token, where they differ; they are then coloured one by one.
    """
    boxes = []
    for n, text in enumerate(map(str, texts)):
        mark = " class=end" if text.startswith("<|") else ""
        if each:
            mark += f' style="{colour_of(each[n])}"'
        boxes.append(f"<span{mark}>{escape(text)}</span>")

    colour = "" if each else colour_of(strength)
    return (
        f'<div class="sample" style="{colour}"><div class="small"><b>{escape(head)}</b> '
        f'<span class="soft">{escape(note)}</span></div>'
        f'<div class="tokens mono">{"".join(boxes)}</div></div>'
    )


def response(text: str, right: bool, head: str, note: str) -> str:
    """One answer as text, one attempt per line, with coloured verdicts and a right or wrong."""
    lines = escape(text.replace(";", ";\n").replace("</think>", "</think>\n"))
    for kind, words in (("good", "ok|对"), ("bad", "no|错")):
        marked = rf' <span class="{kind}">\1</span>'
        lines = re.sub(rf" ({words})(?=&lt;/think|;\n)", marked, lines)
    mark = '<span class="good">✓ right</span>' if right else '<span class="bad">✗ wrong</span>'
    return (
        f'<div><p class="small">{escape(head)}: {mark} '
        f'<span class="soft">{escape(note)}</span></p>'
        f'<div class="response mono">{lines}</div></div>'
    )
