"""The page in a real headless Chromium, over HTTP."""

from __future__ import annotations

import re
import socket
from base64 import b64decode
from pathlib import Path

import pytest
from helpers.chromium import Tab, chromium
from helpers.scripted_engine import ScriptedEngine, listening
from rich.console import Console

from moray.cluster import ray_session
from moray.deploy.serving.args import make_args
from moray.deploy.serving.command import serving
from moray.deploy.serving.keys import KeyFile, add_key

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

CONNECTED = "document.getElementById('status').textContent === 'connected'"
IDLE = "document.getElementById('send').textContent === 'Send'"
HOSTILE = """# <script>alert(1)</script>
<img src=x onerror=alert(1)> **bold** `<b>code</b>` [a](javascript:alert(1)) [b](https://example.org/"onclick=x)
[c](data:text/html,x) https://example.org/?q=<svg/onload=alert(1)>

| <iframe> | b |
|---|---|
| <style>*{display:none}</style> | ![x](https://example.org/pixel.png) |

```html
<script>alert(2)</script>
"""
# Every Markdown mark with tags in between, at random; what comes out has only the elements and attributes it may have,
# and lost no character of a tag.
FUZZ = r"""
(async () => {
  const { renderMarkdown } = await import('/page/markdown.js');
  const parts = ['<script>', '<img src=x onerror=alert(1)>', '"', "'", '`', '```', '**', '*', '_', '~~', '[', '](', ')',
    'javascript:alert(1)', 'https://a.b/', '\n', '\n\n', '> ', '- ', '1. ', '# ', '|', '|-|-|', '\\', ' ', 'x',
    '\u0000', 'data:text/html,x', '  ', '&lt;', '---', '\u202e'];
  const tags = new Set(('H1 H2 H3 H4 H5 H6 P UL OL LI PRE CODE STRONG EM DEL A BR HR BLOCKQUOTE TABLE THEAD ' +
    'TBODY TR TH TD').split(' '));
  const attributes = new Set(['href', 'rel', 'target', 'title', 'start']);
  let seed = 1;
  const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
  for (let round = 0; round < 3000; round++) {
    const text = Array.from({ length: 1 + random(40) }, () => parts[random(parts.length)]).join('');
    const made = renderMarkdown(text);
    for (const element of made.querySelectorAll('*')) {
      if (!tags.has(element.tagName)) return 'element ' + element.tagName + ' of ' + JSON.stringify(text);
      for (const { name } of element.attributes)
        if (!attributes.has(name)) return 'attribute ' + name + ' of ' + JSON.stringify(text);
      if (element.tagName === 'A' && !/^(https?|mailto):$/.test(element.protocol))
        return 'link of ' + JSON.stringify(text);
    }
    const count = (whole) => whole.split('<script>').length;
    const isFenced = text.includes('```');
    if (!isFenced && count(made.textContent) !== count(text)) return 'lost text of ' + JSON.stringify(text);
  }
  for (const mark of ['*', '**x', '`', '[', '](', '_a', '> ', '- ', '|', '[a](', '~~'])
    renderMarkdown(mark.repeat(20000));
  return 'good';
})()
"""


def words(text: str) -> list[str]:
    return re.findall(r"\S+\s*|\s+", text)


def ask(tab: Tab, text: str) -> None:
    tab.run("document.getElementById('input').focus()")
    tab.type(text)
    tab.press("Enter")


def only_from(tab: Tab, url: str) -> bool:
    return all(request.startswith(f"{url}/") for request in tab.requests)


def test_nothing_a_model_says_becomes_part_of_the_page(tmp_path: Path) -> None:
    with listening(ScriptedEngine(answer=words(HOSTILE))) as url, chromium() as tab:
        tab.look(1280, 800, dark=True)
        tab.open(url)
        tab.wait(CONNECTED)
        ask(tab, "<b>hello</b>")
        tab.wait(f"{IDLE} && document.querySelector('.assistant .note')?.textContent.includes('tokens')")
        assert tab.run("document.querySelector('.user').textContent") == "<b>hello</b>"
        assert tab.run("document.querySelectorAll('.assistant :is(script, img, iframe, style, svg, b)').length") == 0
        assert "<script>alert(1)</script>" in tab.run("document.querySelector('.assistant h1').textContent")
        assert tab.run("[...document.querySelectorAll('.assistant a')].every((a) => a.protocol === 'https:')")
        assert tab.run(FUZZ) == "good"
        assert only_from(tab, url) and not tab.complaints
        refused = tab.run("try { document.body.innerHTML = '<i>x</i>'; 'done' } catch { 'refused' }")
        assert refused == "refused"


