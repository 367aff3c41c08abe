"""Collects what a GPU check needs on a machine that has LibTorch and nothing else; scripts/gpu_check.sh calls it.

    python3 bundle.py --build BUILD --torch TORCH_ROOT --pictures FOLDER --source ROOT --folder BUNDLE
"""
import argparse
import json
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

import run_parts

LARGEST_MIB = 40
MOST_PICTURES = 100
PICTURE_SIDE = 160  # pixels; the model looks at 112
# Those that the tests with the label gpu read.
CASES = ["embed/*", "models/base/*", "models/text_only/*", "forward/base.*", "forward/text_only.*"]
MADE_HERE = [run_parts.PROGRAMS, "cases", "tuxpaint", "run.sh", "run_parts.py", "bundle.json"]
# What every Linux with a glibc has, in the version that its programs need.
GLIBC = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|util|resolv|anl|mvec|nsl|nss_.*|BrokenLocale|thread_db))\.so(\..*)?")
# Plugins for networks, which one machine has no use for, and for OpenSHMEM: they need libraries of the hardware.
PLUGIN_LEFT_OUT = re.compile(r"lib(fabric|uc[a-z]|psm|ibverbs|rdmacm|nl-|oshmem|mca_common_(ofi|ucx|verbs))")


def output_of(*command, **options):
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def needed(path):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-d", path))


class Closure:
    """Shared libraries that programs and plugins load, but for LibTorch's and glibc's."""

    def __init__(self, torch, library_path):
        self.packages = torch.parent.resolve()
        self.environment = {"LD_LIBRARY_PATH": ":".join(map(str, library_path)), "PATH": "/usr/bin:/bin"}
        self.found = {}  # name -> file

    def add(self, path):
        for line in output_of("ldd", path, env=self.environment).splitlines():
            name, arrow, file = line.strip().partition(" => ")
            file = Path(re.sub(r" \(0x.*", "", file)) if arrow else None
            if file is None or GLIBC.fullmatch(name):
                continue
            if not file.exists():
                sys.exit(f"{path}: {name} is not found")
            if self.packages not in file.resolve().parents:
                self.found[name] = file.resolve()


