"""The built documentation in a browser: `python -m pytest tests/docs --site docs/_build`, with Chromium and its driver.

Every page is opened: nothing is written to the console, formulas are drawn, links lead somewhere. The memory page says
what `signadam memory` says.
"""

import functools
import http.server
import random
import re
import shutil
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import signadam_ext
from signadam_ext import memory


@pytest.fixture(scope="module")
def site(request):
    folder = request.config.getoption("--site")
    if folder is None:
        pytest.skip("needs a built documentation: --site docs/_build")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def address(site):
    """Where the pages are served: a page from the file system may ask for less than one from a server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(site):
    from selenium import webdriver

    driver = shutil.which("chromedriver")
    assert driver, "needs Chromium and its driver: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1600"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def opened(browser, url):
    """Opens a page and waits until its scripts have run: on a busy machine the driver may return before they have."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(url)
    WebDriverWait(browser, 20, 0.02).until(lambda _: browser.execute_script("return document.readyState") == "complete")


class Links(HTMLParser):
    """Where a page leads, and what in it can be led to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


def pages(site):
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def test_links_lead_somewhere(site):
    read = functools.cache(Links)
    dead, followed = [], 0
    for page in pages(site):
        for link in read(page).links:
            if re.match(r"[a-z]+:", link):
                continue
            path, anchor = urldefrag(link)
            path = path.partition("?")[0]
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            followed += 1
            if not target.is_file() or (
                anchor and target.suffix == ".html" and unquote(anchor) not in read(target).anchors
            ):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert dead == []
    assert followed > 500


FORMULAS = """
const [written, done] = arguments, deadline = Date.now() + 20000;
(function look() {
  const drawn = document.querySelectorAll("mjx-container").length;
  if (drawn === written || Date.now() > deadline) done(drawn);
  else setTimeout(look, 20);
})();
"""


def test_every_page_opens(site, address, browser):
    formulas = 0
    for page in pages(site):
        browser.get_log("browser")
        opened(browser, f"{address}/{page.relative_to(site).as_posix()}")
        written = len(re.findall(r'class="math notranslate', page.read_text(encoding="utf-8")))
        # The script that draws formulas goes on after the page is complete.
        drawn = browser.execute_async_script(FORMULAS, written)
        faults = browser.execute_script("return document.querySelectorAll('mjx-merror, .MathJax_Error').length")
        assert (drawn, faults) == (written, 0), page
        formulas += drawn
        assert browser.get_log("browser") == [], page
        missing = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        assert browser.execute_script(missing) == [], page
    assert formulas > 20
    asked = {
        entry
        for line in browser.get_log("performance")
        for entry in re.findall(r'"url":"(https?://[^"]+)"', line["message"])
    }
    assert asked and all(url.startswith(address) for url in asked)


CHOICES = """
const wanted = arguments[0], form = document.getElementById("memory-choices");
// Names that depend on others come after these.
for (const [name, value] of Object.entries(wanted)) {
  form.elements[name].value = value;
  if (form.elements[name].value !== String(value)) return [name, [...form.elements[name].options].map(o => o.value)];
  form.elements[name].dispatchEvent(new Event("input", {bubbles: true}));
}
const rows = [...document.querySelectorAll("#memory-table tr[data-part]")];
return {
  rows: Object.fromEntries(rows.map(r => [r.dataset.part, [Number(r.dataset.bytes), ...[...r.cells].slice(1).map(c => c.textContent)]])),
  widths: [...document.querySelectorAll(".memory-stack")].map(s => s.getBoundingClientRect().width && [...s.children].map(c => c.getBoundingClientRect().width)),
  command: document.getElementById("memory-command").textContent,
  error: document.getElementById("memory-error").hidden ? null : document.getElementById("memory-error").textContent,
};
"""  # noqa: E501


def test_the_memory_page_says_what_the_command_says(site, address, browser, monkeypatch):
    """50 random choices, of every optimizer and of every form at least one."""
    monkeypatch.syspath_prepend(str(Path(memory.__file__).parents[1] / "docs" / "_ext"))
    import memory_data

    data = memory_data.data()
    opened(browser, f"{address}/memory.html")
    draw = random.Random(0)
    names = list(data["optimizers"])
    tried, parameters_tried = Counter(), set()
    for i in range(50):
        optimizer = names[i] if i < len(names) else draw.choice(names)
        found = data["optimizers"][optimizer]
        param = draw.choice(list(data["params"]))
        parameters = draw.choice([draw.randrange(1, 100), draw.randrange(1000, 10**7), draw.randrange(10**9, 10**11)])
        count = draw.randrange(1, min(parameters, 500) + 1)
        wanted = {
            "parameters": parameters,
            "tensors": count,
            "largest": draw.randrange(1, parameters + 1),
            "gpus": draw.choice([1, 2, 8, 1024]),
            "optimizer": optimizer,
            "param": param,
            # Of the forms that there are, one that has been tried least.
            "storage": min(data["params"][param]["storages"], key=tried.__getitem__),
            "state": min(found["states"], key=tried.__getitem__),
            "grad": draw.choice(list(data["params"])),
            "gradients": draw.choice(memory.GRADIENTS),
        }
        tried.update((wanted["storage"], wanted["state"]))
        parameters_tried |= {param, wanted["gradients"]}
        shown = browser.execute_script(CHOICES, wanted)
        assert isinstance(shown, dict) and shown["error"] is None, (wanted, shown)
        shapes = memory.even_shapes(parameters, count)
        state = wanted["state"] if "state_dtype" in getattr(signadam_ext, found["name"]).COMMON else None
        ours = memory.estimate(
            shapes,
            found["name"],
            state_dtype=state,
            param_storage=wanted["storage"],
            param_dtype=param,
            grad_dtype=wanted["grad"],
            gradients=wanted["gradients"],
            largest=wanted["largest"],
            **found["options"],
        )
        adamws = [memory.adamw(shapes, param, mixed=True)] * (param != "fp32") + [memory.adamw(shapes, param)]
        expected = {}
        for n, kept in enumerate([ours, *adamws]):
            for part in ("weights", "residual", "moments", "scalars", "resident", "gradients", "total"):
                nbytes = getattr(kept, part)
                if nbytes or part == "gradients":
                    cells = [float(f"{nbytes / parameters:.5g}"), nbytes / 1e9, nbytes / 2**30]
                    cells += [nbytes / wanted["gpus"] / 1e9] * (wanted["gpus"] > 1)
                    expected[f"{n}.{part}"] = (nbytes, cells)
        assert {part: row[0] for part, row in shown["rows"].items()} == {p: row[0] for p, row in expected.items()}
        for part, (_, cells) in expected.items():
            # Halves in the last place are rounded up there and to even here.
            texts = shown["rows"][part][1:]
            assert [float(text) for text in texts] == pytest.approx(cells, rel=1e-4, abs=5.1e-4), (wanted, part)
        for bar, kept in zip(shown["widths"], [ours, *adamws], strict=True):
            most = max(other.total for other in (ours, *adamws))
            assert sum(bar) == pytest.approx(kept.total / most * max(map(sum, shown["widths"])), abs=1)
        # What the page offers to copy into a shell gives the same.
        printed = table_of(shown["command"])
        assert f"{float(f'{ours.each(ours.total):.5g}'):g}" in printed["with gradients"], shown["command"]
        assert f"{ours.total / 1e9:.3f}" in printed["with gradients"], shown["command"]
    assert set(tried) == {"fp32", "bf16", "int8", "int4", "int2", *data["params"]["bf16"]["storages"]}
    assert parameters_tried == {*data["params"], *memory.GRADIENTS}


def table_of(command):
    """What a command prints, by the first cell of a row."""
    import argparse

    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    text = memory.table(parser.parse_args(command.removeprefix("signadam memory ").split()))
    return {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in text.splitlines() if "  " in line}


def test_the_memory_page_says_what_makes_no_sense(site, address, browser):
    opened(browser, f"{address}/memory.html")
    for wanted in ({"parameters": 0}, {"tensors": 1.5}, {"parameters": 10, "tensors": 11}, {"gpus": -1}):
        browser.refresh()
        assert browser.execute_script(CHOICES, wanted)["error"], wanted
    browser.refresh()
    assert browser.execute_script(CHOICES, {"model": "70 billion, 723 tensors"})["error"] is None
