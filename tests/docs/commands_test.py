#!/usr/bin/env python3
"""Runs every command that the documentation gives, so that none of them goes stale.

    python3 tests/docs/commands_test.py --source ROOT --build BUILD --scratch DIR [--page docs/training.md ...]

Takes the ```bash blocks of README.md, CONTRIBUTING.md and docs/*.md, in their order, and runs each command in a folder
that looks like the root of a clone whose build/ is BUILD. What can't run as it stands (no network, one host, no GPU,
no hours) is in the table TREATMENTS, with the reason; a command that is neither there nor in RUNS_AS_IT_IS fails the
test. ```python blocks are compiled, and run if they import nothing but the standard library. Also checks that every
message that docs/troubleshooting.md quotes is one that the sources have, and that links between pages lead somewhere.
"""
import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

SLOWEST_COMMAND_S = 120

# ------------------------------------------------------------------------------------------------------------ pages


def blocks(page, language):
    """(line number, text) of the page's fenced blocks in `language`; '' for those without one."""
    found, fence, begin, text = [], None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        mark = re.match(r"\s*```(\w*)\s*$", line)
        if mark and fence is None:
            fence, begin, text = mark[1], number + 1, []
        elif mark:
            if fence == language:
                found.append((begin, "\n".join(text)))
            fence = None
        elif fence is not None:
            text.append(line)
    if fence is not None:
        sys.exit(f"{page}:{begin}: a block that doesn't end")
    return found


def commands(page):
    """(line number, command) of the page, lines that end in a backslash joined, comments gone."""
    for begin, text in blocks(page, "bash"):
        joined, first = "", 0
        for number, line in enumerate(text.splitlines(), begin):
            first = first if joined else number
            joined += line.strip() if joined else line
            if joined.endswith("\\"):
                joined = joined[:-1].rstrip() + " "
                continue
            command = re.sub(r"(^|\s+)#.*$", "", joined).strip()
            if command:
                yield first, command
            joined = ""


# A block without a language that holds one of these is a command nobody would check.
LOOKS_LIKE_A_COMMAND = re.compile(
    r"^\s*(scripts/\S+\.sh|mpirun|build/bin/|cmake|ctest|python3?|pip|git|apt-get|sudo|export|s(batch|run)|ompi_info)\b",
    re.M)

# ----------------------------------------------------------------------------------------------- how commands are run

RUNS_AS_IT_IS = [
    r"scripts/(build|test)\.sh\b",  # over the stubs of build.sh and ctest, see make_clone
    r"scripts/\w+\.sh --help$",
    r"mpirun .*build/bin/step37 (embed|generate|forward|convert|--)",
    r"build/bin/step37 (generate|embed|plan|check|convert|--|pretrain --help)",
    r"(OMP_NUM_THREADS=1 )?mpirun .*build/bin/\w+_test ",
    r"mpirun .*build_\w+/\w+$",
    r"cmake --install build --prefix \S+$",
    r"cmake -S examples/\w+ -B build_\w+ -DCMAKE_PREFIX_PATH=\S+ && cmake --build build_\w+$",
    r"export \w+=",
    r"(ls|cat|head|tail) ",
    r"python3 docs/figures/\w+\.py --check$",
]


def as_small_run(command, test):
    """Two steps on a few small pictures."""
    command += " run.fresh=true training.steps=2 checkpoint.interval=1 report.pictures=2 report.max_new_tokens=4"
    return command if "data.directory=" in command else f"{command} data.directory={test.pictures}"


def on_small_pictures(command, test):
    return re.sub(r"-np \d+", "-np 2", command) + f" data.directory={test.pictures}"


def in_full_and_small(command, test):
    """With all ranks up to where the pictures are read, so that the configuration fits them; then two steps on two."""
    no_pictures = "picture folder nowhere isn't a folder"
    small = re.sub(r"(-np |SLURM_NTASKS=)\d+ ", r"\g<1>2 ", command)
    small = re.sub(r" parallel\.tp=\d+", " parallel.tp=2", small)
    if small == command:
        return as_small_run(command, test)
    return (f"output=$({command} run.directory=runs/full data.directory=nowhere 2>&1); "
            f"grep -F {shlex.quote(no_pictures)} <<<\"$output\" || {{ echo \"$output\"; false; }} && "
            + as_small_run(small, test))