def copy(source, target):
    """The file itself, where `source` is a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(source).resolve(), target)
    target.chmod(0o755 if Path(source).resolve().stat().st_mode & stat.S_IXUSR else 0o644)


def copy_stripped(source, target):
    copy(source, target)
    target.chmod(0o755)
    subprocess.run(["strip", "--strip-unneeded", target], check=True)


def gpu_tests(build):
    """Tests with the label gpu: program, ranks."""
    listing = json.loads(output_of("ctest", "--test-dir", build, "--show-only=json-v1", "-L", "^gpu$"))
    tests = []
    for test in listing["tests"]:
        program, ranks = re.fullmatch(r"(\w+)\.np(\d+)", test["name"]).groups()
        tests.append({"program": program, "ranks": int(ranks)})
    if not tests:
        sys.exit(f"{build} has no test with the label gpu")
    return tests


def open_mpi_folders():
    """prefix, plugins, help files of the Open MPI that mpirun belongs to."""
    paths = {}
    for line in output_of("ompi_info", "--path", "all", "--parsable").splitlines():
        words = line.split(":")
        if words[0] == "path":
            paths[words[1]] = Path(words[2])
    return paths["prefix"], paths["pkglibdir"], paths["pkgdatadir"]


def add_open_mpi(programs, closure):
    prefix, plugins, help_files = open_mpi_folders()
    # With OPAL_PREFIX Open MPI looks for all of it below that, as it lay below its own prefix.
    inside = lambda path: programs / "mpi" / path.relative_to(prefix)
    starters = {"mpirun": shutil.which("orterun"), "orted": shutil.which("orted")}
    for name, program in starters.items():
        if program is None:
            sys.exit(f"{name} of Open MPI 4 is not in PATH")
        copy_stripped(program, programs / "mpi/bin" / name)
        closure.add(program)
    for plugin in sorted(plugins.glob("mca_*.so")):
        if not any(PLUGIN_LEFT_OUT.match(name) for name in needed(plugin)):
            copy_stripped(plugin, inside(plugin))
            closure.add(plugin)
    for file in sorted(help_files.rglob("*")):
        if file.is_file():
            copy(file, inside(file))


def add_pictures(source, folder):
    """At most MOST_PICTURES of those with a caption, spread over all, scaled down."""
    captioned = sorted(path for path in source.rglob("*.png") if path.with_suffix(".txt").exists())
    if not captioned:
        sys.exit(f"{source} has no captioned pictures")
    count = min(MOST_PICTURES, len(captioned))
    for i in range(count):
        picture = captioned[i * len(captioned) // count]
        target = folder / "_".join(picture.relative_to(source).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(picture) as image:
            image = image.convert("RGBA")
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            image.save(target, optimize=True)
        copy(picture.with_suffix(".txt"), target.with_suffix(".txt"))


def add_tokenizer(bundle, libraries):
    """Trains one on the captions, with the program of the bundle as the machine with the GPU will start it."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [*bundle.mpirun(1), bundle.program("step37"), "pretrain", "--config",
                   bundle.folder / "tuxpaint/tuxpaint.yaml", "--progress", "plain", "run.device=cpu",
                   *run_parts.run_settings(bundle, run, 1)]
        outcome = subprocess.run(list(map(str, command)), env=bundle.environment(libraries), text=True, cwd=scratch,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if outcome.returncode != 0:
            sys.exit(f"the bundle's step37 doesn't run:\n{outcome.stdout}")
        copy(run / "tokenizer.model", bundle.folder / "tuxpaint/tokenizer.model")


def prepare(folder):
    """Makes room for a new bundle; results of an earlier one stay."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "bundle.json").exists():
        sys.exit(f"{folder} is not empty and no earlier bundle: name another folder")
    for name in MADE_HERE:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


class LibTorchOfTheBuild:
    """As run_parts.Libraries, of a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.version = re.search(r"__version__ *= *['\"]([0-9.]+)", (folder / "version.py").read_text())[1]

    folders = run_parts.Libraries.folders


def add_programs(programs, arguments, libraries, tests):
    """Programs, Open MPI and the libraries that both load, of which it returns the number."""
    closure = Closure(arguments.torch, [*{path.parent for path in arguments.build.rglob("libmegatron_cpp_*.so*")},
                                        *libraries.folders()])
    for program in ["gpu_check", "step37", *sorted(tests)]:
        built = arguments.build / "bin" / program
        copy_stripped(built, programs / "bin" / program)
        closure.add(built)
    add_open_mpi(programs, closure)
    for name, file in sorted(closure.found.items()):
        copy_stripped(file, programs / "lib" / name)
    return len(closure.found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("build", "torch", "pictures", "source", "folder"):
        parser.add_argument(f"--{option}", type=lambda text: Path(text).resolve(), required=True)
    arguments = parser.parse_args()
    folder, source = arguments.folder, arguments.source
    prepare(folder)
    libraries = LibTorchOfTheBuild(arguments.torch)
    tests = gpu_tests(arguments.build)
    commit = subprocess.run(["git", "-C", str(source), "describe", "--always", "--dirty"], stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True).stdout.strip()
    (folder / "bundle.json").write_text(json.dumps({"torch": libraries.version, "commit": commit, "tests": tests}) + "\n")
    for name in ("run.sh", "run_parts.py"):
        copy(source / "benchmarks/gpu_check" / name, folder / name)
    for case in CASES:
        for path in sorted((source / "tests/cases").glob(case)):
            copy(path, folder / "cases" / path.relative_to(source / "tests/cases"))
    add_pictures(arguments.pictures, folder / "tuxpaint/pictures")
    copy(source / "configs/tuxpaint.yaml", folder / "tuxpaint/tuxpaint.yaml")
    with tempfile.TemporaryDirectory() as scratch:
        programs = Path(scratch)
        num_libraries = add_programs(programs, arguments, libraries, {test["program"] for test in tests})
        add_tokenizer(run_parts.Bundle(folder, programs), libraries)
        # A third of their size.
        with tarfile.open(folder / run_parts.PROGRAMS, "w:xz") as archive:
            for path in sorted(programs.iterdir()):
                archive.add(path, path.name)
    mib = sum(path.stat().st_size for path in folder.rglob("*")
              if path.is_file() and (folder / "results") not in path.parents) / 2**20
    print(f"{mib:.1f} MiB, {num_libraries} shared libraries, {len(tests)} tests", file=sys.stderr)
    if mib > LARGEST_MIB:
        sys.exit(f"{folder} takes {mib:.1f} MiB, more than the {LARGEST_MIB} that can be carried")


if __name__ == "__main__":
    main()
