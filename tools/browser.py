"""A headless Chromium, driven over the Chrome DevTools Protocol (needs websocket-client).

with Browser() as browser:
    browser.open_comfy(server.url)
    browser.load_graph(json.loads(Path("workflow.json").read_text()))
    browser.screenshot(Path("graph.png"))
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it opens our own server only, often as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else a dialog covers the graph
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}
COMFY_READY = "!!(window.app?.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 100)"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no say on this machine


class JavaScriptError(RuntimeError):
    """An exception in the page."""


class ConsoleMessage(NamedTuple):
    level: str  # "log", "warning", "error", "exception", ...
    text: str
    url: str  # of the script or resource, where known


class Browser:
    """One headless page. executable: default the environment's CHROME, else the first Chromium on PATH."""

    def __init__(self, width: int = 1600, height: int = 900, executable: str | None = None):
        found = executable or os.environ.get("CHROME") or next(filter(None, map(shutil.which, NAMES)), None)
        if found is None:
            raise FileNotFoundError(f"no Chromium on PATH ({', '.join(NAMES)}): install it, or set CHROME")
        self.executable, self.size = found, f"{width},{height}"
        self.console: list[ConsoleMessage] = []
        self._process: subprocess.Popen | None = None
        self._profile: tempfile.TemporaryDirectory | None = None
        self._socket: websocket.WebSocket | None = None
        self._last_id = 0

    def __enter__(self) -> Browser:
        with contextlib.ExitStack() as undo:  # a start that fails or is interrupted leaves no process behind
            undo.callback(self.stop)
            self.start()
            undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, timeout: float = 60) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        profile = Path(self._profile.name)
        command = [
            self.executable,
            *FLAGS,
            f"--window-size={self.size}",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        log_file = profile / "chromium.log"
        with log_file.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + timeout
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.executable} did not start:\n{log_file.read_text(errors='replace')}")
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        with DIRECT.open(f"http://127.0.0.1:{port}/json/list", timeout=30) as response:
            page = next(target for target in json.load(response) if target["type"] == "page")
        self._socket = websocket.create_connection(
            page["webSocketDebuggerUrl"], timeout=120, suppress_origin=True, http_no_proxy=["127.0.0.1"]
        )
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._profile is not None:
            self._profile.cleanup()
            self._profile = None

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One protocol command and its result; console messages that arrive meanwhile go to `console`."""
        own = self._send(method, parameters)
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == own:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters}))
        return self._last_id

    def evaluate(self, javascript: str) -> Any:
        """Value of an expression, as JSON; a promise is awaited. Raises JavaScriptError."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.command("Runtime.evaluate", expression=javascript, **options)
        if details := answer.get("exceptionDetails"):
            raise JavaScriptError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait_for(self, javascript: str, timeout: float = 60) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout
        while not self.evaluate(f"!!({javascript})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {timeout:.0f} s this is still false: {javascript}")
            time.sleep(0.1)

    def open(self, url: str) -> None:
        """Load a page; returns when it and its resources are loaded."""
        answer = self.command("Page.navigate", url=url)
        if answer.get("errorText"):
            raise RuntimeError(f"{url}: {answer['errorText']}")
        self.wait_for("document.readyState === 'complete'")

    def open_comfy(self, url: str, timeout: float = 120) -> None:
        """Load ComfyUI's frontend from a server, without its first-run dialogs, and wait for its nodes."""
        body = json.dumps(SETTINGS).encode()
        request = urllib.request.Request(f"{url}/api/settings", body, {"Content-Type": "application/json"})
        with DIRECT.open(request, timeout=30):
            pass
        self.open(url)
        self.wait_for(COMFY_READY, timeout)

    def load_graph(self, graph: dict[str, Any]) -> None:
        """Show a graph in UI format."""
        self.evaluate(f"app.loadGraphData({json.dumps(graph)}).then(() => null)")

    def api_form(self) -> dict[str, Any]:
        """The shown graph in API format, without titles."""
        prompt = self.evaluate("app.graphToPrompt().then(prompt => prompt.output)")
        return {id: {key: node[key] for key in node if key != "_meta"} for id, node in prompt.items()}

    def screenshot(self, path: Path) -> Path:
        """The visible page as PNG."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))
        return path

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Page.javascriptDialogOpening":  # such as "leave the page?": nothing goes on before
            self._send("Page.handleJavaScriptDialog", {"accept": True})
        elif message.get("method") == "Runtime.consoleAPICalled":
            text = " ".join(str(part.get("value", part.get("description"))) for part in parameters["args"])
            frames = parameters.get("stackTrace", {}).get("callFrames") or [{}]
            self.console.append(ConsoleMessage(parameters["type"], text, frames[0].get("url", "")))
        elif message.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            text = details.get("exception", {}).get("description") or details["text"]
            self.console.append(ConsoleMessage("exception", text, details.get("url", "")))
        elif message.get("method") == "Log.entryAdded":
            entry = parameters["entry"]
            self.console.append(ConsoleMessage(entry["level"], entry["text"], entry.get("url", "")))
