"""The documents lead where they say: links, headings, files and commands that they name exist."""

import re

import pytest

from launch.pictures import columns
from tests.harness import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES, *sorted((ROOT / "practice").glob("*.md"))]
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


def test_the_picture_is_what_the_code_draws(tmp_path):
    picture = ROOT / "docs/column-row.png"
    columns.draw(tmp_path / "again.png", ranks=2)
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    assert picture.stat().st_size < 80_000
    with pytest.raises(ValueError, match=r"cannot draw 5 ranks: use 1 to 4"):
        columns.draw(tmp_path / "never.png", ranks=5)
