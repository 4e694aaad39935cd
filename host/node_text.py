"""Messages for the person at the graph: shown under a node, and in the log."""

import logging
from dataclasses import dataclass

log = logging.getLogger("spacetime_edit")


@dataclass(frozen=True)
class NodeText:
    """Shows texts under one node of the graph, also while another node runs; node: its id, None: only the log."""

    node: str | None = None

    def show(self, text: str) -> None:
        """Shows a text, where there is a server and a graph to show it."""
        if not self.node:
            return
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(text, self.node)

    def __call__(self, text: str) -> None:
        """Shows a warning, and logs it."""
        log.warning("%s", text)
        self.show(text)


LOG = NodeText()
"""Writes to the log alone."""
