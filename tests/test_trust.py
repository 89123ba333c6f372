"""Nothing that is read from a checkpoint, a data set or a plan can run code."""

import ast
from pathlib import Path

import dynprune_jax

PACKAGE = Path(dynprune_jax.__file__).parent
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {"extract", "extractall", "unpack_archive", "literal_eval", "unsafe_load"}


def problems(tree):
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.split(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_NAMES:
            yield node.func.id
        if not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr in UNSAFE_METHODS:
            yield node.func.attr
        called = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "np.load" and arguments.get("allow_pickle") != "False":
            yield called
        if called == "torch.load":
            yield called


def test_no_file_that_can_run_code_is_read():
    for path in sorted(PACKAGE.rglob("*.py")):
        found = list(problems(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found, (path, found)


def test_the_test_above_sees_what_it_should():
    for code in ("import pickle", "from yaml import load", "eval('1')", "np.load(f)",
                 "torch.load(f)", "archive.extractall(d)"):  # fmt: skip
        assert list(problems(ast.parse(code)))
