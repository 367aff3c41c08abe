#!/usr/bin/env python3
"""Draws the pictures of docs/architecture.md and docs/parallelism.md, as SVG beside this file.

python3 docs/figures/draw.py           # writes them
python3 docs/figures/draw.py --check   # fails if a committed picture isn't what would be written
"""

import pathlib
import sys
import textwrap
from xml.sax.saxutils import escape

HERE = pathlib.Path(__file__).parent

# Light, then dark: fill and stroke of what is rank 0's, rank 1's, an image row of theirs, every rank's, sent, or
# nobody's here.
COLOURS = {
    "r0": (("#cfe1fb", "#2f6fd0"), ("#1d3f70", "#7fb0f5")),
    "r1": (("#fbe0c6", "#c06a1a"), ("#5e3711", "#f0a75c")),
    "i0": (("#7fb0f0", "#1d56a8"), ("#2f6fd0", "#a9ccf8")),
    "i1": (("#efa766", "#94500f"), ("#b8691c", "#f7c48f")),
    "all": (("#e7e3f4", "#7a68b3"), ("#3a3358", "#b0a2e0")),
    "sent": (("#d3efdb", "#2a8648"), ("#17432a", "#6fcf8f")),
    "none": (("#ffffff", "#9aa4af"), ("#0d1117", "#6e7781")),
}
PAPER = ("#ffffff", "#0d1117")
INK = ("#1f2328", "#e6edf3")
FAINT = ("#57606a", "#9aa4af")


def style():
    def rules(mode):
        lines = [
            f".paper{{fill:{PAPER[mode]}}}",
            f"text{{fill:{INK[mode]}}}",
            f".faint{{fill:{FAINT[mode]}}}",
            f".line{{stroke:{FAINT[mode]};fill:none;stroke-width:1.5}}",
            f".head{{fill:{FAINT[mode]}}}",
        ]
        for name, modes in COLOURS.items():
            fill, stroke = modes[mode]
            lines.append(f".{name}{{fill:{fill};stroke:{stroke};stroke-width:1.5}}")
            lines.append(f".{name}-line{{stroke:{stroke};stroke-width:1.5;fill:none}}")
        return "".join(lines)

    return (
        "text{font-family:system-ui,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px}"
        ".title{font-weight:600}.small{font-size:11.5px}.dashed{stroke-dasharray:4 3}"
        + rules(0)
        + "@media (prefers-color-scheme:dark){"
        + rules(1)
        + "}"
    )