def test_twenty_thousand_experts_on_all_screens(tmp_path: Path) -> None:
    engine = ScriptedEngine(layers=[352] * 58)
    with listening(engine) as url, chromium() as tab:
        for width, height, dark in ((1440, 900, True), (1440, 900, False), (390, 844, True), (390, 844, False)):
            tab.look(width, height, dark=dark, phone=width < 500)
            tab.open(url)
            tab.wait(CONNECTED)
            tab.run("document.getElementById('show-engine').click()")
            tab.wait("document.getElementById('map').width > 300")
            assert tab.run("document.documentElement.scrollWidth <= innerWidth")
            tab.screenshot(tmp_path / f"{width}-{dark}.png")
            tab.run("document.getElementById('map').focus()")
            for key in ("ArrowDown", "ArrowRight", "End"):
                tab.press(key)
            told = tab.run("document.getElementById('cell').textContent")
            assert re.fullmatch(r"Layer \d+, expert 351: (disk|(arena|remote) \S+ on \w+); recent use \d+ of 100", told)
        assert not tab.complaints and only_from(tab, url)


def test_stop_ends_the_generation_and_a_lost_engine_is_told_of(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "me")
    engine = ScriptedEngine(answer=["word "] * 2000, pause_s=0.02)
    with listening(engine, KeyFile(tmp_path / "keys")) as url, chromium() as tab:
        tab.open(url)
        tab.wait("document.getElementById('key-dialog').open")
        tab.type(key)
        tab.press("Enter")
        tab.wait(CONNECTED)
        for end in ("document.getElementById('send').click()", None):
            ask(tab, "go on")
            tab.wait("[...document.querySelectorAll('.assistant')].at(-1)?.textContent.includes('word word')")
            tab.run(end) if end else tab.press("Escape")
            tab.wait(f"{IDLE} && [...document.querySelectorAll('.note')].at(-1).textContent === 'stopped'")
        free = f"fetch('/state', {{headers: {{Authorization: 'Bearer {key}'}}}}).then((answer) => answer.json())"
        tab.wait(f"{free}.then((state) => state.requests === 0)")
        assert engine.cancelled == 2 and engine.num_tokens < 2000
        tab.run("document.getElementById('settings').open = true; document.getElementById('top_p').value = 7")
        ask(tab, "not sent")
        assert tab.run("document.querySelectorAll('.user').length") == 2
        engine.is_lost = True
        tab.wait("document.getElementById('status').textContent.includes('the compute actor is gone')")
        engine.is_lost = False
        tab.wait(CONNECTED)


@pytest.mark.ray
def test_the_page_shows_the_engine_that_runs(tmp_path: Path) -> None:
    """The demonstration model, which has no chat template, under `moray serve`: its text, and its experts in use."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    session = ray_session.start_local(2)
    try:
        args = make_args({"hosts": 2, "threads": 2})
        with serving(args, "127.0.0.1", port, Console(quiet=True)), chromium() as tab:
            tab.look(1440, 900, dark=True)
            url = f"http://127.0.0.1:{port}"
            tab.open(url)
            tab.wait(CONNECTED)
            assert tab.run("document.body.dataset.mode") == "text"
            tab.run("document.getElementById('temperature').value = 0")
            ask(tab, "import os\nimport sys\n")
            tab.wait(f"{IDLE} && document.querySelector('.note')?.textContent.includes('256 tokens')")
            state = "fetch('/state').then((answer) => answer.json())"
            assert tab.run(f"{state}.then((s) => s.tokens_decoded)") >= 255
            recent = f"{state}.then((s) => s.layers.map((layer) => layer.recent))"
            assert max(max(b64decode(levels)) for levels in tab.run(recent)) > 100
            legend = tab.run("document.getElementById('legend').textContent")
            assert re.search(r"disk: 0.*arena host-0 .*arena host-1 ", legend)
            tab.screenshot(tmp_path / "demo.png")
            assert not tab.complaints and only_from(tab, url)
    finally:
        ray_session.leave(session)
