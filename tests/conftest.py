"""The pack as module `spacetime_edit`; for the tiers that need it, the host in this process or as a server.

The repository root is never on sys.path: its `nodes/` would hide ComfyUI's `nodes.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIERS = ("core", "host", "nodes", "workflows", "browser")
HOST_TIERS = {"host", "nodes"}  # import the host in this process

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ["TRITON_INTERPRET"] = "1"  # read as Triton is imported: its kernels run on the CPU, as Python

spec = importlib.util.spec_from_file_location("pack_loader", ROOT / "tools" / "pack.py")
loader = importlib.util.module_from_spec(spec)
spec.loader.exec_module(loader)
loader.load_pack(host=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-family", action="store_true", help="also the tests marked every_family, which take long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_family: of models beside the three of the fast tier (--every-family)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--every-family"):
        return
    left_out = [item for item in items if item.get_closest_marker("every_family")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("every_family")]


def tier(path: Path) -> str:
    """`core` for a file under tests/core, and so on; "" elsewhere."""
    return next((name for name in TIERS if path.is_relative_to(ROOT / "tests" / name)), "")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Before the first module of a host tier is imported: the host, with folders of its own."""
    if isinstance(collector, pytest.Module) and tier(collector.path) in HOST_TIERS:
        use_host(collector.config)


def use_host(config: pytest.Config) -> None:
    if hasattr(config, "spacetime_edit_folder"):
        return
    folder = config.spacetime_edit_folder = tempfile.mkdtemp(prefix="spacetime-edit-tests-")
    arguments = ["--temp-directory", folder]  # ComfyUI appends temp/
    for name in ("input", "output", "user"):
        (Path(folder) / name).mkdir()
        arguments += [f"--{name}-directory", str(Path(folder) / name)]
    try:
        loader.use_host(arguments)
    except FileNotFoundError as missing:
        raise pytest.UsageError(str(missing)) from None


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "spacetime_edit_folder"):
        shutil.rmtree(config.spacetime_edit_folder, ignore_errors=True)


@pytest.fixture(scope="session")
def threads() -> None:
    """Tiny tensors gain nothing from threads, which on a busy machine wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_comfyui(request: pytest.FixtureRequest):
    """A fixed seed; in the host tiers also inference mode, in which ComfyUI runs every node."""
    where = tier(request.path)
    if where not in HOST_TIERS | {"core"}:
        yield
        return
    request.getfixturevalue("threads")
    import torch

    torch.manual_seed(0)
    with torch.inference_mode() if where in HOST_TIERS else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory):
    """One real ComfyUI server for the whole session."""
    from spacetime_edit.tools.other_packs import other_packs
    from spacetime_edit.tools.server import LiveServer

    folder = tmp_path_factory.mktemp("server")
    with other_packs() as others, LiveServer(loader.host_path(), folder, **others) as server:
        yield server