class Picture:
    """A canvas; coordinates are pixels, the origin is top left."""

    def __init__(self, width, height, description):
        self.width, self.height, self.description = width, height, description
        self.items = []

    def text(self, x, y, text, classes="", anchor="middle"):
        self.items.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{classes}">{escape(text)}</text>')

    def texts(self, x, y, lines, classes="", anchor="middle", step=16):
        """Lines of text around the height y; one that begins with '*' is a title, with '-' small."""
        y -= step * (len(lines) - 1) / 2 - 4.5
        for line in lines:
            marks = {"*": "title", "-": "small faint"}
            mark = marks.get(line[:1])
            self.text(x, y, line[1:] if mark else line, f"{classes} {mark or ''}".strip(), anchor)
            y += step

    def rect(self, x, y, width, height, classes, radius=0):
        self.items.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" ' f'class="{classes}"/>'
        )

    def box(self, x, y, width, height, lines, classes="none"):
        self.rect(x, y, width, height, classes, 6)
        self.texts(x + width / 2, y + height / 2, lines)

    def arrow(self, *points):
        """A line through the points with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        (x0, y0), (x1, y1) = points[-2:]
        length = max(abs(x1 - x0), abs(y1 - y0))
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        head = [(x1, y1), (x1 - 8 * dx - 4 * dy, y1 - 8 * dy + 4 * dx), (x1 - 8 * dx + 4 * dy, y1 - 8 * dy - 4 * dx)]
        self.items.append(f'<polyline points="{path}" class="line"/>')
        self.items.append('<polygon points="' + " ".join(f"{x:g},{y:g}" for x, y in head) + '" class="head"/>')

    def matrix(self, x, y, width, height, parts, label, name=""):
        """An outline with filled parts (left, top, right, bottom, classes), as shares of it; a label below, perhaps a
        name above."""
        self.rect(x, y, width, height, "none dashed")
        for left, top, right, bottom, classes in parts:
            self.rect(x + left * width, y + top * height, (right - left) * width, (bottom - top) * height, classes)
        self.text(x + width / 2, y + height + 16, label, "small")
        if name:
            self.text(x + width / 2, y - 7, name, "small faint")

    def hatch(self, x, y, width, height, rank):
        """Marks what is only a summand."""
        step = 9
        offset = step
        while offset < width + height:
            x0, y0 = x + max(0, offset - height), y + min(offset, height)
            x1, y1 = x + min(offset, width), y + max(0, offset - width)
            self.items.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" class="r{rank}-line"/>')
            offset += step

    def svg(self):
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{escape(self.description)}</title>\n<style>{style()}</style>\n"
            f'<rect width="{self.width}" height="{self.height}" class="paper" rx="8"/>\n'
            + "\n".join(self.items)
            + "\n</svg>\n"
        )


WHOLE = (0, 0, 1, 1)


def rows(rank):
    return (0, rank / 2, 1, (rank + 1) / 2)


def columns(rank):
    return (rank / 2, 0, (rank + 1) / 2, 1)


def part(area, classes):
    return (*area, classes)


LANES = (50, 190)  # the top of each rank's lane
LANE = 120  # its height, labels included


def lanes(picture):
    for rank, y in enumerate(LANES):
        picture.text(14, y + 54, f"rank {rank}", "title", "start")


def collective(picture, x, width, lines):
    """A box through both lanes: every rank takes part."""
    picture.box(x, LANES[0] - 24, width, LANES[1] + LANE - LANES[0] + 8, lines, "sent")


def notes(picture, sentences):
    y = LANES[1] + LANE + 26
    for line in textwrap.wrap(" ".join(sentences), int((picture.width - 28) / 6.3), break_on_hyphens=False):
        picture.text(14, y, line, "small", "start")
        y += 18


def column_linear():
    picture = Picture(740, 384, "A column-parallel linear layer on two ranks")
    lanes(picture)
    collective(
        picture,
        176,
        140,
        [
            "*forward",
            "nothing",
            "-sequence parallel:",
            "-all-gather of X",
            "",
            "*backward",
            "all-reduce of dX",
            "-sequence parallel:",
            "-reduce-scatter of dX,",
            "-all-gather of X",
        ],
    )
    for rank, y in enumerate(LANES):
        picture.matrix(80, y + 4, 70, 90, [part(WHOLE, "all")], "X [S, B, C]")
        picture.arrow((154, y + 50), (174, y + 50))
        picture.arrow((318, y + 50), (338, y + 50))
        picture.text(358, y + 54, "X ·")
        picture.matrix(384, y + 4, 80, 90, [part(rows(rank), f"r{rank}")], "A [F, C], rows r")
        picture.text(474, y + 16, "ᵀ", "title")
        picture.arrow((500, y + 50), (560, y + 50))
        picture.matrix(590, y + 4, 110, 90, [part(columns(rank), f"r{rank}")], "Y [S, B, F], columns r")
    notes(
        picture,
        [
            "Y = X Aᵀ. Each rank has all of X and makes its columns of Y. Its gradient dX = dY A is a summand:",
            "the ranks' sum is the gradient. Under sequence parallelism X comes as rows r of S, [S/t, B, C].",
        ],
    )
    return picture


def row_linear():
    picture = Picture(830, 384, "A row-parallel linear layer on two ranks")
    lanes(picture)
    for rank, y in enumerate(LANES):
        picture.matrix(80, y + 4, 90, 90, [part(columns(rank), f"r{rank}")], "X [S, B, C]")
        picture.text(186, y + 55, "·", "title")
        picture.matrix(204, y + 4, 90, 90, [part(columns(rank), f"r{rank}")], "A [F, C]")
        picture.text(304, y + 16, "ᵀ", "title")
        picture.arrow((322, y + 50), (356, y + 50))
        picture.matrix(376, y + 4, 80, 90, [part(WHOLE, f"r{rank}")], "summand [S, B, F]")
        picture.hatch(376, y + 4, 80, 90, rank)
        picture.arrow((460, y + 50), (490, y + 50))
        picture.arrow((638, y + 50), (668, y + 50))
        picture.matrix(694, y + 4, 80, 90, [part(WHOLE, "all")], "Y [S, B, F]")
    collective(
        picture,
        492,
        144,
        [
            "*forward",
            "all-reduce",
            "-sequence parallel:",
            "-reduce-scatter",
            "",
            "*backward",
            "nothing",
            "-sequence parallel:",
            "-all-gather",
        ],
    )
    notes(
        picture,
        [
            "X and A are split by columns: each rank makes a summand of all of Y (hatched), out of its C/t. The",
            "input is",
            "what a column-parallel layer left. Under sequence parallelism Y ends as rows r of S, [S/t, B, F].",
        ],
    )
    return picture


def embedding_rows(rank):
    """Rows of a partial that the ids of a rank fill, in eighths from the top."""
    return {0: (0, 2, 3, 6), 1: (1, 4, 5, 7)}[rank]


def vocab_parallel_embedding():
    picture = Picture(830, 384, "A vocabulary-parallel embedding on two ranks")
    lanes(picture)
    for rank, y in enumerate(LANES):
        picture.matrix(80, y + 4, 30, 90, [part(WHOLE, "all")], "ids [B, S]")
        picture.arrow((122, y + 50), (158, y + 50))
        picture.matrix(180, y + 4, 90, 90, [part(rows(rank), f"r{rank}")], "table [V', H], rows r")
        picture.arrow((280, y + 50), (340, y + 50))
        found = [(0, i / 8, 1, (i + 1) / 8, f"r{rank}") for i in embedding_rows(rank)]
        picture.matrix(364, y + 4, 90, 90, found, "partial [S, B, H]")
        picture.arrow((462, y + 50), (490, y + 50))
        picture.arrow((638, y + 50), (668, y + 50))
        owned = [
            (0, i / 8, 1, (i + 1) / 8, "r0" if i in embedding_rows(0) else "r1") for i in range(4 * rank, 4 * rank + 4)
        ]
        picture.matrix(694, y + 4, 90, 90, owned, "[S/t, B, H], rows r")
    collective(
        picture,
        492,
        144,
        [
            "*forward",
            "reduce-scatter",
            "-without sequence",
            "-parallelism:",
            "-all-reduce",
            "",
            "*backward",
            "all-gather",
            "-without: nothing",
        ],
    )
    notes(
        picture,
        [
            "A rank finds the ids that lie in its rows of the table; the other rows of its partial are zero, so",
            "that the sum",
            "of the partials is the embedding. (V' is V rounded up to a multiple of t.)",
        ],
    )
    return picture


def hidden_parallel_embedding():
    picture = Picture(830, 384, "A hidden-parallel embedding on two ranks")
    lanes(picture)
    for rank, y in enumerate(LANES):
        picture.matrix(80, y + 4, 30, 90, [part(WHOLE, "all")], "ids [B, S]")
        picture.arrow((122, y + 50), (158, y + 50))
        picture.matrix(180, y + 4, 90, 90, [part(columns(rank), f"r{rank}")], "table [V, H], columns r")
        picture.arrow((280, y + 50), (340, y + 50))
        picture.matrix(364, y + 4, 90, 90, [part(columns(rank), f"r{rank}")], "partial [S, B, H/t]")
        picture.arrow((462, y + 50), (490, y + 50))
        picture.arrow((638, y + 50), (668, y + 50))
        owned = [(c / 2, rank / 2, (c + 1) / 2, (rank + 1) / 2, f"r{c}") for c in range(2)]
        picture.matrix(694, y + 4, 90, 90, owned, "[S/t, B, H], rows r")
    collective(
        picture,
        492,
        144,
        [
            "*forward",
            "all-to-all",
            "-without sequence",
            "-parallelism:",
            "-all-gather",
            "",
            "*backward",
            "all-to-all",
            "-without: nothing",
        ],
    )
    notes(
        picture,
        [
            "Every rank finds every id, in its columns of the table. One all-to-all turns columns of all rows",
            "into all",
            "columns of a rank's rows: no rank ever has [S, B, H], and 1/t of the vocabulary-parallel bytes is sent.",
        ],
    )
    return picture


def sequence_parallel():
    picture = Picture(1010, 384, "A decoder layer under sequence parallelism on two ranks")
    lanes(picture)
    gather = ["*forward", "all-gather", "", "*backward", "reduce-", "scatter", "-and all-", "-gather of x"]
    scatter = ["*forward", "reduce-", "scatter", "", "*backward", "all-gather"]
    for rank, y in enumerate(LANES):
        colour = f"r{rank}"
        box_y, height = y + 14, 72
        steps = [
            (72, 86, ["*norm", "rows r", "-[S/t, B, H]"]),
            (262, 112, ["*attention", "heads r,", "all rows"]),
            (478, 92, ["*+ x, norm", "rows r", "-[S/t, B, H]"]),
            (674, 100, ["*MLP", "F/t columns,", "all rows"]),
            (878, 92, ["*+ x", "rows r", "-[S/t, B, H]"]),
        ]
        for x, width, lines in steps:
            picture.box(x, box_y, width, height, lines, colour)
        for x0, x1 in ((158, 168), (252, 261), (374, 384), (468, 477), (570, 580), (664, 673), (774, 784), (868, 877)):
            picture.arrow((x0, y + 50), (x1 + 0.5, y + 50))
    for x, lines in ((169, gather), (385, scatter), (581, gather), (785, scatter)):
        collective(picture, x, 83, lines)
    notes(
        picture,
        [
            "Norms, residuals and what stands between the layers are split by the sequence: a rank has S/t rows",
            "of all H. Attention and",
            "MLP are split by heads and by F, over all rows. The first linear layer of each keeps its input's",
            "rows r only and gathers them",
            "again for the gradient of its weight.",
        ],
    )
    return picture


IMAGE_ROWS = (1, 2, 5)  # eighths of the sequence that images overwrite: image A takes 1 and 2, image B 5
TEXT_ROWS = {0: (0, 4, 6), 1: (3, 7)}


def image_insert(
    title,
    projector,
    projector_label,
    projected,
    projected_label,
    hatched,
    inserted,
    delivered,
    feature_parts,
    feature_label,
    lines,
):
    picture = Picture(1010, 384, title)
    lanes(picture)
    for rank, y in enumerate(LANES):
        colour = f"r{rank}"
        picture.matrix(82, y + 14, 80, 70, feature_parts(rank), feature_label, "features")
        picture.text(186, y + 55, "·", "title")
        picture.matrix(210, y + 4, 84, 90, [part(area, colour) for area in projector(rank)], projector_label)
        picture.text(304, y + 16, "ᵀ", "title")
        picture.arrow((322, y + 50), (350, y + 50))
        areas = projected(rank)
        picture.matrix(370, y + 14, 90, 70, [part(area, f"i{rank}") for area in areas], projected_label, "projected")
        if hatched:
            picture.hatch(370, y + 14, 90, 70, rank)
        picture.arrow((470, y + 50), (540, y + 50))
        picture.text(505, y + 42, "write", "small faint")
        text = [(0, i / 8, 1, (i + 1) / 8, colour) for i in TEXT_ROWS[rank]]
        images = [(left, i / 8, right, (i + 1) / 8, f"i{rank}") for i, left, right in inserted(rank)]
        picture.matrix(560, y + 4, 90, 90, text + images, "[S, B, H]", "partial of the words")
        for i, left, right in inserted(rank):
            if hatched:
                picture.hatch(560, y + 4 + 90 * i / 8, 90, 90 / 8, rank)
        picture.arrow((660, y + 50), (680, y + 50))
        picture.arrow((822, y + 50), (850, y + 50))
        owned = []
        for i in range(4 * rank, 4 * rank + 4):
            if i in IMAGE_ROWS:
                owned += [(left, i / 8, right, (i + 1) / 8, classes) for left, right, classes in delivered(i)]
            else:
                owned.append((0, i / 8, 1, (i + 1) / 8, "r0" if i in TEXT_ROWS[0] else "r1"))
        picture.matrix(880, y + 4, 90, 90, owned, "[S/t, B, H], rows r")
    collective(
        picture,
        682,
        138,
        [
            "*forward",
            "reduce-scatter:",
            "the one that text",
            "alone needs",
            "",
            "*backward",
            "one collective, of",
            "what is trained",
        ],
    )
    notes(picture, lines)
    return picture


def image_insert_column():
    return image_insert(
        "The fused image insert with a column-sharded projector on two ranks",
        lambda rank: [rows(rank)],
        "[H, C], rows r",
        lambda rank: [columns(rank)],
        "[n, H], columns r",
        False,
        lambda rank: [(i, rank / 2, (rank + 1) / 2) for i in IMAGE_ROWS],
        lambda i: [(0, 0.5, "i0"), (0.5, 1, "i1")],
        lambda rank: [part(WHOLE, "all")],
        "[n, C], all",
        [
            "Each rank projects every feature row to its H/t columns and writes them into the rows that the",
            "images overwrite.",
            "Those rows are zero in every partial (nobody looks them up), so that the sum puts their columns",
            "side by side.",
            "Strong colours: image rows. Pale: text rows.",
        ],
    )


def image_insert_row():
    return image_insert(
        "The fused image insert with a row-sharded projector on two ranks",
        lambda rank: [columns(rank)],
        "[H, C], columns r",
        lambda rank: [WHOLE],
        "[n, H], summand",
        True,
        lambda rank: [(i, 0, 1) for i in IMAGE_ROWS],
        lambda i: [(0, 1, "all")],
        lambda rank: [part(columns(rank), f"r{rank}")],
        "[n, C], columns r",
        [
            "Each rank makes a summand of every projected row out of its C/t channels (hatched) and writes it",
            "over the images' rows;",
            "the collective's sum is the projection's sum too. The bias goes into rank 0's summand only.",
            "Strong colours: image rows, violet once they are summed. Pale: text rows.",
        ],
    )


def image_insert_replicated():
    own = {0: ((0, 0, 1, 2 / 3),), 1: ((0, 2 / 3, 1, 1),)}
    mine = {0: (1, 2), 1: (5,)}
    return image_insert(
        "The fused image insert with a replicated projector on two ranks",
        lambda rank: [WHOLE],
        "[H, C], all",
        lambda rank: own[rank],
        "[n, H], own images",
        False,
        lambda rank: [(i, 0, 1) for i in mine[rank]],
        lambda i: [(0, 1, "i0" if i in mine[0] else "i1")],
        lambda rank: [part(area, f"r{rank}") for area in own[rank]],
        "[n, C], own images",
        [
            "Each rank holds the whole projector and projects whole images: those whose features the vision",
            "tower made on it.",
            "Its rows stand alone in the sum. The projector's gradient is of this rank's images only: summed",
            "over the ranks once a step.",
            "Strong colours: image rows. Pale: text rows.",
        ],
    )


def layers():
    picture = Picture(860, 478, "The three layers and what they stand on")
    floors = [
        (
            "step37",
            "all",
            [
                ["*program", "step37 pretrain,", "generate, embed"],
                ["*data", "pictures, tokenizer,", "batches"],
                ["*vision", "vision tower"],
                ["*image insert", "plan, projector,", "exchange"],
            ],
        ),
        (
            "megatron_cpp",
            "r0",
            [
                ["*training, data", "one step; packing"],
                ["*transformer", "decoder layers,", "GPTModel"],
                ["*tensor_parallel", "linears, embeddings,", "cross entropy"],
                ["*optimizer, checkpoint", "AdamW, gradients,", "sharded files"],
            ],
        ),
        (
            "parallel",
            "r1",
            [
                ["*runtime", "MPI's life, device,", "how a job ends"],
                ["*groups", "rank grid,", "process groups"],
                ["*mappings", "collectives with", "gradients"],
                ["*backends", "MPI, NCCL; counting,", "rehearsal"],
            ],
        ),
    ]
    y = 16
    for name, colour, rooms in floors:
        picture.rect(16, y, 828, 112, colour, 8)
        picture.text(26, y + 60, name, "title", "start")
        for i, room in enumerate(rooms):
            picture.box(140 + i * 175, y + 16, 169, 80, room)
        if name != "parallel":
            picture.arrow((430, y + 112), (430, y + 137))
            picture.text(442, y + 129, "includes and calls: downward only", "small faint", "start")
        y += 138
    picture.arrow((430, y - 26), (430, y - 1))
    for i, name in enumerate(("LibTorch: tensors, autograd, c10d", "MPI: bytes between CPUs", "NCCL: between GPUs")):
        picture.box(16 + i * 279, y, 270, 40, [name])
    return picture


def training_step():
    picture = Picture(940, 868, "The data flow of one training step on one rank")
    left, width = 40, 500
    middle = left + width / 2

    def stage(y, height, lines, colour="none", x=left, box_width=width):
        picture.box(x, y, box_width, height, lines, colour)

    picture.text(left, 24, "For each micro-batch, on every rank", "title", "start")
    stage(38, 50, ["*CaptionLoader::next", "ids, labels [1, S] and this rank's pictures; one step ahead"])
    picture.arrow((165, 88), (165, 112))
    picture.arrow((415, 88), (415, 112))
    stage(114, 54, ["*VisionTower::forward", "own pictures → features [n_r, C]"], x=left, box_width=240)
    stage(114, 54, ["*InsertPlan::build", "which row an image row ends in"], x=300, box_width=240)
    picture.arrow((165, 168), (165, 192))
    picture.arrow((415, 168), (415, 192))
    stage(194, 54, ["*align_projector", "→ rows [n_r, H]"], x=left, box_width=240)
    stage(194, 54, ["*ParallelEmbedding::partial", "own ids' rows filled, [S, B, H]"], x=300, box_width=240)
    picture.arrow((165, 248), (165, 272))
    picture.arrow((415, 248), (415, 272))
    stage(274, 50, ["*deliver_by_sum: reduce-scatter over tp", "→ embedding with images [S/t, B, H]"], "sent")
    picture.arrow((middle, 324), (middle, 348))
    stage(
        350,
        70,
        [
            "*TransformerBlock::forward",
            "each layer: all-gather, attention, reduce-scatter,",
            "all-gather, MLP, reduce-scatter over tp",
        ],
        "sent",
    )
    picture.arrow((middle, 420), (middle, 444))
    stage(446, 50, ["*output layer: all-gather over tp", "→ logits [S, B, V'/t], or a chunk of positions at a time"], "sent")
    picture.arrow((middle, 496), (middle, 520))
    stage(
        522,
        50,
        [
            "*linear_cross_entropy: 2 all-reduces of [S, B] size over tp",
            "→ sum of the token losses, equal on every rank of tp",
        ],
        "sent",
    )
    right = 590
    picture.arrow((left + width, 547), (right + 160, 547), (right + 160, 446))
    picture.text(right + 8, 566, "/ loss tokens of the global batch", "small faint", "start")
    picture.box(
        right,
        274,
        320,
        170,
        [
            "*backward",
            "the same way up: a reduce-scatter over tp",
            "where forward has an all-gather,",
            "and the other way round;",
            "linears gather their input once more",
            "for the weight's gradient;",
            "the exchange sends what is trained",
        ],
        "sent",
    )
    picture.arrow((right + 160, 274), (right + 160, 170))
    picture.box(
        right,
        98,
        320,
        70,
        ["*GradientBuffer", "every .grad is a view of a bucket:", "micro-batches add up in place"],
    )
    picture.items.append(f'<line x1="24" y1="604" x2="916" y2="604" class="line dashed"/>')
    picture.text(left, 632, "Once a step, after the last micro-batch", "title", "start")
    stage(
        646,
        54,
        ["*GradientBuffer::reduce", "each bucket over dp or tp_dp, while backward runs"],
        "sent",
        x=left,
        box_width=400,
    )
    stage(
        646,
        54,
        ["*loss and gradient norm", "all-reduce of one number over dp, of one over tp"],
        "sent",
        x=490,
        box_width=420,
    )
    picture.arrow((440, 673), (488, 673))
    picture.arrow((700, 700), (700, 724))
    stage(
        726,
        54,
        ["*check that both are finite; clip by the norm", "the same decision on every rank: the numbers are"],
        x=490,
        box_width=420,
    )
    picture.arrow((490, 753), (442, 753))
    stage(726, 54, ["*AdamW::step", "each rank its parameters, or its slices and a gather"], x=left, box_width=400)
    picture.rect(left, 812, 26, 18, "sent", 4)
    picture.text(
        left + 36,
        826,
        "every rank of a group takes part (drawn: sequence parallelism, replicated projector, fused exchange over a",
        "small",
        "start",
    )
    picture.text(left + 36, 844, "vocabulary-parallel embedding: what configs/tuxpaint.yaml trains)", "small", "start")
    return picture


PICTURES = {
    "layers": layers,
    "training_step": training_step,
    "column_linear": column_linear,
    "row_linear": row_linear,
    "vocab_parallel_embedding": vocab_parallel_embedding,
    "hidden_parallel_embedding": hidden_parallel_embedding,
    "sequence_parallel": sequence_parallel,
    "image_insert_column": image_insert_column,
    "image_insert_row": image_insert_row,
    "image_insert_replicated": image_insert_replicated,
}


def main():
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(__doc__)
    stale = []
    for name, draw in PICTURES.items():
        path = HERE / f"{name}.svg"
        svg = draw().svg()
        if not check:
            path.write_text(svg, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != svg:
            stale.append(path.name)
    if stale:
        sys.exit("not what draw.py writes: " + ", ".join(stale))


if __name__ == "__main__":
    main()
