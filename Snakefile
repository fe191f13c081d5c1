# A run as a graph of jobs, for Snakemake: weights, draws, adapters, chapters, book.
#
#   snakemake --config profile=quick                    this machine (make reproduce)
#   snakemake --config profile=quick n=200              with another value in the profile's place
#   snakemake --workflow-profile profiles/slurm --config profile=laptop shards=context
#
# `tomlib.reproduce.steps` says which jobs there are, which come before which, and gives each a mark:
# a digest of all that decides its result. A finished job leaves an empty file that is named by its
# mark, so it is done again when its mark has changed and at no other time (a chapter also when its
# notebook has). Draws are kept in the run's ledger: what is done again asks only for what is missing.

import os
import shlex
import sys
from glob import glob

from tomlib.profiles import load_profile, new_run
from tomlib.reproduce import steps

given = {k: v for k, v in config.items() if k not in ("profile", "shards")}
run = new_run(load_profile(config.get("profile", "quick"), **given), replay=False)
graph = {step.name: step for step in steps(run, config.get("shards", "model"))}

DONE = os.path.relpath(run.folder / "done")
PROFILE = shlex.quote(config.get("profile", "quick"))
CHANGES = " ".join(f"-p {k} {shlex.quote(str(v))}" for k, v in given.items() if k != "threads")
DO = f"rm -f {shlex.quote(DONE)}/{{params.step}}.* && {shlex.quote(sys.executable)} -m tomlib.cli"
DO += f" reproduce --profile {PROFILE} {CHANGES}"
DO += " --only {params.step}"
MODEL_THREADS = run.profile.threads or os.cpu_count()


wildcard_constraints:
    mark="[0-9a-f]{16}",


def made(name):
    """The file that says that a step is done, as its mark wants it."""
    return f"{DONE}/{name}.{graph[name].mark}"


def after(kind):
    """What a step waits for; nothing where it is done."""

    def inputs(w):
        name = f"{kind}/{w.name}"
        return [] if os.path.exists(made(name)) else [made(s) for s in graph[name].after]

    return inputs


rule all:
    input: [made(name) for name in graph]


rule weights:
    output: touch(f"{DONE}/weights/{{name}}.{{mark}}")
    params: step="weights/{name}"
    threads: 1  # converting is one thread's work: two models are made ready side by side
    shell: DO


rule draws:
    input: after("draws")
    output: touch(f"{DONE}/draws/{{name}}.{{mark}}")
    params: step="draws/{name}"
    threads: MODEL_THREADS
    shell: DO + " -p threads {threads}"


rule adapter:
    input: after("adapter")
    output: touch(f"{DONE}/adapter/{{name}}.{{mark}}")
    params: step="adapter/{name}"
    threads: MODEL_THREADS
    shell: DO + " -p threads {threads}"


rule chapter:
    input: after("chapter"), "notebooks/{name}.ipynb"
    priority: -1  # one core each: side by side when the models are done, not before them
    output: touch(f"{DONE}/chapter/{{name}}.{{mark}}")
    params: step="chapter/{name}"
    shell: DO


rule book:
    input:
        [made(name) for name in graph["book"].after],
        glob("book/*.md"), "_toc.yml", "_config.yml",
    output: touch(made("book"))
    params: step="book"
    shell: DO
