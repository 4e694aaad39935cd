"""A live ComfyUI for tests and demonstrations (standard library only).

    with LiveServer(host_path()) as server:
        entry = server.queue(prompt)             # prompt: a graph in API format
        files = server.output_files(entry)

Import it as `spacetime_edit.tools.server`, or in a script of this folder as `server`; such a script must not
import the host in its own process, whose `server` module has the same name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACK_NAME = "spacetime-edit"
CHILD = {
    **{"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUTF8": "1"},
    "GOMP_SPINCOUNT": "1000",  # idle threads soon sleep: a busy machine stays usable
}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no say on this machine


class PromptRejected(RuntimeError):
    """The server refused a graph; `node_errors` is its answer, by node id."""

    def __init__(self, answer: dict[str, Any]):
        self.node_errors: dict[str, dict] = answer.get("node_errors") or {}
        reasons = [
            f"node {node_id} ({node['class_type']}): {error['message']}: {error['details']}"
            for node_id, node in self.node_errors.items()
            for error in node["errors"]
        ]
        super().__init__("; ".join(reasons) or json.dumps(answer))


class ExecutionFailed(RuntimeError):
    """A graph stopped; `data` is the server's message: node_id, node_type, exception_message, traceback."""

    def __init__(self, event: str, data: dict[str, Any]):
        self.event, self.data = event, data
        reason = data.get("exception_message", "").strip()
        trace = "".join(data.get("traceback", []))
        super().__init__(f"{event} in node {data.get('node_id')} ({data.get('node_type')}): {reason}\n{trace}")


class LiveServer:
    """ComfyUI with this pack alone, on a free port, in a folder of its own; it ends with its `with` block.

    host: the ComfyUI folder, with this pack linked into its custom_nodes.
    folder: keeps output/, input/, temp/, user/ and server.log; default a temporary one, removed at the end.
    arguments: more arguments of ComfyUI's main.py. Without any accelerator `--cpu` is added. others: names of more
    packs that it may load.
    """

    def __init__(
        self,
        host: Path,
        folder: Path | None = None,
        arguments: Sequence[str] = (),
        port: int = 0,
        others: Sequence[str] = (),
    ):
        self.host, self.arguments, self._packs = Path(host), list(arguments), [PACK_NAME, *others]
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="spacetime-edit-")) if folder is None else Path(folder)
        self.output, self.log = self.folder / "output", self.folder / "server.log"
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> LiveServer:
        with contextlib.ExitStack() as undo:  # a start that fails or is interrupted leaves no process behind
            undo.callback(self.stop)
            self.start()
            undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self, timeout: float = 300) -> None:
        """Start the server and wait until it answers. Raises RuntimeError with the end of its log."""
        for name in ("output", "input", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", self.port]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self._packs]
        command += ["--temp-directory", self.folder]  # ComfyUI appends temp/
        for name in ("output", "input", "user"):
            command += [f"--{name}-directory", self.folder / name]
        command += ["--database-url", f"sqlite:///{(self.folder / 'comfyui.db').as_posix()}"]
        command += self.arguments
        if "--cpu" not in self.arguments and not has_accelerator():
            command.append("--cpu")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.host,
                env={**os.environ, **CHILD},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + timeout
        while not self._answers():
            if time.monotonic() > deadline:
                raise RuntimeError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server; remove its folder if it is a temporary one."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    # --- HTTP ---

    def get(self, path: str) -> Any:
        """JSON of a GET request, such as `get("/object_info")`. Raises urllib.error.HTTPError."""
        return json.loads(self._request(path))

    def post(self, path: str, body: Any) -> Any:
        """JSON answer to a JSON body; None where the answer is empty."""
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def submit(self, prompt: dict[str, Any]) -> str:
        """Put a graph in API format on the queue; its prompt id. PromptRejected if any part is invalid."""
        try:
            answer = self.post("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.loads(error.read())) from None
        if answer["node_errors"]:
            self.interrupt(answer["prompt_id"])
            raise PromptRejected(answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """The history entry of a graph, once it has ended. Raises ExecutionFailed, TimeoutError."""
        deadline = time.monotonic() + timeout
        while not (history := self.get(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                self.interrupt(prompt_id)
                raise TimeoutError(f"the graph did not end within {timeout:.0f} s:\n{self.log_tail()}")
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended during the run:\n{self.log_tail()}")
            time.sleep(0.1)
        entry = history[prompt_id]
        for event, data in entry["status"]["messages"]:
            if event in ("execution_error", "execution_interrupted"):
                raise ExecutionFailed(event, data)
        return entry

    def queue(self, prompt: dict[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Run a graph in API format to its end; its history entry, with `outputs` by node id."""
        return self.wait(self.submit(prompt), timeout)

    def interrupt(self, prompt_id: str) -> None:
        """Stop a graph, whether it runs or still waits."""
        self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id})

    def output_files(self, entry: dict[str, Any]) -> list[Path]:
        """Files that a graph saved or previewed, in the order of its history entry."""
        items = [
            item
            for output in entry["outputs"].values()
            for values in output.values()
            for item in values
            if isinstance(item, dict) and "filename" in item
        ]
        return [self.folder / item["type"] / item.get("subfolder", "") / item["filename"] for item in items]

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        url = self.url + urllib.parse.quote(path, safe="/?=&%")
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"} if body else {})
        with DIRECT.open(request, timeout=60) as response:
            return response.read()

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with status {self._process.returncode}:\n{self.log_tail()}")
        try:
            self.get("/system_stats")
        except OSError:  # URLError is one
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_accelerator() -> bool:
    """Whether torch finds a GPU. In a process of its own: a CUDA context here would hold memory."""
    code = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0
