"""The faults, each with the command it befalls and the words that must be read then.

The words are regular expressions. In them {r} is the rank with the fault, {o} lists the others, {n} is the number of ranks.
`each`: the whole grid plants the fault on each rank in turn; otherwise on the last. `alike`: the fault takes the way of another
case, with another verb or in another command; the suite leaves it to the whole grid.
"""

from __future__ import annotations

from dataclasses import dataclass

NONZERO = "nonzero"
SITE = r"\w+(?:/\w+)+\.py:\d+"


@dataclass(frozen=True)
class Case:
    """`status`: of the launcher, or NONZERO. `says`: what standard error must have; `prints`: standard output."""

    name: str
    fault: str | None
    command: str
    says: tuple[str, ...] = ()
    status: int | str = NONZERO
    prints: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (2, 3, 4)
    each: bool = False
    more: tuple[str, ...] = ()
    open_mpi: bool = False
    alike: bool = False


# What is typed; {mesh} is a mesh of the ranks, {tmp} a folder of the run's own, with text.txt and damaged models in it.
COMMANDS = {
    "mlp": "launch.tp_mlp --tokens 5 --d-model 6 --d-ff 13 --timed 5,6,13 --data none",
    "attention": "launch.tp_attention --tokens 9 --d-model 16 --heads 4 --dtype float64",
    "train": "launch.train --layers 2 --d-model 16 --heads 4 --kv-heads 4 --d-ff 22 --sequence-length 24 --batch-tokens 144 "
    "--steps 6 --warmup 2 --sample 3 --text {tmp}/text.txt --output {tmp}/out --mesh {mesh}",
    "dp": "launch.dp_train --steps 3",
    "piped": "tests.cases.piped",
    "generate": "launch.generate --model tests/oracles/families/llama --tokens 1,2,3 --max-new-tokens 6",
}
HANG = ("--timeout", "2")
REPLICAS = ("--check-replicas", "1")
SPECULATE = ("--speculate", "ngram")


def odd(call: str, others: str) -> tuple[str, ...]:
    """The sentence of a mismatch, with the lines that call: of a pair, nobody knows which is wrong."""
    mine, theirs = f"rank {{r}} called {call}.* at {SITE} in .*", f"{{o}} called {others}.* at {SITE} in .*"
    return (f"CollectiveMismatch: on \\S+, ({mine}where {theirs}|{theirs}where {mine})",)


def apart(axis: str, what: str, step: int) -> tuple[str, ...]:
    """The sentence of a divergence. Of two replicas nobody knows who is right; and where sums over dp have brought it to both
    dp ranks of a mesh of 4, two differ from two."""
    alone = f"rank {{r}} of {axis}: ({what}) differs from {{o}}"
    pair = f"rank 1 of {axis}: ({what}) differs from rank 0|ranks 1 and 3: ({what}) differ from ranks 0 and 2"
    return (f"Diverged: ({alone}|{pair}) at step {step}",)


def failed(cause: str) -> tuple[str, ...]:
    """The first line of a death: its rank, and why."""
    return (rf"(?m)^\[{{r}}\] rank {{r}} of {{n}} failed: {cause}",)