def network_interface():
    """The one that leads out of this host, or the loopback, which Open MPI 5 doesn't take."""
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    return next((interface for interface, destination, *_ in routes if destination == "00000000"), "lo")


def on_this_host(command, test):
    command = re.sub(r"--host(file)? \S+ ", "", command)
    command = re.sub(r"--mca (btl|oob)_tcp_if_include \S+ ", f"--mca \\1_tcp_if_include {network_interface()} ", command)
    return in_full_and_small(command, test)


def under_a_stub_of_slurm(command, test):
    """The script itself, run as sbatch would run it, but in the foreground and with an srun that is mpirun."""
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".sh"))
    known = {"--nodes", "--ntasks", "--ntasks-per-node", "--cpus-per-task", "--gpus-per-node", "--time", "--partition"}
    unknown = [word for word in words[1:script] if word.startswith("-") and word not in known]
    if unknown:
        return f"echo 'unknown sbatch options: {unknown}'; false"
    given = dict(zip(words[1:script:2], words[2:script:2]))
    ranks = int(given.get("--ntasks", 0)) or int(given["--nodes"]) * int(given["--ntasks-per-node"])
    job = f"SLURM_JOB_ID=1 SLURM_NTASKS={ranks} SLURM_SUBMIT_DIR=$PWD bash {shlex.join(words[script:])}"
    started = in_full_and_small(job, test)
    # Started again by Slurm it goes on, whatever as_small_run's run.fresh says.
    return f"{started} && export SLURM_RESTART_COUNT=1 && {{ {started}; }} | grep -F 'this run has finished'"


def options_are_known(command, _):
    """Runs `PROGRAM [SUBCOMMAND] --help` and looks for the options there."""
    words = shlex.split(command)
    program = next(i for i, word in enumerate(words) if word.startswith("build/bin/"))
    begin = next((i for i, word in enumerate(words) if i > program and word.startswith("--")), len(words))
    options = [word.split("=")[0] for word in words[begin:] if word.startswith("--")]
    checks = [f"grep -qE -e '{option}([^a-z-]|$)' help.txt" for option in options]
    return " && ".join([f"{shlex.join(words[program:begin])} --help > help.txt", *checks])


def options_are_in_the_source(command, _):
    words = shlex.split(command)
    source = next(i for i, word in enumerate(words) if word.endswith(".py"))
    checks = [f"grep -qF -e {shlex.quote(chr(34) + w + chr(34))} {words[source]}"
              for w in words[source + 1:] if w.startswith("--")]
    parse = f"import ast; ast.parse(open('{words[source]}').read())"
    return " && ".join([f"python3 -c {shlex.quote(parse)}", *checks])


def without_debugger(command, _):
    return command.replace("xterm -e gdb --args ", "")


def syntax_only(command, _):
    return f"bash -n -c {shlex.quote(command)}"


