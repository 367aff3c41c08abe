"""What the field tests share: a folder of one's own, pictures, a small configuration, and the program as users start it.

Each test_*.py here holds situations of one kind that users' machines, files and habits have made. ctest runs them
(tests/field/CMakeLists.txt); one by hand, from the clone's root:

    MCPP_PROGRAM=$PWD/build/bin/step37 python3 -B -m unittest discover -s tests/field -p 'test_files.py' -k link
"""
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(os.environ.get("MCPP_TEST_CASES", ROOT / "tests/cases"))
PROGRAM = os.environ.get("MCPP_PROGRAM", str(ROOT / "build/bin/step37"))
MPIEXEC = shlex.split(os.environ.get("MCPP_MPIEXEC", "mpirun --oversubscribe --bind-to none -np"))
# One thread a rank; and hwloc, which MPI asks for the machine, complains where a container has no /sys.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HWLOC_HIDE_ERRORS": "2"}
# Exit statuses (docs/training.md).
NOT_FINITE, SUSPECTED_HOST, CANNOT_WRITE, INTERRUPTED = 65, 71, 74, 75
# What the clock and the machine say in metrics.jsonl: all else is the same in a run that was interrupted.
OF_THE_CLOCK = {"step_seconds", "tokens_per_second", "data_seconds", "tflops_per_rank", "peak_share",
                "peak_memory_bytes"}
EMBED_CASE = CASES / "embed/34_template_small.safetensors"

TINY = """\
run: {device: cpu, timeout_seconds: 60}
parallel: {tp: 0}
data: {directory: p, held_out: 0.0, vocabulary_size: 300}
model: {hidden_size: 32, num_layers: 2, head_dim: 8, num_attention_heads: 4, num_sliding_attention_heads: 4, \
num_query_groups: 4, ffn_hidden_size: 64, sliding_window: 16, full_attention_interval: 2}
vision: {image_size: 56, width: 16, layers: 1, heads: 2, mlp_width: 32}
training: {steps: 3, global_batch_size: 2, sequence_length: 128, learning_rate: 1e-3, warmup_steps: 1}
checkpoint: {interval: 1}
report: {pictures: 2, max_new_tokens: 4}
"""
CAPTIONS = {"a": "a red duck", "b": "a blue boat", "c": "a green tree", "d": "a small house"}


def curve(run):
    """The lines of a run's metrics without OF_THE_CLOCK."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in OF_THE_CLOCK} for line in lines]


def tensors(checkpoint):
    """The bytes of a checkpoint's files with tensors, by name."""
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


class FieldTest(unittest.TestCase):
    """Each test has an empty folder of its own, self.folder, in which commands are run."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="megatron_cpp_field."))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        (self.folder / "tiny.yaml").write_text(TINY)

    def add_pictures(self, names="abcd", folder="p"):
        """Pictures a.png to d.png with captions."""
        (self.folder / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(CASES / "images/300x200.png", self.folder / folder / f"{name}.png")
            (self.folder / folder / f"{name}.txt").write_text(CAPTIONS[name] + "\n")

    def command(self, *words, environment=None, timeout=120, text=True, **options):
        """Runs a command; its stdout and stderr together are .stdout."""
        return subprocess.run([str(word) for word in words], cwd=options.pop("cwd", self.folder), timeout=timeout,
                              env={**os.environ, **ENVIRONMENT, **(environment or {})}, text=text,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    def mpirun(self, ranks, *words, preload=None, **options):
        exports = ["-x", f"LD_PRELOAD={preload}"] if preload else []
        return self.command(*MPIEXEC, str(ranks), *exports, *words, **options)

    def step37(self, *words, **options):
        """The program alone, on one rank."""
        return self.command(PROGRAM, *words, **options)

    def pretrain(self, *settings, ranks=2, **options):
        return self.mpirun(ranks, PROGRAM, "pretrain", "--config", "tiny.yaml", *settings, **options)

    def embed(self, output, *words, ranks=1, **options):
        return self.mpirun(ranks, PROGRAM, "embed", "--input", EMBED_CASE, "--output", output, *words, **options)

    def shim(self, source):
        """A library of these lines of C, to put before the C library's functions (preload=)."""
        library = self.folder / "shim.so"
        (self.folder / "shim.c").write_text(source)
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, self.folder / "shim.c", "-ldl"], check=True)
        return library

    def assertSucceeds(self, outcome):
        self.assertEqual(outcome.returncode, 0, outcome.stdout)

    def assertFails(self, outcome, *texts):
        """It fails, and says each of `texts` once."""
        self.assertNotEqual(outcome.returncode, 0, outcome.stdout)
        for text in texts:
            self.assertEqual(outcome.stdout.count(text), 1, f"{text!r} in:\n{outcome.stdout}")


class Process:
    """A command whose output is read while it runs. A test waits for a line of it, and never for a time."""

    def __init__(self, test, *words, environment=None, **options):
        self.output = ""
        self.popen = subprocess.Popen([str(word) for word in words], cwd=test.folder, text=True, stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      env={**os.environ, **ENVIRONMENT, **(environment or {})}, **options)
        test.addCleanup(self.popen.stdout.close)
        test.addCleanup(self.popen.kill)

    def wait_for(self, text):
        for line in self.popen.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    def finish(self):
        self.output += self.popen.stdout.read()
        return self.popen.wait(timeout=120)

    def children(self):
        pid = self.popen.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