MISMATCHES = [
    Case("another verb, forward", "at=all_reduce:1,kind=verb", "mlp", odd("broadcast", "all_reduce"), each=True, open_mpi=True),
    Case("another verb, decoding", "at=all_reduce:9,kind=verb", "generate", odd("broadcast", "all_reduce"), alike=True),
    Case("another verb in a gather", "at=all_gather:1,kind=verb", "mlp", odd("broadcast", "all_gather"), alike=True),
    Case("calls in another order", "at=tp.all_reduce:1,kind=order", "train", odd("", ""), each=True),
    Case("calls in another order, attention", "at=all_reduce:1,kind=order", "attention",
         (r"CollectiveMismatch: on tp, rank|rank {r} did not come \(waiting elsewhere\)", f"all_reduce .* at {SITE}"),
         more=HANG),
    Case("another shape, backward", "at=all_reduce:2,kind=shape", "mlp", odd(r"all_reduce \(6, 6\)", r"all_reduce \(5, 6\)"),
         each=True, open_mpi=True),
    Case("another shape in what is started", "at=start_all_reduce:2,kind=shape", "dp", odd("start_all_reduce", "start_all")),
    Case("another shape in a gather", "at=all_gather:1,kind=shape", "generate",
         (*failed("ValueError: rank {r} of tp: dim 0 of "), r"\[{r}\].*inference/sampling\.py", )),
    Case("another dtype of the same size", "at=all_reduce:1,kind=dtype", "mlp", odd(".* int32", ".* float32"), each=True,
         open_mpi=True),
    Case("another dtype of 8 bytes", "at=all_reduce:2,kind=dtype", "attention", odd(".* int64", ".* float64"),
         alike=True),
    Case("another dtype, ZeRO", "at=start_reduce_scatter:1,kind=dtype", "dp", odd(".* int32", ".* float32"), more=("--zero",)),
    Case("another reduction", "at=tp.all_reduce:3,kind=op", "train", odd(".* max", ".* sum"), each=True, open_mpi=True),
    Case("another reduction, attention", "at=all_reduce:2,kind=op", "attention", odd(".* max", ".* sum"),
         alike=True),
    Case("another root", "at=broadcast:1,kind=root", "generate", odd("broadcast .*root 1", "broadcast .*root 0"), each=True,
         more=SPECULATE),
    # Its tp partner waits; the rank that it meets on dp is at the sum of gradients.
    Case("another axis", "at=tp.all_reduce:2,kind=axis", "train",
         (rf"on dp, .*rank {{r}} called all_reduce \(72, 16\) .* at {SITE} in RowParallelLinear\.forward",), each=True,
         ranks=(4,)),
    Case("left out", "at=tp.all_reduce:2,kind=skip", "train", odd("", ""), each=True, open_mpi=True),
    Case("left out, a gather", "at=all_gather:1,kind=skip", "mlp", odd("all_gather", "all_gather"), alike=True),
    Case("the last one left out", "at=all_gather:6,kind=skip", "generate",
         ("rank {r} did not come", f"all_gather .* at {SITE}"), more=HANG),
    Case("made twice", "at=all_reduce:1,kind=double", "mlp", odd("all_reduce", "all_reduce"), each=True),
    Case("started twice", "at=start_all_reduce:1,kind=double", "dp", odd("start_all_reduce", ""), alike=True),
    Case("another order of a pipeline plan", None, "piped",
         (r"rank 1 of {n} failed at operation 1F0: \S+MessageMismatch: rank 0 of pp sent 0F1 .*, receive expected 0F0 ",), 1,
         more=("--fault", "swap:0", "--check-collectives", "on")),
]  # fmt: skip

