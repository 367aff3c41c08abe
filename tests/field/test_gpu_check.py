"""scripts/gpu_check.sh and the runner of its parts, with stand-ins for LibTorch, the programs and the build."""
import json
import os
import shutil
import tarfile
import unittest
from pathlib import Path

from field import ROOT, FieldTest

# What a part's program does in place of gpu_check: rows, and an end.
GPU_CHECK = """#!/usr/bin/env bash
name=$1 rows=$3
row() { echo "$1" >>"$rows"; }
case $name in
  machine) row '{"what": "machine", "device": "cpu", "cpu": "stand-in"}' ;;
  product) row '{"what": "product", "ms": 1.5, "GB/s": 1e300}' ;;
  tower) row '{"what": "tower", "right": false}'; exit 1 ;;
  attention) row '{"what": "attention", "no_gpu": true}' ;;
  insert) row '{"what": "insert"}'; echo "cudaErrorOfSomeKind" >&2; exit 2 ;;
  adamw) row '{"what": "adamw", "ms": 2}'; sleep 600 ;;
esac
"""


# A machine with a GPU, in whose bundle one test fails on it.
MPIRUN = """#!/usr/bin/env bash
while [[ $1 == -* || $1 == none || $1 =~ ^[0-9]+$ ]]; do shift; done
exec "$@"
"""
STEP37 = """#!/usr/bin/env bash
for word in "$@"; do case $word in run.directory=*) folder=${word#*=} ;; run.device=cuda) last=2.02 ;; esac; done
mkdir -p "$folder" && echo pieces >"$folder/tokenizer.model"
printf '{"loss": 3.0}\\n{"loss": %s}\\n' "${last:-2.0}" >"$folder/metrics.jsonl"
"""
TEST = """#!/usr/bin/env bash
for word in "$@"; do case $word in --gtest_output=xml:*) report=${word#*:} ;; esac; done
[[ $TEST_DEVICE != cuda || $TEST_RANKS != 4 ]] || { echo "[  FAILED  ] Layer.IsRight"; exit 1; }
echo '<testsuites tests="7" failures="0"/>' >"$report"
"""


