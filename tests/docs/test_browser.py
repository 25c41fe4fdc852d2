"""The site in a browser: pages load without an error, and search finds a key."""

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
    for (let i = 0; i < 40; i++) {
      await fetch("/wait?" + i);  // meanwhile the browser's time stands still, and the search runs on
      const result = document.getElementById("page").contentDocument.querySelector(".md-search-result");
      if (result && /matching/.test(result.textContent)) return (found.textContent = result.textContent);
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
    """Return what a page became, and what was written to its console."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
    ]
    ran = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", url], capture_output=True, text=True, timeout=120
    )
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def test_every_page_loads_without_an_error(site, address):
    """All at once, each in a frame of its own."""
    pages = [page.relative_to(site).as_posix() for page in site.rglob("index.html")]
    assert len(pages) > 15
    (site / "all.html").write_text("".join(f'<iframe src="/{page}"></iframe>' for page in pages))
    shown, said = opened(f"{address}/all.html")
    assert shown.count("<iframe") == len(pages)
    assert said == []


def test_an_error_would_be_noticed(site, address):
    (site / "wrong.html").write_text("<script>console.error('so'); missing()</script>")
    assert len(opened(f"{address}/wrong.html")[1]) == 2


def test_search_finds_a_key(site, address):
    (site / "search.html").write_text(SEARCH)
    shown, said = opened(f"{address}/search.html")
    found = shown.partition('id="found">')[2].partition("</pre>")[0]
    assert re.search(r"[1-9]\d* matching documents", found)
    assert "Keys of models" in found
    assert said == []