DEATHS = [
    Case("an exception before a verb", "at=all_reduce:2,kind=raise", "mlp",
         (*failed(r"\S*Planted: planted"), r"\[{r}\].*layers/linear\.py"), 1, each=True, open_mpi=True),
    Case("an exception in a verb", "at=tp.all_reduce:5,kind=raise,when=in", "train", failed(r"\S*Planted"), 1),
    Case("an exception after a verb", "at=tp.all_reduce:5,kind=raise,when=after", "train", failed(r"\S*Planted"), 1,
         alike=True),
    Case("an exception while decoding", "at=all_gather:3,kind=raise", "generate", failed(r"\S*Planted"), 1, alike=True),
    Case("an exception with sums under way", "at=start_all_reduce:2,kind=raise,when=after", "dp", failed(r"\S*Planted"), 1),
    Case("an exception while saving", "at=all_reduce:3,kind=raise", "train", failed(r"\S*Planted"), 1,
         more=("--checkpoint", "{tmp}/kept", "--save-every", "1", "--zero")),
    Case("exit with a status", "at=all_reduce:2,kind=exit:3", "attention", failed("SystemExit: 3")),
    Case("exit without one", "at=all_reduce:2,kind=exit:0", "mlp", failed("SystemExit: 0")),
    Case("an exception in a thread", "at=all_reduce:2,kind=thread", "mlp", failed(r"\S*Planted: planted in a thread"), 1,
         open_mpi=True),
    Case("vanished with a status", "at=all_reduce:2,kind=osexit:5", "mlp", ("rank {r} of {n} has left by os._exit\\(5\\)",)),
    Case("vanished without one", "at=all_reduce:2,kind=osexit:0", "mlp", ("rank {r} of {n} has left by os._exit\\(0\\)",)),
    Case("killed before a verb", "at=all_reduce:2,kind=kill", "mlp",
         (f"rank {{r}} of {{n}} was killed by SIGKILL after all_reduce .* at {SITE}",), each=True, open_mpi=True),
    Case("killed in a verb", "at=tp.all_reduce:7,kind=kill,when=in", "train", ("rank {r} of {n} was killed by SIGKILL in ",)),
    Case("killed while decoding", "at=all_reduce:9,kind=kill,when=after", "generate",
         ("rank {r} of {n} was killed by SIGKILL",), alike=True),
    Case("a segmentation fault", "at=all_reduce:2,kind=segv", "mlp", ("rank {r} of {n} was killed by SIGSEGV",), open_mpi=True),
    Case("killed in a send of a pipeline plan", "at=start_send:2,kind=kill,when=in", "piped",
         (rf"rank {{r}} of {{n}} was killed by SIGKILL at operation {{r}}I1 in start_send of {{r}}I1 .* to \d .* at {SITE}",)),
    Case("a segmentation fault in a verb", "at=start_all_reduce:1,kind=segv,when=in", "dp",
         ("rank {r} of {n} was killed by SIGSEGV in start_all_reduce",), alike=True),
]  # fmt: skip

HANGS = [
    Case("stopped", "at=all_reduce:2,kind=stop", "mlp",
         (r"rank {r} did not come \(stopped \(SIGSTOP\)\)", f"all_reduce .* at {SITE}"), each=True, more=HANG, open_mpi=True),
    Case("stopped in a verb", "at=start_all_reduce:1,kind=stop,when=in", "dp",
         (r"rank {r} did not come \(stopped \(SIGSTOP\)\)", rf"(?m)^{{r}} +stopped .* start_all_reduce .* at {SITE}"),
         more=HANG),
    Case("an endless loop before a sum is started", "at=start_all_reduce:2,kind=spin", "dp",
         (r"rank {r} did not come \(computing\): .* in start_all_reduce", f"at {SITE}"), more=HANG),
    Case("an endless loop", "at=tp.all_reduce:6,kind=spin", "train", (r"rank {r} did not come \(computing\)", f"at {SITE}"),
         more=HANG, open_mpi=True, alike=True),
    Case("an endless sleep", "at=all_reduce:9,kind=sleep:1000", "generate", (r"rank {r} did not come \(asleep",), more=HANG),
    Case("an endless sleep after a verb", "at=all_reduce:1,kind=sleep:1000,when=after", "attention",
         (r"rank {r} did not come \(asleep",), more=HANG, alike=True),
    Case("stopped in a receive of a pipeline plan", "at=receive:2,kind=stop,when=in", "piped",
         (r"rank {r} did not come \(stopped \(SIGSTOP\) at operation {r}F1\): rank \d has waited .* in receive of {r}I1 ",
          r"(?m)^{r} +stopped .* operation {r}F1: receive of \dF1 .* from \d #1 on pp"), more=HANG),
    Case("sends of a pipeline that wait", None, "piped",
         (r"\(waiting elsewhere\): .* in send of 0F1 .* to 1 #1 ", "in send of 1B0 .* to 0 #0 "), ranks=(2,),
         more=("--fault", "sends:wait", "--entries", "100000", "--schedule", "1f1b")),
    Case("an early return", "at=all_reduce:2,kind=return", "mlp", (r"rank {r} did not come \(through with main\)",), more=HANG),
    Case("an early return while training", "at=tp.all_reduce:30,kind=return", "train",
         (r"rank {r} did not come \(through with main\)",), more=HANG, alike=True),
    Case("an early return while decoding", "at=all_gather:2,kind=return", "generate",
         (r"rank {r} did not come \(through with main\)",), more=HANG, alike=True),
]  # fmt: skip

