#!/usr/bin/env python3
"""Turns conversations into token ids and masks, by tokenizer and chat template of a published checkpoint.

  tokenize_conversations.py DIR CHATS.jsonl TOKENS.jsonl

DIR has tokenizer.json, tokenizer_config.json and the template (chat_template.jinja, or a key of tokenizer_config.json).
CHATS.jsonl has lines {"messages": [...], "images": [...]}; TOKENS.jsonl gets {"tokens", "loss_mask", "images"}. The loss
counts assistants' turns behind the last user turn, as in Megatron-Bridge's stepfun/data. A picture is its global view;
crops are not written. Lines at fault are left out, and counted; the first is named.

A user's text that spells a special token becomes that token here, as in transformers.

Needs PyPI's tokenizers and jinja2; without them, it makes an environment of its own in the user's cache folder, and runs
there.
"""

import argparse
import copy
import json
import os
import pathlib
import subprocess
import sys

try:
    import jinja2.ext
    import jinja2.sandbox
    import tokenizers
except ImportError as missing:
    tokenizers = missing

ENVIRONMENT, PACKAGES = "conversations-0.23.3-1", ["tokenizers==0.23.3", "jinja2==3.1.6"]
PICTURE, PICTURE_OF_TEMPLATE, GLOBAL_TOKENS = "<image>", "<im_patch>", 169


def run_in_own_environment():
    common = pathlib.Path(__file__).resolve().parent / "common.sh"
    command = 'source "$0"; python_environment "$@"; echo "$cache"'
    made = subprocess.run(["bash", "-c", command, common, ENVIRONMENT, *PACKAGES], stdout=subprocess.PIPE, text=True)
    if made.returncode != 0:
        sys.exit(made.returncode)
    python = f"{made.stdout.strip()}/{ENVIRONMENT}/bin/python"
    os.execv(python, [python, *sys.argv])


def environment():
    # As transformers' utils/chat_template_utils.py makes it, and with a filter that it lacks.
    result = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    result.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    result.filters["fromjson"] = json.loads
    return result


def messages_of(line):
    messages = line.get("messages") or line.get("conversations")
    if not messages:
        raise ValueError("it has neither messages nor conversations")
    return messages


def render(template, line, messages, bos_token=""):
    """The text of messages, a picture as <image>; with the generation prompt unless the assistant speaks last."""
    options = {"bos_token": bos_token, "add_generation_prompt": messages[-1]["role"] != "assistant"}
    options["tools"] = line.get("tools") or messages[0].get("tool_schemas")
    if messages[0].get("reasoning_effort") is not None:
        options["reasoning_effort"] = messages[0]["reasoning_effort"]
    return template.render(messages=copy.deepcopy(messages), **options).replace(PICTURE_OF_TEMPLATE, PICTURE)


def loss_ranges(line, measure):
    """[begin, end) of what counts; measure(messages) is the length of their rendering."""
    messages = messages_of(line)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message isn't the assistant's")
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise ValueError("there is no message of the user")
    begin = measure(messages[:users[-1] + 1])
    ranges = []
    for i in range(users[-1] + 1, len(messages)):
        end = measure(messages[:i + 1])
        if messages[i]["role"] == "assistant" and messages[i].get("loss_mask", 1) == 1:
            ranges.append([begin, end])
        begin = end
    return ranges


class Tokenizing:
    def __init__(self, folder):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template = folder / "chat_template.jinja"
        self.template = environment().from_string(
            template.read_text() if template.exists() else config["chat_template"])
        bos = config.get("bos_token") or ""
        self.bos_token = bos["content"] if isinstance(bos, dict) else bos

    def ids(self, line, messages):
        text = render(self.template, line, messages, self.bos_token)
        picture = "<im_start>" + GLOBAL_TOKENS * "<im_patch>" + "<im_end>"
        return self.tokenizer.encode(text.replace(PICTURE, picture), add_special_tokens=False).ids

    def sample(self, line):
        messages = messages_of(line)
        if PICTURE_OF_TEMPLATE in json.dumps(messages):
            raise ValueError(f"its text has {PICTURE_OF_TEMPLATE}")
        images = line.get("images") or []
        placeholders = render(self.template, line, messages).count(PICTURE)
        if placeholders != len(images):
            raise ValueError(f"{placeholders} pictures for {len(images)} images")
        tokens = self.ids(line, messages)
        mask = [0] * len(tokens)
        for begin, end in loss_ranges(line, lambda part: len(self.ids(line, part))):
            for i in range(begin, min(end, len(mask))):
                mask[i] = 1
        return {"tokens": tokens, "loss_mask": mask,
                "images": [image[0] if isinstance(image, list) else image for image in images]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path)
    parser.add_argument("chats", metavar="CHATS.jsonl", type=pathlib.Path)
    parser.add_argument("tokens", metavar="TOKENS.jsonl", type=pathlib.Path)
    arguments = parser.parse_args()
    if isinstance(tokenizers, ImportError):
        run_in_own_environment()
    tokenizing = Tokenizing(arguments.folder)
    left_out, written = [], 0
    with open(arguments.chats, encoding="utf-8-sig") as chats, open(arguments.tokens, "w", encoding="utf-8") as tokens:
        for number, text in enumerate(chats, 1):
            if not text.strip():
                continue
            try:
                tokens.write(json.dumps(tokenizing.sample(json.loads(text))) + "\n")
                written += 1
            except (ValueError, KeyError, TypeError, AttributeError, jinja2.TemplateError) as error:
                left_out.append(f"{arguments.chats} line {number}: {error}")
    if left_out:
        print(f"{len(left_out)} of {len(left_out) + written} lines are left out (first: {left_out[0]})", file=sys.stderr)
    if written == 0:
        sys.exit(f"{arguments.chats} has no line that can be used")


if __name__ == "__main__":
    main()
