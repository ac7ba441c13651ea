"""Pictures that are listed and not there: the command's error shows the first ones, a file has all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISSING, UNKNOWN = "missing_pictures.txt", "unknown_pictures.txt"


@contextmanager
def listing_missing(folder: Path, prefix: str = "") -> Iterator[None]:
    """Where data are opened: on an error for pictures, write all of them into a file, a path a line, and let the error say where.

    Args:
        folder: made if need be; files of an earlier call are removed once data open.
        prefix: of the file's name, `missing_pictures.txt`, or `unknown_pictures.txt` for weights of pictures that there are not.
    """
    from wordsight.data.listed import MissingPicturesError
    from wordsight.data.weights import UnknownPicturesError

    try:
        yield
    except MissingPicturesError as error:
        raise MissingPicturesError(_listed(error, error.missing, folder / f"{prefix}{MISSING}"), error.missing) from error
    except UnknownPicturesError as error:
        raise UnknownPicturesError(_listed(error, error.unknown, folder / f"{prefix}{UNKNOWN}"), error.unknown) from error
    for name in (MISSING, UNKNOWN):
        (folder / f"{prefix}{name}").unlink(missing_ok=True)


def _listed(error: Exception, names: tuple[str, ...], path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8", errors="surrogateescape")
    return f"{error}\nAll {len(names):,} are listed in {path}"
