"""The page every report shares: one HTML file that needs no network and runs no foreign script."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from regard.core.errors import ArgumentError
from regard.report import units


def page(template: str, context: Mapping[str, object], own: Sequence[str] = ()) -> str:
    """The HTML of a template that extends page.html.j2, with style, script and policy put in.

    Everything in `context` is escaped, save what is marked as safe; a name the template uses and
    the context lacks is an error. own: style and script files that this template has besides those
    of every page.
    """
    style = "\n".join(_source(name) for name in ("page.css", *own) if name.endswith(".css"))
    script = "\n".join(_source(name) for name in ("page.js", *own) if name.endswith(".js"))
    shell = {"style": Markup(style), "script": Markup(script), "policy": policy(script)}
    return _environment().get_template(template).render({**context, **shell})


def policy(script: str) -> str:
    """The content security policy: nothing may be fetched, and only this script may run."""
    digest = b64encode(sha256(script.encode()).digest()).decode()
    rules = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def write_page(html: str, path: str | os.PathLike[str]) -> None:
    """Write a page whole or not at all.

    Raises:
        ArgumentError: the folder does not exist, or the path is a folder.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ArgumentError("path", "a file in an existing folder", str(target))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(html, encoding="utf-8", newline="\n")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def code(text: str) -> Markup:
    """Prose of a docstring, escaped, its `names in backticks` as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick is left over: it is only a character
        return escape(text)
    tagged = (
        Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts)
    )
    return Markup("").join(tagged)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("regard.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=units.percent,
        short_percent=units.short_percent,
        byte_size=units.byte_size,
        amount=units.amount,
        duration=units.duration,
        short=units.short,
        code=code,
    )
    return environment


def _source(name: str) -> str:
    return files("regard.report").joinpath("templates", name).read_text(encoding="utf-8")
