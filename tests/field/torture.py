#!/usr/bin/env python3
"""Does to small training runs what happens to large ones: ranks are killed, stopped or told to end, checkpoints are
damaged, disks are full, data is broken. Each time the job must end soon and say why, no checkpoint may be lost, and the run
that goes on must come to the numbers of one that nothing happened to, bit for bit.

scripts/torture.sh starts it, and has examples. What happens follows from --seed, but for the moment of a signal, which is
a part of the time that an undisturbed run takes. The first failure ends it, with the command that repeats that case alone.
"""
import argparse
import contextlib
import io
import json
import os
import random
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from field import CANNOT_WRITE, CASES, INTERRUPTED, MPIEXEC, PROGRAM, ROOT, Process, curve, tensors

CONFIG = Path(__file__).with_suffix(".yaml")
STEPS, INTERVAL = 12, 3  # as in torture.yaml
HANG_S = 120  # a start that takes longer is ended, and is a failure
STALL_TIMEOUT_S = 3  # run.timeout_seconds where a rank is stopped
# The names in megatron_cpp/checkpoint/save_points.h; from FIRST_OF_RANK_0 on only rank 0 comes by.
SAVE_POINTS = re.findall(r'^ {4}"(\w+)",', (ROOT / "megatron_cpp/checkpoint/save_points.h").read_text(), re.M)
FIRST_OF_RANK_0 = SAVE_POINTS.index("files_written")


class Failure(Exception):
    pass


def require(condition, text, output=""):
    if not condition:
        raise Failure(f"{text}\n{output}" if output else text)


@dataclass(frozen=True)
class Layout:
    tp: int
    dp: int
    settings: tuple = ()

    @property
    def ranks(self):
        return self.tp * self.dp

    def words(self):
        return (f"parallel.tp={self.tp}", f"parallel.dp={self.dp}", *self.settings)

    def __str__(self):
        return f"tp {self.tp} dp {self.dp}"


LAYOUTS = (Layout(1, 1), Layout(2, 1), Layout(1, 2, ("training.distributed_optimizer=true",)), Layout(2, 2))

# ------------------------------------------------------------------------------------------------------------- data


