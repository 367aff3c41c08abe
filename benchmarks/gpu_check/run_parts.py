"""Runs the parts of a GPU check out of the bundle that this file lies in; scripts/gpu_check.sh makes the bundle.

Standard library only: the machine it runs on has a python3 with PyTorch, whose LibTorch the programs use, and nothing
else is taken for granted.
"""
import argparse
import concurrent.futures
import datetime
import gzip
import importlib.util
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

# Ends of the outcome of a part. What was left out for want of a GPU is no fault.
RIGHT, WRONG, NO_GPU, OUT_OF_TIME = "right", "wrong", "no GPU", "out of time"
KILL_AFTER_S = 10
PROGRAMS = "programs.tar.xz"
MACHINE_LIMIT_S = 90  # the first to load LibTorch, maybe from a slow disk
STEPS = 20
TRACED_STEPS = 5
# Float32 on both devices. The first loss comes from the same weights and pictures; later ones drift apart as rounding
# grows through the optimizer.
FIRST_LOSS_ALLOWED = 1e-4
LOSSES_ALLOWED = 5e-2
LEAST_FOR_A_TEST_S = 20  # with less left it isn't begun: stopped in the middle it would look like one that hangs


class Failure(Exception):
    """What stops the whole check."""


class Libraries:
    """LibTorch as the python3 that runs this has it."""

    def __init__(self, version_wanted):
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.origin:
            raise Failure(f"the python3 in PATH ({sys.executable}) has no torch: the programs need its LibTorch "
                          f"{version_wanted}")
        self.folder = Path(spec.origin).parent
        found = re.search(r"__version__ *= *['\"]([0-9.]+)", (self.folder / "version.py").read_text())
        self.version = found[1] if found else "unknown"
        if self.version != version_wanted:
            raise Failure(f"this bundle was built with LibTorch {version_wanted}, {self.folder} is {self.version}")

    def folders(self):
        return [self.folder / "lib", *sorted(self.folder.parent.glob("nvidia/*/lib"))]


