"""core/ is science without a host: it must work where there is no ComfyUI."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, {tools!r})
from pack import load_pack
load_pack(host=False)
core = importlib.import_module("spacetime_edit.core")
names = [module.name for module in pkgutil.walk_packages(core.__path__, "spacetime_edit.core.")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as missing:  # which only its kernels need
        if missing.name != "triton":
            raise
host = {{"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "nodes", "server"}}
print(len(names), *sorted(host & set(sys.modules)))
"""


def test_importing_every_module_of_core_imports_nothing_of_the_host(tmp_path):
    code = IMPORT_ALL.format(tools=str(ROOT / "tools"))
    environment = {**os.environ, "COMFYUI_PATH": str(tmp_path)}  # no ComfyUI there
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    count, *imported = run.stdout.split()
    assert int(count) > 0
    assert imported == []
