"""Append-only record of draws and readouts (first version)."""

import fcntl, gzip, json, os
from contextlib import contextmanager
from pathlib import Path
import pandas as pd
from tomlib.answers import read
from tomlib.errors import TomError


class Ledger:
    def __init__(self, folder, readonly=()):
        self.folder, self.readonly = Path(folder), [Path(r) for r in readonly]

    def _lines(self, kind):
        seen = set()
        for base in (*self.readonly, self.folder):
            for path in sorted((base / kind).glob("*.jsonl*")):
                data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                for line in data.split(b"\n")[:-1]:
                    row = json.loads(line)
                    key = tuple(str(row.get(k)) for k in ("weights", "adapter", "prompt", "temperature", "top_p", "max_new_tokens", "index"))
                    if key not in seen:
                        seen.add(key)
                        yield row

    def draws(self, **equal):
        frame = pd.DataFrame(list(self._lines("draws")), columns=["model", "weights", "adapter", "split", "context", "game", "payoffs", "answer", "prompt", "temperature", "top_p", "max_new_tokens", "seed", "index", "text", "choice", "outcome", "new_tokens", "engine", "time"])
        frame["motivation"] = [read(t, a, "public_goods" if g == "public_goods" else "two_player").motivation for t, a, g in zip(frame["text"], frame["answer"], frame["game"])]
        return frame

    def readouts(self):
        return list(self._lines("readouts"))

    def append(self, kind, shard, rows):
        path = self.folder / kind / f"{shard}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as f:
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
            f.flush(); os.fsync(f.fileno())

    @contextmanager
    def lock(self, kind, shard):
        yield
