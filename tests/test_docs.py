"""The documents lead where they say: links, headings, files and commands are there. Numbers of one are computed again."""

import re

import pytest

from launch.pictures import columns
from layers.embedding import UntiedHead, VocabParallelEmbedding
from layers.loss import VocabParallelCrossEntropy
from layers.mlp import MLP
from layers.norm import RMSNorm
from parallel.ledger import Traffic, message, wire_bytes
from parallel.rows import cut_rows, held
from plan.dry import DryAxis, dry_weights
from tests.harness import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES, *sorted((ROOT / "practice").glob("*.md"))]
TENSOR_PARALLEL = (ROOT / "docs/tensor-parallel.md").read_text()
# The sizes that it is about.
T, D, F, V, RANKS = 48, 64, 1024, 50_257, 4
ROOMS = "launch|practice|plan|inference|training|models|layers|reference|parallel|tests|docs"
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken(document, root=ROOT):
    """What a document names and is not there: links, headings, files in backticks, commands."""
    text, problems = document.read_text(), []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text)):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        page = document if not path else document.parent / path
        if not page.exists():
            problems.append(f"link {link}: no such file")
        elif anchor and anchor not in anchors(page):
            problems.append(f"link {link}: no such heading")
    # In backticks any file or folder; elsewhere, as in what a command printed, code.
    for name in re.findall(rf"(?<=`)(?:{ROOMS})/[\w./-]*(?=`)|(?<![\w./`])(?:{ROOMS})/[\w/]+\.py\b", text):
        if not (root / name).exists():
            problems.append(f"file {name}: not there")
    for module in re.findall(rf"python -m ((?:{ROOMS})(?:\.\w+)*)|`((?:launch)\.\w+)[` ]", text):
        path = root.joinpath(*"".join(module).split("."))
        if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            problems.append(f"command {''.join(module)}: no such module")
    return problems


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_document_names_is_there(document):
    assert broken(document) == []


def test_what_is_not_there_is_seen(tmp_path):
    (tmp_path / "there.md").write_text("# A heading, *here*\n\n```\n# none\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](there.md) [b](there.md#a-heading-here) [c](#page) [d](https://x.y/z.md) `launch/start.py` `parallel/`\n"
        "```\nat layers/mlp.py:5 in run\n```\n"
        "python -m launch.tp_mlp, `python -m launch.bench mlp`, python -m tests.faults.table\n"
    )
    assert broken(page) == []
    page.write_text(
        "[a](gone.md) ![b](gone.png) [c](there.md#none) [d](#there) `parallel/gone.py` `docs/gone/`\n"
        "```\nat launch/step.py:5 in run\n```\npython -m launch.gone\n`launch.lost`\n"
    )
    assert [p.split(":")[0] for p in broken(page)] == [
        *("link gone.md", "link gone.png", "link there.md#none", "link #there"),
        *("file parallel/gone.py", "file docs/gone/", "file launch/step.py", "command launch.gone", "command launch.lost"),
    ]


