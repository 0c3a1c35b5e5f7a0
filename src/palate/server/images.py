"""Pictures beside a prompt: read from a folder of one's own, made anew, and kept in the store under their content's hash.

Nothing is fetched from a URL. A picture is decoded and written again without its metadata, so what a browser gets was
written here; its name is the SHA-256 of those bytes, so there is no path that could lead elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from palate.errors import DataError
from palate.feedback.store import Store

LARGEST_FILE = 20_000_000  # bytes
LARGEST = 40_000_000  # pixels
LONGEST_SIDE = 2048  # pixels; larger pictures are made smaller
READS = ("PNG", "JPEG", "WEBP", "GIF")
HASH = re.compile(r"[0-9a-f]{64}")


def add_image(store: Store, path: str | Path, folder: str | Path) -> str:
    """Put a picture into the store.

    Args:
        path: of the picture, relative to ``folder`` and inside it.
    Returns:
        Its hash.
    Raises:
        DataError: it is outside the folder, missing, too large, or no picture.
    """
    content, kind = reencode(_inside(path, folder), str(path))
    name = hashlib.sha256(content).hexdigest()
    with store.write() as tx:
        tx.run("INSERT OR IGNORE INTO image VALUES (?, ?, ?)", name, kind, content)
    return name


def find_image(store: Store, name: str) -> tuple[bytes, str] | None:
    """(bytes, content type) of a picture by its hash."""
    if not HASH.fullmatch(name):
        return None
    with store.read() as tx:
        row = tx.one("SELECT content, type FROM image WHERE hash = ?", name)
    return None if row is None else (bytes(row[0]), row[1])


def reencode(raw: bytes, where: str = "picture") -> tuple[bytes, str]:
    """(bytes, content type) of the same picture as a new PNG, or as JPEG where it was one.

    Raises:
        DataError: too large, or no picture.
    """
    if len(raw) > LARGEST_FILE:
        raise DataError(f"{where}: {len(raw):,} bytes; at most {LARGEST_FILE:,}. Make the picture smaller.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(raw), formats=READS) as picture:
                if picture.width * picture.height > LARGEST:
                    raise DataError(f"{where}: {picture.width} x {picture.height} pixels; at most {LARGEST:,} in all.")
                photo = picture.format == "JPEG"
                made = picture.convert("RGB" if photo else "RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise DataError(f"{where}: is no picture ({', '.join(READS)}) that can be read: {error}.") from None
    made.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    clean = Image.frombytes(made.mode, made.size, made.tobytes())  # without metadata
    buffer = io.BytesIO()
    clean.save(buffer, "JPEG" if photo else "PNG", **({"quality": 90} if photo else {}))
    return buffer.getvalue(), "image/jpeg" if photo else "image/png"


def _inside(path: str | Path, folder: str | Path) -> bytes:
    root = Path(folder).resolve()
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", str(path)):
        raise DataError(f"{path}: pictures are read from files, not from URLs. Save it beside the records first.")
    found = (root / path).resolve()
    if not found.is_relative_to(root):
        raise DataError(f"{path}: is outside {root}. Name the folder that holds the pictures with --images.")
    if not found.is_file():
        raise DataError(f"{found}: no such picture.")
    if found.stat().st_size > LARGEST_FILE:
        raise DataError(f"{found}: {found.stat().st_size:,} bytes; at most {LARGEST_FILE:,}. Make the picture smaller.")
    return found.read_bytes()
