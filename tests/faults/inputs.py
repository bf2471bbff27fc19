"""What a user can give that cannot be used, by kinds, and what must be said of it: one line, before the work."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.manifest import MANIFEST, SEAL, sealed
from tests.faults.running import Seen, run
from tests.harness import ROOT
from tests.models.test_gguf import as_gguf

LLAMA = ROOT / "tests/oracles/families/llama"
GENERATE = "launch.generate --model {tmp}"
TOKENS = f"launch.score --model {LLAMA} --tokens-file {{tmp}}"
TRAIN = (
    "launch.train --layers 1 --d-model 16 --heads 4 --d-ff 22 --sequence-length 24 --batch-tokens 144 --warmup 1 --sample 0 "
    "--text README.md --output {tmp}/out --mesh dp=1,tp=2"
)
SERVE = f"launch.serve --model {LLAMA} --port 0"
MLP = "launch.tp_mlp --tokens 5 --d-model 6 --d-ff 13 --timed 5,6,13 --data none"
SENT = "tests.cases.sent --check-collectives on"
LISTED = "launch.practice list"


@dataclass(frozen=True)
class Input:
    """`typed`: a command, in which {tmp} is the folder of `prepared`. `before`, `after`: of the shell that runs it.
    `says`: what standard error must have, as a regular expression. `one`: the suite runs it too."""

    name: str
    typed: str
    says: str
    ranks: int = 2
    status: int = 2
    before: str = ""
    after: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    one: bool = False


def listed(n: int, says: str, status: int = 0) -> Input:
    """A workbook whose progress.json is the n-th of PROGRESS."""
    name = f"progress.json: `{PROGRESS[n][:60]}`"
    return Input(name, LISTED, says, ranks=0, status=status, environ={"RANKWISE_WORKBOOK": f"{{tmp}}/book{n}"})


PROGRESS = ("{", "[]", '{"version": 1, "log": [3]}', '{"version": 1, "log": [{"at": 5, "what": "open"}]}', '{"a":' * 10**5,
            '{"version": 99, "log": []}')  # fmt: skip
ASIDE = r"progress\.json could not be read \(.*\)\. It is kept as progress\.unreadable"
INPUTS = {
    "Hostile files and input": [
        Input("GGUF: tokens that are a number", f"{GENERATE}/tokens --prompt a", "tokens is 3, not a list of texts", one=True),
        Input("GGUF: a merge that makes no token", f"{GENERATE}/merges --prompt a", "merge 'ab c' makes no token"),
        Input("GGUF: a template that is no text", f"{GENERATE}/template --prompt a", "template is 3, not a text"),
        Input("JSON 100,000 deep", f"{GENERATE}/deep --tokens 1", "not JSON: it is nested too deeply"),
        Input("an empty .npy", f"{TOKENS}/empty.npy", "No data left in file: use an .npy file of integers"),
        Input("an .npy that claims 8 TiB", f"{TOKENS}/large.npy", r"large\.npy: .*: use an .npy file of integers"),
        Input("a prompt that is not UTF-8", f"{GENERATE}/whole --prompt", "text is not Unicode: character ",
              after='"$(printf "a\\377")"'),
        Input("a manifest that leads out", f"{TRAIN} --steps 4 --resume --checkpoint {{tmp}}/dots",
              "names '../../outside' for rank 0: the file should be .*, in its own folder"),
        Input("a checkpoint's file that is a link", f"{TRAIN} --steps 4 --resume --checkpoint {{tmp}}/link",
              "is a link, which leads out of the checkpoint: put the file itself there"),
        *(listed(n, ASIDE) for n in range(5)),
        listed(5, "was written by a newer rankwise", 2),
    ],
    "Standard output": [
        Input("closed", MLP, "standard output is closed, and the results would be lost", ranks=0, after=">&-"),
        Input("full", MLP, "standard output: No space left on device, and the results are lost", ranks=0, after=">/dev/full"),
        Input("full, practice", LISTED, "standard output: No space left on device", ranks=0, after=">/dev/full"),
    ],
    "Messages (`--check-collectives on`)": [
        Input("sent, and never received", f"{SENT} unreceived", "NeverReceived: on pp, 1 of 1 messages from rank 0 to rank 1",
              status=1, one=True),
        Input("changed while under way", f"{SENT} changed", r"BufferChanged: start_send .* \[1\] was 1.0, is 5.0", status=1),
        Input("a sum's, changed while under way", f"{SENT}", r"BufferChanged: start_all_reduce .*was 1.0, is 5.0", status=1,
              after='"changed sum"'),
    ],
    "The server, before it listens": [
        Input("a host for all, and no key", f"{SERVE} --host 0.0.0.0", "is open to others and there is no --api-key: give one"),
        Input("50 descriptors", SERVE, "may open too few files to take a connection: raise", before="ulimit -n 50"),
    ],
}  # fmt: skip


def prepared(tmp: Path) -> Path:
    """The folder with all that the commands read, but checkpoints."""
    # 17 tokens, as many as the model has.
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": [*"abcdefghijklmnop", "ab"], "merges": ["a b"], "token_type": [1] * 17}
    good = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    wrong = {"tokenizer.ggml.tokens": 3, "tokenizer.ggml.merges": ["a b", "ab c"], "tokenizer.chat_template": 3}
    tmp.mkdir(exist_ok=True)
    for name, changed in (("whole", {}), *((key.split(".")[-1].removeprefix("chat_"), {key: wrong[key]}) for key in wrong)):
        (tmp / name).mkdir()
        as_gguf(tmp / name, "llama", metadata=good | changed)
    shutil.copytree(LLAMA, tmp / "deep")
    (tmp / "deep" / "config.json").write_text('{"a":' * 10**5)
    (tmp / "empty.npy").touch()
    np.save(tmp / "large.npy", np.zeros(1))
    whole = (tmp / "large.npy").read_bytes()
    (tmp / "large.npy").write_bytes(whole.replace(b"(1,), }           ", f"({2**40},), }}".encode()))
    for n, text in enumerate(PROGRESS):
        (tmp / f"book{n}").mkdir()
        (tmp / f"book{n}" / "progress.json").write_text(text)
    return tmp


def checkpoints(tmp: Path) -> None:
    """Two that lead out of their folder, beside what `prepared` has made."""
    typed = TRAIN.format(tmp=tmp).split()
    done = run(2, ["-m", *typed, "--steps", "2", "--checkpoint", str(tmp / "dots"), "--save-every", "2"])
    assert done.status == 0, done
    shutil.copytree(tmp / "dots", tmp / "link")
    manifest = next((tmp / "dots").glob("step-*")) / MANIFEST
    body = manifest.read_bytes().rpartition(SEAL)[0] + b"}"
    text = json.dumps(json.loads(body)).replace("rank-0000-of-0002.safetensors", "../../outside")
    manifest.write_bytes(b"".join(sealed(json.loads(text))))
    file = next((tmp / "link").glob("step-*/rank-0000*"))
    file.rename(tmp / "outside")
    file.symlink_to(tmp / "outside")


def seen(case: Input, tmp: Path) -> Seen:
    """A real run of it."""
    typed = case.typed.format(tmp=tmp).split()
    environ = {name: value.format(tmp=tmp) for name, value in case.environ.items()}
    before = f"{case.before}; " if case.before else ""
    shell = lambda command: ["sh", "-c", f'{before}exec "$@" {case.after}', "sh", *command]  # noqa: E731
    return run(case.ranks, ["-m", *typed], within=shell, **environ)
