#!/usr/bin/env python3
"""Turns text into token ids and back, by DIR/tokenizer.json.

  tokenize_text.py encode DIR   reads text, writes its ids with spaces between them; no begin or end token is added
  tokenize_text.py decode DIR   reads ids, writes their text; special tokens give nothing

Needs PyPI's tokenizers; without it, it makes an environment of its own in the user's cache folder, and runs there.
STEP37_TOKENIZER=scripts/tokenize_text.py lets `step37 generate --model` call it.
"""

import argparse
import os
import pathlib
import subprocess
import sys

try:
    import tokenizers
except ImportError:
    tokenizers = None

ENVIRONMENT, PACKAGE = "tokenizers-0.23.3-1", "tokenizers==0.23.3"


def run_in_own_environment():
    common = pathlib.Path(__file__).resolve().parent / "common.sh"
    command = 'source "$0"; python_environment "$@"; echo "$cache"'
    made = subprocess.run(["bash", "-c", command, common, ENVIRONMENT, PACKAGE], stdout=subprocess.PIPE, text=True)
    if made.returncode != 0:
        sys.exit(made.returncode)
    python = f"{made.stdout.strip()}/{ENVIRONMENT}/bin/python"
    os.execv(python, [python, *sys.argv])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["encode", "decode"])
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path)
    arguments = parser.parse_args()
    if tokenizers is None:
        run_in_own_environment()
    tokenizer = tokenizers.Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    given = sys.stdin.buffer.read().decode()
    if arguments.action == "encode":
        result = " ".join(map(str, tokenizer.encode(given, add_special_tokens=False).ids))
    else:
        result = tokenizer.decode([int(word) for word in given.split()])
    sys.stdout.buffer.write(result.encode())


if __name__ == "__main__":
    main()