# Pattern -> what is run in place of the command, and why the command itself is not.
TREATMENTS = [
    (r"mpirun .*step37 \w+ .*--config run\.yaml", options_are_known, "a checkpoint of Megatron's, see from_megatron_test"),
    (r"\S+/python scripts/from_megatron\.py ", options_are_in_the_source, "needs a Python with PyTorch"),
    (r"mpirun .*--host(file)? .*step37 pretrain ", on_this_host, "there is one host: its ranks stand for those of several"),
    (r"scripts/pretrain\.sh(?! --help)", as_small_run, "hundreds of steps, and pictures out of the network"),
    (r"mpirun .*step37 verify (?!.*--against)", on_small_pictures, "pictures out of the network"),
    (r"mpirun .*step37 verify .*--against", options_are_known, "gradients out of another program"),
    (r"mpirun .*step37 features ", on_small_pictures, "pictures out of the network"),
    (r"mpirun .*step37 pretrain ", as_small_run, "hundreds of steps, and pictures out of the network"),
    (r"sbatch .*slurm_pretrain\.sh", under_a_stub_of_slurm, "there is no Slurm"),
    (r"(mpirun .*)?build/bin/benchmark_image_insert", options_are_known, "12 GB of memory and minutes"),
    (r"mpirun .*build/bin/benchmark_collectives", lambda c, _: c + " --bytes 65536 --repetitions 2", "minutes"),
    (r"python benchmarks/\w+\.py ", options_are_in_the_source, "needs a Python with PyTorch"),
    (r"TEST_RENEW_BASELINE=1 build/bin/pretrain_test ", lambda c, _: c.replace("TEST_RENEW_BASELINE=1 ", ""), "writes into the sources"),
    (r"scripts/docs\.sh$", lambda c, _: c + " --help", "installs doxygen"),
    (r"python3 docs/figures/\w+\.py$", lambda c, _: c + " --check", "writes into the sources"),
    (r"python3 tests/docs/commands_test\.py ", options_are_in_the_source, "would run itself"),
    (r"mpirun .*xterm -e gdb ", without_debugger, "needs a display"),
    (r"scripts/(coverage|gates|faults|fuzz|bench|sanitize|tidy|torture)\.sh", lambda c, _: c.split()[0] + " --help", "minutes to hours"),
    (r"scripts/gpu_check\.sh (build|run)", lambda c, _: c.split()[0] + " --help", "a build against another LibTorch"),
    (r"git config core\.hooksPath ", lambda c, _: f"test -x {c.split()[-1]}/pre-commit", "would change the clone"),
    (r"(sudo )?apt-get install ", syntax_only, "needs root and the network"),
    (r"git clone ", syntax_only, "needs the network"),
    (r"cd megatron_cpp$", syntax_only, "the commands before it would have made the folder; this is the clone"),
]

BUILD_STUB = """#!/usr/bin/env bash
# In place of build.sh: the build is there, and must not build itself. Takes what the script takes, and checks names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=release
while [[ $# -gt 0 ]]; do
  case $1 in
    --preset) grep -q "\\"name\\": \\"$2\\"" CMakePresets.json; preset=$2; shift 2 ;;
    --target) targets=$(cmake --build build --target help); grep -qE "^(bin/)?$2: " <<<"$targets"; shift 2 ;;
    --help) exec scripts/build.sh.original --help ;;
    -D*) name=${1#-D}; grep -rqE "(option|set)\\(${name%%=*} " CMakeLists.txt cmake; shift ;;
    *) echo "unknown option $1" >&2; exit 1 ;;
  esac
done
[[ $preset == release ]] || ln -sfn "$(readlink -f build)" "build-$preset"
"""

CTEST_STUB = """#!/usr/bin/env bash
# In place of ctest: tests would run inside a test. Lists them, and fails if there is none.
output=$({ctest} -N "$@") || exit
tail -n 1 <<<"$output"
[[ $output =~ Total\\ Tests:\\ [1-9] ]]
"""

# Slurm starts a task with the variables of its PMI; mpirun does it here.
SRUN_STUB = """#!/usr/bin/env bash
for word in "$@"; do
  case $word in
    --mpi=list) echo "  pmix"; exit 0 ;;
    --*) shift ;;
    *) break ;;
  esac
done
exec mpirun -np "$SLURM_NTASKS" --bind-to none "$@"
"""


