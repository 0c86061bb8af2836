"""Reads the response format of gpt-oss: messages with a channel each.

`<|channel|>analysis<|message|>...<|end|>` is reasoning, `final` the answer, and so is `commentary`, unless it
has a recipient: `<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{...}<|call|>` is a
call, in whatever channel. The format: https://cookbook.openai.com/articles/openai-harmony
"""

from __future__ import annotations

import re

from microvllm.openai_compat.parsers.json_calls import call_arguments
from microvllm.openai_compat.parsers.output import give_back
from microvllm.openai_compat.parsers.scanner import Reading, Scanner
from microvllm.openai_compat.parsers.writer import Writer

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
TAGS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
RECIPIENT = re.compile(r"to=([^\s<]+)")


def harmony(scan: Scanner, write: Writer) -> Reading[None]:
    """Read an output that goes on behind `<|start|>assistant`."""
    while tag := (yield from scan.passage(TAGS, write.text)):
        if tag in ENDS:
            continue
        header = scan.record = [tag]
        while tag and tag not in (MESSAGE, *ENDS):
            tag = yield from scan.passage(TAGS, len)
        head = "".join(header)
        if tag != MESSAGE:
            scan.record = None
            continue
        recipient = RECIPIENT.search(head)
        if recipient is not None and write.functions:
            name = recipient[1].removeprefix("functions.")
            yield from scan.space()
            if (yield from call_arguments(scan, write, name, None, TAGS)):
                yield from scan.space()
                continue
            write.switch(reasons=False)
            give_back(scan, write)
            continue
        scan.record = None
        write.switch(reasons=head.partition(CHANNEL)[2].startswith("analysis"))
        write.paragraph()
