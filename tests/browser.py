"""A headless Chromium for tests of the report."""

import asyncio
import base64
import importlib.util
import json
from pathlib import Path

import pytest

KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}

# Of every element with a text of its own: its contrast with what it stands on.
CONTRASTS = """
(within) => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parts(color).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (parts(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll(within)]
    .filter((e) => e.checkVisibility()
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => {
      const style = getComputedStyle(e);
      const [a, b] = [light(e.closest("svg") ? style.fill : style.color), light(ground(e))];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}
"""


class Tab:
    """One page of a headless Chromium, driven by the DevTools protocol."""

    def __init__(self, loop, tab):
        self.loop, self.tab, self.log = loop, tab, []
        heard = (
            "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded",
            "Page.javascriptDialogOpening",
        )  # fmt: skip
        for event in heard:
            tab.subscribe(event, self._hear)
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    async def _hear(self, message):
        self.log.append(message["params"])

    def send(self, command, **parameters):
        answer = self.loop.run_until_complete(self.tab.send_command(command, parameters))
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, expression):
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, file, *, width=1280, state=""):
        """Load the page; ``state`` is what its URL says after "#"."""
        self.send("Page.navigate", url="about:blank")  # else another state is no new page
        self.log.clear()
        phone = width < 500
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, mobile=phone,
            deviceScaleFactor=1,
        )  # fmt: skip
        self.send("Page.navigate", url=file.as_uri() + (f"#{state}" if state else ""))
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        self.wait(
            "[...document.querySelectorAll('.plot')].every(p => p.querySelector('svg.main-svg'))"
        )

    def wait(self, condition, *, seconds=20):
        for _ in range(seconds * 20):
            if self.js(f"!!({condition})"):
                return
            self.loop.run_until_complete(asyncio.sleep(0.05))
        raise AssertionError(f"never true: {condition}; heard {self.log}")

    def prefer(self, scheme):
        """As a reader whose system is "light" or "dark"."""
        wanted = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", media="", features=[wanted])

    def contrasts(self, within="body *:not(svg, script, .plot, :is(svg, .plot) *)"):
        """Contrast with its background of every text in elements of the selector."""
        return self.js(f"({CONTRASTS})({json.dumps(within)})")

    def serious_violations(self):
        """What axe-core finds serious or critical: rule, the first element, and how many."""
        axe = importlib.util.find_spec("axe_playwright_python")
        if axe is None or axe.origin is None:
            pytest.skip("needs axe-core: pip install --no-deps axe-playwright-python")
        self.js(Path(axe.origin).with_name("axe.min.js").read_text(encoding="utf-8"))
        found = self.js("axe.run().then(found => JSON.stringify(found.violations))")
        return [
            (rule["id"], rule["nodes"][0]["html"][:200], len(rule["nodes"]))
            for rule in json.loads(found)
            if rule["impact"] in ("serious", "critical")
        ]

    def press(self, key, *, text=""):
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=KEYS[key],
                **({"text": text} if text and kind == "keyDown" else {}),
            )  # fmt: skip

    def choose_file(self, selector, file):
        """Give the file input a file, as a reader does in the dialogue."""
        expression = f"document.querySelector({json.dumps(selector)})"
        found = self.send("Runtime.evaluate", expression=expression)["result"]
        self.send("DOM.setFileInputFiles", files=[str(file)], objectId=found["objectId"])

    def shoot(self, file):
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))
        return file

    def shown_rows(self):
        """Names of the findings that are to be seen, in order."""
        rows = "[...document.querySelectorAll('#findings tbody tr')]"
        return self.js(
            f"{rows}.filter(r => r.checkVisibility())"
            ".map(r => [r.querySelector('a').textContent, r.cells[1].dataset.sort,"
            " r.querySelector('.place').textContent])"
        )
