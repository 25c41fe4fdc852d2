"""In a browser, pages load without an error and search finds a key."""

import re
import shutil
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

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


def opened(url):
    """Return the DOM of a page after loading, and the lines of its console."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
    ]
    command = [CHROMIUM, *options, "--dump-dom", url]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_every_page_loads_without_an_error(site, address):
    """One page loads all others in frames."""
    pages = [page.relative_to(site).as_posix() for page in site.rglob("index.html")]
    assert len(pages) > 15
    (site / "all.html").write_text("".join(f'<iframe src="/{page}"></iframe>' for page in pages))
    dom, messages = opened(f"{address}/all.html")
    assert dom.count("<iframe") == len(pages)
    assert messages == []


def test_errors_of_a_page_are_returned(site, address):
    (site / "wrong.html").write_text("<script>console.error('so'); missing()</script>")
    assert len(opened(f"{address}/wrong.html")[1]) == 2


def test_search_finds_a_key(site, address):
    (site / "search.html").write_text(SEARCH)
    dom, messages = opened(f"{address}/search.html")
    results = dom.partition('id="found">')[2].partition("</pre>")[0]
    assert re.search(r"[1-9]\d* matching documents", results)
    assert "Keys of models" in results
    assert messages == []
