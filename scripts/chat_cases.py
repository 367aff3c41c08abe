#!/usr/bin/env python3
"""Writes what a chat template of the released model makes of conversations, for tests/cases/chat.

  chat_cases.py CHAT_TEMPLATE.jinja CASES.json

CASES.json is a list of {"line": a line of a file of conversations}; "rendered" and "loss", the ranges of its bytes that
count, are written into it anew. Template and masks are applied as transformers and Megatron-Bridge's stepfun/data do
it (tokenize_conversations.py). A picture is the text <image>. Needs PyPI's jinja2.
"""

import argparse
import json
import pathlib

from tokenize_conversations import environment, loss_ranges, messages_of, render


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", type=pathlib.Path)
    parser.add_argument("cases", type=pathlib.Path)
    arguments = parser.parse_args()
    template = environment().from_string(arguments.template.read_text())
    cases = json.loads(arguments.cases.read_text())
    for case in cases:
        line = case["line"]
        case["rendered"] = render(template, line, messages_of(line))
        case["loss"] = loss_ranges(line, lambda messages: len(render(template, line, messages).encode()))
    text = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    arguments.cases.write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
