"""The templates escape what is put into them."""

import re

import pytest
from conftest import ROOT
from jinja2 import UndefinedError

from utils.display.html import as_text, render

FOLDER = ROOT / "utils/display"
TEMPLATES = sorted((FOLDER / "templates").glob("*.html"))


def test_nothing_is_marked_as_safe():
    """Escaping could be switched off by the filter `safe`, a block `autoescape`, a script, or the class Markup."""
    assert len(TEMPLATES) > 3
    for path in TEMPLATES:
        assert not re.search(r"\|\s*safe|autoescape|<script|javascript:|\bon\w+=", path.read_text()), path
    for path in [*FOLDER.glob("*.py"), ROOT / "experiments/dashboard.py", ROOT / "experiments/show_run.py"]:
        assert not re.search(r"Markup|\|\s*safe|autoescape=False|__html__", path.read_text()), path


def test_attributes_are_quoted():
    for path in TEMPLATES:
        assert not re.search(r"=\s*{[{%]", re.sub(r"{%.*?%}", "", path.read_text())), path


def test_values_are_escaped():
    text = render("table.html", values={"<b>": "\"'&<script>", "x": ["<i>", {"<u>": 1}]})
    assert "&lt;b&gt;" in text and "&#34;&#39;&amp;&lt;script&gt;" in text and "&lt;i&gt; &lt;u&gt; 1" in text
    assert set(re.findall(r"<(\w+)", text)) == {"table", "tr", "td"}
    text = render("progress.html", run="<b>", state="</b>", colour="#000", percent=25.0, values={})
    assert "<b>&lt;b&gt;</b>: &lt;/b&gt;" in text and "width:25.0%" in text


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError):
        render("table.html")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456789, "0.12346"),
        (float("inf"), "unknown"),
        (10**9, "1000000000"),
        (None, "-"),
        (True, "yes"),
        ([1, 2.0, "a"], "1 2 a"),
        ({"a": [1], "b": False}, "a 1, b no"),
        ("\x1b[31m", "\\x1b[31m"),
    ],
)
def test_values_as_text(value, text):
    assert as_text(value) == text