class Run(FieldTest):
    def setUp(self):
        super().setUp()
        self.bundle = self.folder / "bundle"
        self.bundle.mkdir()
        for name in ("run.sh", "run_parts.py"):
            shutil.copy(ROOT / "benchmarks/gpu_check" / name, self.bundle / name)
        self.pack(GPU_CHECK)
        (self.bundle / "bundle.json").write_text(json.dumps({"torch": "2.11.0", "commit": "abc", "tests": []}))
        self.install_torch("2.11.0+cu130")

    def pack(self, program, **others):
        """`program` as the bundle's gpu_check, and others of its programs."""
        folder = self.folder / "programs"
        for path, text in {"bin/gpu_check": program, **others}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
            (folder / path).chmod(0o755)
        with tarfile.open(self.bundle / "programs.tar.xz", "w:xz") as archive:
            archive.add(folder, ".")

    def install_torch(self, version):
        """A package that must be found without being imported."""
        torch = self.folder / "packages/torch"
        torch.mkdir(parents=True, exist_ok=True)
        (torch / "__init__.py").write_text("raise RuntimeError('imported')\n")
        (torch / "version.py").write_text(f"__version__ = '{version}'\n")

    def start(self, *words, **options):
        return self.command(ROOT / "scripts/gpu_check.sh", "run", self.bundle, *words,
                            environment={"PYTHONPATH": str(self.folder / "packages")}, **options)

    def lines(self, folder="bundle/results"):
        text = (self.folder / folder / "results.jsonl").read_text()
        return {line["part"]: line for line in map(json.loads, text.splitlines())}

    def test_each_part_leaves_a_line_and_a_repaired_one_replaces_its_own(self):
        outcome = self.start("a", "c", "e", "f")
        self.assertEqual(outcome.returncode, 1, outcome.stdout)
        lines = self.lines()
        self.assertEqual({part: line.get("outcome") for part, line in lines.items()},
                         {"machine": None, "a": "right", "c": "wrong", "e": "no GPU", "f": "wrong"})
        self.assertIn("cudaErrorOfSomeKind", lines["f"]["errors"][0])
        self.assertEqual(lines["f"]["rows"][0], {"what": "insert"})  # what it had before it failed
        self.assertIn("cudaErrorOfSomeKind", (self.bundle / "results/log_f.txt").read_text())
        table = (self.bundle / "results/table.txt").read_text()
        self.assertIn("(c) vision tower, 728 x 728: wrong", table)
        self.assertIn("tower  WRONG", table)

        self.pack(GPU_CHECK.replace("false}'; exit 1", "true}'"))
        outcome = self.start("c")
        self.assertSucceeds(outcome)
        lines = self.lines()
        self.assertEqual(sorted(lines), ["a", "c", "e", "f", "machine"])
        self.assertEqual(lines["c"]["outcome"], "right")

    def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(self):
        runner = self.bundle / "run_parts.py"
        text = runner.read_text()
        limit = 'Part("g", "AdamW", program("adamw"), 15, 20)'
        self.assertIn(limit, text)
        runner.write_text(text.replace(limit, limit.replace("15, 20", "1, 1")))
        outcome = self.start("g", "a", "--output", "elsewhere")
        self.assertEqual(outcome.returncode, 1, outcome.stdout)
        lines = self.lines("elsewhere")
        self.assertEqual(lines["g"]["outcome"], "out of time")
        self.assertEqual(lines["g"]["rows"][0]["ms"], 2)
        self.assertNotIn("results", os.listdir(self.bundle))

    def test_with_a_gpu_losses_and_tests_are_judged(self):
        program = GPU_CHECK.replace('"device": "cpu"', '"device": "cuda", "gpu": "H100"').replace(
            "  machine)", '  nccl) row \'{"what": "NCCL barrier", "right": true}\' ;;\n  machine)')
        self.pack(program, **{"mpi/bin/mpirun": MPIRUN, "bin/step37": STEP37, "bin/embed_test": TEST, "bin/a_test": TEST})
        tests = [{"program": name, "ranks": ranks} for ranks in (1, 2, 4) for name in ("embed_test", "a_test")]
        (self.bundle / "bundle.json").write_text(json.dumps({"torch": "2.11.0", "commit": "abc", "tests": tests}))
        (self.bundle / "tuxpaint").mkdir()
        (self.bundle / "tuxpaint/tokenizer.model").write_text("pieces\n")
        outcome = self.start("b", "i")
        self.assertEqual(outcome.returncode, 1, outcome.stdout)
        lines = self.lines()
        self.assertEqual((lines["b"]["outcome"], lines["i"]["outcome"]), ("right", "wrong"), outcome.stdout)
        self.assertEqual(lines["b"]["device"], "H100")
        losses = next(row for row in lines["b"]["rows"] if "cpu_losses" in row)
        self.assertEqual((losses["cpu_losses"], losses["gpu_losses"]), ([3.0, 2.0], [3.0, 2.02]))
        self.assertAlmostEqual(losses["largest_differs"], 0.01)
        failed = [row for row in lines["i"]["rows"] if row.get("right") is False]
        self.assertEqual([row["failed_tests"] for row in failed], [["Layer.IsRight"]] * 2)
        # A first loss that is another one is a fault.
        self.pack(program, **{"bin/step37": STEP37.replace("3.0", "${last:-3.0}")})
        self.assertEqual(self.start("b").returncode, 1)
        self.assertEqual(self.lines()["b"]["outcome"], "wrong")

    def test_what_is_asked_wrongly(self):
        self.assertFails(self.start("z"), "unknown part z: expected some of a b c d e f g h i")
        self.assertFails(self.start("--colour"), "unrecognized arguments: --colour")
        self.install_torch("2.15.0")
        self.assertFails(self.start("a"), "this bundle was built with LibTorch 2.11.0")
        shutil.rmtree(self.folder / "packages/torch")
        self.assertFails(self.start("a"), "has no torch: the programs need its LibTorch 2.11.0")
        self.assertSucceeds(self.start("--help"))

    def test_programs_that_do_not_start_stop_the_check(self):
        self.pack("#!/bin/sh\necho 'libx.so: cannot open' >&2\nexit 127\n")
        self.assertFails(self.start("a"), "the programs don't run here: ", "libx.so: cannot open")
        (self.bundle / "programs.tar.xz").write_bytes(b"cut short")
        self.assertFails(self.start("a"), "cannot unpack ", "; TMPDIR names another folder")


