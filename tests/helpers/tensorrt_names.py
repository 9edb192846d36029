"""Which names of TensorRT our source uses, and how: read from the source, following its values.

Values are followed from ``import tensorrt`` and parameters called ``trt`` through assignments,
loops, returns and calls of our own functions; what a method of TensorRT returns is what the
bindings say. What is reached in no such way is not seen, so the stand-in of the tests, which
refuses every name it does not have, is compared with the bindings, too.
"""

import ast
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

MODULE = "the module"


@dataclass(frozen=True)
class Class:
    """The value is a class or an enumeration itself."""

    name: str


@dataclass(frozen=True)
class Listed:
    """The value is a list, or another thing to go through, of values of one type."""

    item: object


@dataclass(frozen=True)
class Tupled:
    """The value is a tuple; each place has types of its own."""

    places: tuple[frozenset, ...]


@dataclass(frozen=True)
class Use:
    """One use of a name."""

    where: str
    """File and line."""
    owner: str
    """Class that has the name; `MODULE` for the module itself."""
    name: str
    how: str
    """``read``, ``write``, ``call`` or ``override``."""
    positional: tuple[frozenset, ...] = ()
    """Types that what is passed may have, as far as they are known, such as ``int``; of a method
    that is overridden, its parameters."""
    keywords: tuple[tuple[str, frozenset], ...] = ()
    for_rtx: bool = False
    """Used with TensorRT for RTX alone."""
    optional: bool = False
    """Where a release lacks it, the code has another way."""

    def __str__(self):
        return f"{self.where}: {self.owner}.{self.name} ({self.how})"


def names_used(files, classes):
    """Return the uses in files; `classes` are those of the bindings (see `real_tensorrt`)."""
    follower = _Follower(classes)
    trees = [(path, ast.parse(Path(path).read_text())) for path in files]
    while True:
        before = follower.known()
        follower.uses.clear()
        for path, tree in trees:
            follower.file = Path(path).name
            follower.body(tree.body, ())
        if follower.known() == before:
            return sorted(follower.uses, key=str)