class CommandsTest:
    def __init__(self, source, build, scratch):
        self.source, self.build, self.scratch = source, build, scratch
        self.clone, self.shims, self.pictures = scratch / "clone", scratch / "shims", scratch / "clone/my/pictures"
        self.environment = self.make_environment()
        self.failures = []
        self.make_clone()

    def make_environment(self):
        kept = {k: v for k, v in os.environ.items()
                if k != "Torch_ROOT" and not k.startswith(("SLURM_", "OMPI_", "PMIX_"))}
        return kept | {
            "PATH": f"{self.shims}:{os.environ['PATH']}",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "OMPI_MCA_mpi_yield_when_idle": "1",
            "OMPI_MCA_rmaps_base_oversubscribe": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",  # the same for Open MPI 5
            "HWLOC_HIDE_ERRORS": "2",  # where a container has no /sys
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def make_clone(self):
        if self.scratch.exists() and any(self.scratch.iterdir()) and not self.clone.is_dir():
            sys.exit(f"{self.scratch} is not empty and no folder of this test")
        shutil.rmtree(self.scratch, ignore_errors=True)
        for folder in (self.clone / "scripts", self.shims, self.pictures):
            folder.mkdir(parents=True)
        # What git ignores stays out, so that outputs of earlier runs don't stand in for those of the commands.
        outputs = re.compile(r"build(-.*|_.*)?|runs|data|install|scripts|\.git|compile_commands\.json|__pycache__")
        for entry in self.source.iterdir():
            if not outputs.fullmatch(entry.name):
                (self.clone / entry.name).symlink_to(entry)
        (self.clone / "build").symlink_to(self.build)
        for script in (self.source / "scripts").iterdir():
            is_build = script.name == "build.sh"
            (self.clone / "scripts" / (script.name + ".original" * is_build)).symlink_to(script)
        self.write_program(self.clone / "scripts/build.sh", BUILD_STUB)
        self.write_program(self.shims / "ctest", CTEST_STUB.replace("{ctest}", shutil.which("ctest")))
        self.write_program(self.shims / "srun", SRUN_STUB)
        shapes = [self.source / "tests/cases/images" / name for name in ("20x400.png", "300x200.png")]
        for i in range(24):
            (self.pictures / f"{i}.png").symlink_to(shapes[i % 2])
            (self.pictures / f"{i}.txt").write_text(f"A {('narrow', 'wide')[i % 2]} picture, number {i}.\n")
        (self.clone / "a.png").symlink_to(shapes[1])

    @staticmethod
    def write_program(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def fail(self, page, line, text):
        self.failures.append(f"{page.relative_to(self.source)}:{line}: {text}")
        print(f"FAILED {self.failures[-1]}", flush=True)

    def check_page(self, page):
        environment = dict(self.environment)  # what `export` adds holds to the end of the page
        for line, text in blocks(page, ""):
            if LOOKS_LIKE_A_COMMAND.search(text):
                self.fail(page, line, "a command in a block without a language: call the block bash")
        for line, command in commands(page):
            self.check_command(page, line, command, environment)
        for line, text in blocks(page, "python"):
            self.check_python(page, line, text)
        self.check_links(page)

    def check_command(self, page, line, command, environment):
        for pattern, treatment, reason in TREATMENTS:
            if re.match(pattern, command):
                shown, run = f"{command}   [{reason}]", treatment(command, self)
                break
        else:
            if not any(re.match(pattern, command) for pattern in RUNS_AS_IT_IS):
                return self.fail(page, line, f"nobody says how this is to be tested (TREATMENTS): {command}")
            shown, run = command, command
        run = re.sub(r"\bPREFIX\b", str(self.scratch / "prefix"), run)
        start = time.monotonic()
        rc, output = self.run(run, environment)
        print(f"{page.relative_to(self.source)}:{line}: {time.monotonic() - start:5.1f} s  {shown}", flush=True)
        if rc != 0 or "0 tests from 0 test suites ran" in output:  # GoogleTest takes that for success
            self.fail(page, line, f"{command}\n  run as: {run}\n  status {rc}, output:\n{output[-4000:]}")

    def run(self, command, environment):
        """Status and output; keeps the environment that the command leaves behind."""
        left_behind = self.scratch / "environment"
        script = f"set -o pipefail\n{command}\nrc=$?\nenv -0 > {shlex.quote(str(left_behind))}\nexit $rc"
        process = subprocess.Popen(["bash", "-c", script], cwd=self.clone, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                   start_new_session=True)
        try:
            output, _ = process.communicate(timeout=SLOWEST_COMMAND_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 15)
            output, _ = process.communicate()
            return 124, output + f"\nstill running after {SLOWEST_COMMAND_S} s"
        if command.startswith("export "):
            pairs = left_behind.read_text(errors="replace").split("\0")
            environment.update(pair.split("=", 1) for pair in pairs if "=" in pair)
        return process.returncode, output

    def check_python(self, page, line, text):
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            return self.fail(page, line, f"no Python: {error}")
        imported = {name.split(".")[0] for node in ast.walk(tree) for name in
                    ([a.name for a in node.names] if isinstance(node, ast.Import) else
                     [node.module] if isinstance(node, ast.ImportFrom) else [])}
        if not imported <= sys.stdlib_module_names:
            return print(f"{page.relative_to(self.source)}:{line}: compiled only, needs "
                         f"{sorted(imported - sys.stdlib_module_names)}")
        rc, output = self.run(f"python3 -c {shlex.quote(text)}", self.environment)
        print(f"{page.relative_to(self.source)}:{line}: python block")
        if rc != 0:
            self.fail(page, line, f"python block: {output[-4000:]}")

    def check_links(self, page):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            for target in re.findall(r"\]\(([^)#\s]+)", line):
                if "://" not in target and not (page.parent / target).exists():
                    self.fail(page, number, f"a link to {target}, which isn't there")


# ------------------------------------------------------------------------------------------- quoted error messages

# Headings of the page quote messages; those of other programs are named as such there.
HEADING = re.compile(r"^\*\*`.+`\*\*(?P<other_program> \(.+\))?$")
MESSAGE = re.compile(r"\*\*`(.+?)`\*\*")


def program_text(source):
    """All string literals of the sources, and the scripts, as one text; adjacent literals joined as the compiler does."""
    text = []
    for folder in ("parallel", "megatron_cpp", "step37", "tests/support", "examples"):
        for file in sorted((source / folder).rglob("*")):
            if file.suffix in (".cpp", ".h"):
                text.append(re.sub(r'"\s*\n\s*"', "", file.read_text()))
    for pattern in ("cmake/*", "CMakeLists.txt", "scripts/*.sh"):
        text += [re.sub(r'"\s*\n\s*"', "", file.read_text()) for file in sorted(source.glob(pattern))]
    return "\n".join(text).replace('\\"', '"')


def check_messages(test, page):
    """A quoted message is literal parts, with ... for what differs: they must stand in the sources."""
    text, number_checked = program_text(test.source), 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        heading = HEADING.match(line)
        if not heading or heading["other_program"]:
            continue
        for message in MESSAGE.findall(line):
            number_checked += 1
            # The parts in their order, and near each other: they are of one message, not of any.
            parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
            if not re.search(".{0,300}?".join(parts), text, re.S):
                test.fail(page, number, f"no source has the message: {message}")
    print(f"{page.relative_to(test.source)}: {number_checked} quoted messages looked for in the sources")
    if number_checked == 0:
        test.fail(page, 1, "no quoted message found")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="root of the sources")
    parser.add_argument("--build", type=Path, required=True, help="build tree with bin/step37, the tests and benchmarks")
    parser.add_argument("--scratch", type=Path, required=True, help="folder to work in; is emptied first")
    parser.add_argument("--page", action="append", help="only this page, relative to --source")
    arguments = parser.parse_args()
    source, start = arguments.source.resolve(), time.monotonic()
    test = CommandsTest(source, arguments.build.resolve(), arguments.scratch.resolve())
    # The order that a reader meets them in: what one page makes, the next may use.
    first = ["README.md", "docs/getting-started.md", "docs/training.md"]
    names = arguments.page or first + sorted(
        ["CONTRIBUTING.md", *(str(p.relative_to(source)) for p in (source / "docs").glob("*.md"))],
        key=lambda name: (name == "CONTRIBUTING.md", name))
    for name in dict.fromkeys(names):
        test.check_page(source / name)
        if name == "docs/troubleshooting.md":
            check_messages(test, source / name)
    print(f"{len(test.failures)} failures, {time.monotonic() - start:.0f} s")
    for failure in test.failures:
        print(f"  {failure.splitlines()[0]}")
    return 1 if test.failures else 0


if __name__ == "__main__":
    sys.exit(main())
