"""A run as one HTML file: readable on a phone, printable, with nothing to fetch. Everything from files is escaped."""

import base64
from html import escape

STYLE = """
:root { --ink: #1c1c1c; --soft: #6a6a6a; --line: #dedede; --accent: #2b5d8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink); background: #fff;
  font: 1.0625rem/1.55 Charter, "Bitstream Charter", "Iowan Old Style", Palatino, Georgia, serif;
  overflow-wrap: anywhere; font-variant-numeric: lining-nums; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1.5rem; }
.kicker, figcaption, th, .figures span, footer, .notes { font-family: "Helvetica Neue", Helvetica, Arial, sans-serif; }
.kicker { color: var(--accent); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; margin: 0; }
h1 { font-size: 2.4rem; line-height: 1.15; margin: .2rem 0 .6rem; font-weight: 600; }
h2 { font-size: 1.35rem; margin: 2.6rem 0 .9rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 44rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1.4rem 0 0; padding: 0; list-style: none; }
.figures b { display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 600; }
.figures span { color: var(--soft); font-size: .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .2rem 2rem; }
figure { margin: 0 0 1.4rem; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; }
.plot img { width: 100%; }
.row { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.whole { max-width: 100%; }
.half { max-width: calc(50% - 1rem); }
figcaption { color: var(--soft); font-size: .82rem; margin-top: .45rem; }
pre { background: #f6f6f4; padding: .75rem .9rem; border-radius: 4px; white-space: pre-wrap; margin: .5rem 0;
  font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; break-inside: avoid; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums lining-nums; }
th { text-align: left; font-size: .78rem; color: var(--soft); font-weight: 600; }
td, th { padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { white-space: nowrap; }
.wide { overflow-x: auto; }
.pairs { columns: 19rem; column-gap: 2.5rem; margin: 0; font-size: .92rem; }
.pairs div { display: flex; gap: 1rem; justify-content: space-between; border-bottom: 1px solid var(--line);
  padding: .16rem 0; break-inside: avoid; }
.pairs dt { color: var(--soft); } .pairs dd { margin: 0; text-align: right; }
.notes { background: #fdf6e7; border-left: 3px solid #d9a52e; padding: .6rem 1rem; font-size: .88rem;
  margin: 1.4rem 0; }
.notes p { max-width: none; }
details { margin-top: 2rem; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; color: var(--soft); font-size: .8rem; }
@media (max-width: 60rem) { .half { max-width: 100%; } }
@media (max-width: 40rem) { body { padding: 1.4rem 1rem; font-size: 1rem; } h1 { font-size: 1.8rem; }
  .figures b { font-size: 1.35rem; } }
@media print { body { padding: 0; max-width: none; font-size: 10pt; } h2 { break-after: avoid; }
  .grid { grid-template-columns: 1fr 1fr; } .half { max-width: calc(50% - 1rem); } details { display: none; } }
"""
# Nothing may be loaded and nothing run, whatever the files held.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def data_uri(kind, content):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def figure(source, caption="", alt="", place=""):
    """source: a data URI. place: a CSS class of the figure."""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="{place}"><img src="{source}" alt="{escape(alt or caption)}">{words}</figure>'


def plot(svg, name):
    return figure(data_uri("svg+xml", svg.encode()), alt=name, place="plot")


def row(figures):
    """The figures in a row, if the page is wide enough. Empty if there are no figures."""
    return f'<div class="row">{body}</div>' if (body := "".join(figures)) else ""


def grid(figures):
    return f'<div class="grid">{"".join(figures)}</div>'


def section(title, *parts):
    """A section with a title. Empty if it has no content."""
    body = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{body}</section>" if body else ""


def paragraph(text):
    return f"<p>{escape(text)}</p>" if text else ""


def code(text):
    return f"<pre>{escape(text)}</pre>" if text else ""


def table(heads, rows):
    """A table of texts. Empty if there are no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join(
        "<tr>" + "".join(f'<td class="{"n" if len(c) < 25 else ""}">{escape(c)}</td>' for c in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def pairs(values):
    """{name: text} in columns."""
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items())
    return f'<dl class="pairs">{items}</dl>' if items else ""


def folded(title, text):
    return f"<details><summary>{escape(title)}</summary>{code(text)}</details>" if text else ""


def page(title, kicker, lead, figures, notes, sections, foot):
    """The whole file as text. figures: {name: text}, shown large; notes: sentences; sections: HTML."""
    large = "".join(f"<li><b>{escape(v)}</b><span>{escape(k)}</span></li>" for k, v in figures.items())
    warned = f'<div class="notes">{"".join(map(paragraph, notes))}</div>' if notes else ""
    body = "\n".join(filter(None, sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
{"".join(map(paragraph, lead))}
{f'<ul class="figures">{large}</ul>' if large else ""}
</header>
{warned}
{body}
<footer>{escape(foot)}</footer>
</body>
</html>
"""
