"""Load the pack and its host outside a ComfyUI server: for tests, benchmarks and the demo.

The repository root is a package without a fixed name (ComfyUI chooses one when it loads custom nodes), so
scripts load it as `spacetime_edit`. The host's modules (`comfy`, `nodes`, `folder_paths`) come from
`COMFYUI_PATH`, or from `.host/ComfyUI` where `dev.py setup` puts them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACK = "spacetime_edit"


def host_path() -> Path:
    """Folder of the ComfyUI checkout: `COMFYUI_PATH`, else `.host/ComfyUI`.

    Raises FileNotFoundError when that folder holds no ComfyUI.
    """
    path = Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI").expanduser().resolve()
    if not (path / "comfy" / "options.py").is_file():
        raise FileNotFoundError(f"no ComfyUI in {path}: run `python dev.py setup`, or set COMFYUI_PATH to a checkout")
    return path


def use_host(arguments: Sequence[str] = ()) -> Path:
    """Make `comfy` importable, with these command line arguments, plus `--cpu` without an accelerator.

    The host reads `sys.argv` once, when `comfy.cli_args` is first imported; it sees our arguments there, and
    `sys.argv` is as before afterwards. Where the host is loaded already its arguments stay as they are.
    """
    path = host_path()
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    if "comfy.cli_args" in sys.modules:
        return path
    import torch

    arguments = list(arguments)
    if not torch.accelerator.is_available() and "--cpu" not in arguments:
        arguments.append("--cpu")
    argv = sys.argv
    sys.argv = ["main.py", *arguments]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = argv
    return path


def load_pack(host: bool = True, host_arguments: Sequence[str] = ()) -> ModuleType:
    """The repository root as module `spacetime_edit`; afterwards `import spacetime_edit.core...` works.

    host: also call `use_host(host_arguments)`. Without it only `core` and `tools` can be imported.
    """
    if host:
        use_host(host_arguments)
    if PACK in sys.modules:
        return sys.modules[PACK]
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    with contextlib.ExitStack() as undo:
        undo.callback(sys.modules.pop, PACK)
        spec.loader.exec_module(module)
        undo.pop_all()
    return module
