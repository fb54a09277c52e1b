"""Claims about the Markdown of samples."""

from llmjax.report.markdown import split_samples, to_html


def test_sections_begin_at_second_level_headings_outside_of_code():
    text = "# Samples\n\n## update 1\n\n```\n## code\n```\n\n## update 2\n\nwords\n"
    assert split_samples(text) == [("update 1", "\n```\n## code\n```\n"), ("update 2", "\nwords")]


def test_text_without_headings_is_one_section_and_nothing_is_none():
    assert split_samples("words") == [("", "words")]
    assert split_samples(" \n") == []


def test_only_headings_paragraphs_and_code_are_markup():
    got = to_html("### `a` & b\n\n<i>x</i>\n\n~~~\n  *y*\n~~~")
    assert got == (
        '<h4><code>a</code> &amp; b</h4><p dir="auto">&lt;i&gt;x&lt;/i&gt;</p><pre dir="auto">  *y*</pre>'
    )
