"""File systems: what isn't a regular file, folders that can't be flushed, copied and missing links, names."""
import json
import os
import shlex
import shutil
import stat
import struct
import subprocess
import unittest

from field import CASES, EMBED_CASE, ENVIRONMENT, PROGRAM, FieldTest, Process

NO_LINKS = """
#include <errno.h>
int symlink(const char* a, const char* b) { errno = EPERM; return -1; }
int symlinkat(const char* a, int f, const char* b) { errno = EPERM; return -1; }
"""
NO_FOLDER_FLUSH = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
int fsync(int file) {
  struct stat s;
  if (fstat(file, &s) == 0 && S_ISDIR(s.st_mode)) { errno = atoi(getenv("FLUSH_ERRNO")); return -1; }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""
NO_REPLACING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <unistd.h>
int rename(const char* a, const char* b) {
  if (access(b, F_OK) == 0) { errno = EEXIST; return -1; }
  return ((int (*)(const char*, const char*))dlsym(RTLD_NEXT, "rename"))(a, b);
}
"""
FULL_METRICS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
ssize_t write(int file, const void* data, size_t bytes) {
  char link[64], name[4096] = "";
  snprintf(link, sizeof(link), "/proc/self/fd/%d", file);
  readlink(link, name, sizeof(name) - 1);
  if (strstr(name, "metrics.jsonl") && !strstr(name, ".partial")) { errno = ENOSPC; return -1; }
  return ((ssize_t (*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write"))(file, data, bytes);
}
"""


class Outputs(FieldTest):
    """What `embed` writes; write_file and write_safetensors are what every writer uses."""

    def embed(self, output, *words, **options):
        return self.step37("embed", "--input", EMBED_CASE, "--output", output, *words, **options)

    def expected(self):
        self.assertSucceeds(self.embed("expected.safetensors"))
        return (self.folder / "expected.safetensors").read_bytes()

    def read_in_background(self, pipe):
        os.mkfifo(self.folder / pipe)
        with open(self.folder / f"{pipe}.read", "wb") as out:
            reader = subprocess.Popen(["cat", self.folder / pipe], stdout=out)
        self.addCleanup(reader.kill)
        return reader

    def test_pipes_and_devices_are_written_into(self):
        expected = self.expected()
        readers = [self.read_in_background("pipe"), self.read_in_background("stats")]
        self.assertSucceeds(self.embed("pipe", "--stats", "stats"))
        for reader in readers:
            self.assertEqual(reader.wait(timeout=30), 0)
        self.assertEqual((self.folder / "pipe.read").read_bytes(), expected)
        self.assertIn("forward", json.loads((self.folder / "stats.read").read_text()))
        self.assertTrue(stat.S_ISFIFO((self.folder / "pipe").stat().st_mode))
        if os.geteuid() == 0:
            os.mknod(self.folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            os.mknod(self.folder / "full", 0o666 | stat.S_IFCHR, os.makedev(1, 7))
            try:
                (self.folder / "null").write_bytes(b"")
            except PermissionError:
                return  # a file system without devices
            self.assertSucceeds(self.embed("null", "--stats", "null"))
            self.assertFails(self.embed("full"), "cannot write full: No space left on device")
            for name in ("null", "full"):
                self.assertTrue(stat.S_ISCHR((self.folder / name).stat().st_mode))

    def test_what_cannot_be_written_is_refused(self):
        os.mkfifo(self.folder / "pipe")
        self.assertFails(self.embed("pipe"), "cannot write pipe: it is a pipe that nobody reads")
        (self.folder / "folder").mkdir()
        self.assertFails(self.embed("folder"), "cannot write folder: it is a folder")
        self.assertFails(self.embed("~/o.st"), "--output ~/o.st starts with ~, which isn't expanded here")
        self.assertEqual(list(self.folder.glob("*.partial")), [])

    def test_of_links_the_target_changes(self):
        expected = self.expected()
        (self.folder / "there").mkdir()
        (self.folder / "there/old").write_text("old")
        (self.folder / "there/old").chmod(0o640)
        os.symlink("there/old", self.folder / "o1")
        os.symlink("o1", self.folder / "o2")
        os.symlink("there/new", self.folder / "o3")
        for link, target in (("o2", "old"), ("o3", "new")):
            self.assertSucceeds(self.embed(link))
            self.assertTrue((self.folder / link).is_symlink())
            self.assertEqual((self.folder / "there" / target).read_bytes(), expected)
        self.assertEqual((self.folder / "there/old").stat().st_mode & 0o777, 0o640)
        self.assertEqual({p.name for p in (self.folder / "there").iterdir()}, {"old", "new"})
        os.symlink("nowhere/o", self.folder / "o4")
        self.assertFails(self.embed("o4"), "cannot write o4 (a link to nowhere/o): No such file or directory")

    def test_writers_of_one_name_leave_each_other_alone(self):
        expected = self.expected()
        for _ in range(3):
            writers = [subprocess.Popen([PROGRAM, "embed", "--input", EMBED_CASE, "--output", "o.st"], cwd=self.folder,
                                        env={**os.environ, **ENVIRONMENT}, stderr=subprocess.PIPE, text=True)
                       for _ in range(3)]
            for writer in writers:
                self.assertEqual((writer.communicate(timeout=60)[1], writer.returncode), ("", 0))
            self.assertEqual((self.folder / "o.st").read_bytes(), expected)
        self.assertEqual(list(self.folder.glob("*.partial")), [])

    def test_names_of_every_kind(self):
        expected = self.expected()
        for name in ("a b $1 'c'", "line\nbreak", "-o.st", "n" * 255, "schön %s %n"):
            self.assertSucceeds(self.embed(f"./{name}"))
            self.assertEqual((self.folder / name).read_bytes(), expected)

    def test_file_systems_that_lack_something(self):
        expected = self.expected()
        shim = self.shim(NO_FOLDER_FLUSH)
        for reason in ("22", "95", "38", "9"):  # EINVAL, ENOTSUP, ENOSYS, EBADF
            self.assertSucceeds(self.embed("o.st", environment={"LD_PRELOAD": str(shim), "FLUSH_ERRNO": reason}))
        self.assertFails(self.embed("o.st", environment={"LD_PRELOAD": str(shim), "FLUSH_ERRNO": "5"}),
                         "cannot flush folder .: Input/output error")
        self.assertSucceeds(self.embed("o.st", environment={"LD_PRELOAD": str(self.shim(NO_REPLACING))}))
        self.assertEqual((self.folder / "o.st").read_bytes(), expected)
        self.assertEqual(list(self.folder.glob("*.partial")), [])


class Inputs(FieldTest):
    def changed_case(self, name, change):
        raw = (CASES / "embed/02_one_image.safetensors").read_bytes()
        length, = struct.unpack("<Q", raw[:8])
        header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
        header, data = change(header, data)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (self.folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data)

    def test_dtypes_that_nothing_computes_in_are_no_fault_of_the_others(self):
        def with_scale(header, data):
            header["scale"] = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [len(data), len(data) + 4]}
            return {"__metadata__": None, **header}, data + bytes(4)

        self.changed_case("f8.st", with_scale)
        outcome = self.mpirun(2, PROGRAM, "embed", "--input", "f8.st", "--output", "o.st")
        self.assertSucceeds(outcome)
        self.assertEqual(outcome.stdout.count("tensor scale of dtype F8_E4M3 is left out"), 1, outcome.stdout)

    def test_names_that_no_case_has_are_refused(self):
        self.changed_case("g1.st", lambda header, data: (
            {k.replace("group0.", "group1."): v for k, v in header.items()}, data))
        outcome = self.mpirun(2, PROGRAM, "embed", "--input", "g1.st", "--output", "o.st")
        self.assertFails(outcome, "a case has no tensor group1.image_features")
        self.assertFalse((self.folder / "o.st").exists())


class Runs(FieldTest):
    def setUp(self):
        super().setUp()
        self.add_pictures()

    def pretrain(self, *settings, ranks=2, preload=None, environment=None, **options):
        """One rank needs no mpirun, which takes half a second."""
        if ranks > 1:
            return super().pretrain(*settings, ranks=ranks, preload=preload, environment=environment, **options)
        environment = {**(environment or {}), **({"LD_PRELOAD": str(preload)} if preload else {})}
        return self.step37("pretrain", "--config", "tiny.yaml", *settings, environment=environment, **options)

    def generate(self, checkpoint, *words):
        return self.step37("generate", "--checkpoint", checkpoint, "--image", "p/a.png", *words)

    def steps_of(self, run):
        return [json.loads(line)["step"] for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]

    def test_latest_that_a_copy_made_a_folder(self):
        self.assertSucceeds(self.pretrain("run.directory=r"))
        shutil.copytree(self.folder / "r", self.folder / "r2", symlinks=False)
        latest = self.folder / "r2/checkpoints/latest"
        self.assertTrue(latest.is_dir() and not latest.is_symlink())
        shutil.copytree(latest, self.folder / "stale")
        outcome = self.pretrain("run.directory=r2", "training.steps=6")
        self.assertSucceeds(outcome)
        self.assertEqual(outcome.stdout.count("was a folder, as copies of links are"), 1, outcome.stdout)
        self.assertEqual(os.readlink(latest), "step-00000006")
        self.assertEqual(self.steps_of("r2"), [1, 2, 3, 4, 5, 6])
        # A copy that is older than the newest step; a link that is gone.
        latest.unlink()
        shutil.move(self.folder / "stale", latest)
        outcome = self.mpirun(2, PROGRAM, "generate", "--checkpoint", latest, "--image", "p/a.png")
        self.assertSucceeds(outcome)
        self.assertEqual(outcome.stdout.count("/latest is of step 3; taking "), 1, outcome.stdout)
        self.assertIn("/step-00000006", outcome.stdout)
        shutil.rmtree(latest)
        for path in (latest, latest.parent, f"{latest.parent}/."):
            outcome = self.generate(path)
            self.assertSucceeds(outcome)
            self.assertEqual(outcome.stdout.count("/latest is not there; taking "), 1, outcome.stdout)

    def test_latest_that_is_all_there_is(self):
        self.assertSucceeds(self.pretrain("run.directory=r", "training.steps=1", ranks=1))
        checkpoints = self.folder / "r/checkpoints"
        (checkpoints / "latest").unlink()
        (checkpoints / "step-00000001").rename(checkpoints / "latest")
        outcome = self.pretrain("run.directory=r", "training.steps=2", ranks=1)
        self.assertSucceeds(outcome)
        self.assertIn("resuming after step 1", outcome.stdout)
        self.assertEqual(os.readlink(checkpoints / "latest"), "step-00000002")
        self.assertTrue((checkpoints / "step-00000001/manifest.json").exists())

    def test_latest_of_a_run_that_was_killed_before_it_moved(self):
        self.assertSucceeds(self.pretrain("run.directory=r", ranks=1))
        latest = self.folder / "r/checkpoints/latest"
        latest.unlink()
        latest.symlink_to("step-00000002")
        (latest.parent / "latest.partial").symlink_to("step-00000003")
        (latest.parent / "step-00000001.partial").mkdir()
        outcome = self.pretrain("run.directory=r")
        self.assertSucceeds(outcome)
        self.assertIn("this run has finished", outcome.stdout)
        self.assertEqual(os.readlink(latest), "step-00000003")
        self.assertEqual(list(latest.parent.glob("*.partial")), [])

    def test_checkpoints_on_another_disk(self):
        (self.folder / "scratch/ck").mkdir(parents=True)
        (self.folder / "r").mkdir()
        os.symlink("../scratch/ck", self.folder / "r/checkpoints")
        self.assertSucceeds(self.pretrain("run.directory=r"))
        for path in ("r/checkpoints/latest", "r/checkpoints", "r/checkpoints/step-00000003/", "./r//checkpoints/latest"):
            self.assertSucceeds(self.generate(path))
        # A shell that stands in the linked folder: only its PWD tells how it came there.
        program = f"{PROGRAM} generate --checkpoint latest --image {self.folder}/p/a.png"
        self.assertSucceeds(self.command("sh", "-c", f"cd r/checkpoints && {program}"))
        (self.folder / "scratch/ck/notes").write_text("mine")
        self.assertSucceeds(self.pretrain("run.directory=r", "run.fresh=true", "training.steps=1"))
        self.assertTrue((self.folder / "r/checkpoints").is_symlink())
        self.assertEqual({p.name for p in (self.folder / "scratch/ck").iterdir()}, {"notes", "step-00000001", "latest"})

    def test_links_that_lead_nowhere_are_refused_before_anything_is_written(self):
        for name in ("checkpoints", "metrics.jsonl", "report.html", "tokenizer.model"):
            shutil.rmtree(self.folder / "r", ignore_errors=True)
            (self.folder / "r").mkdir()
            os.symlink("../nowhere/it", self.folder / "r" / name)
            self.assertFails(self.pretrain("run.directory=r", ranks=1),
                             f"r/{name} is a link to ../nowhere/it, which isn't there")
            self.assertEqual([p.name for p in (self.folder / "r").iterdir()], [name])
        os.symlink("nowhere", self.folder / "r5")
        self.assertFails(self.pretrain("run.directory=r5", ranks=1), "r5 is a link to nowhere, which isn't there")

    def test_files_of_a_run_that_are_links_stay_links(self):
        (self.folder / "www").mkdir()
        (self.folder / "r").mkdir()
        names = ("metrics.jsonl", "report.html", "tokenizer.model")
        for name in names:
            os.symlink(f"../www/{name}", self.folder / "r" / name)
        for settings in ([], ["training.steps=4"], ["run.fresh=true"]):
            self.assertSucceeds(self.pretrain("run.directory=r", *settings, ranks=1))
            for name in names:
                self.assertTrue((self.folder / "r" / name).is_symlink(), name)
                self.assertTrue((self.folder / "www" / name).stat().st_size > 0, name)
        self.assertEqual(self.steps_of("r"), [1, 2, 3])
        self.assertEqual({p.name for p in (self.folder / "www").iterdir()}, set(names))
        (self.folder / "r2").mkdir()
        os.mkfifo(self.folder / "r2/metrics.jsonl")
        self.assertFails(self.pretrain("run.directory=r2", ranks=1), "r2/metrics.jsonl is no regular file")

    def test_a_report_into_a_pipe_leaves_the_pipe(self):
        (self.folder / "r").mkdir()
        os.mkfifo(self.folder / "r/report.html")
        reader = os.open(self.folder / "r/report.html", os.O_RDWR)  # so that there is one from now on
        self.addCleanup(os.close, reader)
        Process(self, "sh", "-c", "exec cat <> r/report.html > /dev/null")
        self.assertSucceeds(self.pretrain("run.directory=r", ranks=1))
        self.assertTrue((self.folder / "r/report.html").is_fifo())

    def test_file_systems_without_links_or_flushed_folders(self):
        outcome = self.pretrain("run.directory=r", preload=self.shim(NO_LINKS))
        self.assertSucceeds(outcome)
        self.assertEqual(outcome.stdout.count("cannot make the link r/checkpoints/latest: "), 1, outcome.stdout)
        self.assertEqual(self.steps_of("r"), [1, 2, 3])
        self.assertIn("generate --checkpoint r/checkpoints --image", outcome.stdout)
        self.assertSucceeds(self.generate("r/checkpoints"))
        self.assertSucceeds(self.pretrain("run.directory=r2", "training.steps=1", preload=self.shim(NO_FOLDER_FLUSH),
                                          environment={"FLUSH_ERRNO": "22"}))

    def test_the_reason_why_metrics_cannot_be_written(self):
        self.assertFails(self.pretrain("run.directory=r", preload=self.shim(FULL_METRICS), ranks=1),
                         "cannot write r/metrics.jsonl: No space left on device")

    def test_a_tilde_is_refused(self):
        for setting in ("run.directory=~/r", "data.directory=~/p", "run.directory=~"):
            self.assertFails(self.pretrain(setting, ranks=1), "starts with ~, which isn't expanded here")
        (self.folder / "tiny.yaml").write_text((self.folder / "tiny.yaml").read_text().replace(
            "run: {", "run: {directory: ~/r, "))
        self.assertFails(self.pretrain(ranks=1), "run.directory ~/r starts with ~, which isn't expanded here")
        self.assertFails(self.generate("~/r"), "--checkpoint ~/r starts with ~, which isn't expanded here")
        self.assertEqual({p.name for p in self.folder.iterdir()}, {"tiny.yaml", "p"})

    def test_the_printed_command_can_be_pasted(self):
        for directory in ("my run/r $1 'x'", "-r"):
            outcome = self.pretrain(f"run.directory={directory}", "training.steps=1", ranks=1)
            self.assertSucceeds(outcome)
            command = next(line for line in outcome.stdout.splitlines() if "generate --checkpoint" in line)
            self.assertEqual(shlex.split(command)[-1], "p/a.png")
            self.assertSucceeds(self.command("sh", "-c", command))

    def test_prompts_are_trimmed_as_captions_are(self):
        self.assertSucceeds(self.pretrain("run.directory=r", "training.steps=1", ranks=1))
        texts = {self.generate("r/checkpoints", "--prompt", prompt).stdout for prompt in ("A duck", " A duck \t\n")}
        self.assertEqual(len(texts), 1, texts)
        self.assertFails(self.generate("r/checkpoints", "--prompt", "A\nduck"), "--prompt has several lines")

    def test_another_tokenizer_is_refused(self):
        self.assertSucceeds(self.pretrain("run.directory=r", "training.steps=1", ranks=1))
        (self.folder / "p/a.txt").write_text("quite another caption\n")
        self.assertSucceeds(self.pretrain("run.directory=r2", "training.steps=1", ranks=1))
        shutil.copy(self.folder / "r2/tokenizer.model", self.folder / "r/tokenizer.model")
        for outcome in (self.generate("r/checkpoints"), self.pretrain("run.directory=r", "training.steps=2", ranks=1)):
            self.assertFails(outcome, "tokenizer.model (hash ", " is not the tokenizer of ")
            self.assertIn("r/tokenizer.model", outcome.stdout)
            self.assertIn("step-00000001", outcome.stdout)


if __name__ == "__main__":
    unittest.main()
