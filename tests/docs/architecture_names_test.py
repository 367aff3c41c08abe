#!/usr/bin/env python3
"""Checks that the pages speak of what is there.

    python3 tests/docs/architecture_names_test.py ROOT

In docs/architecture.md and docs/determinism.md every name in backticks that looks like code exists in the tree, and the
walk through a training step has at most eight places. In README.md, CONTRIBUTING.md and docs/*.md every relative link leads somewhere, also
#anchors. Prints each fault as file:line: message and exits with 1 if there is one.
"""

import pathlib
import re
import subprocess
import sys

PAGE = "docs/architecture.md"  # has the walk
PAGES_OF_NAMES = (PAGE, "docs/determinism.md")
WALK = "One training step"
MOST_PLACES = 8
SOURCES = {".h", ".cpp", ".cmake", ".txt", ".sh", ".py", ".yaml", ".in"}

IDENTIFIER = r"[A-Za-z_]\w*"
FENCE = re.compile(r"^\s*(```|~~~)")
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")


def tracked_files(root):
    """Relative paths of the tree's files; without git (an unpacked archive) those outside build folders."""
    try:
        listed = subprocess.run(
            ["git", "-C", root, "ls-files", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        listed = [path.as_posix() for path in paths if not path.parts[0].startswith(("build", "."))]
    return [path for path in listed if (root / path).is_file()]


def prose(path):
    """(number, text) of the lines outside code fences."""
    inside = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def links(line):
    """Targets of the line's links; code may stand in their text, and what looks like a link in code is none."""
    return [target for _, target in LINK.findall(CODE.sub("code", line))]


def anchors(path):
    """The #anchors of a page's headings, as GitHub makes them."""
    found = {}
    result = set()
    for _, line in prose(path):
        if not re.match(r"#{1,6} ", line):
            continue
        title = LINK.sub(r"\1", line.lstrip("#").strip()).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        count = found.get(anchor, 0)
        found[anchor] = count + 1
        result.add(f"{anchor}-{count}" if count else anchor)
    return result


def link_faults(root, page):
    path = root / page
    for number, line in prose(path):
        for target in links(line):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists():
                yield number, f"link to {target}: there is no such file"
            elif anchor and there.suffix == ".md" and anchor not in anchors(there):
                yield number, f"link to {target}: {there.name} has no heading of that name"


class Names:
    """What code names the tree has."""

    def __init__(self, root, files):
        self.files = set(files)
        self.folders = {parent.as_posix() for file in files for parent in pathlib.PurePosixPath(file).parents}
        self.words = set()
        self.scoped = set()  # Type::member and namespace::name, as written somewhere
        self.members = {}  # of a type or namespace: every word of the files that declare it
        for file in files:
            if pathlib.PurePosixPath(file).suffix not in SOURCES or file == "tests/docs/architecture_names_test.py":
                continue
            text = (root / file).read_text(encoding="utf-8", errors="replace")
            words = set(re.findall(IDENTIFIER, text))
            self.words |= words
            self.scoped |= set(re.findall(rf"(?<![\w:])(?:{IDENTIFIER}::)+{IDENTIFIER}", text))
            declared = re.findall(
                rf"\b(?:class|struct|namespace)\s+((?:{IDENTIFIER}::)*{IDENTIFIER})(?:\s+final)?\s*(?::[^:]|{{)", text
            )
            for name in declared:
                for part in name.split("::"):
                    self.members.setdefault(part, set()).update(words)

    def fault(self, code):
        """What is wrong with a span of code; None if it is there, or is no name (a shape, a value, a command)."""
        if "/" in code and re.fullmatch(r"[\w./-]+", code):
            path = code.rstrip("/")
            known = self.folders if code.endswith("/") else self.files | self.folders
            return None if path in known else f"there is no {'folder' if code.endswith('/') else 'file'} {code}"
        if re.fullmatch(r"[\w-]+\.(?:h|cpp|md|py|sh|txt|yaml|cmake)", code):
            known = any(file == code or file.endswith("/" + code) for file in self.files)
            return None if known else f"no file is called {code}"
        name = re.fullmatch(rf"((?:{IDENTIFIER}::)*{IDENTIFIER})(?:\(\))?", code)
        if name:
            return self.name_fault(name.group(1))
        if re.fullmatch(rf"\.?{IDENTIFIER}(?:\.{IDENTIFIER})*", code):  # .grad, run.checked
            missing = [word for word in code.strip(".").split(".") if word not in self.words]
            return f"{missing[0]} is in no source" if missing else None
        return None

    def name_fault(self, name):
        scope, _, last = name.rpartition("::")
        for word in name.split("::"):
            if word not in self.words:
                return f"{word} is in no source"
        if not scope or any(written == name or written.endswith("::" + name) for written in self.scoped):
            return None
        # LibTorch's holder Type has the members of TypeImpl.
        owner = scope.rpartition("::")[2]
        if any(last in self.members.get(type_name, ()) for type_name in (owner, owner + "Impl")):
            return None
        return f"{scope} has no {last}"


def name_faults(root, names, page):
    for number, line in prose(root / page):
        for code in CODE.findall(line):
            fault = names.fault(code)
            if fault:
                yield number, f"`{code}`: {fault}"


def walk_faults(root):
    heading, places, last_link = 0, set(), 0
    inside = False
    for number, line in prose(root / PAGE):
        if line.startswith("## "):
            inside = line[3:].strip() == WALK
            heading = number if inside else heading
        if not inside:
            continue
        for target in links(line):
            if pathlib.PurePosixPath(target).suffix in {".h", ".cpp"}:
                places.add(target)
                last_link = number
    if not heading:
        yield 1, f"there is no section '{WALK}'"
    elif not places:
        yield heading, "the walk leads to no place"
    elif len(places) > MOST_PLACES:
        yield last_link, f"the walk has {len(places)} places, more than {MOST_PLACES}: nobody follows it in one sitting"


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    root = pathlib.Path(sys.argv[1]).resolve()
    if not (root / PAGE).is_file():
        sys.exit(f"{root / PAGE} is missing")
    names = Names(root, tracked_files(root))
    faults = [(page, *fault) for page in PAGES_OF_NAMES for fault in name_faults(root, names, page)]
    faults += [(PAGE, *fault) for fault in walk_faults(root)]
    pages = [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(path.relative_to(root).as_posix() for path in (root / "docs").glob("*.md")),
    ]
    for page in pages:
        faults += [(page, *fault) for fault in link_faults(root, page)]
    for file, number, message in sorted(faults):
        print(f"{file}:{number}: {message}")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
