"""A model's text as HTML that can do nothing: a model's words are an adversary's data.

By default text is text. Markdown goes through a renderer that knows no HTML, then through an allow-list; pictures are
left out (nothing is fetched from elsewhere), links open apart and tell nothing about where they were followed. Hidden
characters are shown in both, see ``feedback.hidden``.
"""

from __future__ import annotations

import html
from functools import lru_cache
from typing import Any, Literal

import nh3
from markdown_it import MarkdownIt

from palate.data.kinds import PromptText
from palate.feedback.hidden import visible

LONGEST_MARKDOWN = 50_000  # characters; longer texts are shown as plain text
TAGS = frozenset(
    [
        "p",
        "br",
        "hr",
        "em",
        "strong",
        "del",
        "code",
        "pre",
        "blockquote",
        "ul",
        "ol",
        "li",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "a",
    ]
)
SCHEMES = frozenset({"http", "https", "mailto"})


def as_html(text: str, how: Literal["text", "markdown"]) -> str:
    """Safe to be put into a page as it is."""
    if how == "markdown" and len(text) <= LONGEST_MARKDOWN:
        return markdown(text)
    return f'<div class="plain">{html.escape(visible(text))}</div>'


@lru_cache(maxsize=256)
def markdown(text: str) -> str:
    """Markdown as sanitised HTML."""
    rendered = _renderer().render(visible(text))
    clean = nh3.clean(
        rendered,
        tags=set(TAGS),
        attributes={"a": {"href"}, "ol": {"start"}},
        url_schemes=set(SCHEMES),
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        strip_comments=True,
    )
    return f'<div class="markdown">{clean}</div>'


def prompt_view(prompt: PromptText, how: Literal["text", "markdown"]) -> list[dict[str, Any]]:
    """The turns of a prompt: role, html, and text with hidden characters shown."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [
        {"role": turn["role"], "html": as_html(turn["content"], how), "text": visible(turn["content"])}
        for turn in turns
    ]


def response_view(key: str, text: str, how: Literal["text", "markdown"]) -> dict[str, Any]:
    return {"id": key, "html": as_html(text, how), "text": visible(text)}


@lru_cache(maxsize=1)
def _renderer() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")
