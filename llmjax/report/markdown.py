"""The Markdown of samples.md: headings, paragraphs and fenced code, as sections and as HTML."""

import html
import re


def split_samples(text: str) -> list[tuple[str, str]]:
    """(heading, body) of each `##` section of a Markdown text; headings inside fenced code do not count."""
    rounds: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in text.splitlines():
        fence = _fence_after(line, fence)
        if not fence and line.startswith("## "):
            rounds.append((line[3:].strip(), []))
        else:
            rounds[-1][1].append(line)
    split = [(heading, "\n".join(lines)) for heading, lines in rounds]
    headed = [part for part in split if part[0]]
    return headed or [part for part in split if part[1].strip()]


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after this line ("" for none); one closes at its own sign, as long or longer."""
    match = re.match(r" {0,3}(`{3,}|~{3,})(.*)$", line)
    if not match:
        return fence
    if not fence:
        return match[1]
    closes = match[1][0] == fence[0] and len(match[1]) >= len(fence) and not match[2].strip()
    return "" if closes else fence


def to_html(text: str) -> str:
    """Headings, paragraphs and fenced code as HTML; all else stays as it is written, escaped."""
    parts: list[str] = []
    block: list[str] = []
    fence = ""

    def close(tag: str) -> None:
        content = html.escape("\n".join(block))
        if tag == "pre" or content.strip():
            parts.append(f'<{tag} dir="auto">{content}</{tag}>')
        block.clear()

    for line in text.splitlines():
        before, fence = fence, _fence_after(line, fence)
        if fence and not before:
            close("p")
        elif before and not fence:
            close("pre")
        elif not fence and (heading := re.match(r"(#{1,6}) +(.*)$", line)):
            close("p")
            parts.append("<h4>" + re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(heading[2])) + "</h4>")
        elif not fence and not line.strip():
            close("p")
        else:
            block.append(line)
    close("pre" if fence else "p")
    return "".join(parts)
