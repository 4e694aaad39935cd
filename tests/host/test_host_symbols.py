"""Everything of the host that we use, by name and by arguments: a newer host fails here first, in readable lines."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import comfy.context_windows
import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = [path for folder in ("host", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))] + [ROOT / "__init__.py"]
HOSTS = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "node_helpers", "nodes", "server")
"""Where ComfyUI's own modules are."""
GONE = object()


class Uses(ast.NodeVisitor):
    """What a file of ours takes from the host: `found` has (line, dotted name, call or None)."""

    def __init__(self, tree: ast.AST):
        self.names: dict[str, str] = {}  # of this file, for dotted names of the host
        self.found: list[tuple[int, str, ast.Call | None]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] in HOSTS:
                        short = alias.name.split(".")[0]
                        self.names[alias.asname or short] = alias.name if alias.asname else short
                        self.found.append((node.lineno, alias.name, None))
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in HOSTS:
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    self.found.append((node.lineno, f"{node.module}.{alias.name}", None))
        self.visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        if dotted := self.dotted(node.func):
            self.found.append((node.lineno, dotted, node))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := self.dotted(node):
            self.found.append((node.lineno, dotted, None))
        else:
            self.generic_visit(node)

    def dotted(self, node: ast.AST) -> str:
        """The host's name of an expression such as `management.soft_empty_cache`; "" of any other."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.names:
            return ""
        return ".".join([self.names[node.id], *reversed(parts)])


def resolved(dotted: str):
    """What a dotted name of the host means, as far as modules and classes go; GONE where a part of it is missing."""
    first, *rest = dotted.split(".")
    value, path = importlib.import_module(first), first
    for name in rest:
        if not inspect.ismodule(value) and not inspect.isclass(value):
            return None  # of an object, which nobody knows before it is there
        path = f"{path}.{name}"
        if hasattr(value, name):
            value = getattr(value, name)
            continue
        try:
            value = importlib.import_module(path)
        except ModuleNotFoundError:
            return GONE
    return value


def refused(function, call: ast.Call) -> str:
    """Why a function would not take the arguments of a call; "" where it does, or where they are not known here."""
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return ""
    try:
        signature = inspect.signature(function)
        signature.bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})
    except ValueError:  # of a builtin
        return ""
    except TypeError as error:
        return str(error)
    return ""


def lacking(source: str) -> list[str]:
    """What the host lacks of what a source text asks of it, a line each."""
    lines = []
    for line, dotted, call in Uses(ast.parse(source)).found:
        value = resolved(dotted)
        if value is GONE:
            lines.append(f"{line}: {dotted} is gone")
        elif call is not None and callable(value) and (why := refused(value, call)):
            lines.append(f"{line}: {dotted}: {why}")
    return list(dict.fromkeys(lines))


def test_the_host_has_all_that_we_name():
    missing = [f"{path.relative_to(ROOT)}:{line}" for path in OURS for line in lacking(path.read_text("utf-8"))]
    assert not missing, "\n".join(["this ComfyUI lacks:", *missing])


@pytest.mark.parametrize(
    "source",
    [
        "import comfy.samplers\ncomfy.samplers.no_such_thing",
        "from comfy.samplers import no_such_thing",
        "import comfy.no_such_module",
        "import comfy.samplers as s\ns.calc_cond_batch(1, 2, 3, 4, 5, 6, 7)",
        "from comfy.samplers import calc_cond_batch as c\nc(1, 2, 3, 4, options=5)",
    ],
)
def test_what_is_gone_is_found(source):
    assert len(lacking(source)) == 1


METHODS = {
    comfy.model_patcher.ModelPatcher: {
        "add_wrapper_with_key": "wrapper_type key wrapper",
        "clone": "",
        "eject_model": "",
        "get_model_object": "name",
        "inject_model": "",
        "is_clone": "other",
        "is_dynamic": "",
        "model_dtype": "",
        "model_size": "",
    },
    comfy.model_base.BaseModel: {
        "get_dtype_inference": "",
        "process_latent_in": "latent",
        "process_latent_out": "latent",
    },
    comfy.samplers.CFGGuider: {
        "inner_set_conds": "conds",
        "predict_noise": "x timestep model_options seed",
        "sample": "noise latent_image sampler sigmas denoise_mask callback disable_pbar seed",
        "set_cfg": "cfg",
    },
    comfy.context_windows.IndexListContextHandler: {
        "execute": "calc_cond_batch model conds x_in timestep model_options",
        "should_use_context": "model conds x_in timestep model_options",
    },
    comfy.context_windows.IndexListContextWindow: {"get_tensor": "full device retain_index_list"},
}  # fmt: skip
"""Methods of objects that we get from the host, with the arguments that we give them."""


@pytest.mark.parametrize("owner", METHODS, ids=lambda owner: owner.__name__)
def test_the_hosts_objects_have_the_methods_that_we_call(owner):
    wrong = []
    for name, arguments in METHODS[owner].items():
        method = getattr(owner, name, None)
        given = arguments.split()
        names = [] if method is None else list(inspect.signature(method).parameters)[1:]
        if method is None or names[: len(given)] != given and not set(given) <= set(names):
            wrong.append(f"{owner.__name__}.{name}({', '.join(names) if method else 'gone'}), expected {given}")
    assert not wrong, "\n".join(wrong)
