"""Finds the form of `content` that a chat template was written for: a string, or a list of parts.

Reads the template's syntax tree, as vLLM does for `--chat-template-content-format auto`: a template that
loops over the content of a message expects parts. The content is followed through assignments, filters,
macros and namespaces by a data-flow analysis that ignores the order of statements. Torch-free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jinja2 import nodes

STRING, OPENAI, AUTO = "string", "openai", "auto"
CONTENT_FORMATS = (AUTO, STRING, OPENAI)

# What a value of the template can be.
MESSAGES, MESSAGE, CONTENTS, CONTENT, PART = "messages", "message", "contents", "content", "part"
_ELEMENT = {MESSAGES: MESSAGE, CONTENTS: CONTENT, CONTENT: PART}
_LIST_OF = {element: whole for whole, element in _ELEMENT.items()}
_SELECTING_FILTERS = frozenset(("first", "last", "random"))
_PART_FILTERS = frozenset(("selectattr", "rejectattr", "groupby"))  # others name an `attribute`
_NOTHING: frozenset[str] = frozenset()


def detect_content_format(tree: nodes.Template) -> str:
    """Returns "openai" for a template that takes contents apart into parts, else "string".

    A template that indexes or filters parts without a loop shows the first or all of them. It counts only
    if it nowhere tests whether a content is a string, since such a test announces another branch for that.
    """
    analysis = _Analysis(tree)
    if analysis.loops_over_content():
        return OPENAI
    return OPENAI if analysis.reads_parts() and not analysis.tests_for_string() else STRING


@dataclass(eq=False)
class _Scope:
    """The names of the template or of one macro. A name that a macro does not bind is the template's."""

    parent: _Scope | None = None
    bound: set[str] = field(default_factory=set)

    def owner(self, name: str) -> _Scope:
        scope = self
        while scope.parent is not None and name not in scope.bound:
            scope = scope.parent
        return scope


