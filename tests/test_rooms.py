"""The rooms of the package: imports point down, files are short, the face is documented, the core needs little."""

import ast
import functools
import inspect
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import peft_func as pf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_func"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up; the public face is on top of the library, and the command line stands before it.
FACE = "peft_func"
ROOMS = [
    "errors", "trees", "weights", "functional", "transforms", "addins", "ensemble", "report", "interop", "training",
    FACE, "cli",
]  # fmt: skip
CORE = {"errors", "trees", "weights", "functional", "transforms", "addins", "ensemble"}
CORE_NEEDS = {"torch", "optree", "safetensors"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else FACE


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, wherever in the file, `from .. import` made absolute."""
    name, found = name_of(path), set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            if module == FACE:  # `from peft_func import trees` is a room, `from peft_func import lora` is the face
                found |= {f"{module}.{a.name}" if a.name in ROOMS else module for a in node.names}
            else:
                found.add(module)
    return found


IDS = [str(path.relative_to(PACKAGE)) for path in FILES]
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=IDS)


@EVERY_FILE
def test_imports_point_down(path):
    here = room_of(name_of(path))
    assert here in ROOMS, f"{here} has no place among the rooms"
    for module in imports_of(path):
        if module.split(".")[0] == FACE:
            there = room_of(module)
            assert there in ROOMS, f"{module} has no place among the rooms"
            assert ROOMS.index(there) <= ROOMS.index(here), f"{name_of(path)} ({here}) imports {module} ({there})"


@EVERY_FILE
def test_a_file_keeps_to_one_idea(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 350, f"{lines} lines"


@EVERY_FILE
def test_the_core_needs_torch_optree_and_safetensors_only(path):
    if room_of(name_of(path)) in CORE | {FACE}:
        needed = {module.split(".")[0] for module in imports_of(path)} - sys.stdlib_module_names - {FACE}
        assert needed <= CORE_NEEDS


@EVERY_FILE
def test_every_file_opens_with_a_docstring(path):
    assert ast.get_docstring(tree_of(path))


@EVERY_FILE
def test_nothing_is_imported_by_star_or_at_a_distance(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        if isinstance(node, ast.Call) and room_of(name_of(path)) in CORE:
            assert ast.unparse(node.func) not in {"__import__", "importlib.import_module", "eval", "exec"}


FACE_IMPORTS = [node for node in tree_of(PACKAGE / "__init__.py").body if isinstance(node, ast.ImportFrom)]
PUBLIC = [(node.module, alias.name, alias.asname) for node in FACE_IMPORTS for alias in node.names]


def test_the_face_holds_names_only():
    doc, *rest = tree_of(PACKAGE / "__init__.py").body
    assert isinstance(doc, ast.Expr)
    assert isinstance(doc.value.value, str)
    assert [ast.unparse(node) for node in rest if not isinstance(node, ast.ImportFrom)] == [
        f"__version__ = {pf.__version__!r}"
    ]
    assert all(name == shown for _, name, shown in PUBLIC)
    assert all(not name.startswith("_") for _, name, _ in PUBLIC)
    assert len({name for _, name, _ in PUBLIC}) == len(PUBLIC)


def documented_alias(module: str, name: str) -> bool:
    """Whether a string stands below the assignment of the name in its module."""
    source = Path(sys.modules[module].__file__)
    body = tree_of(source).body
    for node, following in itertools.pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return isinstance(following, ast.Expr) and isinstance(getattr(following.value, "value", None), str)
    return False


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, name, _ in PUBLIC])
def test_every_public_name_has_a_docstring(module, name):
    thing = getattr(pf, name)
    if inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing):
        own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        assert own, f"{name} has no docstring"
        assert not own.startswith(f"{name}("), f"{name} has only the docstring that dataclass writes"
    else:
        assert documented_alias(module, name), f"{name} is no class, no function, and no documented alias"


ALONE = """
import sys
ALLOWED = {"torch", "torchgen", "functorch", "optree", "safetensors", "numpy", "peft_func"}
NEEDED_BY_THEM = {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"}
class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in ALLOWED | NEEDED_BY_THEM | set(sys.stdlib_module_names) and not top.startswith("_"):
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Block())
import peft_func as pf
BLOCKED = "transformers matplotlib typer rich tqdm sklearn peft hypothesis pytest".split()
assert not set(BLOCKED) & set(sys.modules), set(BLOCKED) & set(sys.modules)
"""

USE = """
import os, tempfile, torch
model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.gift("0", rank=2), pf.train("1")), model)
frozen, trainable = adapter.init(0)
x = torch.ones(2, 4)
y = model(adapter.apply(frozen, trainable), x)
assert torch.equal(y, model(model.params, x))
stacked = pf.stack([trainable, trainable])
torch.vmap(lambda tree: model(adapter.apply(frozen, tree), x))(stacked)
str(pf.table(adapter, trainable))
"""

FILE = """
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "a.safetensors")
    pf.save(path, adapter, trainable)
    adapter, frozen, again = pf.load(path, model)
assert torch.equal(again["train"]["1.bias"], trainable["train"]["1.bias"])
"""


@pytest.mark.parametrize("code", [ALONE, ALONE + USE, ALONE + USE + FILE], ids=["import", "use", "save and load"])
def test_torch_optree_and_safetensors_are_enough(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_import_of_the_library_is_quiet():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import peft_func"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
