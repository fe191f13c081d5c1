"""Take the README's picture of the front page: `python book/screenshot.py`, once the book is built."""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pdf import FLAGS, chromium
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tomlib.errors import TomError
from tomlib.scenarios import root

SIZE = "1280,1500"


def front(notebook: Path) -> str:
    """A mark of what the front page shows: its prose and its outputs but pictures."""
    kept = [
        [cell["source"], [o.get("data", {}).get("text/plain") for o in cell.get("outputs", [])]]
        + [o.get("data", {}).get("text/html") for o in cell.get("outputs", [])]
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]
    ]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def main() -> None:
    """Open the built front page in Chromium and keep what its window shows."""
    page = root() / "_build" / "html" / "notebooks" / "index.html"
    target = root() / "book" / "_static" / "front.png"
    if not page.is_file():
        raise TomError(f"{page}: no such page; build the book first (make book)")
    with tempfile.TemporaryDirectory() as folder:
        flags = [f for f in FLAGS if not f.startswith(("--no-pdf", "--generate"))]
        shot = Path(folder) / "front.png"
        command = [chromium(), *flags, f"--user-data-dir={folder}/profile"]
        command += [f"--window-size={SIZE}", "--hide-scrollbars", f"--screenshot={shot}"]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True)
        if done.returncode or not shot.is_file():
            raise TomError(f"Chromium took no picture: {done.stderr[-400:]}")
        note = PngInfo()
        note.add_text("Shows", front(root() / "notebooks" / "index.ipynb"))
        Image.open(shot).save(target, optimize=True, pnginfo=note)
    print(target)


if __name__ == "__main__":
    try:
        main()
    except TomError as error:
        sys.exit(f"screenshot: {error}")
