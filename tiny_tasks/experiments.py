"""Runs experiments over several seeds; writes results/NAME.csv, and their tables between the marks NAME in README.md.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py main rules        # the names of EXPERIMENTS; two runs at a time, one thread each

A run is one seed of one experiment: its own warm start, then every recipe. It goes into runs/NAME-seedN. A finished
run is not repeated: delete its folder after changing the code. To add an experiment, add a line to EXPERIMENTS.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                           # before torch comes in
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import joblib  # noqa: E402
import pandas  # noqa: E402

import dopd  # noqa: E402
import recipes  # noqa: E402, F401

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["vanilla", "privileged_teacher", "privileged_student", "dopd", "dopd_ema", "dopd_frozen", "half",
           "dopd_half"]
EXPERIMENTS = {
    # name: flags of dopd.py, seeds
    "main": ({"task": "shortcut", "recipe": METHODS}, range(5)),
    "rules": ({"task": "rules", "recipe": METHODS}, range(5)),
}


def run(name: str, flags: dict, seed: int) -> None:
    """One run, unless it is there. What it prints goes into its log.txt."""
    folder = Path(ROOT, "runs", f"{name}-seed{seed}")
    if Path(folder, "job.json").exists():
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    shutil.rmtree(folder, ignore_errors=True)                           # an unfinished run begins anew
    folder.mkdir(parents=True)
    start = time.time()
    with open(folder / "log.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        dopd.run(dopd.Config(**flags, seed=seed, out=str(folder)))
    Path(folder, "job.json").write_text(json.dumps({"seconds": round(time.time() - start), "commit": commit}))


def collect(name: str, flags: dict, seeds) -> pandas.DataFrame:
    """One line per seed and policy: the final test, in full, with task, seconds and commit of its run."""
    lines = []
    for seed in seeds:
        folder = Path(ROOT, "runs", f"{name}-seed{seed}")
        log = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        job = {"task": flags["task"], **json.loads(Path(folder, "job.json").read_text())}
        lines += [{"policy": row["recipe"], "seed": seed, **row["test"], **job} for row in log if "test" in row]
    return pandas.DataFrame(lines)


def table(frame: pandas.DataFrame) -> str:
    """Mean ± standard deviation over the seeds, and exact match seed by seed, in Markdown."""
    grouped = frame.drop(columns=["seed", "task", "seconds", "commit"]).groupby("policy", sort=False)
    means, spreads = grouped.mean(), grouped.std()
    cells = means.map("{:.2f}".format) + " ± " + spreads.map("{:.2f}".format)
    each = grouped["exact match"].agg(lambda values: " ".join(map("{:.2f}".format, values)))
    cells.insert(1, "seed by seed", each)
    lines = [["policy", *cells], ["---"] * (1 + cells.shape[1])]
    lines += [[policy, *row] for policy, row in zip(cells.index, cells.values)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor() -> str:
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    return found[1] if found else platform.processor()


def insert(file: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- NAME --> and <!-- /NAME -->."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    file.write_text(marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", file.read_text()))


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in EXPERIMENTS]
    dopd.require(names and not unknown, f"{' '.join(unknown)}: name one or more of {', '.join(EXPERIMENTS)}")
    jobs = [joblib.delayed(run)(name, EXPERIMENTS[name][0], seed) for name in names for seed in EXPERIMENTS[name][1]]
    joblib.Parallel(n_jobs=2, backend="multiprocessing")(jobs)         # forked: they know the recipes of this process
    for name in names:
        frame = collect(name, *EXPERIMENTS[name])
        frame.round(4).to_csv(ROOT / f"tiny_tasks/results/{name}.csv", index=False)
        minutes = frame.groupby("seed").seconds.first().sum() / 60
        commits = ", ".join(frame.commit.unique())
        note = f"{frame.seed.nunique()} seeds; {minutes:.0f} minutes of one core, {processor()}, commit {commits}."
        insert(ROOT / "README.md", name, f"{table(frame)}\n\n*{note}*")
        print(f"{name}: {note}\n{table(frame)}")


if __name__ == "__main__":
    main(sys.argv[1:])