class _Follower:
    """Goes through all files again and again, until nothing new is learnt."""

    def __init__(self, classes):
        self.classes = classes
        self.uses = set()
        self.file = ""
        self.variables = defaultdict(set)
        """Types by (scope, name)."""
        self.attributes = defaultdict(set)
        """Types by the name of an attribute of our own objects."""
        self.returns = defaultdict(set)
        """Types by the name of our own function."""
        self.parameters = {}
        """Names of the parameters of our own functions, and their scope."""
        self.derived = {}
        """The class of TensorRT that our own class extends."""
        self.for_rtx = False

    def known(self):
        """How much is known by now."""
        tables = (self.variables, self.attributes, self.returns)
        return [sum(map(len, table.values())) for table in tables], len(self.uses)

    # Statements.

    def body(self, statements, scope):
        for statement in statements:
            self.statement(statement, scope)

    def statement(self, node, scope):
        match node:
            case ast.FunctionDef():
                self.function(node, scope)
            case ast.ClassDef():
                self.klass(node, scope)
            case ast.Import():
                for alias in node.names:
                    if alias.name == "tensorrt":
                        self.variables[scope, alias.asname or alias.name].add(MODULE)
            case ast.Assign():
                found = self.value(node.value, scope)
                for target in node.targets:
                    self.assign(target, found, scope)
            case ast.AnnAssign() if node.value is not None:
                self.assign(node.target, self.value(node.value, scope), scope)
            case ast.Return() if node.value is not None:
                if scope:
                    self.returns[scope[-1]] |= self.value(node.value, scope)
            case ast.For():
                items = self.items(self.value(node.iter, scope))
                self.assign(node.target, items, scope)
                self.body([*node.body, *node.orelse], scope)
            case ast.If() if ast.unparse(node.test) == "targets":
                before, self.for_rtx = self.for_rtx, True
                self.body(node.body, scope)
                self.for_rtx = before
                self.body(node.orelse, scope)
            case _:
                for child in ast.iter_child_nodes(node):
                    self.any(child, scope)

    def any(self, node, scope):
        if isinstance(node, ast.stmt):
            self.statement(node, scope)
        elif isinstance(node, ast.expr):
            self.value(node, scope)
        else:  # The parts of `with`, `except` and `match`.
            for child in ast.iter_child_nodes(node):
                self.any(child, scope)

    def function(self, node, scope):
        inside = (*scope, node.name)
        names = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        self.parameters[node.name] = (inside, [name for name in names if name != "self"])
        if "trt" in names:
            self.variables[inside, "trt"].add(MODULE)
        self.body(node.body, inside)

    def klass(self, node, scope):
        inside = (*scope, node.name)
        for base in node.bases:
            for found in self.value(base, scope):
                if isinstance(found, Class):
                    self.derived[node.name] = found.name
        for statement in node.body:
            self.statement(statement, inside)
            base = self.derived.get(node.name)
            if isinstance(statement, ast.FunctionDef) and base and statement.name[0] != "_":
                taken = tuple(a.arg for a in statement.args.args if a.arg != "self")
                self.use(statement, base, statement.name, "override", positional=taken)

    def assign(self, target, found, scope):
        match target:
            case ast.Name():
                self.variables[scope, target.id] |= found
            case ast.Attribute():
                owners = [one for one in self.value(target.value, scope) if one in self.classes]
                for owner in owners:
                    self.use(target, owner, target.attr, "write", positional=(found,))
                if not owners:
                    self.attributes[target.attr] |= found
            case ast.Tuple():
                for place, part in enumerate(target.elts):
                    types = {one.item for one in found if isinstance(one, Listed)}
                    for one in found:
                        if isinstance(one, Tupled) and len(one.places) == len(target.elts):
                            types |= one.places[place]
                    self.assign(part, types, scope)

    # Expressions: each gives the set of types that it may have.

    def value(self, node, scope):
        match node:
            case ast.Constant():
                return set() if node.value is None else {type(node.value).__name__}
            case ast.JoinedStr():
                self.children(node, scope)
                return {"str"}
            case ast.Name():
                return self.variable(node.id, scope)
            case ast.Attribute():
                return self.attribute(node, scope)
            case ast.Call():
                return self.call(node, scope)
            case ast.IfExp():
                self.value(node.test, scope)
                return self.value(node.body, scope) | self.value(node.orelse, scope)
            case ast.Tuple():
                return {Tupled(tuple(frozenset(self.value(part, scope)) for part in node.elts))}
            case ast.List():
                types = set().union(*(self.value(part, scope) for part in node.elts))
                return {Listed(one) for one in types}
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                self.generators(node, scope)
                return {Listed(one) for one in self.value(node.elt, scope)}
            case ast.DictComp():
                self.generators(node, scope)
                self.value(node.key, scope)
                return {Listed(one) for one in self.value(node.value, scope)}
            case ast.Subscript():
                self.value(node.slice, scope)
                return self.items(self.value(node.value, scope))
            case ast.Lambda():
                self.value(node.body, scope)
                return set()
            case _:
                self.children(node, scope)
                return set()

    def children(self, node, scope):
        for child in ast.iter_child_nodes(node):
            self.any(child, scope)

    def generators(self, node, scope):
        for generator in node.generators:
            found = self.items(self.value(generator.iter, scope))
            self.assign(generator.target, found, scope)
            for test in generator.ifs:
                self.value(test, scope)

    def items(self, found):
        """What the values may give that are gone through."""
        places = [place for one in found if isinstance(one, Tupled) for place in one.places]
        return set().union(*places) | {one.item for one in found if isinstance(one, Listed)}

    def variable(self, name, scope):
        for end in range(len(scope), -1, -1):
            if found := self.variables.get((scope[:end], name)):
                return found
        return set()

    def attribute(self, node, scope):
        found, ours = set(), True
        for owner in self.value(node.value, scope):
            if owner == MODULE:
                if node.attr[0] != "_":
                    self.use(node, MODULE, node.attr, "read")
                    found.add(Class(node.attr))
            elif isinstance(owner, Class) or owner in self.classes:
                if node.attr[0] != "_" and not self.is_enumeration_name(owner, node.attr):
                    name = owner.name if isinstance(owner, Class) else owner
                    self.use(node, name, node.attr, "read")
                    found |= self.type_of(name, node.attr)
            else:
                continue
            ours = False
        return set(self.attributes.get(node.attr, ())) if ours else found

    def is_enumeration_name(self, owner, attr):
        """Every member of an enumeration of pybind11 has `name` and `value`."""
        return attr in ("name", "value") and any(
            member.kind == "value" and member.type == owner
            for member in getattr(self.classes.get(owner), "members", {}).values()
        )

    def type_of(self, owner, name):
        member = getattr(self.classes.get(owner), "members", {}).get(name)
        return _types(member.type) if member is not None and member.type else set()

    def call(self, node, scope):
        positional = [self.value(argument, scope) for argument in node.args]
        keywords = {k.arg: self.value(k.value, scope) for k in node.keywords if k.arg}
        match node.func:
            case ast.Name(id="getattr") if len(node.args) > 1:
                return self.getattr(node, scope)
            case ast.Name(id=name):
                self.variable(name, scope)
                return self.call_ours(name, positional, keywords)
            case ast.Attribute(attr=name):
                found = set()
                owners = self.value(node.func.value, scope)
                for owner in owners:
                    if owner == MODULE:
                        self.use(node, name, "__init__", "call", positional, keywords)
                        found |= {name}
                    elif owner in self.classes:
                        self.use(node, owner, name, "call", positional, keywords)
                        method = self.classes[owner].members.get(name)
                        for signature in method.signatures if method else ():
                            found |= _types(signature.returns)
                if not any(owner == MODULE or owner in self.classes for owner in owners):
                    found |= self.call_ours(name, positional, keywords)
                self.value(node.func, scope)
                return found
        self.children(node.func, scope)
        return set()

    def call_ours(self, name, positional, keywords):
        scope, parameters = self.parameters.get(name, (None, ()))
        for parameter, found in (*zip(parameters, positional, strict=False), *keywords.items()):
            if scope is not None:
                self.variables[scope, parameter] |= found
        if name in self.derived:
            return {self.derived[name]}
        return set(self.returns.get(name, ()))

    def getattr(self, node, scope):
        match node.args[1]:
            case ast.Constant(value=str(name)):
                for owner in self.value(node.args[0], scope):
                    if isinstance(owner, Class):
                        self.use(node, owner.name, name, "read", optional=len(node.args) > 2)
                        return self.type_of(owner.name, name)
        return set()

    def use(self, node, owner, name, how, positional=(), keywords=None, optional=False):
        self.uses.add(
            Use(
                f"{self.file}:{node.lineno}",
                owner,
                name,
                how,
                tuple(found if how == "override" else frozenset(found) for found in positional),
                tuple((key, frozenset(found)) for key, found in (keywords or {}).items()),
                self.for_rtx,
                optional,
            )
        )


def _types(word):
    listed = word.removeprefix("list of ")
    return {word} if listed == word else {Listed(listed)}
