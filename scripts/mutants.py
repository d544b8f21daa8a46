"""Mutants of a Python file: each is one small change to its syntax tree."""

import ast
import collections
import copy
import hashlib
import importlib.abc
import importlib.machinery
import random

OPERATORS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd},
}
FUNCTIONS = {"minimum": "maximum", "min": "max", "any": "all"}
FUNCTIONS |= {b: a for a, b in FUNCTIONS.items()}


def changed(node, **fields):
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def called(node):
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def variants(node):
    """(what is done, the node in its place) for every mutation of this node itself."""
    if type(node) in OPERATORS:
        yield "operator", OPERATORS[type(node)]()
    elif isinstance(node, ast.UnaryOp):
        yield "no sign or negation", node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield "constant", changed(node, value=not node.value)
        elif isinstance(node.value, int):
            yield "constant", changed(node, value=node.value + 1)
        elif isinstance(node.value, float):
            yield "constant", changed(node, value=2 * node.value or 1.0)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.keyword) and node.arg == "axis":
        other = 1 if ast.unparse(node.value) == "0" else 0
        yield "axis", changed(node, value=ast.Constant(other))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "no statement", ast.Pass()
    elif isinstance(node, (ast.Name, ast.Attribute)):
        field = "id" if isinstance(node, ast.Name) else "attr"
        if getattr(node, field) in FUNCTIONS:
            new = {field: FUNCTIONS[getattr(node, field)]}
            yield "function", changed(node, **new)
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            rest = [k for k in node.keywords if k is not keyword]
            yield f"no {keyword.arg}=", changed(node, keywords=rest)
        if called(node) == "where" and len(node.args) == 3:
            condition, a, b = node.args
            yield "branches", changed(node, args=[condition, b, a])
            yield "no where", a
        if called(node) == "stop_gradient":
            yield "no stop_gradient", node.args[0]


def is_code(node):
    """Not a docstring, message, import, type alias or overload."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.annotation) != "TypeAlias"
    if isinstance(node, ast.FunctionDef):
        return "overload" not in map(ast.unparse, node.decorator_list)
    return not isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr))


def places(node, line=0):
    """(node, its parent, list or dict that holds it, key there, line), of all code."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        children = enumerate(value) if isinstance(value, list) else [(field, value)]
        holder = value if isinstance(value, list) else vars(node)
        for key, child in children:
            if isinstance(child, ast.AST) and is_code(child):
                at = getattr(child, "lineno", line)
                yield child, node, holder, key, at
                if not (isinstance(child, ast.keyword) and child.arg == "axis"):
                    yield from places(child, at)


def mutants(source):
    """(what identifies and describes the mutant, its code) for each of a source."""
    tree = ast.parse(source)
    for number, (node, parent, holder, key, line) in enumerate(list(places(tree))):
        # An operator by itself has no text.
        has_text = isinstance(node, (ast.expr, ast.stmt, ast.keyword))
        before = ast.unparse(node if has_text else parent)
        for kind, new in variants(node):
            holder[key] = new
            code = compile(ast.fix_missing_locations(tree), "<mutant>", "exec")
            after = ast.unparse(new if has_text else parent)
            holder[key] = node
            told = {"number": number, "line": line, "kind": kind}
            yield told | {"before": before, "after": after}, code


def all_mutants(folder, files, seed):
    """The mutants of the files so called, in an order that the seed decides."""
    found = []
    for name in files:
        source = (folder / f"{name}.py").read_text("utf-8")
        digest = hashlib.sha256(source.encode()).hexdigest()[:8]
        found += [({"file": name, "of": digest, **m}, c) for m, c in mutants(source)]
    random.Random(seed).shuffle(found)
    return found


def stratified(found, size):
    """From each file its share of size mutants, rounded up."""
    left = collections.Counter(told["file"] for told, _ in found)
    left = {f: -(-size * n // len(found)) for f, n in left.items()}
    for told, code in found:
        left[told["file"]] -= 1
        if left[told["file"]] >= 0:
            yield told, code


class Mutant(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Has the module of this name imported with other code than its file's."""

    def __init__(self, name, code):
        self.name, self.code = name, code

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module):
        exec(self.code, vars(module))