def test_the_readme_is_for_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_readme_says_what_each_room_is_for():
    house = re.search(r"## The house\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    told, room = set(), ""
    for line in house.splitlines():
        name, purpose = re.fullmatch(r"( *\w+/) +(\S.*)", line).groups()
        room = name if not name.startswith(" ") else room
        told.add((name if name == room else room + name.strip()).rstrip("/"))
        assert purpose
    # Exercises and stored data are no rooms; tests have a folder a room.
    packages = {p.parent.relative_to(ROOT).as_posix() for p in ROOT.glob("[a-z]*/**/__init__.py")}
    assert {p for p in packages if not p.startswith("tests/")} | {"docs"} == told


def test_the_contents_name_every_page():
    linked = re.findall(r"\]\((\S+?\.md)\)", (ROOT / "docs/README.md").read_text())
    pages = {p.name for p in PAGES} - {"README.md"}
    assert {name for name in linked if not name.startswith("../")} == pages


def test_the_pictures_are_what_the_code_draws(tmp_path):
    for name, picture in columns.PICTURES.items():
        kept, again = ROOT / f"docs/{name}.png", tmp_path / f"{name}.png"
        columns.draw(again, picture, ranks=2)
        assert again.read_bytes() == kept.read_bytes(), "python -m launch.pictures.columns draws them again"
        assert kept.stat().st_size < 100_000
        assert TENSOR_PARALLEL.count(f"]({name}.png)") == 1
        with pytest.raises(ValueError, match=r"cannot draw 5 ranks: use 2 to 4"):
            columns.draw(tmp_path / "never.png", picture, ranks=5)


def told(heading):
    """Of the table under a heading of the page, by row: the verbs that it names, and the numbers after =."""
    section = TENSOR_PARALLEL.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").partition("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {first.strip(): re.findall(r"all_\w+|reduce_\w+|(?<== )[\d,]*\d", more) for first, _, more in rows}


def says(text):
    """Whether the page does, on however many lines."""
    return text in " ".join(TENSOR_PARALLEL.split())


def sent(traffic, phases=("forward", "backward")):
    """What one of RANKS sends, on a ring."""
    return sum(wire_bytes(t.verb, t.message_bytes, RANKS) for t in traffic if t.phase in phases)


def row(traffic):
    return [traffic.verb, f"{traffic.message_bytes:,}", f"{sent([traffic]):,}"]


def test_the_sums_of_tensor_parallelism_are_the_layers_closed_forms():
    tp, weights = DryAxis("tp", RANKS), dry_weights("float32")
    y, dx = MLP(tp, weights, D, F).traffic(T)
    assert told("Column and row parallel") == {"forward: y": row(y), "backward: dx": row(dx)}

    embedding, head = VocabParallelEmbedding(tp, weights, V, D), UntiedHead(tp, weights, D, V)
    (x,), (dh,), (top, both) = embedding.traffic(T), head.traffic(T), VocabParallelCrossEntropy(tp, embedding.cut).traffic(T, 4)
    assert told("Vocabulary parallel") == {
        "embedding, forward: x": row(x),
        "head, backward: dh": row(dh),
        "loss, forward: top": row(top),
        "loss, forward: sum and picked": row(both),
        "instead of the loss' two: whole logits": row(Traffic("all_gather", "tp", "forward", message((T, V), 4))),
    }
    first, *others = (f"{n:,}" for n in embedding.cut.sizes)
    assert says(f"of {V:,} rows, rank 0 holds {first} and the others {others[0]}.")
    assert len(set(others)) == 1


def test_what_sequence_parallelism_sends_and_keeps_are_the_layers_closed_forms():
    tp, weights, ways = DryAxis("tp", RANKS), dry_weights("float32"), (None, cut_rows(T, RANKS))
    mlp, norm = MLP(tp, weights, D, F, cuts_rows=True), RMSNorm(weights, "1", D)
    owed = sent([Traffic("all_reduce", "tp", "backward", sum(p.data.nbytes for p in mlp.parameters if p.owed))])
    kept = [mlp.saved_bytes(T, rows) for rows in ways]
    numbers = {
        "forward, sent by one rank": [sent(mlp.traffic(T, rows), ["forward"]) for rows in ways],
        "backward": [sent(mlp.traffic(T, rows), ["backward"]) for rows in ways],
        "gradient of b2": [owed],
        "kept of x": [mlp.up.saved_bytes(T, rows) for rows in ways],
        "kept by the MLP": kept,
        "kept by a norm": [norm.saved_bytes(held(T, rows, 0)) for rows in ways],
    }
    assert told("Sequence parallelism") == {name: [f"{n:,}" for n in of] for name, of in numbers.items()}
    whole, cut = (sent(mlp.traffic(T, rows)) for rows in ways)
    assert says(f"rank 0 keeps {kept[1]:,} bytes for backward, where whole rows would keep {kept[0]:,}, and")
    assert says(f"and sends {cut + owed:,} bytes over the wire, where whole rows would send {whole:,}.")
