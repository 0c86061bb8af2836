"""Reads `vllm_flags.tsv`: the flags of `vllm serve` 0.33 that have no option here.

Each is spelled as in vLLM's parser, without dashes in front; a key of a JSON flag follows a dot. A switch is
also `no-x`, and `enable-x` and `disable-x` are two sides of one. Flags of older versions that scripts
still use are among them. `scripts/compare_flags.py` compares the table with an installed vLLM. Columns:

`words`      what follows the flag: a `value`, a `list` of them, an `optional` one, or nothing (`switch`).
`here`       `ignored`, with a line: no answer of a dense text model depends on it. `refused`: it would change
             what is served, so with any value but a neutral one the server does not start; unless `always
             refused`, `--ignore-unsupported-flags` drops it. `option`: it is one here.
`text`       why it is ignored, where "has no effect here" would leave a doubt; what completes "it would ...".
`neutral`    values that ask for nothing, beside `ASKS_FOR_NOTHING`.
`needs`      the flag without which vLLM does not start with this one, whatever else is ignored.
`spellings`  other names of the flag.
"""

from __future__ import annotations

from typing import NamedTuple

from microvllm.runtime.tables import read_table

# An empty object is in a flag's own column, if at all: `--speculative-config {}` does not start vLLM either.
ASKS_FOR_NOTHING = ("", "none", "null")


class Refused(NamedTuple):
    """A flag that would change what is served; `changes` completes "it would ..."."""

    kind: str
    changes: str
    neutral: tuple[str, ...]
    always: bool


KINDS: dict[str, str] = {}  # flag -> what follows it, without those that are options here
REFUSED: dict[str, Refused] = {}
IGNORED_BECAUSE: dict[str, str] = {}
NEEDS: dict[str, str] = {}
OTHER_SPELLINGS: dict[str, str] = {}  # spelling -> flag, both with dashes

for _name, _kind, _here, _text, _neutral, _needs, _spellings in read_table("options/vllm_flags.tsv"):
    OTHER_SPELLINGS.update(dict.fromkeys(_spellings.split(), f"--{_name}"))
    if _here == "option":
        continue
    if _here != "ignored":
        REFUSED[_name] = Refused(_kind, _text, tuple(_neutral.split()), _here == "always refused")
    elif _text:
        IGNORED_BECAUSE[_name] = _text
    if _needs:
        NEEDS[_name] = _needs
    if "." not in _name:
        KINDS[_name] = _kind
