"""Chat templates that would take hours or terabytes, by kind: what each does is one call into C or many."""

from collections.abc import Iterator

# Two equal lists of 2 ** 40 leaves each, in 40 small lists; `SAME` ends once they are built.
NESTED = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(40) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
TUPLES = NESTED.replace("[ns.a, ns.a]", "(ns.a, ns.a)").replace("[ns.b, ns.b]", "(ns.b, ns.b)")
MAPS = NESTED.replace("[ns.a, ns.a]", "{'k': ns.a, 'l': ns.a}").replace(
    "[ns.b, ns.b]", "{'k': ns.b, 'l': ns.b}"
)
DOUBLING = "{% set ns = namespace(s='aaaaaaaa', l=['aaaaaaaa']) %}{% for i in range(60) %}BODY{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
MACRO = "{% macro m(n) %}BODY{% endmacro %}{{ m(64) }}"

EQUAL = (
    "ns.a == ns.b", "ns.a != ns.b", "ns.a in [ns.b]", "[ns.a].index(ns.b)", "[ns.a].count(ns.b)",
    "[ns.b] | select('equalto', ns.a) | list", "[ns.b] | reject('in', [ns.a]) | list",
)  # fmt: skip
ORDERED = (
    "ns.a < ns.b", "ns.a >= ns.b", "[ns.a, ns.b] | sort", "[ns.a, ns.b] | max", "[ns.a, ns.b] | min",
    "[{'k': ns.a}, {'k': ns.b}] | groupby('k') | list", "[{'k': ns.a}, {'k': ns.b}] | sort(attribute='k')",
    "[{'k': ns.a}, {'k': ns.b}] | max(attribute='k')",
)  # fmt: skip
PRINTED = (
    "ns.a", "ns.a | string", "ns.a ~ ''", "'%s' % [ns.a]", "'{}'.format(ns.a)", "ns.a | tojson",
    "ns.a | tojson(indent=2)", "ns.a | pprint", "ns.a | escape", "ns.a | urlencode", "[ns.a] | join",
    "ns.a | length ~ ns.a | upper", "ns.a | replace('1', '2')", "'%r' | format(ns.a)", "ns.a | e | length",
)  # fmt: skip
WIDE = (
    "'a' * N", "N * 'a'", "[1] * N", "(1,) * N", "'%Nd' % 1", "'%*d' % (N, 1)", "'{:N}'.format(1)",
    "'{:{}}'.format(1, N)", "'{x:{w}}'.format_map({'x': 1, 'w': N})", "'%Nd' | format(1)", "'a' | center(N)",
    "'a\nb' | indent(N)", "'a'.ljust(N)", "'a'.rjust(N)", "'a'.zfill(N)", "'a'.center(N)",
    "'\t'.expandtabs(2 * 10**9)",
    "[1] | batch(N, 0) | list", "messages | tojson(indent=N)",
)  # fmt: skip
BUILT = (
    "('a' * 90000).replace('', 'b' * 90000)", "('a' * 90000) | replace('a', 'b' * 90000)",
    "(['a' * 90000] * 90000) | join", "''.join(['a' * 90000] * 90000)", "('b' * 90000).join(['a'] * 90000)",
    "([['a'] * 90000] * 90000) | sum(start=[])", "('a ' * 40000000).split()", "('a' * 90000000) | list",
    "('a' * 90000000) | list | tojson", "(9 ** 999999) ** 999",
    "2 ** (10 ** 10)", "(2 ** 99999999) * (3 ** 99999999)",
    "range(100000) | list | batch(1) | list | batch(1) | list | tojson(indent=90000)",
    "(('(' * 90000 + 'a') * 2000) | wordwrap(1)", "(('a@b.c ' * 9000000) | urlize)",
    "('<a ' * 30000000) | striptags", "('a b ' * 30000000) | title", "('\u00df' * 90000000).upper()",
)  # fmt: skip
DOUBLED = (
    "{% set ns.s = ns.s ~ ns.s %}", "{% set ns.s = ns.s + ns.s %}", "{% set ns.s = ns.s * 2 %}",
    "{% set ns.l = ns.l + ns.l %}", "{% set ns.l = ns.l * 2 %}", "{% set ns.s = '%s%s' % (ns.s, ns.s) %}",
    "{% set ns.s = '{0}{0}'.format(ns.s) %}", "{% set ns.s = [ns.s, ns.s] | join %}",
    "{% set ns.s = ns.s.replace('a', 'aa') %}", "{% set ns.s = ns.s | tojson | tojson %}",
    "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}",
)  # fmt: skip
LOOPED = (
    "", "{% set x = loop.index %}", "{% set x = (range(100000) | list) == (range(100000) | list) %}",
    "{% set x = range(100000) | sum %}", "{% set x = range(100000) | map('string') | join | length %}",
    "{% set x = range(100000) | reverse | sort | length %}", "{% set x = range(100000) | random %}",
    "{% set x = 'a' in 'b' * 1000000 %}", "{% if loop.changed(j) %}{% endif %}",
)  # fmt: skip
CALLED = (
    "{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}",
    "{% if n %}{% set x = m(n - 1) ~ m(n - 1) %}{% endif %}",
    "{% for i in range(99999) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endfor %}",
    "{% if n %}{% filter upper %}{{ m(n - 1) }}{{ m(n - 1) }}{% endfilter %}{% endif %}",
    "{% if n %}{% for i in 'ab' recursive %}{{ m(n - 1) }}{% endfor %}{% endif %}",
)  # fmt: skip


def bombs() -> Iterator[tuple[str, str]]:
    """Yields (kind, template)."""
    yield from (("compares lists", f"{NESTED}{{% set x = {each} %}}") for each in EQUAL + ORDERED)
    yield from (("compares tuples", f"{TUPLES}{{% set x = {each} %}}") for each in EQUAL + ORDERED)
    yield from (("compares maps", f"{MAPS}{{% set x = {each} %}}") for each in EQUAL)
    yield from (("prints lists", f"{NESTED}{{{{ {each} }}}}") for each in PRINTED)
    yield from (("asks for width", f"{{{{ {each.replace('N', str(10**10))} }}}}") for each in WIDE)
    yield from (("builds", f"{{% set x = {each} %}}{{{{ x | length }}}}") for each in BUILT)
    yield from (("doubles", DOUBLING.replace("BODY", each)) for each in DOUBLED)
    yield from (("loops", ENDLESS.replace("BODY", each)) for each in LOOPED)
    yield from (("recurses", MACRO.replace("BODY", each)) for each in CALLED)
    yield "is too deep to compile", "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}"
    yield "is too deep to compile", "{% if 1 %}" * 50_000 + "{% endif %}" * 50_000
    yield "is too long to compile", "{{ " + "+".join(["1"] * 1_000_000) + " }}"
    yield "folds at compile time", "{% set x = 9 ** (9 ** 9) %}"
