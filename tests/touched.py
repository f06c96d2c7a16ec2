"""What code touches of TensorRT's Python API, derived from its source: nothing is listed by hand.

Types are followed as far as the code goes: from the module (``trt``, and what ``library()``
returns) and from parameters by their names, through attributes, calls and assignments, by the
types in the docstrings of the real bindings. An attribute of a value whose type cannot be told is
a problem too, so that no use escapes.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from tests.doubles.bindings import Api

# Types of parameters, which are annotated Any, by name; "" is the module itself, None is ours.
PARAMETERS: dict[str, str | None] = {
    "trt": "",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "logger": "Logger",
    "network": "INetworkDefinition",
    "runtime": "Runtime",
    "severity": "ILogger.Severity",
    "self": None,
}
# What the bindings' docstrings call by its name in C++.
_CPP = {"nvonnxparser::IParserError": "ParserError", "nvinfer1::IRuntimeCache": "IRuntimeCache"}
_RETURNED = re.compile(r"-> (?:list\[)?(?:tensorrt\w*\.)+([\w.]+)|-> (nv\w+::\w+)")
_PLAIN = re.compile(r"-> (?:list\[)?(?:int|str|bool|float|bytes|None|typing\.\w+)")
_UNTOLD = "?"
# Ours, kept by the logger that `recording_logger` makes.
_OWN = {("Logger", "lines")}


@dataclass(frozen=True)
class Value:
    """A value of the API: ``of`` is its class; of a method the class it is of, and its name."""

    of: str
    kind: str = "instance"  # or class, method
    name: str = ""


@dataclass
class Touched:
    """The members of a module's classes that a source file uses.

    Attributes:
        members: of each use that must be there, the class ("" for the module) and the name.
        chosen: the classes of which a setting's value chooses a member.
        problems: what is missing in the API, or cannot be followed.
    """

    api: Api
    members: set[tuple[str, str]] = field(default_factory=set)
    chosen: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def touched_by(source: str, api: Api) -> Touched:
    """Return what a source file touches of an API, and what of it is not there."""
    found = Touched(api)
    _Scope(found, {}).visit_all(ast.parse(source).body)
    return found


class _Scope(ast.NodeVisitor):
    """Follows one function with what it sees of those around it."""

    def __init__(self, found: Touched, known: dict[str, Value | None]) -> None:
        self.found = found
        self.known = dict(known)

    def visit_all(self, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        inner = _Scope(self.found, self.known)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            name = argument.arg
            # Whatever has another annotation is not of the API.
            ours = argument.annotation is not None and ast.unparse(argument.annotation) != "Any"
            of = None if ours else PARAMETERS.get(name, f"{_UNTOLD}{name}")
            inner.known[name] = None if of is None else Value(of)
        inner.visit_all(node.body)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self.type_of(base) for base in node.bases]
        for base in bases:
            for method in node.body:
                if base and isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    self.use(base.of, method.name, method)  # it overrides the library's
        self.visit_all(node.body)

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.type_of(node.value)
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr == "__class__":
                assert isinstance(target.value, ast.Name)
                self.known[target.value.id] = value and Value(value.of)  # TensorRT's way to cast
            else:
                self.bind(target, value)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.type_of(node.iter))
        self.visit_all([*node.body, *node.orelse])

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self.type_of(node)
        else:
            super().generic_visit(node)

    def bind(self, target: ast.expr, value: Value | None) -> None:
        if isinstance(target, ast.Name):
            self.known[target.id] = value or _by_name(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            # `builder, network = parse_graph(…)`: by the names, as with parameters.
            for element in target.elts:
                self.bind(element, None)
        else:
            self.type_of(target)

    def type_of(self, node: ast.expr | None) -> Value | None:
        """Return the type of an expression, having noted what it uses."""
        follow = getattr(self, f"of_{type(node).__name__.lower()}", self.of_other)
        found: Value | None = follow(node)
        return found

    def of_name(self, node: ast.Name) -> Value | None:
        return self.known.get(node.id)

    def of_attribute(self, node: ast.Attribute) -> Value | None:
        base = self.type_of(node.value)
        if base is None or (base.of, node.attr) in _OWN or node.attr in ("__name__", "__class__"):
            return None
        return self.use(base.of, node.attr, node)

    def of_call(self, node: ast.Call) -> Value | None:
        return self.called(node)

    def of_subscript(self, node: ast.Subscript) -> Value | None:
        self.type_of(node.slice)
        return self.type_of(node.value)  # a list of them

    def of_list(self, node: ast.List) -> Value | None:
        types = [self.type_of(element) for element in node.elts]
        return next((found for found in types if found), None)

    def of_namedexpr(self, node: ast.NamedExpr) -> Value | None:
        self.bind(node.target, value := self.type_of(node.value))
        return value

    def of_ifexp(self, node: ast.IfExp) -> Value | None:
        types = [self.type_of(part) for part in (node.test, node.body, node.orelse)]
        return types[1] or types[2]

    def of_other(self, node: ast.expr | None) -> Value | None:
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp)):
            return self.comprehended(node)
        for child in ast.iter_child_nodes(node) if node else ():
            if isinstance(child, ast.expr):
                self.type_of(child)
        return None

    def called(self, node: ast.Call) -> Value | None:
        arguments = [self.type_of(argument) for argument in node.args]
        keywords = [keyword.arg for keyword in node.keywords]
        for keyword in node.keywords:
            self.type_of(keyword.value)
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function == "library":
            return Value("")
        if function in ("getattr", "hasattr") and arguments[0]:
            name = node.args[1]
            if len(node.args) == 2 and function == "getattr" and isinstance(name, ast.Constant):
                return self.use(arguments[0].of, str(name.value), node)
            if len(node.args) == 2 and function == "getattr":
                self.found.chosen.add(arguments[0].of)
            return None  # whether it is there is asked, or the name is a setting's
        value = self.type_of(node.func)
        if value is None:
            return None
        if value.kind == "class":
            return Value(value.of)
        text = self.found.api[value.of].get(value.name, "")
        for keyword_name in keywords:
            if f"{keyword_name}: " not in text:
                self.problem(f"{value.of}.{value.name}({keyword_name}=…)", node)
        return self.returned(text)

    def comprehended(self, node: ast.expr) -> Value | None:
        inner = _Scope(self.found, self.known)
        for generator in getattr(node, "generators", ()):
            inner.bind(generator.target, inner.type_of(generator.iter))
            for condition in generator.ifs:
                inner.type_of(condition)
        if isinstance(node, ast.DictComp):
            inner.type_of(node.key)
            return inner.type_of(node.value)
        return inner.type_of(getattr(node, "elt", None))

    def use(self, of: str, name: str, node: ast.AST) -> Value | None:
        """Note a use of a member; return its type."""
        known = self.found.api
        if of.startswith(_UNTOLD):
            self.problem(f"{of}.{name}: of what type is it? (PARAMETERS)", node)
            return None
        self.found.members.add((of, name))
        if of not in known or name not in known[of]:
            self.problem(f"{of or 'the module'}.{name}".removeprefix("the module."), node)
            return None
        if (inner := f"{of}.{name}" if of else name) in known:
            return Value(inner, "class")
        return self.of_member(of, name) if of else None

    def of_member(self, of: str, name: str) -> Value | None:
        text = self.found.api[of][name]
        if re.match(rf"{name}\(", text):
            return Value(of, "method", name)
        # Members of an enum have its docstring.
        return Value(of) if "Members:" in text else self.returned(text)

    def returned(self, text: str) -> Value | None:
        """Return the type in a docstring, None for Python's own."""
        if match := _RETURNED.search(text):
            return Value(_CPP.get(match.group(2) or "", match.group(1) or ""))
        return None if _PLAIN.search(text) else Value(f"{_UNTOLD}{text[:80]}")

    def problem(self, what: str, node: ast.AST) -> None:
        self.found.problems.append(f"line {getattr(node, 'lineno', '?')}: {what}")


def _by_name(name: str) -> Value | None:
    of = PARAMETERS.get(name)
    return None if of is None else Value(of)
