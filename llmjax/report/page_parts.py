"""The HTML of which the sections of the report are made: a section with its heading, and two kinds of tables."""

import html
import json


def section(title: str, body: str) -> str:
    """A section of the page under a heading, or nothing where `body` is empty. Both are HTML already."""
    return f"<section><h2>{title}</h2>\n{body}\n</section>" if body else ""


def as_entries(value: object) -> dict[str, str]:
    """A dict of summary.json with every key and value as text; empty where `value` is no dict."""
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def entry_table(entries: dict[str, str]) -> str:
    """A table with a row for each label and its text; nothing where there are no entries."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(text)}</td></tr>'
        for key, text in entries.items()
    )
    return f'<table class="entries"><tbody>{rows}</tbody></table>' if rows else ""


def figure_table(head: list[str], rows: list[list[str]], words: int = 0) -> str:
    """A table of numbers under the names in `head`. The last `words` columns hold text and are set to the left."""

    def cells(tag: str, texts: list[str]) -> str:
        at = len(texts) - words
        return "".join(
            f"<{tag}{' class=words' * (i >= at)}>{html.escape(text)}</{tag.split()[0]}>"
            for i, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "figures events" if words else "figures"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells("th scope=col", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """`body` folded under a line that opens it on a click."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def flatten(values: dict, prefix: str = "") -> dict[str, str]:
    """Nested keys joined by dots, and values as JSON. Text stands without its quotes, unless it is empty."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            )
    return flat
