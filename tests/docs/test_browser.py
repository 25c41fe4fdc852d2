"""In a browser, pages load, nothing is cut off, commands are copied and dark mode is dark."""

import html
import json
import re
import shutil
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from blocks import PAGES, blocks
from PIL import Image
from shell import joined, lines

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


SEARCH = """
<iframe id="page" src="/?q=moe_world_size"></iframe><pre id="found"></pre>
<script>
  async function look() {
    const page = document.getElementById("page");
    for (let i = 0; i < 40; i++) {
      await fetch("/wait?" + i);  // virtual time stops during a request; the search worker does not
      const result = page.contentDocument.querySelector(".md-search-result");
      if (result && /matching/.test(result.textContent)) {
        found.textContent = result.textContent;
        return;
      }
    }
  }
  look();
</script>
"""


MEASURE = """
<pre id="found"></pre>
<script>
  const results = {code: [], tables: [], copied: []};
  function measure(frame) {
    const page = frame.contentDocument;
    for (const box of page.querySelectorAll("pre > code, .md-typeset__scrollwrap"))
      if (box.scrollWidth > box.clientWidth)
        results[box.matches("code") ? "code" : "tables"].push(
          frame.src + ": " + box.innerText.slice(0, 60));
    page.execCommand = () => {
      results.copied.push(page.querySelector("body > textarea").value);
      return true;
    };
    for (const button of page.querySelectorAll(".language-console button"))
      button.click();
  }
  addEventListener("load", () => setTimeout(() => {
    document.querySelectorAll("iframe").forEach(measure);
    found.textContent = JSON.stringify(results);
  }, 1000));
</script>
"""


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        if not self.path.startswith("/wait"):
            return super().do_GET()
        time.sleep(0.25)
        self.send_response(204)
        return self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def opened(url, *options):
    """Return the DOM of a page after loading, and the lines of its console."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",  # as on a phone, they take no width
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        *(options or ["--dump-dom"]),
        url,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def in_frames(site, address, width):
    """Load all pages in frames of a width: the DOM, its measures, and the lines of its console."""
    pages = [page.relative_to(site).as_posix() for page in site.rglob("index.html")]
    assert len(pages) > 15
    frames = [f'<iframe src="/{page}" width="{width}" height="900"></iframe>' for page in pages]
    (site / "all.html").write_text("".join(frames) + MEASURE)
    dom, messages = opened(f"{address}/all.html")
    assert dom.count("<iframe") == len(pages)
    return json.loads(html.unescape(found(dom))), messages


@pytest.fixture(scope="module")
def laptop(site, address):
    return in_frames(site, address, 1440)


def found(dom):
    return dom.partition('id="found">')[2].partition("</pre>")[0]


def test_every_page_loads_without_an_error(laptop):
    assert laptop[1] == []


def test_no_block_and_no_table_scrolls_sideways(laptop):
    assert laptop[0]["code"] + laptop[0]["tables"] == []


def test_no_table_scrolls_sideways_on_a_phone(site, address):
    assert in_frames(site, address, 390)[0]["tables"] == []


def test_the_button_copies_commands_without_prompt_and_output(laptop):
    """test_shell.py runs these commands."""
    commands = {tuple(lines(block)) for page in PAGES for block in blocks(page)}
    copied = [tuple(joined(text)) for text in laptop[0]["copied"]]
    assert len(copied) > 40
    assert set(copied) <= commands


@pytest.mark.parametrize(("scheme", "light"), [(0, False), (1, True)], ids=["dark", "light"])
def test_plots_follow_the_scheme(site, address, tmp_path, scheme, light):
    """Less than 1 % of a page with plots is white in dark mode."""
    assert (site / "benchmarks" / "h200" / "layer-gluon.png").is_file()
    picture = tmp_path / "page.png"
    opened(
        f"{address}/benchmarks/h200/",
        f"--screenshot={picture}",
        "--window-size=1000,4000",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    with Image.open(picture) as image:
        white = (np.asarray(image.convert("L")) > 250).mean()
    assert white > 0.5 if light else white < 0.01


def test_errors_of_a_page_are_returned(site, address):
    (site / "wrong.html").write_text("<script>console.error('so'); missing()</script>")
    assert len(opened(f"{address}/wrong.html")[1]) == 2


def test_search_finds_a_key(site, address):
    (site / "search.html").write_text(SEARCH)
    dom, messages = opened(f"{address}/search.html")
    assert re.search(r"[1-9]\d* matching documents", found(dom))
    assert "Keys of models" in found(dom)
    assert messages == []
