#!/usr/bin/env python3
"""Prints the test programs that depend on the files named on standard input, one per line, most affected first.

    scripts/changed_files.sh '*.cpp' '*.h' | scripts/affected_tests.py BUILD

BUILD/test_sources.txt, which CMake writes, lists the sources of each program. A test file affects its program. A header, or
the source of the same name, affects the programs that include the header, or, if no test does, those that its users affect.
"""
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("parallel", "megatron_cpp", "step37")


def includes(path):
    return set(re.findall(r'^#include "([^"]+)"', (ROOT / path).read_text(), re.M))


def header_of(path):
    return str(Path(path).with_suffix(".h"))


def main(build, changed):
    programs = {}  # source -> programs
    for line in Path(build, "test_sources.txt").read_text().splitlines():
        program, source = line.split()
        programs.setdefault(source, set()).add(program)
    test_includes = {source: includes(source) for source in programs}
    users = {}  # header of a library -> headers of the files that include it
    for folder in LIBRARIES:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".h", ".cpp"):
                name = path.relative_to(ROOT).as_posix()
                for header in includes(name):
                    users.setdefault(header, set()).add(header_of(name))

    def of_header(header, seen):
        found = {program for source, headers in test_includes.items() if header in headers for program in programs[source]}
        if found:
            return found
        seen = seen | {header}
        return {p for user in users.get(header, ()) if user not in seen for p in of_header(user, seen)}

    counts = Counter()
    for path in changed:
        counts.update(programs.get(path, set()) | of_header(header_of(path), frozenset()))
    for program, _ in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
        print(program)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1], [line.strip() for line in sys.stdin if line.strip()])