NUMBERS = [
    Case("NaN in a forward sum", "at=tp.all_reduce:3,kind=nan", "train",
         (*failed(r"\S*NotFinite: rank \d of tp sends 1 NaN and 0 infinite of [\d,]+ numbers, the first at "),
          rf"in all_reduce .* at {SITE} \(forward\): \S.*(all_reduce|sum_rows)\("), 1, each=True, more=REPLICAS),
    Case("NaN in a sum that is started", "at=start_all_reduce:2,kind=nan", "dp",
         (*failed(r"\S*NotFinite: rank {r} of dp sends 1 NaN"), r"parallel/data\.py|training/trainer\.py"), 1, more=REPLICAS,
         alike=True),
    Case("NaN while decoding", "at=all_reduce:9,kind=nan", "generate", failed(r"\S*NotFinite: rank {r} of tp sends 1 NaN"), 1,
         more=REPLICAS, alike=True),
    Case("NaN, and the comparison alone", "at=all_reduce:2,kind=nan", "mlp", (), 1,
         prints=(r"(?m)^WRONG: dx\[0, 0\] on every rank: got nan, expected ", r"(?m)^NOT ALL AGREED: .*dx")),
    Case("a flipped bit, and the comparison alone", "at=all_reduce:1,kind=flip,when=before", "attention", (), 1,
         prints=(r"(?m)^WRONG: y\[0, 0\] on every rank: got ", r"(?m)^NOT ALL AGREED: .*y")),
    Case("a replica that has diverged over dp", "at=start_all_reduce:2,kind=flip", "dp",
         apart("dp", r"([mv] of )?(blocks\.\d\.)?\w+", 1), 1, more=REPLICAS),
    Case("a replica that has diverged over tp", "at=tp.all_reduce:2,kind=flip", "train",
         apart("tp", r"([mv] of )?(blocks\.\d\.)?\w+", 1), 1, more=REPLICAS, each=True, open_mpi=True),
    Case("another token on one rank", "at=all_gather:3,kind=nan,when=after", "generate",
         apart("tp", "the sequence of tokens", 3), 1, more=REPLICAS),
]  # fmt: skip

FILES = [
    Case("a full disk at a checkpoint", "at=tp.all_reduce:9,kind=disk:1000", "train",
         (r"(?m)^error: rank {r}, \S*kept/step-\d+/rank-\d+-of-\d+\.safetensors: OSError: .*File too large",), 2,
         more=("--checkpoint", "{tmp}/kept", "--save-every", "2"), each=True),
    Case("a damaged checkpoint", None, "train", (r"(?m)^error: .*damaged",), 2,
         more=("--checkpoint", "{tmp}/damaged", "--resume"), alike=True),
    Case("no model", None, "generate", (r"(?m)^error: --model: ",), 2, more=("--model", "{tmp}/none"), alike=True),
    Case("a model cut short", None, "generate", (r"(?m)^error: --model: ",), 2, more=("--model", "{tmp}/short"), alike=True),
    Case("a model without its configuration", None, "generate", (r"(?m)^error: --model: ",), 2, more=("--model", "{tmp}/bare"),
         alike=True),
    Case("a fault that is none", "at=all_reduce:1,kind=explode", "mlp",
         (r"(?m)^error: kind=explode in RANKWISE_FAULT is unknown",), 2),
]  # fmt: skip

# What must go on as if nothing were: no alarm, the right numbers.
HARMLESS = [
    Case("another order in memory", "at=all_reduce:2,kind=forder", "mlp", (), 0),
    Case("a slow rank below the limit", "at=all_reduce:2,kind=sleep:1", "mlp", (), 0, more=("--timeout", "10"), open_mpi=True),
    Case("a slow rank below the limit, training", "at=tp.all_reduce:5,kind=sleep:1,when=after", "train", (), 0,
         more=("--timeout", "30"), alike=True),
]  # fmt: skip

CASES = [*MISMATCHES, *DEATHS, *HANGS, *NUMBERS, *FILES, *HARMLESS]
