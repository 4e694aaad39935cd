"""Write the API form of every template to workflows/api/, as ComfyUI's frontend makes it."""

from __future__ import annotations

import json

from browser import Browser
from other_packs import is_there, other_packs
from pack import host_path
from server import LiveServer
from templates import api_path, for_every_host, read, templates


def main() -> None:
    with other_packs() as others, LiveServer(host_path(), **others) as server, Browser() as browser:
        browser.open_comfy(server.url)
        for template in templates():
            if not is_there(template.stem):
                continue
            browser.load_graph(read(template))
            path = api_path(template)
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(for_every_host(browser.api_form()), indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
            print(path.relative_to(path.parents[2]))


if __name__ == "__main__":
    main()
