"""What the command line says of files."""

from pathlib import Path


def readable_size(path: Path) -> str:
    """Return the size of a file: `"12.3 kB"`, in units of 1000 bytes."""
    size = float(path.stat().st_size)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
