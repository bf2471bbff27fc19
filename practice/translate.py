"""Says in a sentence what an error of Python or NumPy means here, or what waiting ranks mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from practice.part import Outcome

ARGUMENT = "an argument"
# (type, pattern of the message, what is said); \1 and so on are the pattern's groups.
SENTENCES = (
    ("ValueError", r"matmul: .*size (\d+) is different from (\d+)", r"The inner sizes of the product differ: \2 and \1."
     " If one is a weight, which is stored (in, out) here, a transpose is missing or too many."),
    ("ValueError", r"shapes (.*) and (.*) not aligned", r"The inner sizes of the product differ: \1 and \2."),
    ("ValueError", r"operands could not be broadcast together with shapes (.*)", r"The shapes \1 do not fit each other."),
    ("ValueError", r"could not broadcast input array from shape (.*) into shape (.*)",
     r"An array of shape \1 is put into a place of shape \2."),
    ("Changed", r"(.*)", r"\1, by another call or another object. Each needs memory of its own."),
    ("ValueError", r"need at least one array to (\w+)", r"\1 gets an empty list: where there is nothing to put together, make"
     " an array without entries, of the shape that is asked for."),
    ("ValueError", r"zero-size array to reduction operation (\w+)", r"This is the \1 of an array without entries, which has"
     " none. If there can be none here, give initial= or treat it apart."),
    ("ValueError", r"attempt to get (arg\w+) of an empty", r"This is the \1 of an array without entries. If there can be none"
     " here, treat it apart."),
    ("ValueError", r"^(max|min)\(\) (?:iterable argument is empty|arg is an empty)", r"This is the \1 of nothing. If there can"
     " be nothing here, treat it apart."),
    ("ValueError", r"^math domain error", "math.sqrt or math.log is asked of a number below 0, or math.log of 0."),
    ("OverflowError", r"math range error", "math.exp, pow or ** of numbers this large gives none that a float can hold: a"
     " softmax takes a row's maximum away first."),
    ("ValueError", r"cannot reshape array of size 0 into shape .*newaxis", "Of an array without entries reshape cannot"
     " find out what -1 stands for: name each size."),
    ("ValueError", r"truth value of an array with more than one", "An array is asked for one yes or no, as by if, and, or,"
     " not, min, max: np.where, &, |, ~ and np.minimum go entry by entry."),
    ("UFuncTypeError", r"Cannot cast ufunc '?(\w+)'? output from dtype\('(\w+)'\) to dtype\('(\w+)'\)",
     r"What is put in place is \2 and the array \3, which cannot hold it."),
    ("TypeError", r"^'NoneType' object", "Something here is None: a function without return, or a method that changes its"
     " object and returns nothing."),
    ("ValueError", r"read-only", f"This line changes {ARGUMENT} in place: make a new array instead."),
    ("ValueError", r"(rank 0 .*while.*|.*: rank 0 has .*)", r"The ranks do not agree: \1."),
    ("Altered", r"(.*)", r"\1."),
    ("PermissionError", r"(.*)", r"\1."),
    ("Refused", r"(.*)", r"\1."),
    ("Missing", r"(.*)", r"\1."),
    ("OSError", r"File too large", "It prints more than 4 MB."),
    ("MemoryError", r"", "It asks for more memory than this exercise may use."),
    ("SystemExit", r"", "It leaves the program (sys.exit, exit or quit) instead of returning."),
    ("RuntimeError", r"can't start new thread", "It starts more threads than this exercise has memory for."),
    ("RecursionError", r"", "It calls itself without end."),
    ("NameError", r"name '(.*)' is not defined", r"There is no \1 here: is it spelled as in the signature, or assigned later?"),
    ("UnboundLocalError", r"variable '(.*)'", r"\1 is used before it has a value on this way through the function."),
    ("ZeroDivisionError", r"", "It divides by 0."),
)  # fmt: skip


# (what, in which function of NumPy) -> what it is, where an answer has NaN or infinities.
FLOATS = {
    ("invalid value", "subtract"): "inf - inf",
    ("invalid value", "divide"): "0/0 or inf/inf",
    ("invalid value", "multiply"): "0 x inf",
    ("invalid value", "sqrt"): "the root of a negative number",
    ("invalid value", "log"): "the logarithm of a negative number",
    ("divide by zero", "divide"): "a division by 0",
    ("divide by zero", "log"): "the logarithm of 0",
}


def written(text: str, names: Sequence[str]) -> str:
    """Which of the arrays `names` a line writes to: what is assigned to or added to, out=, whose method is called; else the
    first that it names."""
    targets = re.findall(r"\bout\s*=\s*\(?(\w+)", text)
    targets += re.findall(r"^\(?(\w+)(?:\[.*\])?\s*(?:[-+*/@%&|^]|//|\*\*|<<|>>)?=(?!=)", text)
    targets += re.findall(r"\b(?:np\.(?:\w+\.at|copyto|fill_diagonal|put|place|putmask)|rng\.shuffle)\((\w+)", text)
    targets += re.findall(r"\b(\w+)\.(?:sort|fill|put|itemset|resize|partition|setflags)\(", text)
    return next((t for t in targets if t in names), names[0])


NAN = "NaN comes of inf - inf, 0 x inf or 0/0, or of reading what was never written."
INFINITE = (
    "An infinity comes of an exp of more than 709 (float32: 88), of a division by 0, of the logarithm of 0, or of a number"
    " beyond 65,504 in float16."
)
NAIVE = "This is the naive softmax, exp over its sum"


def broken(events: Sequence[dict[str, Any]], solution: str) -> list[str]:
    """Where numbers break, by what NumPy noted, in a line or two; [] where that tells nothing."""
    exp = next((e for e in events if (e["what"], e["in"]) == ("overflow", "exp")), None)
    ratio = next((e for e in events if (e["what"], e["in"]) == ("invalid value", "divide")), None)
    # Where something is subtracted already, it is not the largest.
    short = exp and " - " in exp["text"].partition("exp(")[2]
    if exp and ratio and not short:
        return [
            f"{NAIVE}: exp overflows in line {exp['line']}, {exp['text']}",
            f"inf/inf (or 0/0 where all are far below 0) in line {ratio['line']} is NaN. Subtract each row's maximum first.",
        ]
    if exp:
        far = "a softmax takes a row's maximum away first; log(1 + exp(x)) is logaddexp(0, x)"
        remedy = "what is subtracted there is not the largest, or what is not seen is not masked yet" if short else far
        return [f"exp overflows in line {exp['line']}, {exp['text']}: {remedy}."]
    lines = [f"{meant} in line {e['line']}, {e['text']}" for e in events if (meant := FLOATS.get((e["what"], e["in"])))]
    # A sigmoid or a softmax that is too small for a float is 0.
    if "logaddexp" in solution and any((e["what"], e["in"]) == ("divide by zero", "log") for e in events):
        lines.insert(1, "An exp far below 0 is 0, and so is a sigmoid: -log(sigmoid(m)) is logaddexp(0, -m) for every m.")
    return list(dict.fromkeys(lines))[:2]


def sentence(error: dict[str, Any]) -> list[str]:
    """One to three lines: where, what, and what it means."""
    kind, message = error["type"], error["message"]
    if error["after"] and kind in ("TypeError", "ValueError", "IndexError", "KeyError", "AttributeError", "UFuncTypeError"):
        if kind == "TypeError" and "positional argument" in message:
            return [f"{error['called']} is called as in the scaffold, but: {message}. Keep its arguments."]
        lacks = re.fullmatch(r"'([A-Z]\w*)' object has no attribute '(\w+)'", message)
        if lacks and lacks[1] != "NoneType":
            return [f"your {lacks[1]} has no {lacks[2]}: it must be named so."]
        return [f"After {error['called']} something is not as the task asks ({message})."]
    meant = next((re.search(p, message).expand(s) for k, p, s in SENTENCES if k == kind and re.search(p, message)), None)
    if kind in ("Missing", "Altered"):
        return [meant]
    function = "" if error["function"] == "module" else f"{error['function']}, "
    where = f"{function}line {error['line']}: {error['text']}" if error["line"] else error["called"]
    lines = [where] if where else []
    if error["shapes"]:
        lines.append(f"with {error['shapes']}")
    meant = meant or f"{kind}: {message}"
    lines.append(meant.replace(ARGUMENT, f"the argument {error['argument']}") if error.get("argument") else meant)
    return lines


def waits(by_rank: Sequence[Outcome]) -> list[str]:
    """What each rank waits in, and what that means."""
    lines, doing = [], []
    for rank, o in enumerate(by_rank):
        what, _, line = o.waits.partition("|")
        doing.append(what.split(" ")[0] if o.kind == "hang" else "")
        state = f"waits in {what}" + (f", line {line}" if line not in ("", "0") else "") if o.kind == "hang" else "has returned"
        lines.append(f"rank {rank} {state if o.kind in ('hang', 'ok') else 'has ended'}")
    lines.insert(0, "Nobody could go on:")
    absent = [str(r) for r, d in enumerate(doing) if not d]
    if turned := _turned([o.waits.partition("|")[0] for o in by_rank if o.kind == "hang"]):
        lines.append(turned)
    elif all(d == "send" for d in doing):
        lines += ["Every rank waits in a send, and a send waits for its receiver. (MPI forgives this for small messages;"
                  " practice doesn't.) Pair each send with a receive."]  # fmt: skip
    elif all(d == "recv" for d in doing):
        lines.append("Every rank waits to receive, and nobody sends.")
    elif absent and all(d not in ("send", "recv") for d in doing if d):
        lines.append(f"A collective is for all ranks: rank {', '.join(absent)} returned without calling it.")
    elif absent:
        lines.append(_deserted(by_rank, absent))
    else:
        lines.append("No rank's send meets another's receive.")
    return lines


def _deserted(by_rank: Sequence[Outcome], absent: Sequence[str]) -> str:
    """Who waits for a rank that has returned."""
    for rank, o in enumerate(by_rank):
        what = o.waits.partition("|")[0] if o.kind == "hang" else ""
        if (sender := re.search(r"recv from rank (\d+)", what)) and sender[1] in absent:
            return (
                f"Rank {rank} waits for a message of rank {sender[1]}, which has returned:"
                " each receive needs a send, even of nothing."
            )
        if (taker := re.search(r"to rank (\d+)", what)) and taker[1] in absent:
            return f"Rank {rank} has a message for rank {taker[1]}, which has returned: each send needs a receive."
    return f"Rank {', '.join(absent)} did not come to the other side of it."


def _turned(waits: Sequence[str]) -> str:
    """Where ranks send and receive in one call, but from the rank that they send to."""
    pairs = [re.search(r"send .* to rank (\d+) and recv from rank (\d+)", w) for w in waits]
    if len(pairs) < 3 or not all(pairs) or any(p[1] != p[2] for p in pairs):
        return ""
    return "Each rank receives from the rank that it sends to: on a ring, what goes to the one side comes from the other."
