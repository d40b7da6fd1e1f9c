"""Makes HTML from the files in templates/. All values are escaped, so that no value becomes markup."""

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.core.errors import printable

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def as_text(value: Any) -> str:
    """Convert any JSON value to printable text."""
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else "unknown"
    if isinstance(value, (list, tuple)):
        return " ".join(as_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{printable(name)} {as_text(item)}" for name, item in value.items())
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return printable(value)


_TEMPLATES.filters["as_text"] = as_text


def render(template: str, **values: Any) -> str:
    """Return the HTML of a template that is filled with these values. Templates can call as_text() as a filter."""
    return _TEMPLATES.get_template(template).render(values)