class Script(FieldTest):
    """build, in a folder that looks like a clone."""

    def setUp(self):
        super().setUp()
        self.clone = self.folder / "clone"
        (self.clone / "scripts").mkdir(parents=True)
        (self.clone / "benchmarks/gpu_check").mkdir(parents=True)
        for name in ("gpu_check.sh", "common.sh"):
            shutil.copy(ROOT / "scripts" / name, self.clone / "scripts" / name)
        for name in ("build.sh", "fetch_tuxpaint.sh"):
            (self.clone / "scripts" / name).write_text(f"#!/bin/sh\necho {name} \"$@\" Torch_ROOT=$Torch_ROOT\n")
            (self.clone / "scripts" / name).chmod(0o755)
        (self.clone / "benchmarks/gpu_check/bundle.py").write_text("import sys\nprint('bundle', *sys.argv[1:])\n")
        # Everything is installed, and LibTorch is there.
        tools = self.folder / "tools"
        tools.mkdir()
        (tools / "dpkg-query").write_text("#!/bin/sh\nprintf installed\n")
        (tools / "dpkg-query").chmod(0o755)
        environment = self.folder / "cache/megatron_cpp/torch-2.11.0-1"
        (environment / "lib/python3.11/site-packages/torch").mkdir(parents=True)
        (environment / "complete").touch()
        self.environment = {"PATH": f"{tools}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(self.folder / "cache")}

    def start(self, *words):
        return self.command(self.clone / "scripts/gpu_check.sh", *words, environment=self.environment)

    def test_the_last_line_names_the_folder(self):
        if "bookworm" not in Path("/etc/os-release").read_text():
            self.skipTest("build wants Debian 12")
        for words, folder in ((["build"], "clone/build-gpu/bundle"), (["build", "my/bundle"], "my/bundle")):
            outcome = self.start(*words)
            self.assertSucceeds(outcome)
            self.assertEqual(outcome.stdout.splitlines()[-1], f"GPU check: {folder}")
            self.assertIn(f"--folder {folder}", outcome.stdout)
            self.assertIn("build.sh --preset gpu --target gpu_check_programs", outcome.stdout)
            self.assertIn("torch-2.11.0-1/lib/python3.11/site-packages/torch", outcome.stdout)

    def test_what_is_asked_wrongly(self):
        self.assertFails(self.start(), "build or run? (see --help)")
        self.assertFails(self.start("bild"), "unknown command bild: expected build or run (see --help)")
        self.assertFails(self.start("build", "a b"), "'a b': the folder's path must have no blanks")
        self.assertFails(self.start("build", "--fast"), "unknown option --fast (see --help)")
        self.assertFails(self.start("build", "a", "b"), "build takes one folder, not also b (see --help)")
        self.assertFails(self.start("run"), "run needs the folder that build made (see --help)")
        self.assertFails(self.start("run", "clone"), "clone is no folder that build made: it has no run.sh")
        self.assertSucceeds(self.start("--help"))


if __name__ == "__main__":
    unittest.main()