class _Analysis:
    """The kinds of value that each variable of a template can hold."""

    def __init__(self, tree: nodes.Template) -> None:
        self._root = _Scope()
        self._kinds: defaultdict[tuple[_Scope, str], set[str]] = defaultdict(set)
        self._kinds[self._root, MESSAGES].add(MESSAGES)
        self._macros: dict[str, tuple[nodes.Macro, _Scope]] = {}
        self._nodes: list[tuple[nodes.Node, _Scope]] = []
        self._collect(tree, self._root)
        flows = [
            (node, scope)
            for node, scope in self._nodes
            if isinstance(node, (nodes.Assign, nodes.For, nodes.Call))
        ]
        known = -1
        while known < (known := sum(map(len, self._kinds.values()))):
            for node, scope in flows:
                for owner, name, kinds in self._flows(node, scope):
                    self._kinds[owner, name].update(kinds)

    def loops_over_content(self) -> bool:
        for node, scope in self._nodes:
            if isinstance(node, nodes.For):
                if CONTENT in self._of(node.iter, scope):
                    return True
                # vLLM's rule: outside of macros this name is enough, wherever its value comes from.
                if scope is self._root and isinstance(node.iter, nodes.Name) and node.iter.name == CONTENT:
                    return True
        return False

    def reads_parts(self) -> bool:
        for node, scope in self._nodes:
            if isinstance(node, nodes.Filter):
                takes_apart = node.name in _PART_FILTERS or _attribute(node) is not None
                if takes_apart and CONTENT in self._of(node.node, scope):
                    return True
            if isinstance(node, (nodes.Getattr, nodes.Getitem)):
                key = _key(node)
                # `content[0].upper()` is about a character.
                is_field = isinstance(key, str) and not hasattr(str, key)
                if is_field and PART in self._of(node.node, scope):
                    return True
        return False

    def tests_for_string(self) -> bool:
        return any(
            isinstance(node, nodes.Test) and node.name == "string" and CONTENT in self._of(node.node, scope)
            for node, scope in self._nodes
        )

    def _collect(self, node: nodes.Node, scope: _Scope) -> None:
        """Lists all nodes with their scopes, and binds the names of macros in theirs."""
        self._nodes.append((node, scope))
        inner = scope
        if isinstance(node, nodes.Macro):
            inner = _Scope(scope, {argument.name for argument in node.args})
            self._macros[node.name] = node, inner
        elif isinstance(node, nodes.Name) and node.ctx == "store":
            scope.bound.add(node.name)
        for child in node.iter_child_nodes():
            self._collect(child, inner)

    def _flows(self, node: nodes.Node, scope: _Scope) -> Iterator[tuple[_Scope, str, Iterable[str]]]:
        """Return the (scope, variable, kinds) that a statement or a call of a macro assigns."""
        if isinstance(node, nodes.Assign):
            yield from self._assigned(node.target, node.node, scope)
        elif isinstance(node, nodes.For):
            if isinstance(node.target, nodes.Name):
                yield scope.owner(node.target.name), node.target.name, self._elements(node.iter, scope)
        elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
            macro, inner = self._macros.get(node.node.name, (None, scope))
            if macro is not None:
                for parameter, value in zip(macro.args, node.args, strict=False):
                    yield inner, parameter.name, self._of(value, scope)
                for keyword in node.kwargs:
                    yield inner, keyword.key, self._of(keyword.value, scope)

    def _assigned(
        self, target: nodes.Node, value: nodes.Node, scope: _Scope
    ) -> Iterator[tuple[_Scope, str, Iterable[str]]]:
        if isinstance(target, nodes.Tuple) and isinstance(value, nodes.Tuple):
            for each, own in zip(target.items, value.items, strict=False):
                yield from self._assigned(each, own, scope)
        elif isinstance(target, nodes.NSRef):
            yield scope.owner(target.name), f"{target.name}.{target.attr}", self._of(value, scope)
        elif isinstance(target, nodes.Name):
            owner = scope.owner(target.name)
            yield owner, target.name, self._of(value, scope)
            if isinstance(value, nodes.Call):  # namespace(content=...)
                for keyword in value.kwargs:
                    yield owner, f"{target.name}.{keyword.key}", self._of(keyword.value, scope)

    def _elements(self, node: nodes.Node | None, scope: _Scope) -> frozenset[str]:
        return frozenset(_ELEMENT[kind] for kind in self._of(node, scope) if kind in _ELEMENT)

    def _of(self, node: nodes.Node | None, scope: _Scope) -> frozenset[str]:
        """Return the kinds that an expression can have."""
        if isinstance(node, nodes.Name):
            return frozenset(self._kinds.get((scope.owner(node.name), node.name), ()))
        if isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return self._of_item(node, scope)
        if isinstance(node, nodes.Filter):
            return self._of_filter(node, scope)
        if isinstance(node, nodes.CondExpr):
            return self._of(node.expr1, scope) | self._of(node.expr2, scope)
        if isinstance(node, (nodes.And, nodes.Or, nodes.Add)):
            return self._of(node.left, scope) | self._of(node.right, scope)
        if isinstance(node, (nodes.List, nodes.Tuple)):
            found = frozenset[str]().union(*(self._of(item, scope) for item in node.items))
            return frozenset(_LIST_OF[kind] for kind in found if kind in _LIST_OF)
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            if node.node.attr != "get" or not node.args or not _is_content(node.args[0]):
                return _NOTHING
            return _content_of(self._of(node.node.node, scope))  # message.get("content", ...)
        return _NOTHING

    def _of_item(self, node: nodes.Getattr | nodes.Getitem, scope: _Scope) -> frozenset[str]:
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._of(node.node, scope)
        key = _key(node)
        if not isinstance(key, str):
            return self._elements(node.node, scope)
        found = _content_of(self._of(node.node, scope)) if key == CONTENT else _NOTHING
        if isinstance(node.node, nodes.Name):  # of a namespace
            name = node.node.name
            found |= self._kinds.get((scope.owner(name), f"{name}.{key}"), set())
        return found

    def _of_filter(self, node: nodes.Filter, scope: _Scope) -> frozenset[str]:
        found = self._of(node.node, scope)
        if node.name in _SELECTING_FILTERS:
            return self._elements(node.node, scope)
        if node.name == "map" and MESSAGES in found:
            return frozenset((CONTENTS,)) if _attribute(node) == CONTENT else _NOTHING
        return found


def _key(node: nodes.Node) -> object:
    """Return the constant key or the attribute that the node reads; None for any other index or node."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


def _attribute(node: nodes.Filter) -> object:
    """Return the constant `attribute` argument of a filter, or None."""
    return next(
        (
            keyword.value.value
            for keyword in node.kwargs
            if keyword.key == "attribute" and isinstance(keyword.value, nodes.Const)
        ),
        None,
    )


def _content_of(kinds: frozenset[str]) -> frozenset[str]:
    return frozenset((CONTENT,)) if MESSAGE in kinds else _NOTHING


def _is_content(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and node.value == CONTENT