def png(draw):
    """A picture of random size, with a few colours."""
    width, height = draw.randrange(40, 120), draw.randrange(40, 120)
    rows = b"".join(b"\0" + draw.randbytes(3) * (width // 2) + draw.randbytes(3) * (width - width // 2)
                    for _ in range(height))

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
            chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def caption(draw):
    return " ".join(draw.choice(words) for words in (("a", "the", "one"), ("red", "blue", "small", "old"),
                                                     ("duck", "boat", "tree", "house"), ("here", "there", "outside")))


def conversation(question, answer, images=()):
    messages = [{"role": "user", "content": "<image>" * len(images) + question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **({"images": images} if images else {})}


def small_talk(draw, images):
    return conversation(f"\nwhat about {caption(draw)}?", caption(draw), images)


def make_data(folder):
    """Captioned pictures of several formats, conversations with none to two pictures, and archives of both."""
    draw = random.Random("data")
    stamps = folder / "stamps"
    stamps.mkdir(parents=True)
    for i in range(6):
        (stamps / f"{i}.png").write_bytes(png(draw))
    for name in ("rgb_420.jpg", "rgb_lossy.webp"):
        shutil.copy(CASES / "images/formats" / name, stamps)
    for path in sorted(stamps.iterdir()):
        path.with_suffix(".txt").write_text(caption(draw) + "\n")
    for i in range(4):
        (folder / f"chat{i}.png").write_bytes(png(draw))
    lines = [small_talk(draw, [f"chat{(i + k) % 4}.png" for k in range(i % 3)]) for i in range(8)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "shards").mkdir()
    for shard in "ab":
        with tarfile.open(folder / f"shards/{shard}.tar", "w") as archive:
            for i in range(4):
                name, text = ((f"{i}.txt", caption(draw)) if i % 2 else
                              (f"{i}.json", json.dumps(small_talk(draw, [f"{i}.png"]))))
                for name, data in ((f"{i}.png", png(draw)), (name, text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


MIX = """  sets:
    chats: {kind: conversations, path: data/chats.jsonl, chat_template: step37, weight: 2}
    texts: {kind: conversations, path: data/texts.jsonl, chat_template: step37, weight: 1}
    stamps: {path: data/pictures, weight: 1}
"""


def make_mix(folder, pictures):
    """Samples of MIX: conversations about two captioned pictures of a folder, others without one, and the folder."""
    draw = random.Random("mix")
    (folder / "data").mkdir()
    (folder / "data/pictures").symlink_to(pictures.resolve(strict=True))
    captions = {str(path.relative_to(pictures)): path.with_suffix(".txt").read_text(errors="replace").splitlines()[0]
                for path in sorted(pictures.rglob("*.png")) if path.with_suffix(".txt").exists()}

    pairs = [draw.sample(sorted(captions), 2) for _ in range(60)]
    chats = [conversation("\nwhat is on them?", " ".join(captions[name] for name in pair),
                          [f"pictures/{name}" for name in pair]) for pair in pairs]
    texts = [conversation(f"spell backwards: {captions[a]}", captions[a][::-1]) for a, _ in pairs[:40]]
    for name, samples in (("chats", chats), ("texts", texts)):
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    config = folder / "torture.yaml"
    text, count = re.subn(r"^  sets:\n(    .*\n)+", MIX, config.read_text(), flags=re.M)
    assert count == 1
    config.write_text(text.replace("sequence_length: 128", "sequence_length: 256"))


def flip(draw, data):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 4, 64))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------- runs


class Start:
    """A start of a training run under mpirun: its output, how it ended, and what was done to it."""

    def __init__(self, torture, words):
        self.process = Process(torture, *words)
        self.marks = {}  # when the output had a text of `watched` first
        self.fault_at = None
        self.pids = []
        self.status = None

    def find_ranks(self, ranks):
        """The processes by rank; waits until all are there, or the job has ended."""
        while self.process.popen.poll() is None:
            found = {}
            for pid in self.descendants(self.process.popen.pid):
                with contextlib.suppress(OSError):
                    environment = Path(f"/proc/{pid}/environ").read_bytes()
                    rank = re.search(rb"(?:^|\0)(?:OMPI_COMM_WORLD_RANK|PMI_RANK)=(\d+)\0", environment)
                    if rank and os.readlink(f"/proc/{pid}/exe") == os.path.realpath(PROGRAM):
                        found[int(rank[1])] = pid
            if len(found) == ranks:
                self.pids = [found[rank] for rank in range(ranks)]
                return True
            time.sleep(0.005)
        return False

    @classmethod
    def descendants(cls, pid):
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    yield int(child)
                    yield from cls.descendants(int(child))

    def signal(self, rank, number):
        """False if the process had ended before."""
        try:
            os.kill(self.pids[rank], number)
        except ProcessLookupError:
            return False
        self.fault_at = time.monotonic()
        return True

    def has_died(self, rank):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        return True

    def follow(self, watched, act):
        """Reads the output to its end, while `act` runs in a thread; ends a job that hangs."""
        hang = threading.Timer(HANG_S, self.end)
        hang.start()
        actor = threading.Thread(target=act, args=(self,))
        actor.start()
        for line in self.process.popen.stdout:
            self.process.output += line
            for text in watched:
                if text in line:
                    self.marks.setdefault(text, time.monotonic())
        self.status = self.process.popen.wait()
        # mpirun may end a moment before its ranks do.
        while hang.is_alive() and not all(self.has_died(rank) for rank in range(len(self.pids))):
            time.sleep(0.005)
        self.ended = time.monotonic()
        hangs = not hang.is_alive()
        hang.cancel()
        actor.join()
        require(not hangs, f"a hang: still running after {HANG_S} s", self.output)
        return self

    def end(self):
        for pid in [*self.pids, *self.descendants(self.process.popen.pid), self.process.popen.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def output(self):
        return self.process.output

    def ended_by(self, rank, number):
        """Whether mpirun names this rank and this signal."""
        said = " ".join(self.output.split())  # Open MPI breaks the line
        return re.search(rf"process rank {rank} .* exited on signal {int(number)}", said)

    @property
    def seconds_to_end(self):
        return self.ended - self.fault_at


class Torture:
    def __init__(self, arguments):
        self.arguments = arguments
        self.folder = Path(tempfile.mkdtemp(prefix="megatron_cpp_torture."))
        self.cleanups = contextlib.ExitStack()
        shutil.copy(CONFIG, self.folder / "torture.yaml")
        if arguments.pictures:
            make_mix(self.folder, arguments.pictures)
        else:
            make_data(self.folder / "data")
        self.undisturbed = {}  # by layout: folder and seconds
        self.tried, self.longest = Counter(), {}

    def addCleanup(self, action, *arguments):
        self.cleanups.callback(action, *arguments)

    def draw_layout(self, draw, at_least=1):
        """Many ranks take long to start, and are drawn less often."""
        layouts = [layout for layout in LAYOUTS if at_least <= layout.ranks <= self.arguments.ranks]
        return draw.choices(layouts, [1 / layout.ranks for layout in layouts])[0]

    def command(self, layout, run, *settings, victim=None, variable=None, config="torture.yaml"):
        """Rank `victim` has one environment variable more."""
        words = [PROGRAM, "pretrain", "--config", config, f"run.directory={run}", *layout.words(), *settings]
        if variable is None:
            return [*MPIEXEC, layout.ranks, *words]
        parts = [(victim, words), (1, ["env", variable, *words]), (layout.ranks - victim - 1, words)]
        result = []
        for ranks, part in parts:
            if ranks > 0:
                result += [*([":", MPIEXEC[-1]] if result else MPIEXEC), ranks, *part]
        return result

    def start(self, command, watched=(), act=lambda _: None):
        self.last_command = command
        return Start(self, command).follow(watched, act)

    def end_of_undisturbed(self, layout):
        """Of a run of this layout that nothing happens to: its folder, with a checkpoint of each step, and the seconds
        that one with usual saves takes."""
        if layout not in self.undisturbed:
            run = f"undisturbed_tp{layout.tp}_dp{layout.dp}"
            start = self.start(self.command(layout, run, "checkpoint.interval=1", f"checkpoint.keep={STEPS}"))
            require(start.status == 0, "an undisturbed run failed", start.output)
            require(len(curve(self.folder / run)) == STEPS, "an undisturbed run isn't complete", start.output)
            begin = time.monotonic()
            require(self.start(self.command(layout, "run")).status == 0, "a second undisturbed run failed")
            self.undisturbed[layout] = (self.folder / run, time.monotonic() - begin)
            shutil.rmtree(self.folder / "run")
            losses = [[line["loss"] for line in curve(folder)] for folder, _ in self.undisturbed.values()]
            difference = max(abs(a / b - 1) for a, b in zip(losses[0], losses[-1]))
            require(difference < 1e-3, f"the losses of {layout} and {next(iter(self.undisturbed))} differ by {difference}")
        return self.undisturbed[layout]

    def checkpoints(self, run):
        """The steps of the checkpoints, ascending."""
        folder = self.folder / run / "checkpoints"
        return sorted(int(path.name[5:]) for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))

    def check_checkpoints(self, layout, run, output):
        """Every checkpoint that has its name is whole, and has the bytes of the undisturbed run. The newest step, or 0."""
        expected, _ = self.end_of_undisturbed(layout)
        for step in self.checkpoints(run):
            name = f"checkpoints/step-{step:08}"
            require((self.folder / run / name / "manifest.json").exists(), f"{name} has no manifest", output)
            require(tensors(self.folder / run / name) == tensors(expected / name), f"{name} has other bytes", output)
        latest = self.folder / run / "checkpoints/latest"
        require(not latest.is_symlink() or latest.exists(), "latest leads nowhere", output)
        return max(self.checkpoints(run), default=0)

    def check_finished(self, layout, run, start):
        expected, _ = self.end_of_undisturbed(layout)
        require(start.status == 0, f"the run doesn't go on: status {start.status}", start.output)
        require(curve(self.folder / run) == curve(expected), "another curve", start.output)
        require(self.check_checkpoints(layout, run, start.output) == STEPS, "the last checkpoint is missing", start.output)
        require(os.readlink(self.folder / run / "checkpoints/latest") == f"step-{STEPS:08}", "latest isn't the last one")
        left = [path.name for path in (self.folder / run / "checkpoints").iterdir() if "partial" in path.name]
        require(not left, f"{left} stay")

    def check_resumed(self, start, step):
        """It went on from the newest checkpoint."""
        said = re.search(r"resuming after step (\d+) ", start.output)
        finished = re.search(r"this run has finished: step (\d+)", start.output)
        found = int((said or finished)[1]) if said or finished else 0
        # One that ended before it came to that line has said nothing.
        require(found == step or (not found and "step 1/" not in start.output and start.status != 0),
                f"went on after step {found}, and not {step}", start.output)

    def count(self, kind, start=None, allowed=None):
        """Counts a fault; with `start`, all of whose processes must have ended in time."""
        self.tried[kind] += 1
        if start is None:
            return
        name = kind.split(":")[0]
        seconds = start.seconds_to_end
        self.longest[name] = max(self.longest.get(name, 0.0), seconds)
        require(seconds < (allowed or self.arguments.seconds), f"it took {seconds:.1f} s to end", start.output)

    # --------------------------------------------------------------------------------------------------------- kills

    def kills(self, draw, wanted, say):
        """A run that is killed up to four times; one that comes to its end before doesn't count."""
        layout, run = self.draw_layout(draw), "run"
        _, whole_seconds = self.end_of_undisturbed(layout)
        settings = [f"checkpoint.asynchronous={draw.choice(('true', 'false'))}", f"checkpoint.keep={draw.choice((1, 2))}"]
        say(f"{layout}, {' '.join(settings)}")
        newest, done = 0, 0
        for _ in range(min(draw.randint(1, 4), wanted)):
            at_point = draw.random() < 0.5
            point = draw.choice(SAVE_POINTS)
            victim = draw.randrange(layout.ranks)
            moment = draw.random()
            if at_point:
                if SAVE_POINTS.index(point) >= FIRST_OF_RANK_0:
                    victim = 0
                number = draw.randint(1, max(1, (STEPS - newest) // INTERVAL))
                command = self.command(layout, run, *settings, victim=victim,
                                       variable=f"MCPP_KILL_AT_SAVE_POINT={point}:{number}")
                kind, shown = f"kills: {point}", f"rank {victim} at {point}:{number}"
            else:
                command = self.command(layout, run, *settings)
                kind, shown = "kills: at any moment", f"rank {victim} at {moment:.3f} of the time"

            def act(start):
                if not at_point:
                    time.sleep(moment * whole_seconds)
                if not start.find_ranks(layout.ranks):
                    return
                if not at_point:
                    start.signal(victim, signal.SIGKILL)
                    return
                while not start.has_died(victim):
                    time.sleep(0.005)
                start.fault_at = time.monotonic()

            start = self.start(command, act=act)
            self.check_resumed(start, newest)
            if start.status == 0:
                say("  ended before")
                newest = self.check_checkpoints(layout, run, start.output)
                break
            if not start.ended_by(victim, signal.SIGKILL):
                # Open MPI 4 loses its last message now and then; what comes first is the run's, or mpirun's.
                is_lost = start.status == 128 + signal.SIGKILL and start.output.startswith("----")
                require(is_lost, f"{shown}: nobody names it", start.output)
                kind = "kills: before the run's first line, with status 137 and without the rank's name"
            self.count(kind, start)
            done += 1
            before, newest = newest, self.check_checkpoints(layout, run, start.output)
            # A save is over before the next step, or the next save, begins.
            metrics = self.folder / run / "metrics.jsonl"
            steps = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
            due = max(before, (steps - 1) // INTERVAL * INTERVAL - (INTERVAL if "true" in settings[0] else 0))
            require(newest >= due, f"{shown}: the checkpoint of step {due} is lost", start.output)
            say(f"  {shown}: ended within {start.seconds_to_end:.1f} s; {newest} steps are saved")
            if newest == STEPS:
                break
        start = self.start(self.command(layout, run, *settings))
        self.check_resumed(start, newest)
        self.check_finished(layout, run, start)
        return done

    # ------------------------------------------------------------------------------------------------------ sigterms

    def sigterms(self, draw, wanted, say):
        """A run whose ranks are told to end, up to three times."""
        layout, run = self.draw_layout(draw), "run"
        _, whole_seconds = self.end_of_undisturbed(layout)
        say(f"{layout}")
        newest, done, step_line = 0, 0, f"/{STEPS}  loss "
        for _ in range(min(draw.randint(1, 3), wanted)):
            victim, moment = draw.randrange(layout.ranks), draw.random()

            def act(start):
                time.sleep(moment * whole_seconds)
                if start.find_ranks(layout.ranks):
                    start.signal(victim, signal.SIGTERM)

            start = self.start(self.command(layout, run), [step_line], act)
            self.check_resumed(start, newest)
            newest = self.check_checkpoints(layout, run, start.output)
            if start.status == 0:
                say("  ended before")
                break
            if start.status == INTERRUPTED:
                stopped = re.findall(r"stopped by SIGTERM after step (\d+) of \d+, which is saved", start.output)
                require(stopped == [str(newest)], "it doesn't say once after which step it stopped", start.output)
                kind = "sigterms: saved"
            else:  # before its first step, and when all are saved, it ends at once
                require(start.ended_by(victim, signal.SIGTERM), f"status {start.status}", start.output)
                step = start.marks.get(step_line)
                is_early = step is None or step > start.fault_at
                require(is_early or newest == STEPS, "what was done isn't saved", start.output)
                kind = f"sigterms: {'before the first step' if is_early else 'after the last step'}"
            self.count(kind, start)
            done += 1
            say(f"  rank {victim}: status {start.status} within {start.seconds_to_end:.1f} s; {newest} steps are saved")
        start = self.start(self.command(layout, run))
        self.check_resumed(start, newest)
        self.check_finished(layout, run, start)
        return done

    # --------------------------------------------------------------------------------------------------------- stops

    def stops(self, draw, _wanted, say):
        """A rank that is stopped while it trains, saves or writes the report: the job ends. One that is stopped later, when
        all work is done, is waited for by MPI and mpirun; that doesn't count."""
        layout, run = self.draw_layout(draw, at_least=2), "run"
        _, whole_seconds = self.end_of_undisturbed(layout)
        victim, moment = draw.randrange(layout.ranks), draw.random()
        command = self.command(layout, run, f"run.timeout_seconds={STALL_TIMEOUT_S}")
        first, last = "parameters on ", "The report is "
        allowed = STALL_TIMEOUT_S + self.arguments.seconds

        def act(start):
            while first not in start.marks and start.process.popen.poll() is None:
                time.sleep(0.005)
            if start.find_ranks(layout.ranks):
                time.sleep(moment * whole_seconds / 2)
                start.signal(victim, signal.SIGSTOP)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    start.process.popen.wait(timeout=allowed)
                if last in start.marks:
                    start.signal(victim, signal.SIGCONT)

        start = self.start(command, [first, last], act)
        if start.status == 0:
            say(f"{layout}: ended before")
            self.check_finished(layout, run, start)
            return 0
        reports = start.output.count("What every rank is doing:\n")
        named = re.search(rf"^  rank {victim}: silent \(stopped\)$", start.output, re.M)
        require(reports == 1 and named, f"not one report that has rank {victim} as stopped", start.output)
        self.count("stops", start, allowed)
        say(f"{layout}: rank {victim} at {moment:.3f}: ended within {start.seconds_to_end:.1f} s")
        newest = self.check_checkpoints(layout, run, start.output)
        start = self.start(self.command(layout, run))
        self.check_resumed(start, newest)
        self.check_finished(layout, run, start)
        return 1

    # ---------------------------------------------------------------------------------------------- damaged checkpoints

    DAMAGES = ("cut", "bits flipped", "zeros", "longer", "missing", "of another step")

    @staticmethod
    def damage(draw, file, other):
        """Changes `file` in one of DAMAGES, the last of which takes the file `other`. Which one."""
        kind = draw.choice(Torture.DAMAGES)
        data = file.read_bytes()
        begin = draw.randrange(len(data))
        if kind == "zeros" and not any(data[begin:begin + 4096]):
            kind = "cut"
        file.unlink()
        if kind == "cut":
            file.write_bytes(data[:begin])
        elif kind == "bits flipped":
            file.write_bytes(flip(draw, data))
        elif kind == "zeros":
            file.write_bytes(data[:begin] + bytes(len(data[begin:begin + 4096])) + data[begin + 4096:])
        elif kind == "longer":
            file.write_bytes(data + draw.randbytes(draw.choice((1, 512))))
        elif kind == "of another step":
            shutil.copy(other, file)
        return kind

    def damaged(self, draw, wanted, say):
        """The newest checkpoints, up to four, are damaged: refused by name, and passed over when asked."""
        layout, run = self.draw_layout(draw), "run"
        expected, _ = self.end_of_undisturbed(layout)
        folder = self.folder / run / "checkpoints"
        newest = draw.randrange(STEPS // 2, STEPS)
        whole = newest - min(draw.randint(1, 4), wanted)
        others = [f"step-{step:08}" for step in range(STEPS + 1) if not whole <= step <= newest]
        shutil.copytree(expected, self.folder / run, symlinks=True, ignore=shutil.ignore_patterns("latest", *others))
        (folder / "latest").symlink_to(f"step-{newest:08}")
        names = []
        for step in range(newest, whole, -1):
            file = draw.choice(sorted((folder / f"step-{step:08}").iterdir()))
            kind = self.damage(draw, file, folder / f"step-{whole:08}" / file.name)
            # A checkpoint without its manifest is none; with another one, its other files are what differs.
            has_name = file.name != "manifest.json" or kind not in ("missing", "of another step")
            names.append(f"step-{step:08}/{file.name}" if has_name else f"step-{step:08}")
            self.count(f"damaged: {kind}")
            say(f"{layout}: {kind}: step-{step:08}/{file.name}")
        before = {path: path.stat().st_mtime_ns for path in sorted((self.folder / run).rglob("*"))}
        for name in names:
            start = self.start([PROGRAM, "check", "--checkpoint", folder / name.split("/")[0]])
            is_named = start.status == 1 and re.search(f"error: .*{name}", start.output)
            require(is_named, f"{name}: check doesn't name it", start.output)
        start = self.start(self.command(layout, run))
        require(start.status == 1, f"damaged ones are taken: status {start.status}", start.output)
        require(re.search(f"error: .*{names[0]}", start.output), f"{names[0]}: pretrain doesn't name it", start.output)
        after = {path: path.stat().st_mtime_ns for path in sorted((self.folder / run).rglob("*"))}
        require(after == before, "something was changed")
        start = self.start(self.command(layout, run, "checkpoint.pass_over_damaged=true", "checkpoint.interval=1"))
        self.check_resumed(start, whole)
        for name in names:
            require(re.search(f"passing over .*{name}", start.output), f"{name}: no warning", start.output)
        self.check_finished(layout, run, start)
        return len(names)

    # --------------------------------------------------------------------------------------------------- full disks

    def full_disks(self, draw, _wanted, say):
        """A run on a disk that has room for a part of it."""
        layout, run = self.draw_layout(draw), "run"
        expected, _ = self.end_of_undisturbed(layout)
        whole = int(sum(path.stat().st_size for path in expected.rglob("*.*") if path.is_file()) / INTERVAL)
        size = draw.randrange(16 << 10, whole)
        (self.folder / run).mkdir()
        disk = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder / run)]
        if subprocess.run(disk, capture_output=True).returncode != 0:
            print("full disks are left out: no file system can be mounted here")
            return None
        self.addCleanup(subprocess.run, ["umount", "-l", self.folder / run])
        make_room = ["mount", "-o", "remount,size=256m", str(self.folder / run)]
        on_error, freed = draw.choice((("stop", False), ("continue", False), ("continue", True)))
        settings = ["checkpoint.keep=9", f"checkpoint.asynchronous={draw.choice(('true', 'false'))}"]
        kind = f"full disks: {on_error}{', room later' if freed else ''}"
        goes_on = "; training goes on"

        def act(start):
            while freed and goes_on not in start.marks and start.process.popen.poll() is None:
                time.sleep(0.005)
            if freed:
                subprocess.run(make_room, check=True)

        start = self.start(self.command(layout, run, *settings, f"checkpoint.on_error={on_error}"), [goes_on], act)
        said = f"{layout}, {' '.join(settings)}: {size} of {whole} bytes, {on_error}{', room later' if freed else ''}"
        allowed = (CANNOT_WRITE, 0) if freed else (CANNOT_WRITE,)
        require(start.status in allowed, f"{said}: status {start.status}", start.output)
        if start.status != 0:
            require(re.search("error: .*No space left on device", start.output), f"{said}: nobody says why", start.output)
        newest = self.check_checkpoints(layout, run, start.output)
        left = [path.name for path in (self.folder / run / "checkpoints").glob("*.partial")]
        require(not left, f"{said}: {left} stay", start.output)
        subprocess.run(make_room, check=True)
        again = self.start(self.command(layout, run, *settings))
        self.check_resumed(again, newest)
        self.check_finished(layout, run, again)
        self.count(kind)
        say(f"{said}: status {start.status}, {newest} steps were saved")
        return 1

    # --------------------------------------------------------------------------------------------------- broken data

    def broken_data(self, draw, _wanted, say):
        """A picture, an archive or a line is broken: trained on with a warning, or refused, with its name."""
        layout, run = self.draw_layout(draw), "run"
        (self.folder / run).mkdir()
        data = self.folder / run / "data"
        shutil.copytree(self.folder / "data", data)
        (self.folder / run / "torture.yaml").write_text(CONFIG.read_text().replace("data/", f"{run}/data/"))
        thing = draw.choice(("picture", "picture in a conversation", "line", "archive"))
        kind = draw.choice(("cut", "garbage", "bits flipped"))
        if thing == "line":
            file = data / "chats.jsonl"
            lines = file.read_bytes().splitlines()
            number = draw.randrange(len(lines))
            lines[number] = self.broken(draw, kind, lines[number]).replace(b"\n", b" ")
            file.write_bytes(b"".join(line + b"\n" for line in lines))
            name = f"chats.jsonl line {number + 1}"
        else:
            folder = {"picture": data / "stamps", "picture in a conversation": data, "archive": data / "shards"}[thing]
            files = [path for path in folder.iterdir() if path.suffix in (".png", ".jpg", ".webp", ".tar")]
            file = draw.choice(sorted(files))
            # Behind its members an archive has zeros only.
            size = len(file.read_bytes().rstrip(b"\0")) if thing == "archive" else None
            file.write_bytes(self.broken(draw, kind, file.read_bytes()[:size]))
            name = file.name
        steps = 4
        start = self.start(self.command(layout, run, f"training.steps={steps}", "checkpoint.interval=0",
                                        config=f"{run}/torture.yaml"))
        said = f"{layout}: {thing}, {kind}: {name}"
        require(start.status in (0, 1), f"{said}: status {start.status}", start.output)
        # A changed bit may be one of a colour or a letter.
        if kind != "bits flipped" or start.status != 0:
            require(name in start.output, f"{said}: isn't named", start.output)
        if start.status == 0:
            losses = [line["loss"] for line in curve(self.folder / run)]
            require(len(losses) == steps and None not in losses, f"{said}: losses {losses}", start.output)
        else:
            require("error: " in start.output, f"{said}: no error", start.output)
        self.count(f"broken data: {thing}, {kind}")
        say(f"{said}: {'named, ' if name in start.output else ''}{'refused' if start.status else 'trained on'}")
        return 1

    @staticmethod
    def broken(draw, kind, data):
        if kind == "cut":
            return data[:draw.randrange(len(data) // 5, len(data) * 4 // 5)]
        return draw.randbytes(len(data)) if kind == "garbage" else flip(draw, data)

    # ------------------------------------------------------------------------------------------------------ all of it

    KINDS = ("kills", "sigterms", "stops", "damaged", "full_disks", "broken_data")

    def one(self, kind, number, wanted):
        """Case `number` of `kind`. How many faults it had; None: they can't be had here."""
        draw = random.Random(f"{self.arguments.seed} {kind} {number}")
        for attempt in self.folder.glob("run"):
            shutil.rmtree(attempt)
        lines = []

        def say(text):
            lines.append(text)
            print(f"{kind}:{number} {text}", flush=True)

        try:
            done = getattr(self, kind)(draw, wanted, say)
        except Failure as failure:
            words = " ".join(str(word) for word in self.last_command)
            option = f"--ranks {self.arguments.ranks} --seconds {self.arguments.seconds}"
            if self.arguments.pictures:
                option += f" --pictures {self.arguments.pictures}"
            sys.exit(f"FAILED {kind}:{number}: {failure}\nthe last command, in {self.folder}, which stays:\n  {words}\n"
                     f"repeat it with\n  scripts/torture.sh --seed {self.arguments.seed} {option} --only {kind}:{number}")
        finally:
            self.cleanups.close()
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        return done

    def all(self):
        print(f"--seed {self.arguments.seed}", flush=True)
        if self.arguments.only:
            kind, _, number = self.arguments.only.partition(":")
            self.one(kind, int(number), 1000)
        else:
            for kind in self.KINDS:
                number, left = 0, getattr(self.arguments, kind)
                while left > 0:
                    done = self.one(kind, number, left)
                    if done is None:
                        break
                    number, left = number + 1, left - done
        shutil.rmtree(self.folder)
        print("survived:")
        for kind, tried in sorted(self.tried.items()):
            print(f"{tried:6}  {kind}")
        for name, seconds in self.longest.items():
            print(f"{name}: all jobs ended within {seconds:.1f} s")


def main():
    parser = argparse.ArgumentParser(prog="scripts/torture.sh", description=__doc__.splitlines()[0])
    defaults = {"kills": 4, "sigterms": 1, "stops": 1, "damaged": 3, "full_disks": 1, "broken_data": 3}
    for kind in Torture.KINDS:
        option = f"--{kind.replace('_', '-')}"
        parser.add_argument(option, type=int, default=defaults[kind], metavar="N", help=f"(default: {defaults[kind]})")
    parser.add_argument("--pictures", type=Path, metavar="DIR",
                        help="train on a mix of this folder of captioned PNG files and conversations about them")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=4, help="the most ranks of a run (default: 4)")
    parser.add_argument("--seconds", type=float, default=10.0, help="in which a job must end after a fault (default: 10)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="what is drawn (default: at random)")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="this case alone, such as kills:3")
    arguments = parser.parse_args()
    if arguments.pictures:
        arguments.broken_data = 0  # it knows the files of make_data
    Torture(arguments).all()


if __name__ == "__main__":
    main()
