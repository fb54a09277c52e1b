"""The page to chat with: it loads nothing from elsewhere, and in a real browser it chats, stops and stays itself."""

import html.parser
import re
import shutil
import time

import pytest

from llmjax.serve.app import PAGE, content_policy
from tests.serve.running import TOKENIZER, ask, engine, running

TEXT = PAGE.read_text(encoding="utf-8")


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, which must be closed in the order in which they were opened."""

    VOID = ("meta", "link", "input")

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def elements():
    parser = Elements()
    parser.feed(TEXT)
    assert parser.open == []
    return parser.found


def test_the_page_links_to_nothing_and_makes_no_markup_of_text(elements):
    links = [
        value for _, attrs in elements for name, value in attrs.items() if name in ("src", "href", "action")
    ]
    assert links == ["data:,"] and "://" not in TEXT and "@import" not in TEXT and "url(" not in TEXT
    assert not any(name.startswith("on") or name == "style" for _, attrs in elements for name in attrs)
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "new Function"):
        assert word not in TEXT
    assert "textContent = text" in TEXT and "textContent = said" in TEXT


def test_every_field_has_a_label_and_every_id_that_the_script_names_exists(elements):
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len({*ids}) and {*re.findall(r'at\("([\w-]+)"\)', TEXT)} <= {*ids}
    labelled = {attrs.get("for") for tag, attrs in elements if tag == "label"}
    fields = [attrs["id"] for tag, attrs in elements if tag in ("textarea", "input")]
    inside = re.findall(r"<label>.*?<input id=\"(\w+)\"", TEXT)
    assert {*fields} == {*inside, "text"} and "text" in labelled


def test_the_policy_lets_the_script_and_the_style_of_the_page_run_and_nothing_else():
    policy = content_policy(TEXT)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    with running() as server:
        status, text = ask(server, "GET", "/")
    assert (status, text) == (200, TEXT)


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def wait_for(page, condition):
    """Waits until a condition in the page holds. Playwright's own way is forbidden by the policy of the page."""
    end = time.monotonic() + 30
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def set_tokens(page, count):
    page.click("#settings")
    page.fill("#tokens", str(count))


def write(monkeypatch, text, seconds=0.0):
    """Makes the engine write this text, one byte at each step."""
    place, step = iter(TOKENIZER.encode(text)), engine().step

    def spell():
        time.sleep(seconds)
        return [
            event._replace(token=next(place, TOKENIZER.encode(".")[0]))
            if getattr(event, "token", None)
            else event
            for event in step()
        ]

    monkeypatch.setattr(engine(), "step", spell)


@pytest.mark.interop
def test_in_a_browser_one_chats_and_what_a_model_writes_stays_text(browser, monkeypatch, tmp_path):
    said = "春江 <img src=x onerror=alert(1)>\n<b>b</b>"
    write(monkeypatch, said)
    with running() as server:
        page, problems = browser.new_page(locale="en-GB"), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("dialog", lambda dialog: problems.append("a dialog"))
        page.goto(f"http://127.0.0.1:{server.port}/")
        wait_for(page, "document.title === 'tiny'")
        set_tokens(page, len(said.encode()))
        page.focus("#text")
        page.keyboard.type("hello")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("you")
        page.keyboard.press("Enter")
        page.wait_for_selector("article.note")
        texts = page.locator("article p").all_inner_texts()
        assert texts[:2] == ["hello\nyou", said] and page.locator("article img, article b").count() == 0
        assert page.evaluate("document.activeElement.id") == "text" and page.locator("#stop").is_hidden()
        page.screenshot(path=tmp_path / "page.png")
        page.click("#new")
        assert page.locator("article").count() == 0 and problems == []


@pytest.mark.interop
def test_in_a_browser_the_stop_button_frees_the_slot(browser, monkeypatch):
    write(monkeypatch, "a" * 200, seconds=0.1)
    with running() as server:
        page = browser.new_page(locale="zh-CN")
        page.goto(f"http://127.0.0.1:{server.port}/")
        assert page.locator("#send").inner_text() == "发送"
        set_tokens(page, 80)
        page.fill("#text", "你好")
        page.keyboard.press("Enter")
        wait_for(page, "document.querySelectorAll('article.model p')[0]?.textContent.length > 2")
        page.click("#stop")
        page.wait_for_selector("article.note")
        end = time.monotonic() + 10
        while not server.engine.is_idle and time.monotonic() < end:
            time.sleep(0.05)
        assert server.engine.is_idle and "已停止" in page.locator("article.note").inner_text()
        # What was said stays in the conversation, whose next message follows on it.
        assert page.evaluate("messages.map((message) => message.role)") == ["user", "assistant"]


@pytest.mark.interop
def test_in_a_browser_a_long_conversation_loses_its_oldest_turn_and_says_so(browser):
    with running() as server:
        page = browser.new_page(locale="en-GB")
        page.goto(f"http://127.0.0.1:{server.port}/")
        set_tokens(page, 3)
        for number in range(1, 4):
            page.fill("#text", f"{number} " + "long " * 6)
            page.keyboard.press("Enter")
            wait_for(page, f"document.querySelectorAll('article.model').length === {number} && !running")
        notes = " ".join(page.locator("article.note").all_inner_texts())
        assert "its oldest turn is left out" in notes
        assert page.evaluate("messages[0].content").startswith("2 ")


@pytest.mark.interop
def test_in_a_browser_the_key_is_asked_for(browser):
    with running(key="secret") as server:
        page = browser.new_page(locale="en-GB")
        page.goto(f"http://127.0.0.1:{server.port}/")
        wait_for(page, "document.activeElement.id === 'key'")
        page.keyboard.type("secret")
        page.keyboard.press("Tab")
        wait_for(page, "document.title === 'tiny'")
        page.fill("#text", "hello")
        page.click("#send")
        page.wait_for_selector("article.model")
