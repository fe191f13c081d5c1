# A run as a graph of jobs, for Snakemake: weights, draws, adapters, chapters, book.
#
#   snakemake --config profile=quick                    this machine (make reproduce)
#   snakemake --config profile=quick n=200              with another value in the profile's place
#   snakemake --workflow-profile profiles/slurm --config profile=laptop shards=context
#
# `tomlib.reproduce.steps` says which jobs there are, which come before which, and gives each a mark:
# a digest of all that decides its result. A job is done again when its mark has changed and at no
# other time; files only order the jobs (`ancient`). Draws are kept in the run's ledger, so that a
# job that is done again asks for what is missing and no more.

import os
import shlex
import sys
from glob import glob

from tomlib.profiles import load_profile, new_run
from tomlib.reproduce import steps

given = {k: v for k, v in config.items() if k not in ("profile", "shards")}
run = new_run(load_profile(config.get("profile", "quick"), **given), replay=False)
graph = {step.name: step for step in steps(run, config.get("shards", "model"))}

FOLDER = os.path.relpath(run.folder)
PROFILE = shlex.quote(config.get("profile", "quick"))
CHANGES = " ".join(f"-p {k} {shlex.quote(str(v))}" for k, v in given.items() if k != "threads")
DO = f"{sys.executable} -m tomlib.cli reproduce --profile {PROFILE} {CHANGES}"


def made(name):
    """The file that says that a step is done."""
    kind, _, rest = name.partition("/")
    files = {"chapter": f"notebooks/{rest}.ipynb", "book": "book/index.html"}
    return f"{FOLDER}/{files.get(kind, 'done/' + name)}"


def after(kind):
    """What a step waits for."""
    return lambda w: ancient([made(s) for s in graph["/".join([kind, *w])].after])


def mark(kind):
    """What decides a step's result."""
    return lambda w: graph["/".join([kind, *w])].mark


rule book:
    input:
        [made(s) for s in graph["book"].after],
        glob("book/*.md"), "_toc.yml", "_config.yml",
    output: made("book")
    params: mark=graph["book"].mark
    shell: DO + " --only book"


rule chapter:
    input: after("chapter"), notebook="notebooks/{name}.ipynb"
    output: made("chapter/{name}")
    params: mark=mark("chapter")
    shell: DO + " --only chapter/{wildcards.name}"


rule adapter:
    input: after("adapter")
    output: touch(made("adapter/{arm}"))
    params: mark=mark("adapter")
    threads: run.profile.threads or os.cpu_count()
    shell: DO + " -p threads {threads} --only adapter/{wildcards.arm}"


rule draws:
    input: after("draws")
    output: touch(made("draws/{part}"))
    params: mark=mark("draws")
    threads: run.profile.threads or os.cpu_count()
    shell: DO + " -p threads {threads} --only draws/{wildcards.part}"


rule weights:
    output: touch(made("weights/{card}"))
    params: mark=mark("weights")
    threads: run.profile.threads or os.cpu_count()
    shell: DO + " --only weights/{wildcards.card}"
