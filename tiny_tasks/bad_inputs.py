"""What dopd.py answers to bad input: the inputs of test_dopd.py, and some that take more than a flag.

    python tiny_tasks/bad_inputs.py                      # writes results/bad_inputs.md, half a minute
"""

import contextlib
import io
import math
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest                              # noqa: E402

import dopd                                # noqa: E402
import test_dopd as tests                  # noqa: E402


class Folders:
    """As pytest's factory of temporary folders."""

    def __init__(self, home: Path):
        self.home = home

    def mktemp(self, name: str) -> Path:
        (self.home / name).mkdir()
        return self.home / name


def answer(flags: str, patch: pytest.MonkeyPatch | None = None) -> str:
    """The exit code and the line that says why; with a patch, after a Ctrl-C at the third step."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = tests.go(flags) if patch is None else tests.go_until(3, flags, patch)
    said = [line.removeprefix("dopd.py: ") for line in (errors.getvalue() + out.getvalue()).splitlines()
            if line.startswith("dopd.py:") or "interrupted" in line or "damaged" in line]
    return f"{code} | {' '.join(said).replace(f'{Path.cwd()}/', '') or 'runs'}"


def with_more_than_flags():
    """(what is wrong, answer), one after the other in the folder of the tests."""
    os.environ["WORLD_SIZE"] = "3"
    yield "3 processes, `--batch_size 4 --rollouts 2`", answer(f"{tests.ONE} --out three")
    del os.environ["WORLD_SIZE"]

    answer(f"{tests.ONE} --steps 1 --out warm")              # so that what fails below is not the warm start
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, what in ((2_000, "the log"), (30_000, "the weights"), (80_000, "the optimizer's state")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        said = answer(f"{tests.ONE} --out full")
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        shutil.rmtree("full")
        yield f"a disk that is full on writing {what}", said

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dopd.DIVERGENCES, "reverse_kl", lambda student, source: student.sum(-1) * math.nan)
        yield "a loss that is no number", answer(f"{tests.ONE} --out nan")
    with pytest.MonkeyPatch.context() as patch:
        yield "Ctrl-C", answer(f"{tests.ONE} --out stopped", patch)

    tests.write_lines("empty_hint.jsonl", *[tests.GOOD | {"hint": ""}] * 4)
    yield "hints that are empty", answer(f"{tests.ONE} --data empty_hint.jsonl --steps 1 --out hintless")
    said = answer(f"{tests.ONE} --data good.jsonl --max_new_tokens 1 --steps 1 --out endless")
    truncated = tests.rows_of("endless")[-2]["truncated"]
    yield "completions that do not stop", f"{said}, and logs `truncated` {truncated:.2f}"
    for weights in Path("runs/warm_start").glob("student-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    yield "a damaged warm start", answer(f"{tests.ONE} --steps 1 --out again")


def main() -> None:
    lines, sys.argv = [], ["dopd.py"]      # which is what the message after a Ctrl-C names
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tests.datasets.config.HF_DATASETS_CACHE = home / "cache"
        dopd.draw_curves = lambda *args: None
        tests.shrink()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            models = tests.checkpoints._get_wrapped_function()(Folders(home))
            os.chdir(tests.shelf._get_wrapped_function()(models, Folders(home)))
        for flags, _ in tests.BAD:
            text, _ = tests.BAD_FILES.get(flags.split()[-1].removesuffix(".jsonl"), ("", ""))
            row = f" whose last row is `{text.splitlines()[-1][:70]}`" if text.strip() else ""
            lines.append([f"`{flags}`{row}", answer(flags)])
        lines += map(list, with_more_than_flags())
        os.chdir(ROOT)
    page = "".join(f"| {what} | {said} |\n" for what, said in lines).replace("long" * 80, "longlong...")
    dopd.write_text(ROOT / "tiny_tasks" / "results" / "bad_inputs.md", (
        f"`python tiny_tasks/bad_inputs.py`: {len(lines)} bad inputs, and what `dopd.py` answers. Most of them are tests too "
        f"(`test_bad_input` and its neighbours).\n\n| input | exit code | answer |\n|---|---|---|\n{page}"))


if __name__ == "__main__":
    main()
