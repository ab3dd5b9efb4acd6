"""The parts of a GGUF that llama-gguf-split divided: NAME-00001-of-00003.gguf and so on, side by side."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from export.checkpoints.gguf.contents import is_companion
from export.checkpoints.links import check_link, check_regular
from runtime.errors import UserError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"  # keys of a part's header


def parts(path: Path) -> list[Path]:
    """All parts of the GGUF that a file belongs to, by its name, the first one first; the file itself if it is whole.

    Raises `UserError` for a part that is missing, or is a link that leads out of the folder.
    """
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) < 2:
        return [path]
    result = []
    for number in range(1, int(named["count"]) + 1):
        part = path.with_name(f"{named['stem']}-{number:05}-of-{named['count']}.gguf")
        if not part.exists() and not part.is_symlink():
            raise UserError(
                f"{path} is part {int(named['number'])} of {int(named['count'])}, but {part.name} is not beside it; "
                "fetch all parts into one folder"
            )
        if part != path:
            check_regular(part)
            check_link(part, path.parent)
        result.append(part)
    if path not in result:
        raise UserError(f"{path} has a number beyond its {int(named['count'])} parts; fetch it again under its name")
    return result


def find(path: Path) -> list[Path]:
    """The parts of a GGUF that is given as a file, or as a folder that holds no other language model as GGUF."""
    if path.is_file():
        return parts(path)
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(path.glob("*.gguf")):
        named = PART.fullmatch(file.name)
        found.setdefault((named["stem"], named["count"]) if named else (file.name, ""), file)
    firsts = list(found.values())
    models = firsts if len(firsts) < 2 else [file for file in firsts if not is_companion(file)]
    if len(models) != 1:
        example = f", such as {(models or firsts)[0].name}" if firsts else ""
        raise UserError(
            f"{path} holds {len(firsts)} different .gguf files, expected one or the parts of one; "
            f"set frontend.checkpoint to the file{example}"
        )
    return parts(models[0])


def check_parts(files: Sequence[Path], headers: Sequence[Mapping[str, object]], tensors: Sequence[int]) -> None:
    """Check that the files are the parts that their headers say, in their order; `tensors` counts those of each file.

    Raises `UserError` naming the part that does not fit.
    """
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        said = header.get(COUNT, 0) or 1
        if said != len(files):
            raise UserError(
                f"{file} is one of {said} parts by its header and one of {len(files)} by its name, "
                "expected names such as NAME-00001-of-00003.gguf for 3 parts; "
                "rename them, or join them with llama-gguf-split --merge"
            )
        if len(files) > 1 and header.get(NUMBER) != number:
            raise UserError(
                f"{file} has {NUMBER}: {header.get(NUMBER)!r} in its header, expected {number}; fetch the parts again"
            )
    total = headers[0].get(TENSORS, sum(tensors))
    if len(files) > 1 and total != sum(tensors):
        raise UserError(
            f"{files[0]} and the parts beside it hold {sum(tensors)} tensors, expected {total} by its header; "
            "fetch the parts again"
        )
