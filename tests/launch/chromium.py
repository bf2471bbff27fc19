"""A headless Chromium, driven over two pipes by the DevTools protocol: JSON messages with a zero byte between them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from fcntl import F_DUPFD, fcntl
from pathlib import Path

from parallel.remains import die_with_parent

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page at this address, `width` points wide. `folder`: where the browser may keep its things."""

    def __init__(self, url: str, width: int, folder: Path, height: int = 900) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()

        def connected() -> None:
            # Chromium reads from descriptor 3 and writes to 4, which may be these pipes' own.
            there = [fcntl(pipe, F_DUPFD, 10) for pipe in (theirs_in, theirs_out)]
            for to, pipe in enumerate(there, 3):
                os.dup2(pipe, to)

        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}")
        self._process = subprocess.Popen(
            [FOUND, *options, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            start_new_session=True,
            preexec_fn=lambda: (die_with_parent(os.getppid()), connected()),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._sent, self._session = b"", 0, None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.go(url)

    def go(self, url: str) -> None:
        self._call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def _call(self, method: str, **params: object) -> dict:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                part = os.read(self._in, 2**20)
                assert part, "the browser has ended"
                self._read += part
            text, _, self._read = self._read.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, expression: str) -> object:
        """What an expression is worth in the page; that of a promise once it is kept."""
        told = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, expression: str, timeout: float = 20.0) -> object:
        """The expression's value, as soon as it is true."""
        end = time.monotonic() + timeout
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)
        return value

    def type(self, text: str, into: str) -> None:
        """Replace the text of the element with this id, by keys; \\n is the Enter key."""
        self.js(f"document.getElementById({into!r}).focus(); document.activeElement.value = ''")
        for key in text:
            if key == "\n":
                enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                self._call("Input.dispatchKeyEvent", type="keyDown", **enter)
                self._call("Input.dispatchKeyEvent", type="keyUp", **enter)
            else:
                self._call("Input.insertText", text=key)

    def picture(self, path: Path) -> None:
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
