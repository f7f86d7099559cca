"""A headless Chromium for tests of the report."""

import asyncio
import base64
import json

KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


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