class Bundle:
    """The folder, and the one in which programs, libraries and Open MPI lie unpacked."""

    def __init__(self, folder, programs):
        self.folder, self.programs = folder, programs
        self.facts = json.loads((folder / "bundle.json").read_text())

    def program(self, name):
        return str(self.programs / "bin" / name)

    def mpirun(self, ranks):
        return [str(self.programs / "mpi/bin/mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]

    def tests(self, ranks):
        """Names of the test programs, in the order of the bundle."""
        return [test["program"] for test in self.facts["tests"] if test["ranks"] == ranks]

    def environment(self, libraries):
        environment = dict(os.environ)
        ours = [self.programs / "lib", *libraries.folders()]
        environment["LD_LIBRARY_PATH"] = ":".join([*map(str, ours), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        environment["OPAL_PREFIX"] = str(self.programs / "mpi")
        environment["MCPP_TEST_CASES"] = str(self.folder / "cases")
        environment.update({
            # As in scripts/common.sh.
            "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
            # One machine: no ssh, no network, and no reading in another process's memory, which containers forbid.
            "OMPI_MCA_plm": "isolated", "OMPI_MCA_btl": "self,vader", "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
            # Ranks may share a GPU where NCCL is 2.30 or newer; older ones don't know the variable.
            "NCCL_MULTI_RANK_GPU_ENABLE": "1"})
        return environment


class Context:
    """What a part works with: programs, a folder for logs and scratch, and the time it has."""

    def __init__(self, bundle, environment, output, has_gpu):
        self.bundle, self.environment, self.output, self.has_gpu = bundle, environment, output, has_gpu
        self.device = "cuda" if has_gpu else "cpu"
        self.scratch = None  # a folder of the part's own
        self.log = None
        self.deadline = 0.0
        self.rows, self.errors = [], []

    def left(self):
        return max(0.0, self.deadline - time.monotonic())

    def run(self, command, name, environment=None, limit=None):
        """(exit status, output); the status is None where the time was up. The output goes to the log, too."""
        limit = min(limit or self.left(), self.left())
        if limit <= 0:
            return None, ""
        output_file = self.scratch / f"{name}.out"
        with output_file.open("wb") as output:
            process = subprocess.Popen(command, env={**self.environment, **(environment or {})}, stdout=output,
                                       stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                                       cwd=self.scratch)
            try:
                status = process.wait(timeout=limit)
            except BaseException as error:
                stop(process)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                status = None
        text = output_file.read_text(errors="replace")
        with self.log.open("a") as log:
            log.write(f"+ {' '.join(map(str, command))}\n{text}\n[status {'out of time' if status is None else status}]\n")
        return status, text

    def mpirun(self, ranks, command, name, environment=None, limit=None):
        # A folder for each: two mpirun of one user get into each other's way in a common one. Short, for sockets.
        temporary = Path(tempfile.mkdtemp(prefix="gpu"))
        try:
            return self.run([*self.bundle.mpirun(ranks), *command], name,
                            {"OMPI_MCA_orte_tmpdir_base": str(temporary), **(environment or {})}, limit)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def failed(self, what, status, text):
        """A row and an error for a program that didn't end well."""
        outcome = "out of time" if status is None else f"exit status {status}"
        self.rows.append({"what": what, "right": False, "ended": outcome})
        lines = [line for line in text.splitlines() if line.strip()]
        self.errors.append(f"{what}: {outcome}: " + " | ".join(lines[-4:])[-600:])
        if status is None:
            self.errors[-1] = OUT_OF_TIME + ": " + self.errors[-1]

    def check(self, name, *arguments, ranks=0):
        """gpu_check NAME: its rows, and a failure if it ended badly without one."""
        rows_file = self.scratch / f"{name}.jsonl"
        command = [self.bundle.program("gpu_check"), name, "--rows", str(rows_file), *arguments]
        status, text = self.mpirun(ranks, command, name) if ranks else self.run(command, name)
        rows = read_lines(rows_file)
        self.rows += rows
        if status != 0 and not (status == 1 and any(row.get("right") is False for row in rows)):
            self.failed(f"gpu_check {name}", status, text)

    def test(self, program, ranks, pattern=None, limit=None):
        what = f"{program} on {ranks} rank{'s' if ranks > 1 else ''}" + (f", {pattern}" if pattern else "")
        if self.left() < LEAST_FOR_A_TEST_S:
            self.rows.append({"what": what, "left_out": "no time left"})
            return
        name = f"{program}.np{ranks}"
        report = self.scratch / f"{name}.xml"
        environment = {"TEST_DEVICE": self.device, "TEST_RANKS": str(ranks), "OMP_NUM_THREADS": "1",
                       "TEST_WATCHDOG_S": str(int(min(limit or 1e9, self.left())))}
        command = [self.bundle.program(program), f"--gtest_output=xml:{report}"]
        command += [f"--gtest_filter={pattern}"] if pattern else []
        began = time.monotonic()
        status, text = self.mpirun(ranks, command, name, environment, limit)
        row = {"what": what, "device": self.device, "seconds": round(time.monotonic() - began, 1)}
        try:
            totals = xml.etree.ElementTree.parse(report).getroot().attrib
            skipped = len(re.findall(r"result=\"skipped\"", report.read_text()))
            row.update(tests=int(totals["tests"]), failed=int(totals["failures"]), skipped=skipped)
        except (OSError, xml.etree.ElementTree.ParseError):
            row.update(tests=None)
        if status == 0 and row["tests"]:
            self.rows.append({**row, "right": True})
            return
        failed_tests = sorted(set(re.findall(r"\[  FAILED  \] (\w+\.\w+)", text)))
        self.failed(what, status, "\n".join(failed_tests) or text)
        self.rows[-1].update(row, failed_tests=failed_tests[:20])

    def tests(self, jobs):
        """Test programs (program, ranks, pattern, limit); several at once where there are cores to spare."""
        cores = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, min(4, cores // 4))) as pool:
            for done in [pool.submit(self.test, *job) for job in jobs]:
                done.result()

    def pretrain(self, name, steps, ranks, device, *overrides):
        """Losses of a run on the bundle's pictures, or None."""
        folder = self.scratch / name
        command = [self.bundle.program("step37"), "pretrain", "--config", str(self.bundle.folder / "tuxpaint/tuxpaint.yaml"),
                   "--progress", "plain", *run_settings(self.bundle, folder, steps), f"run.device={device}", *overrides]
        status, text = self.mpirun(ranks, command, name, {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2 // ranks))})
        if status != 0:
            self.failed(f"step37 pretrain, run.device={device}, {ranks} rank{'s' if ranks > 1 else ''}", status, text)
            return None
        return [line["loss"] for line in read_lines(folder / "metrics.jsonl")]

    def compare_losses(self, what, cpu, gpu):
        row = {"what": what, "cpu_losses": cpu, "gpu_losses": gpu}
        if cpu and gpu:
            differences = [abs(a - b) / max(1e-30, abs(a)) for a, b in zip(cpu, gpu)]
            row.update(first_differs=differences[0], first_allowed=FIRST_LOSS_ALLOWED, largest_differs=max(differences),
                       largest_allowed=LOSSES_ALLOWED)
            row["right"] = (len(cpu) == len(gpu) and differences[0] <= FIRST_LOSS_ALLOWED
                            and max(differences) <= LOSSES_ALLOWED)
        elif cpu and not self.has_gpu:
            row.update(no_gpu=True, right=len(cpu) > 1 and cpu[-1] < cpu[0])
        self.rows.append(row)


def run_settings(bundle, run_directory, steps):
    """Overrides for a short run on the bundle's pictures, all ranks sharing one model."""
    return ["parallel.tp=0", f"run.directory={run_directory}", f"data.directory={bundle.folder / 'tuxpaint/pictures'}",
            f"training.steps={steps}", "validation.interval=0", "checkpoint.interval=0", "report.pictures=0"]


def stop(process):
    """Ends a process and what it started: mpirun ends its ranks when asked to end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(timeout=KILL_AFTER_S)
            return
        except subprocess.TimeoutExpired:
            continue


def read_lines(path):
    """Objects of a file of JSON lines; none if there is no such file. A line cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                pass
    return rows


# ------------------------------------------------------------------------------------------------------------ parts


def correctness(context):
    context.check("nccl")
    bundle = context.bundle
    # The golden cases first, by themselves: bit for bit on the exact ones, 1e-5 on the others.
    golden = "Embed.EqualsTheGoldenCases"
    context.test("embed_test", 1, golden)
    cpu = context.pretrain("cpu", STEPS, 1, "cpu")
    gpu = context.pretrain("cuda", STEPS, 1, "cuda") if context.has_gpu else None
    context.compare_losses(f"{STEPS} steps of tuxpaint", cpu, gpu)
    if cpu:
        same = (context.scratch / "cpu/tokenizer.model").read_bytes() == (
            bundle.folder / "tuxpaint/tokenizer.model").read_bytes()
        context.rows.append({"what": "the run's tokenizer is the bundle's, byte for byte", "right": same})
    others = [(name, 1, f"-{golden}" if name == "embed_test" else None) for name in bundle.tests(1)]
    context.tests(others)


def trace(context):
    raw = context.scratch / "trace.json"
    context.check("trace", "--config", str(context.bundle.folder / "tuxpaint/tuxpaint.yaml"), "--trace", str(raw),
                  *run_settings(context.bundle, context.scratch / "run", TRACED_STEPS),
                  f"run.device={context.device}", ranks=1)
    if raw.exists():
        with raw.open("rb") as source, gzip.open(context.output / "trace.json.gz", "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)


def shared_gpu(context):
    share = ["run.share_gpus=true"] if context.has_gpu else []
    cpu = context.pretrain("cpu", 5, 2, "cpu")
    gpu = context.pretrain("cuda", 5, 2, "cuda", *share) if context.has_gpu else None
    context.compare_losses("5 steps of tuxpaint on two ranks" + (" that share a GPU" if context.has_gpu else ""), cpu, gpu)
    jobs = [(name, ranks) for ranks in (2, 4) for name in context.bundle.tests(ranks)]
    # On the CPU some are enough to show that Open MPI works here.
    context.tests(jobs if context.has_gpu else [job for job in jobs if job[0] in ("parallel_test", "tensor_parallel_test")])


class Part:
    def __init__(self, letter, title, run, limit_gpu, limit_cpu):
        self.letter, self.title, self.run, self.limit_gpu, self.limit_cpu = letter, title, run, limit_gpu, limit_cpu


def program(name):
    return lambda context: context.check(name)


# Limits in seconds: all together 290 on a GPU and 480 on the CPU.
PARTS = [
    Part("a", "a large product, and a copy", program("product"), 15, 20),
    Part("b", "NCCL, tests, golden cases and losses on one rank", correctness, 75, 150),
    Part("c", "vision tower, 728 x 728", program("tower"), 40, 30),
    Part("d", "layers at a rank's widths of eight, with copies beside them", program("layers"), 20, 40),
    Part("e", "attention", program("attention"), 20, 30),
    Part("f", "image insert", program("insert"), 20, 50),
    Part("g", "AdamW", program("adamw"), 15, 20),
    Part("h", "one step under the profiler", trace, 15, 40),
    Part("i", "two and four ranks on one GPU", shared_gpu, 70, 100),
]


def outcome_of(context):
    if any(error.startswith(OUT_OF_TIME) for error in context.errors):
        return OUT_OF_TIME
    if context.errors or any(row.get("right") is False for row in context.rows) or not context.rows:
        return WRONG
    if all(row.get("no_gpu") and "right" not in row for row in context.rows):
        return NO_GPU
    return RIGHT


def run_part(part, context, device_name):
    """The part's line for results.jsonl."""
    limit = part.limit_gpu if context.has_gpu else part.limit_cpu
    context.scratch = Path(tempfile.mkdtemp(prefix=f"gpu_check_{part.letter}."))
    context.log = context.output / f"log_{part.letter}.txt"
    context.log.unlink(missing_ok=True)
    context.rows, context.errors = [], []
    began = time.monotonic()
    context.deadline = began + limit
    try:
        part.run(context)
    except Exception as error:  # a part that fails in a way nobody thought of leaves the others their turn
        context.errors.append(f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(context.scratch, ignore_errors=True)
    return {"part": part.letter, "title": part.title, "outcome": outcome_of(context), "device": device_name,
            "seconds": round(time.monotonic() - began, 1), "limit_seconds": limit,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "rows": context.rows, "errors": context.errors}


# ---------------------------------------------------------------------------------------------------------- results


def text_of(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(text_of, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text_of(of_key)}" for key, of_key in value.items()) or "none"
    return "-" if value is None else str(value)


def table(lines):
    """The results as text, a row a line."""
    result = []
    for line in lines:
        if line["part"] == "machine":
            result.append("machine: " + ", ".join(f"{key} {text_of(value)}" for key, value in line["rows"][0].items()
                                                 if key != "what"))
            continue
        result.append(f"\n({line['part']}) {line['title']}: {line['outcome']}, {line['seconds']:.1f} s, {line['device']}")
        width = max((len(row["what"]) for row in line["rows"]), default=0)
        for row in line["rows"]:
            values = [f"{key} {text_of(value)}" for key, value in row.items() if key not in ("what", "right", "no_gpu")]
            verdict = {True: "right", False: "WRONG"}.get(row.get("right"), "no GPU" if row.get("no_gpu") else "")
            result.append(f"  {row['what']:<{width}}  {verdict:<6}  {'; '.join(values)}".rstrip())
        result += [f"  ! {error}" for error in line["errors"]]
    return "\n".join(result) + "\n"


def write(path, text):
    """The whole file or none of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


class Results:
    """results.jsonl and table.txt. Parts that run again take the place of their lines, others keep theirs."""

    def __init__(self, folder, kept):
        self.folder = folder
        self.lines = kept
        self.save()

    def add(self, line):
        self.lines = [other for other in self.lines if other["part"] != line["part"]] + [line]
        self.lines.sort(key=lambda other: "" if other["part"] == "machine" else other["part"])
        self.save()

    def save(self):
        write(self.folder / "results.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        write(self.folder / "table.txt", table(self.lines))


def machine_line(context):
    """What the machine is; without it nothing else can run."""
    context.scratch = Path(tempfile.mkdtemp(prefix="gpu_check."))
    context.log = context.output / "log_machine.txt"
    context.log.unlink(missing_ok=True)
    context.rows, context.errors = [], []
    context.deadline = time.monotonic() + MACHINE_LIMIT_S
    try:
        context.check("machine")
    finally:
        shutil.rmtree(context.scratch, ignore_errors=True)
    if context.errors:
        raise Failure("the programs don't run here: " + context.errors[0])
    return {"part": "machine", "rows": context.rows}


def parse(arguments, bundle):
    letters = [part.letter for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="run.sh", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs the parts of a GPU check, all of them or those that are named.",
        epilog="parts:\n" + "\n".join(f"  {part.letter}  {part.title}" for part in PARTS) +
               "\n\nWrites results.jsonl, a line after each part, table.txt, a log for each part, and trace.json.gz (part h,"
               " for a\ntrace viewer). A part that runs again replaces its line. Exit status 0 if nothing that ran was "
               "wrong.")
    parser.add_argument("parts", nargs="*", metavar="PART", help="letters of parts; none: all, on a clean sheet")
    parser.add_argument("--output", type=Path, default=bundle / "results", metavar="DIR",
                        help="folder for results (default: results beside this script)")
    chosen = parser.parse_args(arguments)
    for part in chosen.parts:
        if part not in letters:
            parser.error(f"unknown part {part}: expected some of {' '.join(letters)}")
    return chosen


def main(arguments):
    folder = Path(__file__).resolve().parent
    chosen = parse(arguments, folder)
    # Elsewhere, for the folder may be one that can't be written.
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as programs:
        try:
            with tarfile.open(folder / PROGRAMS) as archive:
                archive.extractall(programs)
        except (OSError, tarfile.TarError, lzma.LZMAError) as error:
            raise Failure(f"cannot unpack {folder / PROGRAMS} into {programs}: {error}; TMPDIR names another folder"
                          ) from error
        return run_chosen(Bundle(folder, Path(programs)), chosen)


def run_chosen(bundle, chosen):
    """The exit status."""
    libraries = Libraries(bundle.facts["torch"])
    output = chosen.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        kept = read_lines(output / "results.jsonl") if chosen.parts else []
        results = Results(output, kept)
    except OSError as error:
        raise Failure(f"cannot write results: {error}; --output names another folder") from error
    context = Context(bundle, bundle.environment(libraries), output, has_gpu=False)
    machine = machine_line(context)
    results.add({**machine, "bundle": bundle.facts.get("commit"), "torch": libraries.version})
    facts = machine["rows"][0]
    context.has_gpu = facts["device"] == "cuda"
    context.device = facts["device"]
    device_name = facts.get("gpu") or "CPU, " + facts["cpu"]
    print(f"{device_name}, LibTorch {libraries.version}" + ("" if context.has_gpu else ": no GPU, small sizes on the CPU"),
          flush=True)
    bad = []
    for part in PARTS:
        if chosen.parts and part.letter not in chosen.parts:
            continue
        line = run_part(part, context, device_name)
        results.add(line)
        if line["outcome"] in (WRONG, OUT_OF_TIME):
            bad.append(part.letter)
        print(f"({part.letter}) {part.title}: {line['outcome']}, {line['seconds']:.1f} s", flush=True)
        for error in line["errors"]:
            print(f"  {error}", flush=True)
    print(f"results: {output / 'table.txt'}" + (f"; wrong: {' '.join(bad)}" if bad else ""), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Failure as failure:
        sys.exit(f"run.sh: {failure}")
