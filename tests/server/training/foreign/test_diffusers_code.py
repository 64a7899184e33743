"""The Python files of an exported folder stand alone."""

import ast
import builtins
from collections import Counter

import pytest

from server.training.foreign.diffusers_code import network_code, pipeline_code

OURS = {"server", "client", "shared", "deploy", "maskfed"}
CODE = {"network": network_code, "pipeline": pipeline_code}


@pytest.mark.parametrize("name", CODE)
def test_a_file_imports_nothing_of_ours_and_defines_every_name_once(name):
    tree = ast.parse(CODE[name]())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    assert not roots & OURS and {"torch", "diffusers"} <= roots
    defined = Counter(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert defined and set(defined.values()) == {1}


@pytest.mark.parametrize("name", CODE)
def test_every_name_that_a_file_uses_is_there(name):
    """Annotations aside, which stay text."""
    tree = ast.parse(CODE[name]())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                argument.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant("")
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used - bound - set(dir(builtins)) == set()
