"""The site in a browser: after `make site`, and if there is Chromium."""

import functools as ft
import http.server
import json
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, cast

import pytest


site = Path(__file__).parent.parent / "site"
chromium = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(not (site / "index.html").exists(), reason="needs `make site`"),
    pytest.mark.skipif(chromium is None, reason="needs Chromium"),
]

PAGES = ("", "how-it-works/", "adjoints/", "benchmarks/", "api/solver/", "studies/")
# In frames of the same origin, of which everything can be asked.
HARNESS = """<body><script>
const pages = %s, found = [];
const sleep = ms => new Promise(done => setTimeout(done, ms));
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.style.height = "800px";
  frame.src = "/" + page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const root = frame.contentDocument;
  if (page.includes("?q="))
    for (let i = 0; i < 100 && !root.querySelector(".md-search-result__link"); i++)
      await sleep(100);
  const maths = [...root.querySelectorAll("math")];
  found.push({
    page, width,
    inner: root.documentElement.scrollWidth,
    raw: root.querySelectorAll(".arithmatex").length,
    formulas: maths.filter(x => x.getBoundingClientRect().height > 5).length,
    links: [...root.querySelectorAll(".md-search-result__link")].map(x => x.href),
  });
  frame.remove();
}
(async () => {
  for (const page of pages)
    for (const width of [390, 1280])
      await look(page, width);
  await look("?q=DeerSolver", 1280);
  fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        # Whatever would come from elsewhere is refused, and an error in the console.
        policy = "default-src 'self' 'unsafe-inline' blob: data:"
        self.send_header("Content-Security-Policy", policy)
        super().end_headers()

    def do_GET(self):
        if self.path != "/harness":
            return super().do_GET()
        body = (HARNESS % json.dumps(PAGES)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        cast(Any, self.server).found.put(json.loads(self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    handler = ft.partial(_Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        found = cast(Any, server).found = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = "headless no-sandbox disable-gpu disable-quic no-first-run"
        flags += " disable-background-networking disable-component-update disable-sync"
        flags += " enable-logging=stderr remote-debugging-port=0"
        directory = tmp_path_factory.mktemp("browser")
        with (directory / "log").open("w") as log:
            browser = subprocess.Popen(
                [
                    str(chromium),
                    *(f"--{flag}" for flag in flags.split()),
                    f"--user-data-dir={directory / 'profile'}",
                    f"http://127.0.0.1:{server.server_address[1]}/harness",
                ],
                stderr=log,
                stdout=subprocess.DEVNULL,
            )
            try:
                pages = found.get(timeout=90)
            finally:
                browser.terminate()
                browser.wait(timeout=20)
                server.shutdown()
    log = (directory / "log").read_text(errors="replace")
    return pages, [line for line in log.splitlines() if "CONSOLE" in line]


def test_pages(seen):
    found, _ = seen
    assert {row["page"] for row in found} == {*PAGES, "?q=DeerSolver"}
    for row in found:
        # Nothing is wider than the screen, be it of a phone.
        assert row["inner"] <= row["width"]
        # Every formula is one that the browser shows.
        assert row["raw"] == 0
    formulas = {row["page"]: row["formulas"] for row in found}
    assert formulas["how-it-works/"] > 10 and formulas["adjoints/"] > 1


def test_search(seen):
    found, _ = seen
    [row] = [row for row in found if row["page"].startswith("?q=")]
    assert any("api/solver" in link for link in row["links"])


def test_no_errors_and_no_requests_to_elsewhere(seen):
    _, console = seen
    assert console == []
