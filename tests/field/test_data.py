"""Data folders as users have them: what file managers, other systems and cameras leave in them, and names and encodings
of all kinds."""
import base64
import json
import os
import shutil
import struct
import unittest

from field import CAPTIONS, CASES, FieldTest

FORMATS = CASES / "images/formats"
WEBP = base64.b64decode("UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA==")  # 1 x 1 pixel
HEIF = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def exif_block(orientation):
    return b"\xff\xe1\x00\x22Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)


class DataTest(FieldTest):
    def setUp(self):
        super().setUp()
        self.add_pictures()
        self.p = self.folder / "p"

    def add(self, name, data, caption="a thing"):
        path = self.p / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.with_suffix(".txt").write_text(caption + "\n")
        return path

    def train(self, *settings, ranks=1, **options):
        return self.pretrain("run.directory=r", "training.steps=1", *settings, ranks=ranks, **options)

    def assertPictures(self, outcome, count):
        self.assertSucceeds(outcome)
        self.assertIn(f"{count} pictures to train on", outcome.stdout)

    def report(self):
        """The JSON in the report; the page itself is checked to be plain ASCII text."""
        page = (self.folder / "r/report.html").read_bytes()
        self.assertFalse([byte for byte in set(page) if byte != 10 and not 32 <= byte < 127])
        return json.loads(page.split(b'id="run">')[1].split(b"</script>")[0])

    def test_what_systems_leave_in_folders(self):
        for name in CAPTIONS:  # AppleDouble
            (self.p / f"._{name}.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
            (self.p / f"._{name}.txt").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
        for folder in (".Trash-1000/files", "@eaDir/x", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".ipynb_checkpoints"):
            self.add(f"{folder}/old.png", (self.p / "a.png").read_bytes())
        shutil.move(self.p, self.folder / ".hidden")
        outcome = self.train("data.directory=.hidden")
        self.assertPictures(outcome, 4)
        self.assertIn("10 hidden or system files and folders (first: .hidden/$RECYCLE.BIN)", outcome.stdout)

    def test_linked_folders_are_followed_once(self):
        far = self.folder / "far"
        far.mkdir()
        for name in ("c.png", "c.txt", "d.png", "d.txt"):
            shutil.move(self.p / name, far)
        for target, name in (("../far", "far"), ("../far", "again"), (".", "self"), ("..", "up")):
            (self.p / name).symlink_to(target)
        self.assertPictures(self.train(), 4)

    def test_unreadable_folders_and_captions_are_named(self):
        for name in ("lost+found", "private"):
            (self.p / name).mkdir()
        # As for a user without rights on them; tests may run as root, who has them.
        library = self.shim(r"""
            #define _GNU_SOURCE
            #include <dirent.h>
            #include <dlfcn.h>
            #include <errno.h>
            #include <fcntl.h>
            #include <stdarg.h>
            #include <stdio.h>
            #include <string.h>
            static int closed(const char* path) {
              const char* name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
              if (strcmp(name, "private") && strcmp(name, "lost+found") && strcmp(name, "a.txt")) return 0;
              errno = EACCES;
              return 1;
            }
            DIR* opendir(const char* path) {
              return closed(path) ? 0 : ((DIR* (*)(const char*))dlsym(RTLD_NEXT, "opendir"))(path);
            }
            int openat(int folder, const char* path, int flags, ...) {
              va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest);
              return closed(path) ? -1 : ((int (*)(int, const char*, int, ...))dlsym(RTLD_NEXT, "openat"))(folder, path,
                                                                                                        flags, mode);
            }
            FILE* fopen64(const char* path, const char* mode) {
              return closed(path) ? 0 : ((FILE* (*)(const char*, const char*))dlsym(RTLD_NEXT, "fopen64"))(path, mode);
            }
            FILE* fopen(const char* path, const char* mode) {
              return closed(path) ? 0 : ((FILE* (*)(const char*, const char*))dlsym(RTLD_NEXT, "fopen"))(path, mode);
            }
            """)
        outcome = self.train(preload=library)
        self.assertPictures(outcome, 3)
        self.assertIn("(first: p/lost+found)", outcome.stdout)
        self.assertIn("1 folder that can't be read (first: p/private: Permission denied)", outcome.stdout)
        self.assertIn("1 picture whose caption can't be read (first: p/a.txt: Permission denied)", outcome.stdout)
        self.assertIn("0 without a caption", outcome.stdout)

    def test_extensions_in_any_case(self):
        shutil.move(self.p / "a.png", self.p / "A.PNG")
        shutil.move(self.p / "a.txt", self.p / "A.TXT")
        shutil.move(self.p / "b.txt", self.p / "b.Txt")
        self.assertPictures(self.train(), 4)

    def test_formats_by_content(self):
        for name in ("rgb_lossy.webp", "animated.gif", "rgb.bmp", "lzw.tiff"):
            self.add(name, (FORMATS / name).read_bytes())
        for name, source in (("h.jfif", "rgb_420.jpg"), ("i.jpe", "rgb_lossless.webp"), ("j.picture", "palette.gif")):
            self.add(name, (FORMATS / source).read_bytes())
        self.add("k.heic", HEIF)
        outcome = self.train("report.pictures=24")
        self.assertPictures(outcome, 11)
        self.assertIn("1 file with a caption that is none of PNG, JPEG, WebP, GIF, BMP, TIFF (first: p/k.heic)",
                      outcome.stdout)
        pictures = self.report()["pictures"]
        self.assertEqual(len(pictures), 11)
        self.assertTrue(all(base64.b64decode(picture["thumbnail"]).startswith(b"\x89PNG") for picture in pictures))

    def test_captions_in_other_encodings(self):
        (self.p / "a.txt").write_bytes("a red duck\n".encode("utf-16"))
        (self.p / "b.txt").write_bytes(b"\xff\xfe\x0aN")
        self.add("e.png", (self.p / "a.png").read_bytes())
        (self.p / "e.txt").write_bytes("une \xe9toile\n".encode("latin-1"))
        self.add("f.png", (self.p / "a.png").read_bytes())
        (self.p / "f.txt").write_bytes(b"\0\0\0\n")
        (self.p / "g\udce9\n.png").write_bytes((self.p / "a.png").read_bytes())  # a name in Latin-1
        (self.p / "g\udce9\n.txt").write_text("a name")
        outcome = self.train("report.pictures=8", text=False)
        output = outcome.stdout.decode()  # UTF-8 throughout
        self.assertEqual(outcome.returncode, 0, output)
        self.assertIn("5 pictures to train on", output)
        self.assertIn("(first: p/e.txt)", output)
        self.assertIn("(first: p/f.txt)", output)
        shown = {picture["name"]: picture["caption"] for picture in self.report()["pictures"]}
        self.assertEqual(shown.get("a.png", "a red duck"), "a red duck")
        self.assertFalse([name for name in shown if name in ("e.png", "f.png")])

    def test_pictures_that_cant_be_read(self):
        for i in range(2):
            self.add(f"x{i}.jpg", HEIF)
        self.add("y.png", WEBP)
        outcome = self.train()
        self.assertPictures(outcome, 5)
        self.assertEqual(outcome.stdout.count("2 of 7 pictures can't be read (first: p/x0.jpg: it is HEIF"), 1)
        for path in self.p.glob("*.png"):
            path.write_bytes(HEIF)
        outcome = self.train("data.max_unreadable=1")
        self.assertFails(outcome, "7 of 7 pictures can't be read (first: p/a.png: it is HEIF, which isn't read)")
        self.assertNotIn("step 1", outcome.stdout)

    def test_damaged_pictures_are_warned_of_once(self):
        jpeg = (FORMATS / "rgb_420.jpg").read_bytes()
        self.add("e.jpg", jpeg[:len(jpeg) * 2 // 3])
        self.add("turned.jpg", jpeg[:2] + exif_block(6) + jpeg[2:])
        outcome = self.pretrain("run.directory=r", "training.steps=6", "report.pictures=12", ranks=2)
        self.assertPictures(outcome, 6)
        self.assertEqual(outcome.stdout.count("p/e.jpg is damaged: "), 1, outcome.stdout)
        self.assertEqual(outcome.stdout.count("warning: "), 1, outcome.stdout)
        outcome = self.step37("generate", "--checkpoint", "r/checkpoints", "--image", "p/e.jpg")
        self.assertSucceeds(outcome)
        self.assertEqual(outcome.stdout.count("p/e.jpg is damaged: "), 1, outcome.stdout)

    def test_a_report_holds_thumbnails_not_files(self):
        with (self.p / "a.png").open("ab") as file:
            file.write(os.urandom(4 << 20))
        self.assertPictures(self.train("report.pictures=8"), 4)
        self.assertLess((self.folder / "r/report.html").stat().st_size, 1 << 20)

    def test_a_small_vocabulary(self):
        for i in range(60):
            self.add(f"x{i}.gif", (FORMATS / "palette.gif").read_bytes(),
                     "".join(chr(0x4e00 + 10 * i + k) for k in range(10)))
        outcome = self.train("data.vocabulary_size=300")
        self.assertPictures(outcome, 64)
        self.assertIn("data.vocabulary_size 300 is too small: the texts have ", outcome.stdout)
        self.assertFails(self.pretrain("run.directory=s", "data.vocabulary_size=200", ranks=1),
                         "data.vocabulary_size 200 is too small: at least ")

    def test_a_second_start_takes_the_index(self):
        self.assertPictures(self.train(), 4)
        self.assertTrue((self.folder / "r/pictures.index").exists())
        (self.folder / "r/pictures.index").write_bytes(b"megatron_cpp picture index 1\nnot an index")
        self.assertPictures(self.train("training.steps=2"), 4)


if __name__ == "__main__":
    unittest.main()
