"""Makes the HTML that the sections of the report have in common: headings, tables, and parts that fold."""

import html
import json


def section(title: str, body: str) -> str:
    """A section of the page with a heading, or nothing if `body` is empty. `title` and `body` are HTML already."""
    return f"<section><h2>{title}</h2>\n{body}\n</section>" if body else ""


def as_entries(value: object) -> dict[str, str]:
    """A dict from summary.json with every key and value as text, or an empty dict if `value` is not a dict."""
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def entry_table(entries: dict[str, str]) -> str:
    """A table with a row for each label and its text, or nothing if there are no entries."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(text)}</td></tr>'
        for key, text in entries.items()
    )
    return f'<table class="entries"><tbody>{rows}</tbody></table>' if rows else ""


def figure_table(head: list[str], rows: list[list[str]], words: int = 0) -> str:
    """A table of numbers, set to the right, under the names in `head`.

    The last `words` columns hold text and are set to the left.
    """

    def cells(tag: str, texts: list[str]) -> str:
        """The cells of a row. `tag` is the name of the element, and may have attributes."""
        first_text_column = len(texts) - words
        return "".join(
            f"<{tag}{' class=words' * (i >= first_text_column)}>{html.escape(text)}</{tag.split()[0]}>"
            for i, text in enumerate(texts)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    kind = "figures events" if words else "figures"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells("th scope=col", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, body: str) -> str:
    """HTML that shows only the line `summary`, and `body` after a click on it."""
    return f"<details><summary>{summary}</summary>{body}</details>"


def flatten(values: dict, prefix: str = "") -> dict[str, str]:
    """A nested dict as a flat one: keys joined by dots, values written as JSON.

    Text has no quotes, except empty text, which would be invisible without them. `prefix` comes before every key.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
            )
    return flat
